"""Packaging: this folder is imported as crossover, its folders as crossover.kernels, .archs, .train and .benchmarks.

An install adds one name to site-packages, `crossover`, and nothing under a generic name. `kernels/` has no __init__.py
on purpose: with the repository root on sys.path, a regular package of that name would hide Hugging Face's `kernels`
and break `import transformers`; a folder without __init__.py never does (PEP 420). Exact versions: constraints.txt.
"""

import re

from setuptools import find_namespace_packages, setup

NAME = "crossover"
FOLDERS = ("kernels", "archs", "train", "benchmarks")
HF = ["transformers>=5.0"]

setup(
    name=NAME,
    version=re.search(r'__version__ = "(.+)"', open("__init__.py", encoding="utf-8").read())[1],
    description="Transformer, S4, Mamba, Jamba and LSTM language models as one experiment: equal budgets, one report.",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "numba>=0.60",
        "einops>=0.8",
        "datasets>=4.0",
        "tokenizers>=0.20",
        "safetensors>=0.4",
        "tensorboard>=2.15",
        "matplotlib>=3.8",
        "tyro>=1.0",
        "rich>=13.0",
        "filelock>=3.12",
        "jinja2>=3.1",
    ],
    extras_require={
        "dev": [
            "pytest>=9.0",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.8",
            "basedpyright>=1.20",
            "setuptools>=77",
            "pip>=23.0",
            "triton>=3.6; sys_platform == 'linux'",  # PyTorch for CUDA brings it along
            *HF,
        ],
        "hf": HF,
        "eval": ["lm-eval>=0.4.13"],
        "slurm": ["submitit>=1.5"],
    },
    package_dir={NAME: "."},
    script_name="setup.py",  # which is no module of the package; pip calls it by another name
    packages=[NAME]
    + [
        f"{NAME}.{package}"
        for folder in FOLDERS
        for package in (
            folder,
            *(f"{folder}.{sub}" for sub in find_namespace_packages(folder, exclude=("*.templates",))),
        )
    ],
    package_data={
        NAME: ["py.typed"],
        f"{NAME}.archs": ["*.bib"],
        f"{NAME}.benchmarks.report": ["templates/*", "*.bib"],
    },
    entry_points={"console_scripts": ["crossover = crossover.benchmarks.cli:main"]},
)
