"""The loss of a forecast of one step."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import kstest, norm

from mclr_jax import noise
from mclr_jax.objectives.base import Batch, Models, likelihood
from mclr_jax.objectives.emulate import Emulate
from mclr_jax.types import as_condition

RNG = np.random.default_rng(0)
PROBLEM = cases.problem(noise.LogUniform(0.2, 3.0))


def loss_of(x, forecast, objective=Emulate()):  # noqa: B008
    batch = Batch(jnp.float32(x), as_condition(jnp.zeros(len(x), jnp.int32)))
    models = Models(cases.no_answer, cases.no_answer, forecast=forecast)
    return objective(models, PROBLEM, batch, jax.random.split(jax.random.key(0), len(x)))


def test_each_frame_is_compared_with_the_forecast_from_the_one_before():
    x = RNG.normal(size=(3, 4, 2))
    loss, metrics = loss_of(x, lambda x: (2 * x, None))
    want = ((2 * x[:, :-1] - x[:, 1:]) ** 2).mean((1, 2))
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    assert metrics.keys() == {"error"}


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_with_a_variance_it_is_the_likelihood(power):
    """Of a normal distribution times v^power: scipy's density, and a gradient without that of v."""
    x, v = RNG.normal(size=(3, 2, 2)), 0.3
    found, metrics = loss_of(x, lambda x: (2 * x, v + 0 * x), Emulate(variance_power=power))
    square = (2 * x[:, 0] - x[:, 1]) ** 2
    density = norm.logpdf(x[:, 1], 2 * x[:, 0], v**0.5) + 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(found, -(density * v**power).mean(1), rtol=1e-5)
    np.testing.assert_allclose(metrics["error_ratio"].parts[0], (square / v).mean(1), rtol=1e-5)
    one = jnp.ones((1, 1))
    slope = jax.grad(lambda v: likelihood(0.7 * one, v, 0.0, power)[0].sum())(v * one)
    assert slope == pytest.approx((1 / v - 0.49 / v**2) / 2 * v**power, rel=1e-5)


def test_forecasts_start_beside_the_states_of_the_data():
    """Each window's std is input_noise u^3, u uniform in [0, 1]; what comes next has no noise."""
    x, seen = RNG.normal(size=(2000, 3, 40)), {}

    def forecast(states):
        seen["states"] = np.asarray(states)
        return 0 * states, None

    loss, _ = loss_of(x, forecast, Emulate(input_noise=0.3))
    np.testing.assert_allclose(loss, (x[:, 1:] ** 2).mean((1, 2)), rtol=1e-5)
    std = (seen["states"] - x[:, :-1]).std((1, 2)) / 0.3
    assert kstest(np.cbrt(std), "uniform").statistic < 0.04
    loss_of(x, forecast)
    np.testing.assert_allclose(seen["states"], x[:, :-1], rtol=1e-6)


def test_windows_of_one_frame_and_other_networks_are_refused():
    for x, forecast in [(np.ones((2, 1, 3)), lambda x: (x, None)), (np.ones((2, 2, 3)), None)]:
        with pytest.raises(ValueError, match="expected an emulator and two frames or more"):
            loss_of(x, forecast)
