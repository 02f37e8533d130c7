"""Packaging of pc_triton. `kernels/` at the top level is imported as `pc_triton.kernels`."""

import re
from pathlib import Path

from setuptools import setup

TRAIN = ["tokenizers>=0.20", "safetensors>=0.4", "tqdm>=4.60", "matplotlib>=3.7"]
INTEGRATIONS = ["transformers>=5", "accelerate>=1.1", "lightning>=2.4"]
STREAM = ["datasets>=4"]
GPU = ["triton>=3.6; platform_system == 'Linux'"]
DOCS = ["sphinx>=8.1,<10", "myst-nb>=1.3", "furo>=2025.7"]
TEST = ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3", "hypothesis>=6", "tensorboard>=2.20"]
NOTEBOOKS = ["nbclient>=0.11", "nbformat>=5.10", "ipykernel>=6.29"]  # runs those of docs/notebooks

INIT = Path("pc_triton/__init__.py").read_text(encoding="utf-8")  # read: importing it would need torch
VERSION = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[0]

setup(
    name="pc_triton",
    version=VERSION,
    description="Predictive coding beyond Gaussian distributions: PyTorch layers on fused Triton kernels",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    project_urls={"Paper": "https://arxiv.org/abs/2211.03481"},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in (10, 11, 12, 13)),  # those that were tested
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=["pc_triton", "pc_triton.kernels"],
    package_dir={"pc_triton.kernels": "kernels"},
    package_data={"pc_triton": ["py.typed", "tuned.json"]},
    install_requires=["torch>=2.6", "numpy>=1.26"],
    extras_require={
        "train": TRAIN,
        "stream": STREAM,
        "gpu": GPU,
        "docs": DOCS,
        "integrations": INTEGRATIONS,  # of docs/examples
        "pcx": ["scikit-learn>=1.4", "pcx==0.6.3"],  # the rivals of bench/digits.py need different versions of JAX
        "fabricpc": ["scikit-learn>=1.4", "fabricpc==0.6.0"],
        "dev": [
            *(*TRAIN, *STREAM, *GPU, *INTEGRATIONS, *NOTEBOOKS, *TEST),
            *("scikit-learn>=1.4", "setuptools>=68", "wheel", "ruff>=0.9", "mypy>=1.13"),
        ],
    },
    entry_points={"console_scripts": ["pc-triton = pc_triton.cli:main"]},
)
