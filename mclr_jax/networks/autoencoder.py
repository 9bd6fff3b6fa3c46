"""The KL autoencoder of Stable Diffusion: images <-> latents of a lower resolution.

Source: Rombach et al. 2022 (arXiv:2112.10752), as diffusers' `AutoencoderKL` has it. The names of
the modules are those of diffusers, so that a parameter's path is its name there.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from mclr_jax.networks.layers import DEEPEST, WIDEST, GroupNorm, Linear, attention, upsample
from mclr_jax.schema import key

DOWN = ((0, 1), (0, 1))  # padding of a convolution of stride 2: at the right and bottom alone
LOGVAR_RANGE = -30.0, 20.0
Conv, Norm = partial(Linear, kernel_size=3), partial(GroupNorm, 1e-6)


class Residual(nn.Module):
    """Two convolutions beside the identity, or beside a dense layer if the width changes."""

    features: int
    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = partial(Norm, groups=self.groups)
        h = Conv(self.features, name="conv1")(nn.silu(norm(name="norm1")(x)))
        h = Conv(self.features, name="conv2")(nn.silu(norm(name="norm2")(h)))
        if x.shape[-1] != self.features:
            x = Linear(self.features, name="conv_shortcut")(x)
        return x + h


class SelfAttention(nn.Module):
    """Attention with one head among all pixels, beside the identity."""

    groups: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        h = Norm(groups=self.groups, name="group_norm")(x).reshape(len(x), -1, channels)
        q, k, v = (Linear(channels, name=name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v"))
        return x + Linear(channels, name="to_out.0")(attention(q, k, v).reshape(x.shape))


class Half(nn.Module):
    """The encoder or the decoder: residual blocks at falling or rising resolutions."""

    widths: tuple[int, ...]  # of the resolutions, in the order of the calls
    layers: int  # residual blocks of a resolution
    features: int  # channels of the output
    groups: int
    attends: bool  # in the middle, at the lowest resolution
    decodes: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = Conv(self.widths[0], name="conv_in")(x)
        x = self._levels(self._middle(x)) if self.decodes else self._middle(self._levels(x))
        x = nn.silu(Norm(groups=self.groups, name="conv_norm_out")(x))
        return Conv(self.features, name="conv_out")(x)

    def _middle(self, x: jax.Array) -> jax.Array:
        x = Residual(x.shape[-1], self.groups, name="mid_block.resnets.0")(x)
        if self.attends:
            x = SelfAttention(self.groups, name="mid_block.attentions.0")(x)
        return Residual(x.shape[-1], self.groups, name="mid_block.resnets.1")(x)

    def _levels(self, x: jax.Array) -> jax.Array:
        way = "up" if self.decodes else "down"
        for level, width in enumerate(self.widths):
            name = f"{way}_blocks.{level}"
            for i in range(self.layers):
                x = Residual(width, self.groups, name=f"{name}.resnets.{i}")(x)
            if level + 1 < len(self.widths):
                conv = partial(Conv, width, name=f"{name}.{way}samplers.0.conv")
                x = conv()(upsample(x)) if self.decodes else conv(stride=2, padding=DOWN)(x)
        return x


class Autoencoder(nn.Module):
    """`encode` and `decode` of images; the fields are the keys of diffusers' config.

    Images (B, H, W, C) have the range that the latents' convention says, raw latents
    (B, H / f, W / f, latent_channels) no scale; f is 2^(len(block_out_channels) - 1).
    """

    in_channels: int = key(3, 1, WIDEST)
    out_channels: int = key(3, 1, WIDEST)
    latent_channels: int = key(4, 1, WIDEST)
    block_out_channels: tuple[int, ...] = key((64,), 1, WIDEST)
    layers_per_block: int = key(1, 1, DEEPEST)
    norm_num_groups: int = key(32, 1, WIDEST)
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    # Stable Diffusion's networks take (raw latents - shift_factor) * scaling_factor.
    scaling_factor: float = key(0.18215, 0.0, ends="(")
    shift_factor: float = key(0.0)

    def setup(self):
        half = partial(Half, groups=self.norm_num_groups, attends=self.mid_block_add_attention)
        widths, layers = self.block_out_channels, self.layers_per_block
        self.encoder = half(widths, layers, 2 * self.latent_channels, decodes=False)
        self.decoder = half(widths[::-1], layers + 1, self.out_channels, decodes=True)
        if self.use_quant_conv:
            self.quant_conv = Linear(2 * self.latent_channels)
        if self.use_post_quant_conv:
            self.post_quant_conv = Linear(self.latent_channels)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and standard deviation of the raw latents of images."""
        found = self.encoder(images)
        found = self.quant_conv(found) if self.use_quant_conv else found
        mean, logvar = jnp.split(found, 2, axis=-1)
        return mean, jnp.exp(jnp.clip(logvar, *LOGVAR_RANGE) / 2)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images of raw latents; the range is not limited."""
        return self.decoder(self.post_quant_conv(latents) if self.use_post_quant_conv else latents)

    def __call__(self, images: jax.Array) -> jax.Array:
        return self.decode(self.encode(images)[0])
