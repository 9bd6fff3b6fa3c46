"""Random views of an image: crop, flip, colour jitter, then noise."""

import dataclasses

import jax
import jax.numpy as jnp

from mclr_jax.data.pixels import random_flip
from mclr_jax.noise import normal_like
from mclr_jax.types import expand


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What a view changes before noise is added. Vectors (B, d) only get noise.

    Attributes:
      crop: the image moves by up to this share of its side, and goes on by reflection.
      flip: left to right, with probability 1/2.
      jitter: brightness, contrast and saturation are scaled by factors in 1 +- jitter; for images
        with 1 or 3 channels in [-1, 1].
    """

    crop: float = 0.125
    flip: bool = False
    jitter: float = 0.2


NONE = Augmentation(crop=0.0, flip=False, jitter=0.0)


def view(
    images: jax.Array, sigma: jax.Array, keys: jax.Array, augmentation: Augmentation
) -> jax.Array:
    """Images or vectors (B, ...), perturbed by keys (B,) and with noise of level sigma () or (B,).

    Example i depends on keys[i] alone.
    """
    k_crop, k_flip, k_jitter, k_noise = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)(
        keys
    )
    x = images
    if x.ndim == 4:
        if augmentation.crop:
            x = _crop(x, k_crop, augmentation.crop)
        if augmentation.flip:
            x = random_flip(x, k_flip)
        if augmentation.jitter and x.shape[-1] in (1, 3):
            x = _jitter(x, k_jitter, augmentation.jitter)
    return x + expand(jnp.asarray(sigma, x.dtype), x) * normal_like(k_noise, x)


def _crop(images: jax.Array, keys: jax.Array, share: float) -> jax.Array:
    margins = [round(share * size) for size in images.shape[1:3]]
    padding = [(margin, margin) for margin in margins]

    def one(image, key):
        start = jax.random.randint(key, (2,), 0, 2 * jnp.array(margins) + 1)
        padded = jnp.pad(image, [*padding, (0, 0)], mode="reflect")
        return jax.lax.dynamic_slice(padded, (*start, 0), image.shape)

    return jax.vmap(one)(images, keys)


def _jitter(images: jax.Array, keys: jax.Array, strength: float) -> jax.Array:
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (3,)))(keys)
    brightness, contrast, saturation = (
        factor[:, None, None, None] for factor in (1 + strength * (2 * uniform - 1)).T
    )
    x = (images + 1) / 2 * brightness
    grey = x.mean(-1, keepdims=True)
    x = grey + saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdims=True)
    x = mean + contrast * (x - mean)
    return 2 * x.clip(0, 1) - 1
