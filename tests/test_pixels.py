"""What the device does to images, and what importing it costs."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.data import pixels


def test_to_float():
    images = jnp.array([0, 51, 255], jnp.uint8)
    np.testing.assert_allclose(pixels.to_float(images), [-1, -0.6, 1], atol=1e-6)
    latents = jnp.array([-3.0, 7.5], jnp.bfloat16)
    assert pixels.to_float(latents).dtype == jnp.float32
    np.testing.assert_array_equal(pixels.to_float(latents), [-3, 7.5])
    with pytest.raises(TypeError, match="int32"):
        pixels.to_float(jnp.array([1]))


def test_random_flip_is_per_example():
    images = np.arange(64 * 2 * 3 * 1, dtype=np.uint8).reshape(64, 2, 3, 1)
    keys = jax.random.split(jax.random.key(0), 64)
    out = np.asarray(jax.jit(pixels.random_flip)(images, keys))
    flipped = np.array([np.array_equal(o, i[:, ::-1]) for o, i in zip(out, images, strict=True)])
    kept = np.array([np.array_equal(o, i) for o, i in zip(out, images, strict=True)])
    assert (flipped ^ kept).all()
    assert 16 < flipped.sum() < 48  # four sigma
    np.testing.assert_array_equal(pixels.random_flip(images[5:9], keys[5:9]), out[5:9])
    with pytest.raises(ValueError, match=r"\(B, H, W, C\)"):
        pixels.random_flip(images[..., 0], keys)


def test_only_jax_and_numpy_are_imported():
    """So that a task or a network of pixels needs no reader of data sets."""
    script = """
import sys, jax.numpy, numpy
before = set(sys.modules)
import mclr_jax.data.augment, mclr_jax.data.pixels
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mclr_jax"]
