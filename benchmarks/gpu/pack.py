"""Packs stock vLLM for a machine with a GPU and no network, to which only files of a limited size can be carried.

Takes vLLM's wheel for CUDA and those of its requirements that the other machine lacks. Of compiled libraries the code
for other GPUs and the symbols for debuggers are overwritten with zeros, which compress to nothing; what other models
and other GPUs need stays behind. torch is not carried: the libraries that are left ask for its stable interface, and
run on the torch that is there if it is not much older than the one that vLLM names.

    python benchmarks/gpu/pack.py parts --present present.txt

``present.txt``: what ``pip list --format freeze`` prints on the other machine. There ``unpack.py``, which needs nothing
but Python, takes the parts and says what is missing.
"""

import argparse
import email
import fnmatch
import io
import lzma
import platform
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

#: What vLLM requires and imports for other models, data, GPUs or front ends only.
LEFT_OUT = {
    *("torch", "torchaudio", "torchcodec", "torchvision", "triton", "pynvvideocodec"),
    *("flashinfer-python", "tilelang", "quack-kernels", "tokenspeed-mla", "humming-kernels"),
    *("nvidia-cudnn-frontend", "nvidia-cutlass-dsl", "nvtx", "fastsafetensors", "instanttensor"),
    *("opentelemetry-sdk", "opentelemetry-api", "opentelemetry-exporter-otlp"),
    *("opentelemetry-semantic-conventions-ai", "anthropic", "mcp", "model-hosting-container-standards", "fastapi-cli"),
}
#: Files of vLLM's wheel for other models or GPUs, and FlashAttention 2, which Hopper does not take.
UNUSED = (
    *("vllm/vllm-rs", "vllm/_flash*", "vllm/_deepselect*", "vllm/_qutlass*", "vllm/_moe_C*"),
    *("vllm/third_party/deep_gemm/*", "vllm/third_party/fmha_sm100/*", "vllm/vllm_flash_attn/_vllm_fa2_C*"),
)
#: A dictionary that holds several of the alike kernels of a library.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 2, "dict_size": 2**27}]
#: Of the fatbin format: a header with the size of what follows, and entries of code for one GPU or, as PTX, newer ones.
FATBIN, PTX, ELF = 0xBA55ED50, 1, 2


def carried(
    names: list[str], present: set[str], python: str, folder: Path, processor: str = platform.machine()
) -> list[Path]:
    """Wheels of requirements and, in turn, of theirs, downloaded to ``folder``.

    Args:
        names: requirements, as pip takes them.
        present: names of distributions that the other machine has.
        python: its version there.
        folder: where wheels are kept, also from one call to the next.
        processor: what the other machine's is called.
    """
    platforms = [f"manylinux_2_{minor}_{processor}" for minor in range(39, 4, -1)]
    target = ["--no-deps", "--only-binary=:all:", "--python-version", python, "--implementation", "cp"]
    for name in (*platforms, f"manylinux2014_{processor}", "any"):
        target += ["--platform", name]
    seen, waiting, wheels = present | LEFT_OUT, [Requirement(name) for name in names], []
    # What is asked for by name is carried.
    seen -= {canonicalize_name(requirement.name) for requirement in waiting}
    while waiting:
        requirement = waiting.pop(0)
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            command = [sys.executable, "-m", "pip", "download", "--quiet", *target, "--find-links", folder]
            subprocess.run([*command, "--dest", fresh, f"{requirement.name}{requirement.specifier}"], check=True)
            (wheel,) = Path(fresh).iterdir()
            wheels.append(Path(shutil.move(wheel, folder / wheel.name)))
        waiting += needed(wheels[-1], python, requirement.extras)
    return wheels


def needed(wheel: Path, python: str, extras: set[str]) -> Iterator[Requirement]:
    """What a wheel requires with some of its extras."""
    version = {"python_version": python, "python_full_version": f"{python}.0"}
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = fnmatch.filter(archive.namelist(), "*.dist-info/METADATA")
        for line in email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", []):
            requirement = Requirement(line)
            if not requirement.marker or any(
                requirement.marker.evaluate({**version, "extra": e}) for e in {"", *extras}
            ):
                yield requirement


def reduce(library: bytearray, capability: int) -> None:
    """Overwrites what a library in the ELF format has for debuggers and for other GPUs; nothing moves.

    Args:
        library: its bytes, changed in place.
        capability: of the GPU, 90 for 9.0.
    """
    (headers,) = struct.unpack_from("<Q", library, 0x28)
    count, names = struct.unpack_from("<HH", library, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", library, headers + 64 * index) for index in range(count)]
    for index, (name, kind, flags, _, start, size) in enumerate(sections):
        begin = sections[names][4] + name
        # Not loaded, and bits, symbols or strings.
        if index != names and kind in (1, 2, 3) and not flags & 2:
            library[start : start + size] = bytes(size)
        elif library[begin : library.index(0, begin)] == b".nv_fatbin":
            _reduce_fatbins(library, start, start + size, capability)


def _reduce_fatbins(library: bytearray, place: int, end: int, capability: int) -> None:
    while place < end:
        magic, _, length, size = struct.unpack_from("<IHHQ", library, place)
        if magic != FATBIN:
            # They are aligned to 8 bytes.
            place += 8
            continue
        place += length
        data = b"".join(_entries(bytes(library[place : place + size]), capability))
        struct.pack_into("<Q", library, place - 8, len(data))
        library[place : place + size] = data.ljust(size, b"\0")
        place += size


def _entries(fatbin: bytes, capability: int) -> list[bytes]:
    """Code for a GPU, else what its driver can compile for it, else whatever is smallest."""
    found, place = [], 0
    while place < len(fatbin):
        kind, _, length, size = struct.unpack_from("<HHIQ", fatbin, place)
        (made_for,) = struct.unpack_from("<I", fatbin, place + 28)
        found.append((kind, made_for, fatbin[place : place + length + size]))
        place += length + size
    own = [data for kind, made_for, data in found if (kind, made_for) == (ELF, capability)]
    older = sorted((made_for, data) for kind, made_for, data in found if kind == PTX and made_for <= capability)
    return own or [data for _, data in older[-1:]] or [min((data for *_, data in found), key=len)]


def archive(wheels: list[Path], capability: int) -> bytes:
    """All files of the wheels as an xz of a tar; what is installed outside of Python's path is left out."""
    packed = io.BytesIO()
    with (
        lzma.open(packed, "w", format=lzma.FORMAT_XZ, filters=FILTERS) as stream,
        tarfile.open(fileobj=stream, mode="w|") as tar,
    ):
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as source:
                for name in sorted(source.namelist()):
                    if name.endswith("/") or ".data/" in name or any(fnmatch.fnmatch(name, of) for of in UNUSED):
                        continue
                    data = bytearray(source.read(name))
                    if data.startswith(b"\x7fELF"):
                        reduce(data, capability)
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def main() -> None:
    """Packs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the parts")
    parser.add_argument(
        "--carry", nargs="+", default=["vllm==0.32.0"], help="requirements that are carried in any case"
    )
    parser.add_argument("--present", type=Path, help="what is there: a line each, NAME or NAME==VERSION")
    parser.add_argument("--python", default="3.12", help="its version there")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU there: 90 for 9.0")
    parser.add_argument("--megabytes", type=float, default=60, help="of a part, at most")
    parser.add_argument("--wheels", type=Path, help="folder where downloaded wheels stay (default: none)")
    args = parser.parse_args()
    lines = args.present.read_text().split() if args.present else []
    present = {str(canonicalize_name(line.partition("==")[0])) for line in lines}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as nowhere:
        folder = (args.wheels or Path(nowhere)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        wheels = carried(args.carry, present, args.python, folder)
        for wheel in wheels:
            print(f"{wheel.stat().st_size / 1e6:8.1f} MB  {wheel.name}")
        print(f"{len(wheels)} wheels in {time.monotonic() - start:.0f} s", flush=True)
        data = archive(wheels, args.capability)
    size = int(args.megabytes * 1e6)
    pieces = [data[place : place + size] for place in range(0, len(data), size)]
    args.out.mkdir(parents=True, exist_ok=True)
    for number, piece in enumerate(pieces, 1):
        file = args.out / f"{number}-of-{len(pieces)}.part"
        file.write_bytes(piece)
        print(f"{len(piece) / 1e6:8.1f} MB  {file}")
    print(f"packed in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
