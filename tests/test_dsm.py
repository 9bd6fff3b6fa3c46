import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax import noise
from mclr_jax.denoiser import EDM, natural_weight
from mclr_jax.objectives.base import Batch
from mclr_jax.objectives.dsm import DSM
from mclr_jax.types import Condition

LEVELS = noise.LogNormal(-0.4, 1.2)
WEIGHT = functools.partial(natural_weight, EDM(1.0))


def run(denoise, x0, label_dropout=0.0):
    """The loss (B,) and metrics of DSM for x0 (B, 3, d) of class 0."""
    keys = jax.random.split(jax.random.key(0), len(x0))
    problem = cases.problem(LEVELS, weight=WEIGHT, frames=(3,))
    batch = Batch(x0, Condition(jnp.zeros(len(x0), int)))
    return DSM(label_dropout)(cases.models(denoise), problem, batch, keys)


def test_frames_are_weighted_by_their_own_levels():
    """Diffusion forcing: mean over frames of weight(sigma_f) |D_f - x_f|^2."""
    x0 = jax.random.normal(jax.random.key(0), (400, 3, 4))
    seen = []

    def denoise(x, sigma, condition):
        seen.append((x, sigma, condition))
        return 0.5 * x

    loss, metrics = run(denoise, x0, 0.3)
    ((x, sigma, condition),) = seen
    assert sigma.shape == (400, 3)
    assert set(condition.label.tolist()) == {0, 3}
    assert abs((condition.label == 3).mean() - 0.3) < 4 * np.sqrt(0.21 / 400)
    error = ((0.5 * x - x0) ** 2).mean(-1)
    np.testing.assert_allclose(loss, ((1 + sigma**-2) * error).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"].parts[0], error.mean(-1), rtol=1e-5)


def test_a_log_variance_head_divides_the_weighted_error_and_is_added():
    """weight error / e^u + u (EDM2), whose slope in u vanishes at u = ln(weight error)."""
    x0 = jax.random.normal(jax.random.key(0), (50, 4))
    keys = jax.random.split(jax.random.key(1), 50)
    problem = cases.problem(LEVELS, weight=WEIGHT)
    models = cases.models(lambda x, sigma, condition: 0.5 * x)
    batch = Batch(x0, Condition(jnp.zeros(50, int)))
    plain, _ = DSM(0.0)(models, problem, batch, keys)
    u = {}

    def head(sigma):
        return u.setdefault("u", 0.3 * jnp.log(sigma))

    loss, _ = DSM(0.0)(models._replace(log_variance=head), problem, batch, keys)
    np.testing.assert_allclose(loss, plain * jnp.exp(-u["u"]) + u["u"], rtol=1e-5)

    def total(u):
        head = models._replace(log_variance=lambda sigma: u)
        return DSM(0.0)(head, problem, batch, keys)[0].sum()

    np.testing.assert_allclose(jax.grad(total)(jnp.log(plain)), 0, atol=1e-5)


# ---- learned variances ---------------------------------------------------------------------------


def with_moments(moments, x0, power, weight=WEIGHT):
    """The same, whose network gives `moments`."""
    keys = jax.random.split(jax.random.key(0), len(x0))
    problem = cases.problem(LEVELS, weight=weight, frames=x0.shape[1:2])
    models = cases.models(lambda *inputs: moments(*inputs)[0])._replace(moments=moments)
    batch = Batch(x0, Condition(jnp.zeros(len(x0), int)))
    return DSM(0.0, power)(models, problem, batch, keys)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_loss_with_a_variance_is_its_formula(power):
    """(r^2 e^-s + s) / 2 e^(power s) for each coordinate, r and e^s in units of c_out."""
    x0 = jax.random.normal(jax.random.key(0), (50, 3, 2))
    seen = []

    def moments(x, sigma, condition):
        seen.append((x, sigma))
        c_out = (sigma / jnp.sqrt(1 + sigma**2))[..., None]
        return 0.5 * x, c_out**2 * jnp.exp(jnp.sin(x))

    loss, metrics = with_moments(moments, x0, power)
    ((x, sigma),) = seen
    c_out = (sigma / np.sqrt(1 + sigma**2))[..., None]
    r, s = (0.5 * x - x0) / c_out, np.sin(x)
    expected = (r**2 * np.exp(-s) + s) / 2 * np.exp(power * s)
    np.testing.assert_allclose(loss, expected.mean((1, 2)), rtol=1e-4, atol=1e-5)
    found = {name: sums.parts[0] for name, sums in metrics.items()}
    np.testing.assert_allclose(found["error"], ((0.5 * x - x0) ** 2).mean((1, 2)), rtol=1e-5)
    ratio = (r**2 * np.exp(-s)).mean((1, 2))
    np.testing.assert_allclose(found["error_ratio"], ratio, rtol=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_exact_moments_are_the_minimum(power):
    """x0 ~ N(0, 0.5^2): no gradient at the exact mean and variance, and a positive one above."""
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (40_000, 2, 1))

    def loss(mean, log_variance):
        def moments(x, sigma, condition):
            gain = (0.25 / (0.25 + sigma**2))[..., None]
            v = gain * sigma[..., None] ** 2 * jnp.exp(log_variance)
            return (gain + mean) * x, jnp.broadcast_to(v, x.shape)

        return with_moments(moments, x0, power)[0].mean()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert np.abs(gradient(0.0, 0.0)).max() < 0.02
    for step in (-0.2, 0.2):
        assert np.sign(step) * gradient(step / 2, 0.0)[0] > 0.05
        assert np.sign(step) * gradient(0.0, step)[1] > 0.05


def test_power_1_trains_the_mean_like_the_square_error():
    """And with another weight, which enters by the same power."""
    x0 = jax.random.normal(jax.random.key(0), (50, 3, 2))

    def gradient(power, weight):
        def mean_loss(a):
            moments = lambda x, sigma, condition: (a * x, jnp.exp(x))  # noqa: E731
            return with_moments(moments, x0, power, weight)[0].mean()

        return jax.grad(mean_loss)(0.3)

    def plain(a):
        return run(lambda x, sigma, condition: a * x, x0)[0].mean()

    np.testing.assert_allclose(2 * gradient(1.0, WEIGHT), jax.grad(plain)(0.3), rtol=1e-4)
    four = lambda sigma: 4 * WEIGHT(sigma)  # noqa: E731
    for power in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(
            gradient(power, four), 4**power * gradient(power, WEIGHT), rtol=1e-4
        )
