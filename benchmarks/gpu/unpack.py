"""Unpacks what ``pack.py`` made, and says what is missing. Needs nothing but Python.

Parts may come in several transfers: with the last one everything is unpacked. Then every requirement of what was
unpacked is compared with what is there, and the modules that an engine is made of are imported.

    python benchmarks/gpu/unpack.py parts --to site
"""

import argparse
import importlib.metadata
import io
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
#: What an engine on a GPU is made of, the compiled libraries first.
MODULES = [
    *("torch", "vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa3_C", "vllm.entrypoints.llm"),
    *("vllm.v1.engine.core", "vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu.model_runner"),
    *("vllm.v1.worker.gpu_model_runner", "vllm.v1.attention.backends.flash_attn"),
    *("vllm.v1.attention.backends.triton_attn", "vllm.v1.attention.backends.flashinfer", "flashinfer"),
    *("vllm.v1.spec_decode.ngram_proposer", "vllm.v1.spec_decode.eagle", "cake_vllm.integration.connector"),
]
#: Nothing is missing without it.
OPTIONAL = {"flashinfer", "vllm.v1.attention.backends.flashinfer"}


def gather(parts: Path, kept: Path) -> list[Path] | None:
    """Puts parts with those that came before; all of them in their order, or ``None`` if one has yet to come."""
    kept.mkdir(parents=True, exist_ok=True)
    for file in parts.glob("*.part"):
        shutil.copy(file, kept)
    found = {int(file.name.partition("-")[0]): file for file in kept.glob("*.part")}
    total = int(next(iter(found.values())).stem.rpartition("-")[2]) if found else 1
    missing = [number for number in range(1, total + 1) if number not in found]
    if missing:
        print(f"parts that have yet to come: {', '.join(map(str, missing))} of {total}")
        return None
    return [found[number] for number in range(1, total + 1)]


def unpack(parts: list[Path], target: Path) -> None:
    """Files to ``target``."""
    whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    with lzma.open(whole) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
        tar.extractall(target, filter="data")


def unmet(target: Path) -> Iterator[str]:
    """A line for each requirement of what lies in ``target`` that is absent or has another version."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        from pip._vendor.packaging.requirements import Requirement

    for owner in importlib.metadata.distributions(path=[str(target)]):
        for line in owner.requires or []:
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            wanted = f"{requirement.name}{requirement.specifier}: {owner.name} wants it,"
            try:
                version = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                yield f"{wanted} not there"
            else:
                if not requirement.specifier.contains(version, prereleases=True):
                    yield f"{wanted} there is {version}"


def importing(modules: list[str]) -> list[str]:
    """Imports modules one after the other, says how it went, and returns which failed."""
    failed = []
    for name in modules:
        start = time.monotonic()
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"import {name}: {type(error).__name__}: {error}", flush=True)
            failed += [] if name in OPTIONAL else [name]
        else:
            print(f"import {name}: {time.monotonic() - start:.1f} s", flush=True)
    return failed


def main() -> None:
    """Unpacks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", type=Path, help="folder with what has come")
    parser.add_argument("--to", type=Path, required=True, help="folder for Python's path")
    parser.add_argument("--plugin", type=Path, default=ROOT, help="the plugin's checkout (default: this one)")
    parser.add_argument("--imports", nargs="+", default=MODULES, help="modules that are tried")
    args = parser.parse_args()
    start, target = time.monotonic(), args.to.absolute()
    parts = gather(args.parts, target.with_name(target.name + "-parts"))
    if parts is None:
        return
    unpack(parts, target)
    print(f"{sum(part.stat().st_size for part in parts) / 1e6:.1f} MB unpacked in {time.monotonic() - start:.1f} s")
    plugin = args.plugin.absolute()
    # Its entry point, by which vLLM finds it.
    subprocess.run([sys.executable, "setup.py", "--quiet", "egg_info"], cwd=plugin, check=True)
    path = os.pathsep.join(map(str, (plugin, target)))
    importlib.invalidate_caches()
    sys.path[:0] = [str(plugin), str(target)]
    for line in sorted({*unmet(target)}):
        print(line)
    failed = importing(args.imports)
    print(f"export PYTHONPATH={path}    # {time.monotonic() - start:.0f} s in all")
    if failed:
        raise SystemExit(f"do not import: {', '.join(failed)}")


if __name__ == "__main__":
    main()
