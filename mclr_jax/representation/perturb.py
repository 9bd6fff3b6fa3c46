"""Random views of an image: crop, flip, colour jitter, then noise."""

import dataclasses

import jax
import jax.numpy as jnp

from mclr_jax.data.pixels import random_flip
from mclr_jax.noise import normal_like, split
from mclr_jax.types import expand


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The changes of an image before noise is added; vectors (B, d) get noise only."""

    crop: float = 0.125  # largest shift, as a share of the side; the border is reflected
    flip: bool = False  # left to right, with probability 1/2
    jitter: float = 0.2  # brightness, contrast, saturation times 1 +- jitter; 1 or 3 channels only


NONE = Augmentation(crop=0.0, jitter=0.0)


def view(images: jax.Array, sigma: jax.Array, keys: jax.Array, change: Augmentation) -> jax.Array:
    """Images in [-1, 1] or vectors (B, ...), changed by keys (B,), with noise sigma () or (B,)."""
    k_crop, k_flip, k_jitter, k_noise = split(keys, 4)  # an example depends on its key alone
    x, change = images, change if images.ndim == 4 else NONE
    if change.crop:
        x = _crop(x, k_crop, change.crop)
    if change.flip:
        x = random_flip(x, k_flip)
    if change.jitter and x.shape[-1] in (1, 3):
        x = _jitter(x, k_jitter, change.jitter)
    return x + expand(jnp.asarray(sigma, x.dtype), x) * normal_like(k_noise, x)


def _crop(images: jax.Array, keys: jax.Array, share: float) -> jax.Array:
    margins = [round(share * size) for size in images.shape[1:3]]
    padded = jnp.pad(images, [(margin, margin) for margin in (0, *margins, 0)], "reflect")

    def window(image, key):
        start = jax.random.randint(key, (2,), 0, 2 * jnp.array(margins) + 1)
        return jax.lax.dynamic_slice(image, (*start, 0), images.shape[1:])

    return jax.vmap(window)(padded, keys)


def _jitter(images: jax.Array, keys: jax.Array, strength: float) -> jax.Array:
    uniform = jax.vmap(lambda key: jax.random.uniform(key, (3, 1, 1, 1)), out_axes=1)(keys)
    brightness, contrast, saturation = 1 + strength * (2 * uniform - 1)  # (B, 1, 1, 1) each
    x = (images + 1) / 2 * brightness
    grey = x.mean(-1, keepdims=True)
    x = grey + saturation * (x - grey)
    mean = x.mean((1, 2, 3), keepdims=True)
    x = mean + contrast * (x - mean)
    return 2 * x.clip(0, 1) - 1
