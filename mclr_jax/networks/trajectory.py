"""Transformers for trajectories whose frames have their own noise levels.

`Trajectory` is for states of few coordinates, `FrameDiT` for fields. Positions in time are relative
and attention in time has a window: both run on more frames than they were trained on.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from mclr_jax.networks import layers
from mclr_jax.networks.dit import Block, feed_forward, modulated, self_attention
from mclr_jax.networks.layers import DEEPEST, WIDEST, Dropout, Linear, Network
from mclr_jax.networks.mlp import noise_embedding
from mclr_jax.schema import key
from mclr_jax.types import Condition


class _TrajectoryNetwork(Network):
    """The common part of both networks: embedding of the condition, blocks, output."""

    num_classes: int = 1
    width: int = key(128, 1, WIDEST, says="of a token")
    depth: int = key(4, 1, DEEPEST, says="number of blocks")
    heads: int = key(4, 1, DEEPEST, says="of the attention")
    mlp_ratio: float = key(4.0, 0.0, 64.0, "(", says="hidden units of a block over its width")
    variance: bool = key(False, says="the output has a log variance for each value")

    per_frame = True

    def _block(self, kind: type[nn.Module], index: int, **more: Any) -> nn.Module:
        options = self.heads, self.mlp_ratio, self.dropout, self.dtype, self.window, self.causal
        return self.block(kind)(*options, **more, name=f"block{index}")

    def _embedding(self, c_noise: jax.Array, condition: Condition, width: int) -> jax.Array:
        """Noise levels (B, N, p) of N tokens of p frames -> embedding (B, N, width)."""
        linear = partial(Linear, width, dtype=self.dtype)
        features = noise_embedding(c_noise).reshape(*c_noise.shape[:2], -1)
        table = nn.Embed(self.num_classes + 1, width, dtype=self.dtype, name="map_label")
        label = self.with_optional_inputs(table(condition.label), condition)
        embedding = linear(name="map_noise")(features) + label[:, None]
        return nn.silu(linear(name="map_layer")(nn.silu(embedding)))

    def _output(self, x: jax.Array, embedding: jax.Array, features: int) -> jax.Array:
        """Tokens (B, N, D) or (B, N, P, D) -> float32 (..., features), zero at the start."""
        modulation = Linear(2 * x.shape[-1], kernel_init=zeros, dtype=self.dtype, name="out_adaLN")
        shift, scale = modulated(modulation(embedding), x, 2)
        x = layers.layer_norm(x, self.dtype) * (1 + scale) + shift
        x = Linear(features, kernel_init=zeros, dtype=self.dtype, name="out_linear")(x)
        return x.astype(jnp.float32)

    def _check(self, x: jax.Array, c_noise: jax.Array, axes: int) -> None:
        if x.ndim != axes or c_noise.shape != x.shape[:2]:
            expected = "(B, F, d)" if axes == 3 else "(B, F, H, W, C)"
            raise ValueError(
                f"x has shape {x.shape} and c_noise {c_noise.shape}; "
                f"{type(self).__name__} expects x {expected} and c_noise (B, F). "
                "config.network is `trajectory` for states, `frame_dit` for fields"
            )
        if self.width % self.heads:
            raise ValueError(
                f"width is {self.width}; {self.heads} heads need a multiple of {self.heads}"
            )


class Trajectory(_TrajectoryNetwork):
    """A transformer over the frames of x (B, F, d); a token is `frames_per_token` frames.

    A token sees itself and `window` tokens before it and, unless `causal`, after it. The frames of
    one token see each other: causality of single frames needs frames_per_token = 1. With `patch`,
    the coordinates are on a ring, a token has `patch` of them, and it also sees those of its own
    frames at most `reach` patches away: the network is the same everywhere on the ring.
    """

    out_channels: int = 3
    frames_per_token: int = key(4, 1, DEEPEST, says="that are one token")
    patch: int = key(0, 0, says="coordinates of a token, on a ring; 0 for all")
    reach: int = key(2, 0, says="patches on each side that a token sees")
    window: int = key(4, 0, says="tokens before, and unless causal after, that a token sees")
    causal: bool = key(False, says="no token sees later ones")
    embedding_width: int = key(64, 1, WIDEST, says="of noise levels and label")

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, F, d), c_noise (B, F) -> raw output (B, F, out_channels [* 2 with `variance`]).

        Raises ValueError on other shapes, and if tokens do not divide frames and coordinates.
        """
        self._check(x, c_noise, axes=3)
        (batch, frames, _), p = x.shape, self.frames_per_token
        if frames % p:
            raise ValueError(
                f"x has {frames} frames, not divisible by frames_per_token {p}: add "
                f"{-frames % p} frames of pure noise at the highest level, or in training set "
                "config.data.frames"
            )
        patch = self.patch or x.shape[2]
        if x.shape[2] % patch:
            raise ValueError(f"x has {x.shape[2]} coordinates, not divisible by patch {patch}")
        count, channels = x.shape[2] // patch, self.out_channels * (1 + self.variance)
        levels = c_noise.reshape(batch, frames // p, p)
        embedding = self._embedding(levels, condition, self.embedding_width)
        h = x.reshape(batch, frames // p, p, count, patch).swapaxes(2, 3)
        h = Linear(self.width, dtype=self.dtype, name="in_linear")(h.reshape(*h.shape[:3], -1))
        for index in range(self.depth):
            if self.patch:
                block = self._block(FrameBlock, index, ring=self.reach)
                h = block(h, embedding, condition.dropout_keys)
            else:
                block = self._block(Block, index)
                h, _ = block(h[:, :, 0], jnp.int32(index), embedding, condition.dropout_keys)
                h = h[:, :, None]
        h = self._output(h, embedding, p * channels // count)
        h = h.reshape(*h.shape[:3], p, 1 + self.variance, -1)
        return jnp.moveaxis(h, 2, 4).reshape(batch, frames, channels)


class FrameBlock(nn.Module):
    """Attention within a frame, attention in time, and an MLP, with adaLN-Zero of each frame."""

    heads: int
    mlp_ratio: float
    dropout: float
    dtype: Any
    window: int
    causal: bool
    ring: int | None = None  # patches on a ring that see each other; None: all, in any order

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, dropout_keys: Any) -> jax.Array:
        """x (B, F, P, D) of P patches, embedding (B, F, E), dropout_keys (B,) or None -> x."""
        linear = partial(Linear, dtype=self.dtype)
        modulation = linear(9 * x.shape[-1], kernel_init=zeros, name="adaLN_modulation")
        parts = modulated(modulation(embedding), x, 9)

        def attended(h: jax.Array, *options: Any) -> jax.Array:
            flat = h.reshape(-1, *h.shape[2:])
            return self_attention(flat, self.heads, self.dtype, *options).reshape(h.shape)

        changes = [
            lambda h: attended(h, self.ring, False, "space_", True),
            lambda h: attended(h.swapaxes(1, 2), self.window, self.causal, "time_").swapaxes(1, 2),
            lambda h: feed_forward(h, self.mlp_ratio, self.dtype),
        ]
        for number, change in enumerate(changes):
            shift, scale, gate = parts[3 * number : 3 * number + 3]
            h = change(layers.layer_norm(x, self.dtype) * (1 + scale) + shift)
            x = x + gate * Dropout(self.dropout, name=f"dropout{number}")(h, dropout_keys)
        return x


class FrameDiT(_TrajectoryNetwork):
    """A DiT for fields (B, F, H, W, C), whose patches see their frame and their place in time.

    As in Jia et al. 2026 (arXiv 2605.14285), except for relative positions and a window in time: a
    frame sees `window` frames before it and, unless `causal`, after it.
    """

    out_channels: int = 1
    patch_size: int = key(4, 1, DEEPEST, says="sides of a patch, a token")
    reach: int = key(0, 0, says="patches on each side, on a torus, that a token has as input")
    window: int = key(16, 0, says="frames before, and unless causal after, that a frame sees")
    causal: bool = key(True, says="no frame sees later ones")

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, F, H, W, C), c_noise (B, F) -> raw output (B, F, H, W, out_channels [* 2]).

        Raises ValueError on other shapes, and if patches do not divide the field.
        """
        self._check(x, c_noise, axes=5)
        (batch, frames, height, width, _), p = x.shape, self.patch_size
        if height % p or width % p:
            raise ValueError(f"fields are {height}x{width}, not divisible by patch_size {p}")
        rows, columns = height // p, width // p
        embedding = self._embedding(c_noise[..., None], condition, self.width)
        h = layers.space_to_depth(x.reshape(-1, *x.shape[2:]), p)
        near = range(-self.reach, self.reach + 1)
        h = jnp.concatenate([jnp.roll(h, (i, j), (1, 2)) for i in near for j in near], axis=-1)
        h = Linear(self.width, dtype=self.dtype, name="in_linear")(h)
        place = self.param("place", normal(0.02), (rows, columns, self.width))
        h = (h + place.astype(self.dtype)).reshape(batch, frames, rows * columns, self.width)
        for index in range(self.depth):
            h = self._block(FrameBlock, index)(h, embedding, condition.dropout_keys)
        h = self._output(h, embedding, p * p * self.out_channels * (1 + self.variance))
        h = layers.depth_to_space(h.reshape(-1, rows, columns, h.shape[-1]), p)
        return h.reshape(batch, frames, *h.shape[1:])
