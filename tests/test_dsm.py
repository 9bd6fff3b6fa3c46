import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mclr_jax import noise
from mclr_jax.objectives.dsm import dsm


def arguments(**changes):
    return {
        "noise": noise.LogNormal(-0.4, 1.2),
        "weight": functools.partial(noise.edm_weight, sigma_data=1.0),
        "null_label": 3,
        "label_dropout": 0.0,
    } | changes


def test_the_loss_of_a_useless_denoiser_is_known():
    """D = 0 on data of one point x0: the error is |x0|^2 / d and the loss weight(sigma) times it.

    E[weight] with sigma_data = 1 is E[1 + sigma^-2] = 1 + exp(-2 m + 2 s^2) for ln sigma ~ N(m, s).
    """
    keys = jax.random.split(jax.random.key(0), 200_000)
    x0 = jnp.broadcast_to(jnp.array([3.0, 4.0]), (200_000, 2))
    settings = arguments(noise=noise.LogNormal(0.5, 0.4))
    loss, metrics = dsm(lambda x, s, c: 0 * x, x0, jnp.zeros(200_000, int), keys, **settings)
    np.testing.assert_allclose(metrics["error"], 12.5, rtol=1e-6)
    expected = 12.5 * (1 + np.exp(-2 * 0.5 + 2 * 0.4**2))
    np.testing.assert_allclose(loss.mean(), expected, rtol=0.01)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_exact_denoiser_is_the_minimum(direction):
    """Moving the exact denoiser by e raises the error by |e|^2 / d (Pythagoras)."""
    mix = reference.mixture()
    x0, label = mix.sample(jax.random.key(1), 100_000)
    keys = jax.random.split(jax.random.key(2), 100_000)

    def moved(x, sigma, label):
        return mix.denoise(x, sigma, label) + direction * 0.3 * jnp.tanh(x)

    exact, _ = dsm(mix.denoise, x0, label, keys, **arguments(weight=jnp.ones_like))
    worse, _ = dsm(moved, x0, label, keys, **arguments(weight=jnp.ones_like))
    ks = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(keys)
    sigma = jax.vmap(noise.LogNormal(-0.4, 1.2).sample)(ks[0])
    x = x0 + sigma[:, None] * noise.normal_like(ks[1], x0)
    expected = ((0.3 * jnp.tanh(x)) ** 2).mean()
    np.testing.assert_allclose(worse.mean() - exact.mean(), expected, rtol=0.05)


def test_label_dropout_shows_the_null_label_at_its_rate():
    seen = []

    def denoise(x, sigma, label):
        seen.append(np.asarray(label))
        return x

    keys = jax.random.split(jax.random.key(0), 20_000)
    labels = jnp.arange(20_000) % 3
    dsm(denoise, jnp.ones((20_000, 1)), labels, keys, **arguments(label_dropout=0.1))
    assert abs((seen[0] == 3).mean() - 0.1) < 0.008
    np.testing.assert_array_equal(seen[0][seen[0] != 3], np.asarray(labels)[seen[0] != 3])


def test_each_example_depends_on_its_own_key_alone():
    mix = reference.mixture()
    x0, label = mix.sample(jax.random.key(1), 8)
    keys = jax.random.split(jax.random.key(2), 8)
    settings = arguments(label_dropout=0.5)
    together, _ = dsm(mix.denoise, x0, label, keys, **settings)
    apart, _ = dsm(mix.denoise, x0[5:7], label[5:7], keys[5:7], **settings)
    np.testing.assert_allclose(together[5:7], apart, rtol=1e-5)
