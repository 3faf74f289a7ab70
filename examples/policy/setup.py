"""A distribution whose entry point makes a method of its class."""

from setuptools import setup

setup(
    name="my-policies",
    version="0.1",
    py_modules=["my_policies"],
    entry_points={"cake_vllm.policies": ["value-norm = my_policies:ValueNorm"]},
)
