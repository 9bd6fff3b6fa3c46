"""The magnitude-preserving U-Net of EDM2 with its log-variance head.

Source: Karras et al. 2024 (arXiv:2312.02696), Sections 2 and B; equations are those of its
Appendix B.4. Official weights load through `mclr_jax.pretrained.edm`, under the names of modules.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.nn.initializers import normal, zeros

from mclr_jax.adapter import LowRank
from mclr_jax.networks import layers
from mclr_jax.networks.convolution import convolve
from mclr_jax.networks.layers import WIDEST, Network
from mclr_jax.schema import key
from mclr_jax.types import Condition


def unit(x: jax.Array, axis: Any = -1) -> jax.Array:
    """x over the root mean square along the axes, in float32 (eq. 66 with epsilon 1e-4)."""
    square = jnp.mean(jnp.square(x.astype(jnp.float32)), axis, keepdims=True)
    norm = 1e-4 + jnp.sqrt(jnp.maximum(square, 1e-30))  # of zeros, the gradient is no NaN
    return x / norm.astype(x.dtype)


def mp_silu(x: jax.Array) -> jax.Array:
    """The SiLU for inputs and outputs of unit variance (eq. 81)."""
    return nn.silu(x) / 0.596


def mp_sum(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
    """The sum of unit variance, with the share `balance` of b (eq. 88)."""
    return (a + balance * (b - a)) / np.hypot(1 - balance, balance).item()


def mp_cat(a: jax.Array, b: jax.Array, balance: float) -> jax.Array:
    """Channels of a and of b, which contribute by `balance`, not by their number (eq. 103)."""
    channels = np.array([a.shape[-1], b.shape[-1]])
    shares = np.array([1 - balance, balance])
    weights = shares * np.sqrt(channels.sum() / np.square(shares).sum() / channels)
    return jnp.concatenate([weights[0].item() * a, weights[1].item() * b], axis=-1)


class MPLinear(nn.Module):
    """`layers.Linear` whose weights are normalised for each output (eq. 47), without a bias."""

    features: int
    kernel_size: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, gain: jax.Array | float = 1.0) -> jax.Array:
        window = (self.kernel_size, self.kernel_size) if self.kernel_size > 1 else ()
        shape = (*window, x.shape[-1], self.features)
        kernel = self.param("kernel", normal(1.0), shape)
        kernel = kernel.merged() if isinstance(kernel, LowRank) else kernel
        scaled = unit(kernel, range(len(shape) - 1)) * (gain / np.sqrt(np.prod(shape[:-1])))
        scaled, x = layers.gathered(scaled.astype(self.dtype)), x.astype(self.dtype)
        if window:
            return convolve(x, scaled, 1, "SAME")
        return (x.reshape(-1, x.shape[-1]) @ scaled).reshape(*x.shape[:-1], self.features)


class Block(nn.Module):
    """Residual block (paper, Figure 21), of the encoder or the decoder, and self-attention."""

    features: int
    decoder: bool
    heads: int
    balances: tuple[float, float]  # of the residual branch and of the attention
    clip: float
    dropout: float
    dtype: Any
    resample: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, dropout_keys: jax.Array | None):
        """x (B, H, W, C), embedding (B, E), dropout_keys (B,) or None -> (B, H', W', features)."""
        linear = partial(MPLinear, self.features, dtype=self.dtype)
        x = self.resample(x) if self.resample else x
        skip = linear(name="conv_skip") if x.shape[-1] != self.features else lambda x: x
        x = x if self.decoder else unit(skip(x))

        h = linear(3, name="conv_res0")(mp_silu(x))
        gain = self.param("emb_gain", zeros, ())
        scale = linear(name="emb_linear")(embedding, gain) + 1
        h = mp_silu(h * scale[:, None, None, :])
        h = layers.Dropout(self.dropout, name="dropout")(h, dropout_keys)
        h = linear(3, name="conv_res1")(h)
        x = mp_sum(skip(x) if self.decoder else x, h, self.balances[0])

        if self.heads:
            qkv = MPLinear(3 * self.features, dtype=self.dtype, name="attn_qkv")(x)
            qkv = unit(qkv.reshape(len(x), -1, self.heads, 3, self.features // self.heads))
            h = layers.attention(*jnp.moveaxis(qkv, 3, 0)).reshape(x.shape)
            x = mp_sum(x, linear(name="attn_proj")(h), self.balances[1])
        return jnp.clip(x, -self.clip, self.clip) if self.clip else x


class EDM2(Network):
    """EDM2's U-Net; XS, S, M, L, XL and XXL have 128, 192, 256, 320, 384 and 448 channels.

    The label `num_classes`, and every label of a network without classes, is a row of zeros: EDM2
    does not train with a null label. `log_variance` is u of its loss, error / e^u + u.
    """

    out_channels: int = 3
    num_classes: int = 10  # 0 for a network without classes
    channels: int = key(192, 1, WIDEST, says="at full resolution")
    channel_mult: tuple[int, ...] = key((1, 2, 3, 4), 1, 2**8, says="factors of channels, by level")
    channel_mult_noise: int = key(0, 0, 2**8, says="of the noise level's features; 0: the first")
    channel_mult_emb: int = key(0, 0, 2**8, says="of the embedding; 0: the largest")
    num_blocks: int = key(3, 1, 2**8, says="in a level of the encoder; the decoder has one more")
    attention_resolutions: tuple[int, ...] = key((16, 8), 0, says="image heights with attention")
    channels_per_head: int = key(64, 1, WIDEST, says="of attention, which narrower blocks lack")
    label_balance: float = key(0.5, 0.0, 1.0, says="share of the class in the embedding")
    concat_balance: float = key(0.5, 0.0, 1.0, says="share of the encoder in the decoder's inputs")
    res_balance: float = key(0.3, 0.0, 1.0, says="share of the residual branch")
    attn_balance: float = key(0.3, 0.0, 1.0, says="share of the attention")
    clip_act: float = key(256.0, 0.0, 1e9, says="largest activation between blocks; 0 for any")
    resample_filter: tuple[float, ...] = key((1.0, 1.0), says="taps, an even number of them")
    logvar_channels: int = key(128, 1, WIDEST, says="features of the log-variance head")
    cpu_device_per_core: ClassVar[bool] = True

    def setup(self):
        def fourier(name: str, size: int) -> tuple[jax.Array, jax.Array]:
            turns = self.param(f"{name}_freqs", normal(2 * np.pi), (size,))
            phases = partial(jax.random.uniform, maxval=2 * np.pi)
            return jax.lax.stop_gradient((turns, self.param(f"{name}_phases", phases, (size,))))

        factor = self.channel_mult_noise or self.channel_mult[0]
        self.noise_waves = fourier("emb_fourier", self.channels * factor)
        self.logvar_waves = fourier("logvar_fourier", self.logvar_channels)
        shape = (self.logvar_channels, 1)
        self.logvar = self.param("logvar_linear", lambda k: {"kernel": normal(1.0)(k, shape)})

    def log_variance(self, c_noise: jax.Array) -> jax.Array:
        """u of noise levels c_noise (B,), (B,)."""
        weights = unit(self.logvar["kernel"], 0) / np.sqrt(self.logvar_channels)
        return (_waves(c_noise, *self.logvar_waves) @ weights)[..., 0]

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, H, W, C), c_noise (B,) -> raw output (B, H, W, out_channels).

        Raises ValueError if the levels do not divide the image.
        """
        taps, levels = self.resample_filter, len(self.channel_mult)
        layers.check_sizes(x, 1, levels, "channel_mult")
        up, down = partial(layers.upsample, taps=taps), partial(layers.downsample, taps=taps)
        embedding = self._embedding(c_noise, condition).astype(self.dtype)

        def block(name: str, h: jax.Array, features: int, attend=False, resample=None) -> jax.Array:
            heads = self.heads(features) if attend else 0
            balances = self.res_balance, self.attn_balance
            options = (heads, balances, self.clip_act, self.dropout, self.dtype, resample)
            module = self.block(Block)(features, name.startswith("dec"), *options, name=name)
            return module(h, embedding, condition.dropout_keys)

        # Encoder.
        widths, sizes, attends = layers.pyramid(
            x, self.channels, self.channel_mult, self.attention_resolutions
        )
        first = MPLinear(widths[0], 3, self.dtype, name=f"enc_{sizes[0]}_conv")
        skips = [h := first(jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1))]
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            if level > 0:
                skips.append(h := block(f"enc_{size}_down", h, h.shape[-1], resample=down))
            for index in range(self.num_blocks):
                skips.append(h := block(f"enc_{size}_block{index}", h, width, attends[level]))

        # Decoder.
        for level in reversed(range(levels)):
            width, size = widths[level], sizes[level]
            h = layers.entered(block, h, size, level == levels - 1, up)
            for index in range(self.num_blocks + 1):
                h = mp_cat(h, skips.pop(), self.concat_balance)
                h = block(f"dec_{size}_block{index}", h, width, attends[level])
        gain = self.param("out_gain", zeros, ())
        h = MPLinear(self.out_channels, 3, self.dtype, name="out_conv")(h, gain)
        return h.astype(jnp.float32)

    def _embedding(self, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """Embedding of noise level (B,) and condition -> (B, E) float32."""
        linear = partial(
            MPLinear, self.channels * (self.channel_mult_emb or max(self.channel_mult))
        )
        embedding = linear(name="emb_noise")(_waves(c_noise, *self.noise_waves))
        if self.num_classes:
            one_hot = jax.nn.one_hot(condition.label, self.num_classes)  # null: zeros
            label = linear(name="emb_label")(one_hot * np.sqrt(self.num_classes))
            embedding = mp_sum(embedding, label, self.label_balance)
        return mp_silu(self.with_optional_inputs(embedding, condition))

    @nn.nowrap
    def heads(self, features: int) -> int:
        """Attention heads of a block of so many channels; 0 for no attention."""
        return features // self.channels_per_head

    @nn.nowrap
    def normalised(self, params: Any) -> Any:
        """The parameters with weights of unit variance for each output, as after each update.

        It changes no answer, but the relative size of the next update (paper, Section 2.3).
        """

        def one(path: Any, x: jax.Array) -> jax.Array:
            weight = path[-1] == "kernel" and path[0] not in self.optional_inputs
            return unit(x, range(x.ndim - 1)) if weight else x

        return traverse_util.path_aware_map(one, params)


def _waves(values: jax.Array, frequencies: jax.Array, phases: jax.Array) -> jax.Array:
    """Features of unit variance (B, n) float32 of values (B,) (eq. 75)."""
    angles = values.astype(jnp.float32)[..., None] * frequencies + phases
    return np.sqrt(2).item() * jnp.cos(angles)
