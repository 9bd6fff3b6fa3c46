"""Scaling and flips of images, on the device and inside jit."""

import jax
import jax.numpy as jnp


def to_float(images: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 in [-1, 1]; floats (in [-1, 1], or latents) -> float32."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"got images of {images.dtype}, expected uint8 (0..255) or a float type")
    return images.astype(jnp.float32)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Flips each image of (B, H, W, C) left to right with probability 1/2, by its key (B,)."""
    if images.ndim != 4:
        raise ValueError(f"got images of shape {images.shape}, expected (B, H, W, C) to flip")
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
