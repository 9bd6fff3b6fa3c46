"""The U-Nets of EDM (DDPM++, NCSN++, ADM): one block, one network, official module names.

Sources: Karras et al. 2022 (arXiv:2206.00364), Table 7 and Appendix F.2; Song et al. 2021
(arXiv:2011.13456) for DDPM++ and NCSN++; Dhariwal and Nichol 2021 (arXiv:2105.05233) for ADM.
Official weights load through `mclr_jax.pretrained.edm`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import normal, variance_scaling, zeros

from mclr_jax.networks import layers
from mclr_jax.networks.layers import DEEPEST, WIDEST, Linear, Network, positional_embedding
from mclr_jax.schema import key
from mclr_jax.types import Condition

ARCHITECTURES = ("ddpmpp", "ncsnpp", "adm")


class Block(nn.Module):
    """Residual block, optionally with resampling before and self-attention after.

    The block of ADM scales and shifts its second norm and adds without rescaling; the block of
    DDPM++ and NCSN++ adds the embedding before that norm and divides each sum by sqrt(2).
    `edm_init` selects EDM's initial values instead of those of `Linear`.
    """

    features: int
    adm: bool
    resample: Callable[[jax.Array], jax.Array] | None = None
    heads: int = 0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    edm_init: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, dropout_keys: jax.Array | None):
        """x (B, H, W, C), embedding (B, E), dropout_keys (B,) or None -> (B, H', W', features)."""
        linear, init_last, init_qkv = _initialised(self.adm, self.dtype, self.edm_init)
        norm = partial(layers.GroupNorm, 1e-5 if self.adm else 1e-6, self.dtype)
        rescale = 1.0 if self.adm else np.sqrt(0.5).item()
        resampled = self.resample or (lambda x: x)

        h = nn.silu(norm(name="norm0")(x))
        h = linear(self.features, 3, name="conv0")(resampled(h))
        affine = linear(self.features * (1 + self.adm), name="affine")
        modulation = affine(embedding)[:, None, None, :]
        if self.adm:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = norm(name="norm1")(h) * (1 + scale) + shift
        else:
            h = norm(name="norm1")(h + modulation)
        h = layers.Dropout(self.dropout, name="dropout")(nn.silu(h), dropout_keys)
        h = linear(self.features, 3, name="conv1", **init_last)(h)

        skip = resampled(x)
        if self.features != x.shape[-1] or (self.resample and not self.adm):
            skip = linear(self.features, name="skip")(skip)
        x = (h + skip) * rescale

        if self.heads:
            qkv = linear(3 * self.features, name="qkv", **init_qkv)(norm(name="norm2")(x))
            qkv = qkv.reshape(len(x), -1, self.heads, 3 * self.features // self.heads)
            h = layers.attention(*jnp.split(qkv, 3, axis=-1)).reshape(x.shape)
            x = (x + linear(self.features, name="proj", **init_last)(h)) * rescale
        return x


def _initialised(adm: bool, dtype: Any, edm_init: bool = True) -> tuple[partial, dict, dict]:
    """`Linear` with its initial values (EDM's `weight_init`), options of last layers and of qkv."""
    linear = partial(Linear, dtype=dtype)
    if not edm_init:
        return linear, {}, {}
    if adm:
        init = {"kernel_init": variance_scaling(1 / 3, "fan_in", "uniform"), "bias_scale": 1.0}
        return partial(linear, **init), {"kernel_init": zeros, "bias_scale": 0.0}, {}
    last, qkv = (variance_scaling(variance, "fan_avg", "uniform") for variance in (1e-10, 0.2))
    return linear, {"kernel_init": last}, {"kernel_init": qkv}


# What "" and 0 mean in the fields of `UNet`: embedding, encoder, decoder, taps, noise channels.
USUAL = {"ddpmpp": ("positional", "standard", "standard", (1.0, 1.0), 1),
         "ncsnpp": ("fourier", "residual", "standard", (1.0, 3.0, 3.0, 1.0), 2),
         "adm": ("positional", "standard", "standard", (1.0, 1.0), 1)}  # fmt: skip


class UNet(Network):
    """EDM's U-Net, of the architecture "ddpmpp", "ncsnpp" or "adm".

    The first two are settings of one class of the official code, whose other settings have fields.

    Official settings: for CIFAR-10 the defaults, dropout 0.13 and augment_dim 9; for FFHQ and AFHQ
    64x64 channel_mult (1, 2, 2, 2), dropout 0.05 (AFHQ: 0.25); for ImageNet 64x64 architecture
    "adm", channels 192, channel_mult (1, 2, 3, 4), num_blocks 3, attention_resolutions
    (32, 16, 8), dropout 0.1.
    """

    architecture: str = key("ddpmpp", words=ARCHITECTURES, says="kind of blocks and resampling")
    out_channels: int = 3
    num_classes: int = 10  # 0 for a network without classes
    channels: int = key(128, 1, WIDEST, says="at full resolution")
    channel_mult: tuple[int, ...] = key((2, 2, 2), 1, 2**8, says="factors of channels, by level")
    num_blocks: int = key(4, 1, 2**8, says="in a level of the encoder; the decoder has one more")
    attention_resolutions: tuple[int, ...] = key(
        (16,), 0, says="image heights, in patches, with attention"
    )
    patch_size: int = key(1, 1, DEEPEST, says="pixels of a patch become channels of one pixel: "
                          "patch_size^2 times cheaper; not in EDM")  # fmt: skip
    channel_mult_noise: int = key(0, 0, 2**8, says="of the noise level's features; 0: 2 in ncsnpp, "
                                  "1 in others")  # fmt: skip
    channel_mult_emb: int = key(4, 1, 2**8, says="of the embedding")
    embedding: str = key("", words=("", "positional", "fourier"), says="of the noise level")
    encoder: str = key("", words=("", "standard", "residual", "skip"), says="path of the image")
    decoder: str = key("", words=("", "standard", "skip"), says="sums outputs of all levels: skip")
    resample_filter: tuple[float, ...] = key((), says="taps; () for those of the architecture")
    channels_per_head: int = key(0, 0, WIDEST, says="of adm's attention, which narrower blocks "
                                 "lack; 0: 64, and one head in narrower blocks")  # fmt: skip
    cpu_device_per_core: ClassVar[bool] = True  # XLA:CPU runs a small convolution on one thread

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """x (B, H, W, C), c_noise (B,) -> raw output (B, H, W, out_channels).

        Raises ValueError if the levels do not divide the image.
        """
        _, encoder, decoder, taps, _ = self.settings
        levels = len(self.channel_mult)
        layers.check_sizes(x, self.patch_size, levels, "channel_mult")
        x = layers.space_to_depth(x, self.patch_size)
        adm, norm = self.architecture == "adm", partial(layers.GroupNorm, dtype=self.dtype)
        up, down = partial(layers.upsample, taps=taps), partial(layers.downsample, taps=taps)
        linear, init_last, _ = _initialised(adm, self.dtype)
        embedding = self._embedding(c_noise, condition).astype(self.dtype)

        def block(name: str, h: jax.Array, features: int, attend=False, resample=None) -> jax.Array:
            heads = self.heads(features) if attend else 0
            options = (features, adm, resample, heads, self.dropout, self.dtype)
            module = self.block(Block)(*options, name=name)
            return module(h, embedding, condition.dropout_keys)

        # Encoder.
        widths, sizes, attends = layers.pyramid(
            x, self.channels, self.channel_mult, self.attention_resolutions
        )
        residual = x.astype(self.dtype)
        h = linear(widths[0] if adm else self.channels, 3, name=f"enc_{sizes[0]}_conv")(residual)
        skips = [h]
        for level, (width, size) in enumerate(zip(widths, sizes, strict=True)):
            if level > 0:
                h = block(f"enc_{size}_down", h, h.shape[-1], resample=down)
                if encoder == "residual":  # the downsampled image is added at each level
                    residual = layers.blur(residual, taps, stride=1, pad=len(taps) // 2)
                    name = f"enc_{size}_aux_residual"
                    residual = linear(h.shape[-1], 3, 2, "VALID", name=name)(residual)
                    h = residual = (h + residual) * np.sqrt(0.5).item()
                elif encoder == "skip":
                    residual = down(residual)
                    h = h + linear(h.shape[-1], name=f"enc_{size}_aux_skip")(residual)
                skips.append(h)
            for index in range(self.num_blocks):
                h = block(f"enc_{size}_block{index}", h, width, attends[level])
                skips.append(h)

        # Decoder.
        features = self.patch_size**2 * self.out_channels
        output: Any = None
        for level in reversed(range(levels)):
            width, size = widths[level], sizes[level]
            h = layers.entered(block, h, size, level == levels - 1, up)
            for index in range(self.num_blocks + 1):
                attend = attends[level] and (adm or index == self.num_blocks)
                h = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(f"dec_{size}_block{index}", h, width, attend)

            if level == 0 or decoder == "skip":  # outputs of lower levels are doubled and added
                prefix = "out" if adm and level == 0 else f"dec_{size}_aux"
                out = norm(1e-5 if adm else 1e-6, name=f"{prefix}_norm")(h)
                out = linear(features, 3, name=f"{prefix}_conv", **init_last)(nn.silu(out))
                output = out if output is None else up(output) + out
        return layers.depth_to_space(output, self.patch_size).astype(jnp.float32)

    def __post_init__(self):
        super().__post_init__()
        if self.channels * self.settings[-1] % 2:
            raise ValueError(f"network.channels is {self.channels}; expected an even number")

    @property
    def settings(self) -> tuple[str, str, str, tuple[float, ...], int]:
        """Embedding, encoder, decoder, taps and noise channels over `channels`."""
        own = (self.embedding, self.encoder, self.decoder, self.resample_filter,
               self.channel_mult_noise)  # fmt: skip
        usual = USUAL[self.architecture]
        return tuple(a or b for a, b in zip(own, usual, strict=True))  # type: ignore[return-value]

    @nn.nowrap
    def heads(self, features: int) -> int:
        """Attention heads of a block of so many channels; 0 for no attention."""
        if self.architecture != "adm":
            return 1
        per_head = self.channels_per_head
        return features // per_head if per_head else max(1, features // 64)

    def _embedding(self, c_noise: jax.Array, condition: Condition) -> jax.Array:
        """Embedding of noise level (B,) and condition -> (B, channel_mult_emb channels) float32."""
        adm, (kind, *_, factor) = self.architecture == "adm", self.settings
        linear = _initialised(adm, jnp.float32)[0]
        one_hot = jax.nn.one_hot(condition.label, self.num_classes)  # the null label gives zeros

        noise_channels, width = self.channels * factor, self.channels * self.channel_mult_emb
        if kind == "fourier":
            frequencies = self.param("map_noise_freqs", normal(16.0), (noise_channels // 2,))
            angles = 2 * np.pi * c_noise.astype(jnp.float32)
            embedding = layers.sinusoids(angles, jax.lax.stop_gradient(frequencies))
        else:
            embedding = positional_embedding(c_noise, noise_channels, endpoint=not adm)
        if not adm:  # sin before cos
            embedding = jnp.roll(embedding, noise_channels // 2, axis=-1)
        if self.num_classes and not adm:
            scaled = one_hot * np.sqrt(self.num_classes)
            embedding = embedding + linear(noise_channels, name="map_label")(scaled)
        embedding = self.with_optional_inputs(embedding, condition)

        embedding = nn.silu(linear(width, name="map_layer0")(embedding))
        embedding = linear(width, name="map_layer1")(embedding)
        if self.num_classes and adm:
            options = {"use_bias": False, "kernel_init": normal(1.0), "name": "map_label"}
            embedding = embedding + linear(width, **options)(one_hot)
        return nn.silu(embedding)
