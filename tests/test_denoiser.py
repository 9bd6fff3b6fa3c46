import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mclr_jax import denoiser


@settings(deadline=None, max_examples=30)
@given(sigma=st.floats(0.002, 80), sigma_data=st.floats(0.1, 2))
def test_preconditioning_of_edm_table_1(sigma, sigma_data):
    """Every coefficient, seen through a network that reports its inputs."""
    x, label = jnp.array([[3.0, -1.0]]), jnp.array([5])

    def network(x_in, c_noise, label):
        return x_in * c_noise[:, None] + label[:, None]

    total = sigma**2 + sigma_data**2
    raw = np.asarray(x) / np.sqrt(total) * (np.log(sigma) / 4) + 5
    expected = sigma_data**2 / total * np.asarray(x) + sigma * sigma_data / np.sqrt(total) * raw
    got = denoiser.edm(network, sigma_data)(x, jnp.array([sigma]), label)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_network_of_zeros_denoises_unit_gaussian_data_exactly():
    """For x0 ~ N(0, sigma_data^2 I), c_skip alone is the exact denoiser."""
    x, sigma = jnp.array([[1.0], [2.0]]), jnp.array([0.5, 3.0])
    got = denoiser.edm(lambda x, c, y: 0 * x, 0.7)(x, sigma, jnp.zeros(2, int))
    np.testing.assert_allclose(got, x * 0.49 / (0.49 + sigma[:, None] ** 2), rtol=1e-6)


def test_expand_broadcasts_over_the_trailing_axes():
    assert denoiser.expand(jnp.arange(2.0), jnp.zeros((2, 3, 4))).shape == (2, 1, 1)
    assert denoiser.expand(jnp.float32(1), jnp.zeros((2, 3))).shape == (2, 1)
