import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mclr_jax import noise


def test_rho_grid_is_edm_equation_5():
    """18 steps from 80 to 0.002 with rho 7; the formula written out step by step."""
    expected = [
        (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)
    ]
    np.testing.assert_allclose(noise.rho_grid(18), [*expected, 0.0], rtol=1e-12)


@given(
    n=st.integers(1, 100), low=st.floats(1e-4, 0.1), high=st.floats(0.2, 1e3), rho=st.floats(1, 10)
)
def test_grids_fall_from_sigma_max_to_sigma_min_to_zero(n, low, high, rho):
    grid = noise.rho_grid(n, low, high, rho)
    assert len(grid) == n + 1
    assert grid[-1] == 0
    assert np.all(np.diff(grid) < 0)
    np.testing.assert_allclose(grid[0], high, rtol=1e-9)
    if n > 1:
        np.testing.assert_allclose(grid[-2], low, rtol=1e-9)


@pytest.mark.parametrize("bad", [(0, 0.002, 80, 7), (5, 0, 80, 7), (5, 90, 80, 7), (5, 0.1, 1, 0)])
def test_bad_grids_are_refused(bad):
    with pytest.raises(ValueError, match=r"num_steps is 0|expected 0 < sigma_min"):
        noise.rho_grid(*bad)


@pytest.mark.parametrize("shape", [(), (3,)])
def test_training_distributions_have_their_moments(shape):
    keys = jax.random.split(jax.random.key(0), 100_000)

    def log_sigma(levels):
        sigma = jax.vmap(lambda key: levels.sample(key, shape))(keys)
        assert sigma.shape == (100_000, *shape)
        return np.log(np.asarray(sigma, np.float64))

    normal = log_sigma(noise.LogNormal(-0.4, 1.3))
    np.testing.assert_allclose(normal.mean(0), np.full(shape, -0.4), atol=0.015)
    np.testing.assert_allclose(normal.std(0), np.full(shape, 1.3), atol=0.015)
    uniform = log_sigma(noise.LogUniform(0.01, 10.0))
    low, high = np.log(0.01), np.log(10.0)
    np.testing.assert_allclose(uniform.mean(0), np.full(shape, (low + high) / 2), atol=0.03)
    np.testing.assert_allclose(uniform.std(0), np.full(shape, (high - low) / 12**0.5), atol=0.03)
    assert uniform.min() >= low - 1e-5
    assert uniform.max() <= high + 1e-5
    if shape:  # the levels of frames are independent
        for values in (normal, uniform):
            np.testing.assert_allclose(np.corrcoef(values.T), np.eye(3), atol=0.015)


def test_distributions_compare_by_value():
    assert noise.LogNormal() == noise.LogNormal(-1.2, 1.2) != noise.LogNormal(-1.2, 1.0)
    assert len({noise.LogUniform(), noise.LogUniform(0.002, 80.0), noise.LogUniform(0.01)}) == 2


def test_noise_of_a_sample_is_addressed_by_seed_and_number():
    x = jnp.zeros((4, 3, 2))
    all_four = noise.normal_like(noise.sample_keys(1, [0, 1, 2, 3]), x)
    two = noise.normal_like(noise.sample_keys(1, [2, 0]), x[:2])
    np.testing.assert_array_equal(all_four[np.array([2, 0])], two)
    other_seed = noise.normal_like(noise.sample_keys(2, [0, 1, 2, 3]), x)
    assert np.abs(all_four - other_seed).min() > 0


def test_noise_has_the_type_and_the_moments_that_it_should():
    x = jnp.zeros((2000, 5, 2), jnp.bfloat16)
    assert noise.normal_like(noise.sample_keys(0, np.arange(2000)), x).dtype == jnp.bfloat16
    n = noise.normal_like(noise.sample_keys(0, np.arange(2000)), x.astype(jnp.float32))
    assert abs(n.mean()) < 4 / np.sqrt(n.size)
    assert abs((n**2).mean() - 1) < 4 * np.sqrt(2 / n.size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: noise.LogNormal(mean=21.0), "mean is 21.0; .*at least -20 and at most 20"),
        (lambda: noise.LogNormal(std=11.0), "std is 11.0; .*at most 10"),
        (lambda: noise.LogUniform(sigma_min=0.0), "sigma_min is 0.0; .*at least 1e-09"),
        (lambda: noise.LogUniform(sigma_min=2.0, sigma_max=1.0), "sigma_max is 1.0; .*at least 2"),
        (
            lambda: noise.LogUniform(sigma_max=1e30),
            "sigma_max is 1e.30; .*at most 1000000000",
        ),
    ],
)
def test_levels_whose_squares_a_float32_cannot_hold_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
