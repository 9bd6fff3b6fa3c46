"""A residual MLP for vectors, such as samples of a 2-D mixture."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.networks.layers import Dropout, Linear


def noise_embedding(c_noise: jax.Array) -> jax.Array:
    """cos and sin of c_noise (B,) at 16 frequencies -> (B, 32).

    c_noise = ln(sigma)/4 spans about 3; the denoiser of a sharp mixture changes over 0.1.
    """
    angles = c_noise.astype(jnp.float32)[:, None] * np.geomspace(0.5, 32, 16, dtype=np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Block(nn.Module):
    """Residual layer whose hidden units are scaled and shifted by the condition."""

    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, h: jax.Array, condition: jax.Array, dropout_keys: jax.Array | None
    ) -> jax.Array:
        """h (B, D), condition (B, D), dropout_keys (B,) or None -> (B, D)."""
        width = h.shape[-1]
        linear = partial(Linear, dtype=self.dtype)
        scale, shift = jnp.split(linear(2 * width, name="affine")(condition), 2, axis=-1)
        hidden = nn.silu(linear(width, name="linear0")(h) * (1 + scale) + shift)
        hidden = Dropout(self.dropout, name="dropout")(hidden, dropout_keys)
        return h + linear(width, name="linear1")(hidden)


class MLP(nn.Module):
    """Residual MLP for x (B, d), conditioned on noise level and class.

    Attributes:
      out_channels: length of the output vector.
      num_classes: classes; label == num_classes is the null label, the last row of a table.
      width: hidden units.
      depth: residual blocks of two linear maps each.
      augment_dim: length of the augmentation vector, 0 for none.
      dtype: compute dtype; parameters and output are float32.
      remat: recompute blocks in the backward pass to save memory.
    """

    out_channels: int = 2
    num_classes: int = 10
    width: int = 128
    depth: int = 4
    augment_dim: int = 0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        label: jax.Array,
        augment: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """x (B, d), c_noise (B,), label (B,) int -> raw output (B, out_channels).

        Args:
          augment: (B, augment_dim) augmentation vector; None for unaugmented data.
          dropout_keys: (B,) typed PRNG keys, one per example; None for no dropout.
        """
        linear = partial(Linear, self.width, dtype=self.dtype)
        condition = linear(name="map_noise")(noise_embedding(c_noise))
        condition = condition + nn.Embed(
            self.num_classes + 1, self.width, dtype=self.dtype, name="map_label"
        )(label)
        if self.augment_dim and augment is not None:
            condition = condition + linear(use_bias=False, name="map_augment")(augment)
        condition = nn.silu(linear(name="map_layer")(nn.silu(condition)))

        h = linear(name="in_linear")(x)
        block = nn.remat(Block) if self.remat else Block
        for index in range(self.depth):
            h = block(self.dropout, self.dtype, name=f"block{index}")(h, condition, dropout_keys)
        return Linear(self.out_channels, name="out_linear")(nn.silu(h))
