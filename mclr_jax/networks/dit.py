"""DiT: a transformer on image patches, modulated by noise level and class (adaLN-Zero).

Source: Peebles and Xie 2022 (arXiv:2212.09748). SiT (Ma et al. 2024, arXiv:2401.08740) and REPA
(Yu et al. 2024, arXiv:2410.06940) have the same network. Official weights load through
`mclr_jax.pretrained.dit`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import lecun_normal, normal, zeros

from mclr_jax.networks import layers
from mclr_jax.networks.layers import DEEPEST, WIDEST, Dropout, Linear, Network, RelativeBias
from mclr_jax.networks.layers import positional_embedding as timestep_embedding
from mclr_jax.schema import in_range, key
from mclr_jax.types import Condition


class Block(nn.Module):
    """Attention and MLP, each with a shifted and scaled input and a gate that starts at 0."""

    heads: int
    mlp_ratio: float
    dropout: float
    dtype: Any
    window: int | None = None  # see `self_attention`
    causal: bool = False
    qk_norm: bool = False
    mlp_epsilon: float = layers.LAYER_NORM_EPSILON
    embed: Callable[..., jax.Array] | None = None  # for an embedding of the block's own

    @nn.compact
    def __call__(
        self, x: jax.Array, index: jax.Array, embedding: Any, dropout_keys: jax.Array | None
    ) -> tuple[jax.Array, jax.Array | None]:
        """x (B, N, D), index () of this block, embedding (B[, N], E) -> x and no scan output.

        With `embed` the embedding is that function's value, to be made of the given inputs, and
        the scan output.
        """
        own = None
        if self.embed is not None:
            own = embedding = self.embed(*embedding)
        linear = partial(Linear, dtype=self.dtype)
        if dropout_keys is not None:  # scanned blocks share one path, so `Dropout` needs the index
            dropout_keys = jax.vmap(jax.random.fold_in, (0, None))(dropout_keys, index)
        dropout = partial(Dropout, self.dropout)

        modulation = linear(6 * x.shape[-1], kernel_init=zeros, name="adaLN_modulation")
        parts = modulated(modulation(embedding), x, 6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = parts

        h = layers.layer_norm(x, self.dtype) * (1 + scale_a) + shift_a
        h = self_attention(
            h, self.heads, self.dtype, self.window, self.causal, qk_norm=self.qk_norm
        )
        x = x + gate_a * dropout(name="dropout_attention")(h, dropout_keys)

        h = layers.layer_norm(x, self.dtype, self.mlp_epsilon) * (1 + scale_m) + shift_m
        h = feed_forward(h, self.mlp_ratio, self.dtype)
        x = x + gate_m * dropout(name="dropout_mlp")(h, dropout_keys)
        return x, own


def modulated(modulation: jax.Array, x: jax.Array, count: int) -> list[jax.Array]:
    """`count` equal parts of modulation (B, ..., count D), to combine with x (B, ..., N, D)."""
    missing = tuple(range(modulation.ndim - 1, x.ndim - 1))
    return jnp.split(jnp.expand_dims(modulation, missing), count, axis=-1)


def self_attention(
    x: jax.Array, heads: int, dtype: Any, window: int | None = None, causal: bool = False,
    prefix: str = "", ring: bool = False, qk_norm: bool = False,
) -> jax.Array:  # fmt: skip
    """Self-attention of x (B, N, D), to be called in a module, with its linear maps.

    A `window` limits and weighs what a token sees, see `RelativeBias`. `qk_norm` normalises the
    queries and keys of each head, with a learned scale and bias (REPA's option).
    """
    (_, tokens, width), linear, bias = x.shape, partial(Linear, dtype=dtype), None
    if window is not None:
        bias = RelativeBias(heads, window, causal, ring, name=f"{prefix}distance")(tokens)
        bias = bias.astype(dtype)
    qkv = linear(3 * width, name=f"{prefix}qkv")(x).reshape(*x.shape[:2], 3, heads, -1)
    q, k, v = jnp.moveaxis(qkv, 2, 0)
    if qk_norm:
        norm = partial(nn.LayerNorm, epsilon=1e-5, dtype=dtype)
        q, k = norm(name=f"{prefix}q_norm")(q), norm(name=f"{prefix}k_norm")(k)
    h = layers.attention(q, k, v, bias).reshape(x.shape)
    return linear(width, name=f"{prefix}proj")(h)


def feed_forward(x: jax.Array, ratio: float, dtype: Any) -> jax.Array:
    """Two linear maps with a GELU between them, to be called in a module."""
    hidden = Linear(int(x.shape[-1] * ratio), dtype=dtype, name="fc1")(x)
    return Linear(x.shape[-1], dtype=dtype, name="fc2")(layers.gelu(hidden))


def embedded(
    rows: int, width: int, unit: bool, dtype: Any,
    t: jax.Array, label: jax.Array, others: jax.Array | None,
) -> jax.Array:  # fmt: skip
    """Embedding (B, width) of a level's features t (B, 256), a label (B,) and others (B, width).

    The layers are those of the calling module; `unit` is that of `DiT.unit_condition`.
    """
    dense = lecun_normal() if unit else normal(0.02)
    t = nn.silu(Linear(width, kernel_init=dense, name="t_embedder_0")(t))
    t = Linear(width, kernel_init=dense, name="t_embedder_2")(t)
    table = normal(1.0 if unit else 0.02)
    embedding = t + nn.Embed(rows, width, embedding_init=table, name="y_embedder")(label)
    embedding = embedding if others is None else embedding + others
    return nn.silu(embedding).astype(dtype)  # the first operation of each use


def position_embedding(dim: int, height: int, width: int) -> np.ndarray:
    """Fixed sin-cos table (height * width, dim): dim's first half encodes the column."""
    frequencies = 1e-4 ** (np.arange(dim // 4) / (dim // 4))
    rows, columns = np.mgrid[:height, :width].reshape(2, -1, 1) * frequencies
    parts = [np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


class DiT(Network):
    """DiT for images (B, H, W, C). DiT-XL/2 is width 1152, depth 28, heads 16, patch_size 2.

    With a learned variance, as in the published DiT, `out_channels` is 2 C; SiT's has 2 C, too, and
    does not use the second half.
    """

    out_channels: int = 3
    num_classes: int = 10
    patch_size: int = key(4, 1, DEEPEST, says="sides of a patch, a token")
    width: int = key(384, 1, WIDEST, says="of a token")
    depth: int = key(12, 1, DEEPEST, says="number of blocks")
    heads: int = key(6, 1, DEEPEST, says="of the attention")
    mlp_ratio: float = key(4.0, 0.0, 64.0, "(", says="hidden units of a block over its width")
    time_scale: float = key(1000.0, 0.0, 1e6, says="factor of c_noise: 1000 suits EDM's "
                            "ln(sigma)/4; official weights of DiT and SiT need 1")  # fmt: skip
    # Official initial weights are near 0.02: Adam needs thousands of steps to use the class.
    unit_condition: bool = key(False, says="embeddings of level and class start with variance 1")
    # At depth 6 on the CPU, this compiles about 1.5x faster and runs 8% slower; on an H200, DiT-B/2
    # compiles 5x faster and takes 1.3x as long: what a loop keeps for gradients is copied.
    scan_blocks: bool = key(False, says="compile one block instead of each, same parameters")
    qk_norm: bool = key(False, says="normalise queries and keys, an option of REPA")
    stored_positions: bool = key(False, says="position embedding among the parameters, not "
                                 "trained: that of a published file")  # fmt: skip
    # diffusers' DiT differs from the official one in the next three.
    own_embeddings: bool = key(False, says="embeddings of level and class in each block")
    time_endpoint: bool = key(False, says="time frequencies down to 1/10000, included")
    mlp_epsilon: float = key(layers.LAYER_NORM_EPSILON, 0.0, 1.0, "()", says="of MLPs' norms")

    def __post_init__(self):
        super().__post_init__()
        in_range("config.network.mlp_ratio", self.mlp_ratio, 1 / self.width, 64.0)

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, H, W, C), c_noise (B,) -> raw output (B, H, W, out_channels).

        Raises ValueError if patches do not divide the image, or heads do not divide the width.
        """
        (batch, height, width, _), p = x.shape, self.patch_size
        if height % p or width % p:
            raise ValueError(f"images are {height}x{width}, not divisible by patch_size {p}")
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width is {self.width}; {self.heads} heads and the position embedding need a "
                f"multiple of {self.heads} and of 4"
            )
        rows, columns = height // p, width // p
        linear = partial(Linear, dtype=self.dtype)

        # A p x p convolution of stride p is a dense layer on flattened patches.
        x = layers.space_to_depth(x, p).reshape(batch, rows * columns, -1)
        x = linear(self.width, name="x_embedder")(x)
        position = jnp.asarray(position_embedding(self.width, rows, columns)[None])
        if self.stored_positions:
            position = jax.lax.stop_gradient(self.param("pos_embed", lambda key: position))
        x = x + position.astype(self.dtype)

        optional = self.takes_strength or self.augment_dim
        inputs = (
            timestep_embedding(c_noise * self.time_scale, endpoint=self.time_endpoint),
            jnp.minimum(condition.label, self.num_classes),  # a network without classes has one row
            self.with_optional_inputs(jnp.zeros((batch, self.width)), condition)
            if optional else None,
        )  # fmt: skip
        embed = partial(embedded, self.num_classes + 1, self.width, self.unit_condition, self.dtype)
        embedding: Any = inputs if self.own_embeddings else embed(*inputs)

        # The parameters have a leading depth axis, also if the blocks are unrolled.
        blocks = nn.scan(
            self.block(Block, looped=self.scan_blocks),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=self.depth,
            unroll=1 if self.scan_blocks else self.depth,
        )(
            self.heads, self.mlp_ratio, self.dropout, self.dtype, qk_norm=self.qk_norm,
            mlp_epsilon=self.mlp_epsilon, embed=embed if self.own_embeddings else None,
            name="blocks",
        )  # fmt: skip
        x, embeddings = blocks(x, jnp.arange(self.depth), embedding, condition.dropout_keys)
        if self.own_embeddings:
            embedding = embeddings[0]

        modulation = linear(2 * self.width, kernel_init=zeros, name="final_adaLN_modulation")
        shift, scale = jnp.split(modulation(embedding)[:, None, :], 2, axis=-1)
        x = layers.layer_norm(x, self.dtype) * (1 + scale) + shift
        x = linear(p * p * self.out_channels, kernel_init=zeros, name="final_linear")(x)
        return layers.depth_to_space(x.reshape(batch, rows, columns, -1), p).astype(jnp.float32)
