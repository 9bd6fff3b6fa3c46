"""Layers and the base class that the networks share."""

import zlib
from collections.abc import Callable, Sequence
from functools import cache, partial, reduce
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import Initializer, ones, xavier_uniform, zeros
from jax.sharding import AxisType

from mclr_jax import backend
from mclr_jax.adapter import LowRank
from mclr_jax.networks.convolution import convolution_p, convolve
from mclr_jax.schema import check, key
from mclr_jax.types import Condition

LAYER_NORM_EPSILON = 1e-6


def attention(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """q, k, v (B, N, heads, D) and a bias (1, heads, N, N) or None -> as q; softmax in float32.

    On NVIDIA's cards, 16-bit numbers without a bias take the fused kernel of cuDNN, which does not
    store the (B, heads, N, N) weights. It has no forward-mode derivative.
    """
    fits = q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 128 and bias is None
    fused = fits and backend.traced_for() == "gpu" and _cudnn_attention()
    return jax.nn.dot_product_attention(q, k, v, bias, implementation="cudnn" if fused else "xla")


@cache
def _cudnn_attention() -> bool:
    """True if cuDNN has fused attention for the devices: for cards since Ampere."""
    device = jax.local_devices()[0]
    cuda = device.client.platform_version.startswith("cuda")
    return cuda and float(device.compute_capability) >= 8.0


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """The GELU with tanh. Its derivative keeps one array, the slope; that of JAX's keeps five."""
    return jax.nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_jvp(x: tuple[jax.Array], change: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    value, slope = jax.jvp(partial(jax.nn.gelu, approximate=True), x, (jnp.ones_like(*x),))
    return value, slope * change[0]


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def layer_norm(x: jax.Array, dtype: Any, epsilon: float = LAYER_NORM_EPSILON) -> jax.Array:
    """Normalise the last axis without learned scale and bias; statistics are float32.

    Its gradient keeps the answer, in `dtype`, and a number for each row; Flax's keeps x in float32.
    """
    return _normalised(x, dtype, epsilon)[0]


def _normalised(x: jax.Array, dtype: Any, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """(answer of `layer_norm`, factor of each row)."""
    x = x.astype(jnp.float32)
    mean = x.mean(axis=-1, keepdims=True)
    variance = jnp.square(x).mean(axis=-1, keepdims=True) - jnp.square(mean)
    factor = lax.rsqrt(jnp.maximum(variance, 0.0) + epsilon)
    return ((x - mean) * factor).astype(dtype), factor


@layer_norm.defjvp
def _layer_norm_jvp(
    dtype: Any, epsilon: float, x: tuple[jax.Array], change: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    answer, factor = _normalised(*x, dtype, epsilon)

    @partial(jax.checkpoint, prevent_cse=False)  # keeps its arguments, not these in float32
    def derivative(answer: jax.Array, factor: jax.Array, dx: jax.Array) -> jax.Array:
        answer, dx = answer.astype(jnp.float32), dx.astype(jnp.float32)
        along = answer * (answer * dx).mean(axis=-1, keepdims=True)
        return ((dx - dx.mean(axis=-1, keepdims=True) - along) * factor).astype(dtype)

    return answer, derivative(answer, factor, *change)


def check_sizes(x: jax.Array, patch_size: int, levels: int, field: str) -> None:
    """Raises ValueError unless x (B, H, W, C) divides into patches and halves at each level."""
    divisor = patch_size * 2 ** (levels - 1)
    if any(size % divisor for size in x.shape[1:3]):
        raise ValueError(
            f"images are {x.shape[1]}x{x.shape[2]}; patch_size {patch_size} and {levels} levels of "
            f"{field} need sizes divisible by {divisor}"
        )


def pyramid(
    x: jax.Array, channels: int, channel_mult: Sequence[int], attention_resolutions: Sequence[int]
) -> tuple[list[int], list[str], list[bool]]:
    """Of each level of a U-Net on x (B, H, W, C): channels, size as in names, and attention."""
    heights = [(x.shape[1] >> level, x.shape[2] >> level) for level in range(len(channel_mult))]
    widths = [channels * mult for mult in channel_mult]
    attends = [height in attention_resolutions for height, _ in heights]
    return widths, [f"{height}x{width}" for height, width in heights], attends


def entered(block: Callable[..., Any], h: jax.Array, size: str, deepest: bool, up: Any) -> Any:
    """The features with which a level of a U-Net's decoder begins, by EDM's names of blocks."""
    if not deepest:
        return block(f"dec_{size}_up", h, h.shape[-1], resample=up)
    h = block(f"dec_{size}_in0", h, h.shape[-1], attend=True)
    return block(f"dec_{size}_in1", h, h.shape[-1])


def space_to_depth(x: jax.Array, size: int) -> jax.Array:
    """Stacks patches as channels: (B, H, W, C) -> (B, H / size, W / size, size^2 C)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // size, size, width // size, size * channels).swapaxes(2, 3)
    return x.reshape(batch, height // size, width // size, size * size * channels)


def depth_to_space(x: jax.Array, size: int) -> jax.Array:
    """The inverse of `space_to_depth`."""
    batch, height, width, features = x.shape
    x = x.reshape(batch, height, width, size, features // size).swapaxes(2, 3)
    return x.reshape(batch, height * size, width * size, features // size**2)


def _mesh() -> Any:
    """The mesh whose layout XLA chooses, of `jax.sharding.use_abstract_mesh`, if there is one.

    The mesh of pmap is none: its code is that of one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = all(kind == AxisType.Auto for kind in mesh.axis_types)
    return mesh if free and not mesh.empty else None


def gathered(kernel: jax.Array) -> jax.Array:
    """The kernel whole on every device of `_mesh`.

    Without this XLA may divide features among the devices that share the parameters, and move
    activations, which are larger, from device to device.
    """
    return kernel if _mesh() is None else lax.with_sharding_constraint(kernel, jax.P())


def divided(inputs: Any) -> Any:
    """A tree of arrays (B, ...) with equally many rows on each device of `_mesh`.

    Of rows that were joined, such as positives and negatives, XLA may otherwise make whole copies.
    """
    mesh = _mesh()

    def divide(x):
        if mesh is None or len(x) % mesh.size:
            return x
        return lax.with_sharding_constraint(x, jax.P(mesh.axis_names))

    return jax.tree.map(divide, inputs)


class Linear(nn.Module):
    """Dense layer on the last axis, kernel (C, D), or convolution of NHWC images, (k, k, C, D).

    A 1x1 convolution is the dense layer. The bias starts uniform in +-bias_scale / sqrt(fan_in);
    PyTorch's default is `bias_scale` 1. `dtype` is that of the computation; parameters are float32.
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
        kernel = self.param("kernel", self.kernel_init, shape)
        if isinstance(kernel, LowRank):
            down, up = kernel.down.reshape(*shape[:-1], -1), kernel.up * kernel.scale
            h, up = self._times(x, down), gathered(up.astype(self.dtype))
            # With an axis of a batch it is no product with weights, which recomputed blocks keep.
            y = lax.dot_general(h.reshape(1, -1, len(up)), up[None], (((2,), (1,)), ((0,), (0,))))
            y = self._times(x, kernel.base) + y.reshape(*h.shape[:-1], self.features)
        else:
            y = self._times(x, kernel)
        if self.use_bias:
            bound = self.bias_scale / np.sqrt(np.prod(shape[:-1]))
            init = partial(jax.random.uniform, minval=-bound, maxval=bound)
            y = y + self.param("bias", init, (self.features,)).astype(self.dtype)
        return y

    def _times(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        kernel = gathered(kernel.astype(self.dtype))
        if self.kernel_size > 1:
            return convolve(x, kernel, self.stride, self.padding)
        # With one leading axis, XLA:CPU takes half the time for the kernel's gradient.
        return (x.reshape(-1, x.shape[-1]) @ kernel).reshape(*x.shape[:-1], kernel.shape[-1])


def sinusoids(values: jax.Array, frequencies: np.ndarray | jax.Array) -> jax.Array:
    """cos and sin of values (...) times each of n frequencies -> (..., 2n) float32."""
    angles = values.astype(jnp.float32)[..., None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def positional_embedding(t: jax.Array, dim: int = 256, endpoint: bool = False) -> jax.Array:
    """cos and sin of t (B,) at dim/2 frequencies from 1 down to 1/10000 -> (B, dim).

    `endpoint` includes the frequency 1/10000, as in DDPM++; ADM and DiT stop before it.
    """
    return sinusoids(t, 1e-4 ** (np.arange(dim // 2) / (dim // 2 - endpoint)))


# The largest sizes that a network may have: beyond them is a mistake that no machine can hold.
WIDEST, DEEPEST = 2**16, 2**10


def _products(primitive: Any, *_: Any, **__: Any) -> bool:
    return primitive in (lax.dot_general_p, lax.conv_general_dilated_p, convolution_p)


# What recomputed blocks keep of the forward pass.
KEPT: dict[str, Callable[..., Any]] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": _products,  # of matrices, and convolutions: only cheap operations are repeated
    # Matrix products with weights; not those of attention, whose size grows with tokens squared.
    "weight_products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Network(nn.Module, kw_only=True):
    """Base of the networks, which are called with x (B, ...), c_noise (B,) and a `Condition`.

    In subclasses, `out_channels` counts the channels of the raw output, and the label `num_classes`
    is the null label.
    """

    augment_dim: int = 0  # length of the augmentation vector, 0 for none
    takes_strength: bool = False  # whether the guidance strength is an input
    dropout: float = key(0.0, 0.0, 1.0, ")", says="rate in each block, in training")
    dtype: Any = key(jnp.float32, words=("float32", "bfloat16"), says="of the computation; "
                     "parameters, norms, softmax and output are float32")  # fmt: skip
    remat: bool = key(False, says="recompute blocks in the backward pass, to save memory")
    remat_policy: str = key("nothing", words=KEPT, says="values that are not computed again")
    where: ClassVar[str] = "config.network"
    optional_inputs: ClassVar[tuple[str, ...]] = ("map_strength", "map_augment")
    label_inputs: ClassVar[tuple[str, ...]] = ("map_label", "emb_label", "y_embedder")

    def __post_init__(self):
        check(self)
        for name in ("channel_mult", "channels"):
            if getattr(self, name, None) == ():
                raise ValueError(f"{self.where}.{name} is (); expected a value for each level.")
        super().__post_init__()

    def block(self, kind: type[nn.Module], looped: bool = False) -> type[nn.Module]:
        """The class of a block, which is recomputed in the backward pass if `remat` says so.

        Outside of a loop XLA would merge the recomputation with the original, if it were allowed.
        """
        if not self.remat:
            return kind
        return nn.remat(kind, policy=KEPT[self.remat_policy], prevent_cse=not looped)

    def with_optional_inputs(self, embedding: jax.Array, condition: Condition) -> jax.Array:
        """The embedding (B, E) plus a linear map of each optional input that the network has.

        Absent inputs are zeros, so `init` always makes the kernels. They start at zero (EDM's
        `map_augment` does not), so that weights without them give the same model.
        """
        batch, width = embedding.shape
        linear = partial(Linear, width, use_bias=False, kernel_init=zeros, dtype=embedding.dtype)
        if self.takes_strength:
            strength = jnp.zeros(batch) if condition.strength is None else condition.strength
            # Smooth features, zero at strength 0. The factor 8 makes the kernel, which starts at
            # zero, have an effect after a few hundred Adam steps.
            angles = jnp.log1p(strength)[:, None] * jnp.array([0.5, 1.0, 2.0, 4.0])
            features = 8 * jnp.concatenate([jnp.sin(angles), 1 - jnp.cos(angles)], axis=-1)
            embedding = embedding + linear(name="map_strength")(features)
        if self.augment_dim:
            none = jnp.zeros((batch, self.augment_dim))
            augment = none if condition.augment is None else condition.augment
            embedding = embedding + linear(name="map_augment")(augment)
        return embedding


class GroupNorm(nn.Module):
    """Group normalisation, by default with EDM's rule: 32 groups, or fewer of 4 channels or more.

    Statistics are float32, the output has `dtype`. Flax's own takes 2 to 3 times as long on the
    CPU, forward and backward (16x32x32x32: 0.85 against 0.39 ms).
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    groups: int = 0  # 0: EDM's rule

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        groups = self.groups or max(min(32, channels // 4), 1)
        if channels % groups:
            raise ValueError(f"{channels} channels; {groups} groups of equal size are expected")
        scale = self.param("scale", ones, (channels,))
        bias = self.param("bias", zeros, (channels,))

        def group_mean(y: jax.Array) -> jax.Array:
            """Mean over space and each group's channels: (B, H, W, C) -> (B, 1, 1, C)."""
            per_channel = y.mean(axis=(1, 2), keepdims=True)
            grouped = per_channel.reshape(len(y), 1, 1, groups, channels // groups)
            return jnp.repeat(grouped.mean(axis=-1), channels // groups, axis=-1)

        x = x.astype(jnp.float32)
        centred = x - group_mean(x)
        gain = scale * lax.rsqrt(group_mean(jnp.square(centred)) + self.epsilon)
        return (centred * gain + bias).astype(self.dtype)


class RelativeBias(nn.Module):
    """A summand of attention logits: a learned number for each head and distance of tokens.

    It is -inf beyond `window` tokens and, if `causal`, for later tokens. On a `ring` the last token
    is beside the first one.
    """

    heads: int
    window: int
    causal: bool
    ring: bool = False

    @nn.compact
    def __call__(self, tokens: int) -> jax.Array:
        """(1, heads, queries, keys) for so many tokens."""
        table = self.param("bias", zeros, (self.heads, 2 * self.window + 1))
        distance = np.arange(tokens) - np.arange(tokens)[:, None]  # of the key after the query
        if self.ring:
            distance = (distance + tokens // 2) % tokens - tokens // 2
        seen = (np.abs(distance) <= self.window) & ((distance <= 0) | (not self.causal))
        index = np.clip(distance, -self.window, self.window) + self.window
        return jnp.where(seen, table[None, :, index], -jnp.inf)


class Dropout(nn.Module):
    """Dropout of x (B, ...), where the mask of an example depends on that example's key alone.

    `keys` are typed PRNG keys (B,), or None for no dropout. A hash of the layer's path makes layers
    differ; if one module runs several times (a scan), the caller folds the iteration into the keys.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array | None) -> jax.Array:
        if keys is None or self.rate == 0:
            return x
        layer = zlib.crc32("/".join(self.path).encode())

        def mask(key: jax.Array) -> jax.Array:
            return jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - self.rate, x.shape[1:])

        # Without the barrier, XLA:TPU takes 3 times as long to compile a block of a U-Net: it
        # computes random bits inside its convolutions.
        kept = lax.optimization_barrier(jax.vmap(mask)(keys))
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


def blur(x: jax.Array, taps: Sequence[float], stride: int, pad: int) -> jax.Array:
    """Filter each channel of NHWC images by the separable `taps`, normalised to sum 1.

    Sums of shifted slices, which XLA fuses: depthwise convolutions are slow on the CPU.
    """
    weights = np.asarray(taps, np.float32) / sum(taps)
    for axis in (1, 2):
        size = (x.shape[axis] + 2 * pad - len(weights)) // stride + 1
        x = jnp.pad(x, [(pad, pad) if a == axis else (0, 0) for a in range(4)])
        span = (size - 1) * stride + 1
        shifted = [lax.slice_in_dim(x, k, k + span, stride, axis) for k in range(len(weights))]
        x = reduce(jnp.add, [w.item() * s for w, s in zip(weights, shifted, strict=True)])
    return x


def downsample(x: jax.Array, taps: Sequence[float] = (1, 1)) -> jax.Array:
    """Halve zero-padded NHWC images by a filter of even length (EDM's `resample_filter`)."""
    if len(taps) % 2:
        raise ValueError(f"network.resample_filter is {taps}; expected an even number of taps")
    return blur(x, taps, stride=2, pad=len(taps) // 2 - 1)


def upsample(x: jax.Array, taps: Sequence[float] = (1, 1)) -> jax.Array:
    """Double NHWC images by the transpose of `downsample` times 4, which keeps the mean."""
    if tuple(taps) == (1, 1):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    gaps = [(0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 0)]  # one zero between neighbours
    return 4 * blur(lax.pad(x, jnp.zeros((), x.dtype), gaps), taps[::-1], 1, pad=len(taps) // 2)
