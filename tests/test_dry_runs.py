"""What is written for a GPU, or for hours, runs on the CPU in small: it cannot rot until it meets one."""

import json
import os
import struct
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, run_script
from stored import cpu_has_eight_bits

sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

import pack
import turns

pytestmark = [pytest.mark.full, pytest.mark.slow]


def test_first(tmp_path):
    out = tmp_path / "first.jsonl"
    run_script("benchmarks/gpu/first.py", "--dry-run", "--out", str(out))
    header, *lines = map(json.loads, out.read_text().splitlines())
    assert header["versions"]["vllm"]
    assert not [line for line in lines if line.get("outcome") == "failed" or "error" in line]
    ended = [line for line in lines if "ended" in line]
    assert [line["ended"] for line in ended] == [0] * len(ended)
    num_loads = 3 + cpu_has_eight_bits()
    assert Counter(line["part"] for line in ended) == {"a": 3, "b": 2, "c": 3, "d": num_loads, "e": 1}
    passed = {line["test"].partition("[")[0] for line in lines if line.get("outcome") == "passed"}
    tests = {"served_as_replayed", "attention_of_kept_tokens", "running_requests_shrink", "eight_bits"}
    assert passed >= {f"test_{name}" for name in {*tests, "drafts_change_nothing", "graphs_change_nothing", "move"}}
    held = {(line["name"], line["context"], line["rows"]): line["held"] for line in lines if "held" in line}
    for (name, context, rows), size in held.items():
        assert name == "stock" or size < held["stock", context, rows]
    loads = [line for line in lines if "requests/s" in line]
    assert len(loads) == 2 * num_loads
    # The pool of long requests is full.
    running = {line["name"]: line["running"] for line in loads if line["input"] == 256}
    assert running["stock"] < running["cake"]
    assert {line["policy"] for line in lines if "costs" in line} == {"cake", "layer-defensivekv"}


def test_turns(chatty_model, tmp_path, monkeypatch, capsys):
    """Two sessions, of which the pool holds one, over the tests' tier; a second run starts no server."""
    out = tmp_path / "turns.json"
    command = ["benchmarks/turns.py", chatty_model, "--dtype", "float32", "--tier", "tests", "--out", str(out)]
    command += ["--sessions", "2", "--turns", "6", "--tokens", "500", "--pool", "600", "--pause", "0"]
    command += ["--output-len", "8", "--budgets", "0.2", "--tiers", "with"]
    printed = run_script(*command)
    assert printed.count("vllm serve") == 2
    record = json.loads(out.read_text())
    assert record["results"]["settings"]["tier"] == "tests"
    table = record["results"]["figures"]
    assert table.keys() == {"stock, tier", "echo 0.2, tier"}
    settings, *lines = map(json.loads, out.with_suffix(".jsonl").read_text().splitlines())
    assert settings == record["results"]["settings"]
    for line, of in zip(lines, table.values(), strict=True):
        assert len(line["turns"]) == of["turns"] == 2 * 6
        assert all(turn["first"] > 0 and turn["text"] for turn in line["turns"])
        assert sum(count for _, count in of["right"].values()) == 2 * 3
        assert of["below"] > 0
        assert of["cached"]["late"] > of["cached"]["early"]
    assert table["stock, tier"]["evicted"] == 0 < table["echo 0.2, tier"]["evicted"]
    # The script sets it for its servers: it is as before when the test ends.
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(sys, "argv", command)
    turns.main()
    again = capsys.readouterr().out
    assert "vllm serve" not in again
    monkeypatch.setattr(sys, "argv", ["benchmarks/turns.py", "--show", str(out)])
    turns.main()
    shown = capsys.readouterr().out
    assert "echo 0.2, tier" in shown
    assert again.endswith(shown)
    assert printed.endswith(shown)


def test_the_longest_step_of_a_batch_that_evicts_while_it_decodes(chatty_model, tmp_path):
    out = tmp_path / "latency.json"
    command = ["benchmarks/latency.py", chatty_model, "--dtype", "float32", "--decoding", "4", "--budget", "64"]
    printed = run_script(*command, "--repeats", "1", "--out", str(out))
    results = json.loads(out.read_text())["results"]
    assert results.keys() == {"all in one step", "one in a step"}
    for runs in results.values():
        assert runs.keys() == {"stock", "snapkv", "rkv", "echo"}
        assert {len(steps) for (steps,) in runs.values()} == {128}
    assert printed.count("| echo |") == 2


def entry(kind: int, capability: int, code: bytes) -> bytes:
    """Of a fatbin: PTX or machine code for one GPU."""
    return struct.pack("<HHIQ12xI32x", kind, 0x101, 64, len(code), capability) + code


def library(fatbins: list[list[bytes]]) -> bytes:
    """An ELF file with nothing but fatbins, symbols for debuggers and the names of its sections."""
    code = b"".join(struct.pack("<IHHQ", pack.FATBIN, 1, 16, len(b"".join(of))) + b"".join(of) for of in fatbins)
    symbols, names = b"symbols!", b"\0.nv_fatbin\0.symtab\0.shstrtab\0"
    start = 64 + len(code)
    sections = [(0, 0, 0, 0, 0, 0), (1, 1, 2, 0, 64, len(code)), (12, 2, 0, 0, start, len(symbols))]
    sections.append((20, 3, 0, 0, start + len(symbols), len(names)))
    headers = start + len(symbols) + len(names)
    head = bytearray(64)
    head[:4] = b"\x7fELF"
    struct.pack_into("<Q", head, 0x28, headers)
    struct.pack_into("<HH", head, 0x3C, len(sections), 3)
    table = b"".join(struct.pack("<IIQQQQ24x", *of) for of in sections)
    return bytes(head) + code + symbols + names + table


def save_wheel(folder: Path, name: str, files: dict[str, bytes], requires: list[str]) -> None:
    """A distribution of version 1.0."""
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {line}\n" for line in requires)
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{name}-1.0.dist-info/METADATA": metadata.encode(), f"{name}-1.0.dist-info/WHEEL": wheel.encode()}
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, data in files.items():
            archive.writestr(file, data)
        archive.writestr(f"{name}-1.0.dist-info/RECORD", "")


def test_packed_and_unpacked(tmp_path, monkeypatch):
    """A distribution and what it requires, over parts that come one at a time."""
    codes = [(2, 90, b"own code"), (2, 80, b"that of another."), (1, 80, b"PTX code"), (1, 100, b"for more")]
    own, other, ptx, newer = (entry(*of) for of in codes)
    wheels, parts, site = (tmp_path / name for name in ("wheels", "parts", "site"))
    wheels.mkdir()
    code = {"zz_engine/kernels.so": library([[other, own, ptx], [other, ptx, newer], [newer, other]])}
    # Too random to become smaller than a part.
    code |= {"zz_engine/__init__.py": b"import zz_needed", "zz_engine/noise": os.urandom(5000)}
    save_wheel(wheels, "zz_engine", code, ["zz-needed>=1", "zz-there", "numpy<1", "zz-extra; extra == 'more'"])
    save_wheel(wheels, "zz_needed", {"zz_needed.py": b"VALUE = 7"}, ["torch>=1"])
    present = tmp_path / "present.txt"
    present.write_text("zz_there==3\nnumpy==2.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    command = ["benchmarks/gpu/pack.py", str(parts), "--carry", "zz-engine", "--present", str(present)]
    printed = run_script(*command, "--wheels", str(wheels), "--python", "3.11", "--megabytes", "0.004")
    assert "2 wheels" in printed
    first, second = sorted(parts.iterdir())
    assert all(part.stat().st_size <= 4000 for part in (first, second))

    plugin = tmp_path / "plugin"
    plugin.mkdir()
    (plugin / "setup.py").write_text("from setuptools import setup; setup(name='zz-plugin', packages=[])")
    unpacking = ["benchmarks/gpu/unpack.py", str(parts), "--to", str(site), "--plugin", str(plugin)]
    unpacking += ["--imports", "zz_engine"]
    second = second.rename(tmp_path / second.name)
    assert "yet to come: 2 of 2" in run_script(*unpacking)
    assert not site.exists()
    first.unlink()
    second.rename(parts / second.name)
    printed = run_script(*unpacking)
    assert "zz-there: zz_engine wants it, not there" in printed
    assert "numpy<1: zz_engine wants it, there is" in printed
    assert "zz-extra" not in printed
    assert "import zz_engine:" in printed
    assert (site / "zz_engine" / "noise").read_bytes() == code["zz_engine/noise"]
    got = (site / "zz_engine" / "kernels.so").read_bytes()
    assert len(got) == len(code["zz_engine/kernels.so"])
    assert [got.count(code) for *_, code in codes] == [1, 0, 1, 1]
    assert b"symbols!" not in got
    # Where nothing fits something stays, so that the fatbin is one.
    magic = struct.pack("<I", pack.FATBIN)
    places = [place for place in range(0, len(got) - 16, 8) if got[place : place + 4] == magic]
    assert [struct.unpack_from("<Q", got, place + 8)[0] for place in places] == [len(own), len(ptx), len(newer)]
    with pytest.raises(AssertionError, match="do not import: zz_missing"):
        run_script(*unpacking, "zz_missing")
