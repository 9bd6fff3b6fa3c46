"""Functions that published extractors share: input images, convolutions with batch norms."""

import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mclr_jax.networks.convolution import convolve

Weights = dict[str, np.ndarray]


def fold(state: Weights, norm_of: dict[str, str]) -> Weights:
    """The kernels (kh, kw, in, out) and biases (out,) of convolutions followed by batch norms.

    norm_of: name of each convolution -> name of its batch norm (epsilon 1e-3).
    """
    weights = {}
    for conv, norm in norm_of.items():
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-3)
        weights[conv] = state[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale
        weights[f"{conv}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return weights


def conv(weights: Weights, x: jax.Array, name: str, stride: int = 1, padding="SAME") -> jax.Array:
    """The convolution `name` of x (B, H, W, C), with its bias; depthwise if the kernel is."""
    kernel, bias = jnp.asarray(weights[name]), weights[f"{name}.bias"]
    if kernel.shape[2] == x.shape[-1]:
        return convolve(x, kernel, stride, padding) + bias
    return _depthwise(x, kernel[:, :, 0], stride, padding) + bias


def _depthwise(x: jax.Array, kernel: jax.Array, stride: int, padding) -> jax.Array:
    """A kernel (kh, kw, C) as a sum over its entries: XLA's own is naive code on the CPU."""
    size = kernel.shape[:2]
    pads = lax.padtype_to_pads(x.shape[1:3], size, (stride, stride), padding)
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    ends = [n - k + 1 for n, k in zip(x.shape[1:3], size, strict=True)]
    parts = [
        x[:, i : i + ends[0] : stride, j : j + ends[1] : stride] * kernel[i, j]
        for i, j in np.ndindex(*size)
    ]
    return functools.reduce(operator.add, parts)


def coloured(images: jax.Array, size: int | None = None) -> jax.Array:
    """Images (B, H, W, 1 or 3) -> (B, H, W, 3); with a size, cubic, antialiased resize to it.

    ValueError on other channels, such as those of latents.
    """
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; expected 1 or 3. Decode latents first.")
    images = jnp.broadcast_to(images, (*images.shape[:3], 3))
    return jax.image.resize(images, (len(images), size, size, 3), "cubic") if size else images
