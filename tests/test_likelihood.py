"""Likelihoods against exact densities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax import mixture, noise
from mclr_jax.evaluation.likelihood import bits_per_dim, log_likelihood

GRID = noise.rho_grid(128, sigma_min=0.05, sigma_max=80.0)[-2::-1]


def data(count):
    exact = mixture.toy()
    x0, label = exact.sample(jax.random.key(0), count)
    x = x0 + GRID[0] * jax.random.normal(jax.random.key(1), x0.shape)
    log_prob = exact.log_prob_given_label(x, GRID[0])
    return exact, x, label, np.asarray(log_prob)[np.arange(count), label]


def test_the_likelihood_of_a_mixture_is_its_density():
    exact, x, label, expected = data(200)
    found = jax.jit(lambda x, label: log_likelihood(exact.denoise, x, label, GRID, sigma_data=1.0))(
        x, label
    )
    np.testing.assert_allclose(np.mean(found), np.mean(expected), rtol=0.003)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_random_signs_give_the_exact_divergence_on_average():
    exact, x, label, expected = data(2000)
    keys = jax.random.split(jax.random.key(2), len(x))

    @jax.jit
    def estimate(x, label, keys):
        return log_likelihood(exact.denoise, x, label, GRID, keys, sigma_data=1.0, probes=4)

    found = np.asarray(estimate(x, label, keys))
    error = found - expected
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(len(x)) + 0.005
    assert error.std() > 1e-3  # it is an estimate
    np.testing.assert_allclose(found[:100], estimate(x[:100], label[:100], keys[:100]), rtol=1e-3)


def test_bits_per_dim_of_a_uniform_density_are_eight():
    nats = jnp.log(jnp.full(3, 0.5)) * 10  # density 1/2 on [-1, 1], 10 dimensions
    np.testing.assert_allclose(bits_per_dim(nats, 10), 8.0, rtol=1e-6)


@pytest.mark.parametrize("grid", [[1.0], [0.0, 1.0], [2.0, 1.0]])
def test_a_grid_that_does_not_rise_is_refused(grid):
    exact, x, label, _ = data(2)
    with pytest.raises(ValueError, match="must rise from above 0"):
        log_likelihood(exact.denoise, x, label, np.array(grid))
