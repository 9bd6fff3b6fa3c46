"""Classifiers of noisy data, called like the denoising networks; they ignore the label.

The last hidden layer (B, d) is stored as `features`, for distances between sets of images.
"""

from functools import partial
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mclr_jax.networks import layers
from mclr_jax.networks.layers import DEEPEST, WIDEST, Linear, Network
from mclr_jax.networks.mlp import MLP, noise_embedding
from mclr_jax.networks.unet import Block
from mclr_jax.schema import key
from mclr_jax.types import Condition, with_label


class MLPClassifier(Network):
    """The residual MLP on flattened data (B, ...); fields as in `MLP`."""

    num_classes: int = 10
    width: int = key(256, 1, WIDEST, says="hidden units")
    depth: int = key(2, 1, DEEPEST, says="residual blocks of two linear maps each")
    gives: ClassVar[str] = "logits"

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, ...), c_noise (B,) -> logits (B, num_classes)."""
        own = ("width", "depth", "augment_dim", "takes_strength", "dropout", "dtype")
        fields = {field: getattr(self, field) for field in own}
        trunk = MLP(out_channels=self.width, num_classes=0, **fields, name="trunk")
        h = nn.silu(trunk(x.reshape(len(x), -1), c_noise, with_label(condition, 0)))
        self.sow("intermediates", "features", h)
        return Linear(self.num_classes, name="out_linear")(h)


class ConvClassifier(Network):
    """A small residual network for images (B, H, W, C), with the block of ADM."""

    num_classes: int = 10
    channels: tuple[int, ...] = key((32, 64), 1, WIDEST, says="of the levels, which halve the size")
    patch_size: int = key(2, 1, DEEPEST, says="pixels of a patch become channels of one pixel")
    gives: ClassVar[str] = "logits"
    cpu_device_per_core: ClassVar[bool] = True  # XLA:CPU runs a small convolution on one thread

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, H, W, C), c_noise (B,) -> logits (B, num_classes).

        Raises ValueError for other shapes, and if patches and levels do not divide the size.
        """
        if x.ndim != 4:
            raise ValueError(
                f"data have shape {x.shape[1:]}, conv_classifier expects images (H, W, C); "
                "use mlp_classifier, which takes any shape"
            )
        layers.check_sizes(x, self.patch_size, len(self.channels), "channels")
        linear = partial(Linear, dtype=self.dtype)
        embedding = linear(2 * self.channels[-1], name="map_noise")(noise_embedding(c_noise))
        embedding = nn.silu(self.with_optional_inputs(embedding, condition))
        h = layers.space_to_depth(x, self.patch_size)
        h = linear(self.channels[0], 3, name="in_conv")(h)
        for level, features in enumerate(self.channels):
            h = layers.downsample(h) if level else h
            options = {"dropout": self.dropout, "dtype": self.dtype, "name": f"block{level}"}
            block = Block(features, adm=True, edm_init=False, **options)
            h = block(h, embedding, condition.dropout_keys)
        h = nn.silu(layers.GroupNorm(dtype=self.dtype, name="out_norm")(h))
        h = h.astype(jnp.float32).mean(axis=(1, 2))
        self.sow("intermediates", "features", h)
        return Linear(self.num_classes, name="out_linear")(h)
