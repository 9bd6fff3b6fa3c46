"""Classifiers of noisy data: the interface of the denoising networks, with logits as the output.

Labels are not read. Each stores its last hidden layer, (B, d), as the intermediate `features`, for
distances between sets of images.
"""

from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mclr_jax.networks import layers
from mclr_jax.networks.layers import Linear
from mclr_jax.networks.mlp import MLP, noise_embedding
from mclr_jax.types import Condition, with_label


class MLPClassifier(nn.Module):
    """The residual MLP on flattened data (B, ...); arguments as in `MLP`."""

    num_classes: int = 10
    width: int = 256
    depth: int = 2
    augment_dim: int = 0
    takes_strength: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    optional_inputs: ClassVar[tuple[str, ...]] = ("map_strength", "map_augment")
    gives: ClassVar[str] = "logits"

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, ...), c_noise (B,) -> logits (B, num_classes)."""
        trunk = MLP(
            out_channels=self.width,
            num_classes=0,
            width=self.width,
            depth=self.depth,
            augment_dim=self.augment_dim,
            takes_strength=self.takes_strength,
            dropout=self.dropout,
            dtype=self.dtype,
            name="trunk",
        )
        h = nn.silu(trunk(x.reshape(len(x), -1), c_noise, with_label(condition, 0)))
        self.sow("intermediates", "features", h)
        return Linear(self.num_classes, name="out_linear")(h)


class ConvBlock(nn.Module):
    """Two 3x3 convolutions with a residual; the embedding scales and shifts between them."""

    features: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, dropout_keys: jax.Array | None):
        """x (B, H, W, C), embedding (B, D), dropout_keys (B,) or None -> (B, H, W, features)."""
        conv = partial(Linear, self.features, 3, dtype=self.dtype)
        h = conv(name="conv0")(nn.silu(layers.GroupNorm(dtype=self.dtype, name="norm0")(x)))
        affine = Linear(2 * self.features, dtype=self.dtype, name="affine")(embedding)
        scale, shift = jnp.split(affine[:, None, None, :], 2, axis=-1)
        h = nn.silu(layers.GroupNorm(dtype=self.dtype, name="norm1")(h) * (1 + scale) + shift)
        h = layers.Dropout(self.dropout, name="dropout")(h, dropout_keys)
        h = conv(name="conv1")(h)
        if x.shape[-1] != self.features:
            x = Linear(self.features, dtype=self.dtype, name="skip")(x)
        return x + h


class ConvClassifier(nn.Module):
    """A small residual network for images (B, H, W, C).

    Attributes:
      num_classes: classes.
      channels: of each level; a level has one residual block, and half the size of the one before.
      patch_size: pixels of a patch are stacked as channels first.
      augment_dim: length of the augmentation vector, 0 for none.
      takes_strength: whether the guidance strength is an input.
      dropout: in each block.
      dtype: compute dtype; parameters and logits are float32.
    """

    num_classes: int = 10
    channels: tuple[int, ...] = (32, 64)
    patch_size: int = 2
    augment_dim: int = 0
    takes_strength: bool = False
    dropout: float = 0.0
    dtype: Any = jnp.float32
    optional_inputs: ClassVar[tuple[str, ...]] = ("map_strength", "map_augment")
    gives: ClassVar[str] = "logits"
    cpu_device_per_core: ClassVar[bool] = True  # XLA:CPU runs a small convolution on one thread

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, H, W, C), c_noise (B,) -> logits (B, num_classes).

        Raises:
          ValueError: no images, or a size that patches and levels do not divide.
        """
        if x.ndim != 4:
            raise ValueError(
                f"data have shape {x.shape[1:]}; conv_classifier expects images (H, W, C), and "
                "mlp_classifier takes any shape"
            )
        divisor = self.patch_size * 2 ** (len(self.channels) - 1)
        if any(size % divisor for size in x.shape[1:3]):
            raise ValueError(
                f"images are {x.shape[1]}x{x.shape[2]}; patch_size {self.patch_size} and "
                f"{len(self.channels)} levels of channels need sizes divisible by {divisor}"
            )
        linear = partial(Linear, dtype=self.dtype)
        width = 2 * self.channels[-1]
        embedding = linear(width, name="map_noise")(noise_embedding(c_noise))
        embedding = nn.silu(layers.with_optional_inputs(self, embedding, condition))
        h = layers.space_to_depth(x, self.patch_size)
        h = linear(self.channels[0], 3, name="in_conv")(h)
        for level, features in enumerate(self.channels):
            if level:
                h = layers.downsample(h)
            block = ConvBlock(features, self.dropout, self.dtype, name=f"block{level}")
            h = block(h, embedding, condition.dropout_keys)
        h = nn.silu(layers.GroupNorm(dtype=self.dtype, name="out_norm")(h))
        h = h.astype(jnp.float32).mean(axis=(1, 2))
        self.sow("intermediates", "features", h)
        return Linear(self.num_classes, name="out_linear")(h)
