"""Scaling and flips of images, and draws of latents, on the device and inside jit."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 in [-1, 1]; floats (in [-1, 1], or latents) -> float32."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"got images of {images.dtype}, expected uint8 (0..255) or a float type")
    return images.astype(jnp.float32)


def from_moments(images: jax.Array, keys: jax.Array, channels: int) -> jax.Array:
    """Examples with so many channels from a batch of training, as float32.

    Images (B, ..., C) with twice as many are means and standard deviations of latents, which are
    drawn by the keys (B,).
    """
    x = to_float(images)
    if x.shape[-1] != 2 * channels:
        return x
    mean, std = jnp.split(x, 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return mean + std * noise


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Flips each image of (B, H, W, C) left to right with probability 1/2, by its key (B,)."""
    if images.ndim != 4:
        raise ValueError(f"got images of shape {images.shape}, expected (B, H, W, C) to flip")
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
