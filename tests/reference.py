"""Reference numbers that several test files compare with."""

import functools
import pathlib

import jax.numpy as jnp
import numpy as np

from mclr_jax.mixture import GaussianMixture

DATA = pathlib.Path(__file__).parent / "data"


@functools.cache
def load(name):
    """All arrays of tests/data/NAME.npz."""
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def mixture():
    """The mixture of mixture_samplers.npz; call it under jax.enable_x64(True) for float64."""
    names = ("means", "stds", "weights", "class_prior")
    arrays = load("mixture_samplers")
    return GaussianMixture(**{n: jnp.asarray(arrays[f"mixture/{n}"]) for n in names})
