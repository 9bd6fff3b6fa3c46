"""What the convolutional feature extractors share: batch norms folded in, names as in the files."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mclr_jax.networks.layers import NHWC

Weights = dict[str, np.ndarray]


def fold(state: Weights, norm_of: dict[str, str]) -> Weights:
    """Convolutions, by name, with the batch norms `norm_of` that follow them (epsilon 1e-3).

    NAME.weight (out, in, kh, kw) becomes NAME (kh, kw, in, out) and NAME.bias (out,).
    """
    weights = {}
    for conv, norm in norm_of.items():
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-3)
        weights[conv] = state[f"{conv}.weight"].transpose(2, 3, 1, 0) * scale
        weights[f"{conv}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return weights


def conv(weights: Weights, x: jax.Array, name: str, stride: int = 1, padding="SAME") -> jax.Array:
    """The convolution `name` of x (B, H, W, C), with its bias; depthwise where its kernel is."""
    kernel = jnp.asarray(weights[name])
    groups = x.shape[-1] // kernel.shape[2]
    y = lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=NHWC, feature_group_count=groups
    )
    return y + weights[f"{name}.bias"]


def coloured(images: jax.Array) -> jax.Array:
    """Images (B, H, W, 1 or 3) -> (B, H, W, 3); ValueError on other channels, such as latents'."""
    if images.shape[-1] not in (1, 3):
        raise ValueError(
            f"images have {images.shape[-1]} channels; expected 1 or 3. Decode latents first."
        )
    return jnp.broadcast_to(images, (*images.shape[:3], 3))
