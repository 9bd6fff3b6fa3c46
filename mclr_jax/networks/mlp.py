"""A residual MLP for vectors, such as samples of a 2-D mixture, and for trajectories."""

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.networks.layers import DEEPEST, WIDEST, Dropout, Linear, Network, sinusoids
from mclr_jax.schema import key
from mclr_jax.types import Condition


def noise_embedding(c_noise: jax.Array) -> jax.Array:
    """cos and sin of c_noise (...) at 16 frequencies -> (..., 32).

    c_noise = ln(sigma)/4 spans about 3; the denoiser of a sharp mixture changes within 0.1.
    """
    return sinusoids(c_noise, np.geomspace(0.5, 32, 16, dtype=np.float32))


class Block(nn.Module):
    """Residual layer with hidden units scaled and shifted by the embedding."""

    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array, embedding: jax.Array, dropout_keys: jax.Array | None):
        """h (B, D), embedding (B, D), dropout_keys (B,) or None -> (B, D)."""
        width = h.shape[-1]
        linear = partial(Linear, dtype=self.dtype)
        scale, shift = jnp.split(linear(2 * width, name="affine")(embedding), 2, axis=-1)
        hidden = nn.silu(linear(width, name="linear0")(h) * (1 + scale) + shift)
        hidden = Dropout(self.dropout, name="dropout")(hidden, dropout_keys)
        return h + linear(width, name="linear1")(hidden)


class MLP(Network):
    """Residual MLP for x (B, d) or a trajectory (B, F, d), conditioned on noise level and class."""

    out_channels: int = 2
    num_classes: int = 10
    width: int = key(128, 1, WIDEST, says="hidden units")
    depth: int = key(4, 1, DEEPEST, says="residual blocks of two linear maps each")
    per_frame: bool = key(False, says="x is a trajectory with one noise level per frame")

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, d), c_noise (B,) -> raw output (B, out_channels).

        With `per_frame`: x (B, F, d), c_noise (B, F) -> (B, F, out_channels), frames jointly.
        Other shapes raise ValueError.
        """
        if x.ndim != 2 + self.per_frame or c_noise.shape != x.shape[:-1]:
            expected = "x (B, F, d), c_noise (B, F)" if self.per_frame else "x (B, d), c_noise (B,)"
            raise ValueError(
                f"x has shape {x.shape} and c_noise {c_noise.shape}; "
                f"per_frame={self.per_frame} expects {expected}"
            )
        linear = partial(Linear, self.width, dtype=self.dtype)
        embedding = linear(name="map_noise")(noise_embedding(c_noise).reshape(len(x), -1))
        table = nn.Embed(self.num_classes + 1, self.width, dtype=self.dtype, name="map_label")
        embedding = self.with_optional_inputs(embedding + table(condition.label), condition)
        embedding = nn.silu(linear(name="map_layer")(nn.silu(embedding)))

        h = linear(name="in_linear")(x.reshape(len(x), -1))
        block = self.block(Block)
        for index in range(self.depth):
            module = block(self.dropout, self.dtype, name=f"block{index}")
            h = module(h, embedding, condition.dropout_keys)
        shape = (*x.shape[:-1], self.out_channels)
        return Linear(math.prod(shape[1:]), name="out_linear")(nn.silu(h)).reshape(shape)
