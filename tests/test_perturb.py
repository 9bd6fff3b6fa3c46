"""Views of an image, against what each perturbation must do to it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.representation import perturb
from mclr_jax.representation.perturb import Augmentation

KEYS = jax.random.split(jax.random.key(0), 64)


def views(image, augmentation, sigma=0.0):
    images = jnp.broadcast_to(jnp.asarray(image), (len(KEYS), *np.shape(image)))
    return np.asarray(perturb.view(images, sigma, KEYS, augmentation))


def test_a_crop_is_a_window_of_the_reflected_image_and_all_windows_occur():
    image = np.arange(64.0, dtype=np.float32).reshape(8, 8, 1)
    padded = np.pad(image, [(1, 1), (1, 1), (0, 0)], mode="reflect")
    windows = [padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)]
    seen = {x.tobytes() for x in views(image, Augmentation(flip=False, jitter=0.0))}
    assert seen == set(windows)


def test_a_flip_mirrors_about_half_of_the_views():
    image = np.arange(64.0, dtype=np.float32).reshape(8, 8, 1)
    found = views(image, Augmentation(crop=0.0, flip=True, jitter=0.0))
    flipped = np.array([np.array_equal(x, image[:, ::-1]) for x in found])
    assert all(np.array_equal(x, image) for x in found[~flipped])
    assert 0.3 < flipped.mean() < 0.7


def test_jitter_scales_brightness_contrast_and_saturation_within_bounds():
    strength = 0.2
    jitter = Augmentation(crop=0.0, jitter=strength)
    flat = views(np.zeros((4, 4, 3), np.float32), jitter)  # grey: brightness alone is seen
    assert np.abs(flat).max() <= strength + 1e-6
    np.testing.assert_allclose(flat, np.broadcast_to(flat[:, :1, :1, :1], flat.shape), atol=1e-6)
    assert flat.std() > strength / 4
    colours = np.random.default_rng(0).uniform(-0.4, 0.4, (4, 4, 3)).astype(np.float32)
    for x in views(colours, jitter):  # about its grey, colour scales by one factor
        ratio = (x - x.mean(-1, keepdims=True)) / (colours - colours.mean(-1, keepdims=True))
        np.testing.assert_allclose(ratio, ratio[0, 0, 0], rtol=1e-3)
        assert (1 - strength) ** 3 <= ratio[0, 0, 0] <= (1 + strength) ** 3
    bright = views(np.ones((4, 4, 1), np.float32), jitter)
    assert bright.max() <= 1
    latents = np.full((4, 4, 4), 3.0, np.float32)
    np.testing.assert_array_equal(views(latents, jitter), views(latents, perturb.NONE))


def test_noise_has_its_level_and_depends_on_the_key_alone():
    x = jnp.ones((len(KEYS), 200))
    noisy = perturb.view(x, 0.5, KEYS, Augmentation())
    assert float(noisy.std()) == pytest.approx(0.5, rel=0.02)
    half = perturb.view(x[:5], 0.5, KEYS[:5], Augmentation())
    np.testing.assert_array_equal(half, noisy[:5])
    double = perturb.view(x, jnp.full(len(x), 1.0), KEYS, perturb.NONE)
    np.testing.assert_allclose(double - 1, 2 * (noisy - 1), rtol=1e-5, atol=1e-6)
