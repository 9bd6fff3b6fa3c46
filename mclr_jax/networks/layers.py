"""Layers that the networks share: linear maps and convolutions, resampling, norm, attention."""

import functools
import zlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer, variance_scaling

from mclr_jax.networks.conv import fast_conv

# EDM's names for its initialisers (`weight_init` in training/networks.py); `gain` multiplies the
# weights, while variance_scaling takes the factor of their variance.


def xavier_uniform(gain: float = 1.0) -> Initializer:
    """Uniform with variance gain^2 * 2 / (fan_in + fan_out)."""
    return variance_scaling(gain**2, "fan_avg", "uniform")


def kaiming_uniform(gain: float = 1.0) -> Initializer:
    """Uniform with variance gain^2 / fan_in."""
    return variance_scaling(gain**2, "fan_in", "uniform")


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Any = "SAME") -> jax.Array:
    """Convolve NHWC images with an HWIO kernel: every convolution of the project goes through here.

    Args:
      x: (B, H, W, C) images.
      kernel: (kh, kw, C, D) weights of the same dtype.
      stride: step of the output in both directions.
      padding: as for `jax.lax.conv_general_dilated`.

    Returns:
      (B, H', W', D).
    """
    return fast_conv(
        x, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
    """Patches of size x size become channels: (B, H, W, C) -> (B, H/size, W/size, size^2 C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size, channels).swapaxes(2, 3)
    return x.reshape(batch, height // size, width // size, size * size * channels)


def depth_to_space(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, size, size, features // size**2).swapaxes(2, 3)
    return x.reshape(batch, height * size, width * size, features // size**2)


class Linear(nn.Module):
    """Dense layer on the last axis or, where `kernel_size` > 1, a convolution of NHWC images.

    A 1x1 convolution is the dense layer (kernel (C, D)); larger ones have kernel (k, k, C, D).

    Attributes:
      bias_scale: the bias starts uniform in +-bias_scale / sqrt(fan_in), which is PyTorch's own
        choice at 1; zero by default.
      dtype: compute dtype; parameters are float32.
    """

    features: int
    kernel_size: int = 1
    stride: int = 1
    padding: Any = "SAME"
    use_bias: bool = True
    kernel_init: Initializer = xavier_uniform()
    bias_scale: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        window = (self.kernel_size, self.kernel_size) if self.kernel_size > 1 else ()
        shape = (*window, x.shape[-1], self.features)
        x = x.astype(self.dtype)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        if window:
            y = convolve(x, kernel, self.stride, self.padding)
        else:  # one leading axis: XLA:CPU takes half the time for the gradient of the kernel
            y = (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            bound = self.bias_scale / np.sqrt(np.prod(shape[:-1]))
            bias = self.param("bias", lambda key: _uniform(key, (self.features,), bound))
            y = y + bias.astype(self.dtype)
        return y


def _uniform(key: jax.Array, shape: Sequence[int], bound: float) -> jax.Array:
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


class GroupNorm(nn.Module):
    """Group normalisation with EDM's rule: 32 groups, but never under 4 channels each; at least 1.

    Statistics are float32 whatever the input; the output is of `dtype`.
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        groups = max(min(32, channels // 4), 1)
        if channels % groups:
            raise ValueError(f"{channels} channels; {groups} groups of equal size are expected")
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        def group_mean(y: jax.Array) -> jax.Array:
            """Mean over space and over each group's channels: (B, H, W, C) -> (B, 1, 1, C)."""
            per_channel = y.mean(axis=(1, 2), keepdims=True)
            grouped = per_channel.reshape(len(y), 1, 1, groups, channels // groups)
            return jnp.repeat(grouped.mean(axis=-1), channels // groups, axis=-1)

        x = x.astype(jnp.float32)
        centred = x - group_mean(x)
        gain = scale * lax.rsqrt(group_mean(jnp.square(centred)) + self.epsilon)
        return (centred * gain + bias).astype(self.dtype)


class Dropout(nn.Module):
    """Dropout whose mask for one example depends on that example's key and on nothing else.

    Called as `Dropout(rate)(x, keys)` with x (B, ...) and keys (B,) typed PRNG keys, or None for no
    dropout. Layers differ by a hash of their path; where one module runs several times (a scan over
    blocks) the caller folds the iteration into the keys first.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        if keys is None or self.rate == 0:
            return x
        layer = zlib.crc32("/".join(self.path).encode())

        def mask(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self.rate, x.shape[1:])

        return jnp.where(jax.vmap(mask)(keys), x / (1 - self.rate), 0).astype(x.dtype)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention, q, k, v (B, N, heads, D) -> (B, N, heads, D); the softmax is float32."""
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits / np.sqrt(q.shape[-1])).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def blur(x: jax.Array, taps: Sequence[float], stride: int, pad: int) -> jax.Array:
    """Filter each channel of NHWC images by the separable `taps`, normalised to sum 1.

    Written as sums of shifted slices, which XLA fuses; depthwise convolutions are slow on CPU.
    """
    weights = np.asarray(taps, np.float32) / sum(taps)
    for axis in (1, 2):
        size = (x.shape[axis] + 2 * pad - len(weights)) // stride + 1
        x = jnp.pad(x, [(pad, pad) if a == axis else (0, 0) for a in range(4)])
        span = (size - 1) * stride + 1
        shifted = [lax.slice_in_dim(x, k, k + span, stride, axis) for k in range(len(weights))]
        x = functools.reduce(jnp.add, [w.item() * s for w, s in zip(weights, shifted, strict=True)])
    return x


def downsample(x: jax.Array, taps: Sequence[float] = (1, 1)) -> jax.Array:
    """Halve NHWC images by a filter of even length (EDM's `resample_filter`), zero-padded."""
    return blur(x, taps, stride=2, pad=len(taps) // 2 - 1)


def upsample(x: jax.Array, taps: Sequence[float] = (1, 1)) -> jax.Array:
    """Double NHWC images: the transpose of `downsample` times 4, which keeps the mean."""
    if tuple(taps) == (1, 1):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    gaps = [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 0)]  # one zero between neighbours
    return 4 * blur(lax.pad(x, jnp.zeros((), x.dtype), gaps), taps[::-1], 1, pad=len(taps) // 2)
