import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mclr_jax.training.optimizer import Optimizer


def test_schedules_match_their_formulas():
    cosine = Optimizer(learning_rate=2.0, schedule="cosine", warmup_steps=10).rate(100)
    np.testing.assert_allclose(cosine(0), 2.0 / 10, rtol=1e-3)
    np.testing.assert_allclose(cosine(4), 2 * 0.5 * 0.5 * (1 + np.cos(np.pi * 0.04)), rtol=1e-5)
    np.testing.assert_allclose(cosine(50), 1.0, rtol=1e-5)
    np.testing.assert_allclose(cosine(100), 0.0, atol=1e-6)
    decay = Optimizer(learning_rate=1.0, schedule="inverse_sqrt", decay_steps=100).rate(1000)
    np.testing.assert_allclose([decay(50), decay(100), decay(400)], [1, 1, 0.5], rtol=1e-6)
    assert Optimizer(learning_rate=0.3).rate(10)(5) == pytest.approx(0.3)


def run(optimizer, gradients):
    transform = optimizer.transformation(100)
    params = jnp.array([1.0, -2.0])
    state = transform.init(params)
    for gradient in gradients:
        updates, state = transform.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


def test_adam_with_decay_and_clipping_matches_its_definition():
    """Loshchilov and Hutter 2019, Algorithm 2, after clipping, written out in NumPy."""
    settings = Optimizer(learning_rate=0.1, weight_decay=0.2, clip_norm=1.0, b1=0.8, b2=0.9)
    gradients = [[3.0, 4.0], [0.3, -0.1], [0.0, 2.0]]
    params, m, v = np.array([1.0, -2.0]), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = np.array(g) / max(1, np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = (m / (1 - 0.8**t)) / (np.sqrt(v / (1 - 0.9**t)) + 1e-8)
        params = params - 0.1 * (step + 0.2 * params)
    np.testing.assert_allclose(run(settings, gradients), params, rtol=1e-5)
