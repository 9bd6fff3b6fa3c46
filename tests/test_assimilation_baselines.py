"""Particle filter, smoothers and scores of benchmarks/ against exact Gaussian conditioning."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import assimilation  # noqa: E402
import assimilation_baselines as baselines  # noqa: E402
from assimilation import System  # noqa: E402

MOVE = np.array([[0.9, 0.5], [-0.4, 0.8]])
START = np.array([1.0, -0.5])  # mean of the first state; its covariance is I
NOISE, ERROR, FRAMES = 0.4, 0.6, 9
SYSTEM = System(lambda x: x @ MOVE.T, NOISE, lambda x: x[..., :1], ERROR)


def gaussian(values, last):
    """Mean (T, 2) and covariance (T, 2, T, 2) of all states given the observations up to `last`."""
    size = 2 * FRAMES
    spread = np.zeros((size, size))  # states as linear functions of independent normals
    spread[:2, :2] = np.eye(2)
    mean = [START]
    for k in range(1, FRAMES):
        now, before = slice(2 * k, 2 * k + 2), slice(2 * k - 2, 2 * k)
        spread[now] = MOVE @ spread[before]
        spread[now, now] = NOISE * np.eye(2)
        mean.append(MOVE @ mean[-1])
    mean, covariance = np.concatenate(mean), spread @ spread.T
    seen = [k for k in range(last + 1) if not np.isnan(values[k, 0])]
    observe = np.eye(size)[[2 * k for k in seen]]
    gain = covariance @ observe.T
    gain = gain @ np.linalg.inv(observe @ gain + ERROR**2 * np.eye(len(seen)))
    mean = mean + gain @ (values[seen, 0] - observe @ mean)
    covariance = covariance - gain @ observe @ covariance
    return mean.reshape(FRAMES, 2), covariance.reshape(FRAMES, 2, FRAMES, 2)


def exact(values, lag):
    """Mean and standard deviation (T, 2) of frame k given the observations up to k + lag."""
    mean, std = np.zeros((2, FRAMES, 2))
    for k in range(FRAMES):
        all_means, covariance = gaussian(values, min(k + lag, FRAMES - 1))
        mean[k], std[k] = all_means[k], np.sqrt(np.diag(covariance[k, :, k]))
    return mean, std


@pytest.fixture(scope="module")
def case():
    """Observations with a gap, and 100,000 particles that have seen them."""
    truth = SYSTEM.trajectories(jax.random.key(1), jnp.array(START)[None], FRAMES)[0]
    values = truth[:, :1] + ERROR * jax.random.normal(jax.random.key(2), (FRAMES, 1))
    values = values.at[jnp.array([2, 5])].set(jnp.nan)
    particles = START + jax.random.normal(jax.random.key(3), (100_000, 2))
    history = jax.jit(assimilation.particle_filter, static_argnums=0)(
        SYSTEM, values, particles, jax.random.key(4)
    )
    return np.asarray(values, np.float64), history


@pytest.mark.parametrize("lag", [0, 3, FRAMES - 1])
def test_filter_and_fixed_lag_are_those_of_kalman(case, lag):
    values, history = case
    mean, std, members = assimilation.fixed_lag(history, lag, jax.random.key(5), 1000)
    want_mean, want_std = exact(values, lag)
    assert np.abs((mean - want_mean) / want_std).max() < 0.03
    np.testing.assert_allclose(std, want_std, rtol=0.03)
    assert np.abs((members.mean(1) - want_mean) / want_std).max() < 5 / 1000**0.5
    np.testing.assert_allclose(members.std(1), want_std, rtol=0.12)


def test_backward_simulation_has_the_joint_law_of_rauch_tung_striebel(case):
    values, history = case
    few = jax.tree.map(lambda leaf: leaf[:, ::20], history)
    x = assimilation.backward_simulation(SYSTEM, few, jax.random.key(6), 1000)
    x = np.moveaxis(np.asarray(x), 1, 0)
    mean, covariance = gaussian(values, FRAMES - 1)
    size = 2 * FRAMES
    covariance = covariance.reshape(size, size)
    std = np.sqrt(np.diag(covariance))
    assert np.abs((x.mean(0) - mean).ravel() / std).max() < 0.13
    found = np.cov(x.reshape(1000, size).T)
    assert np.abs((found - covariance) / np.outer(std, std)).max() < 0.15


def test_one_step_of_lorenz63():
    """Against the differential equation, from which one step of RK4 differs by 5e-5 here."""
    from scipy.integrate import solve_ivp

    def slope(_, x):
        return [10 * (x[1] - x[0]), x[0] * (28 - x[2]) - x[1], x[0] * x[1] - 8 / 3 * x[2]]

    start = np.array([1.5, -1.5, 25.0])
    want = solve_ivp(slope, (0, 0.025), start, rtol=1e-12, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(assimilation.rk4(jnp.array(start)), want, atol=1e-4)


def test_log_prior_of_the_truth_is_that_of_the_table():
    """17.88 in FlowDAS's table: 14 steps, the sum over coordinates, units of the state."""
    system = assimilation.PROTOCOLS["flowdas"].system
    start = assimilation.attractor(jax.random.key(0), 2000)
    x = system.trajectories(jax.random.key(1), start, 15)
    error = float(system.log_prior(x).std()) / 2000**0.5
    assert float(system.log_prior(x).mean()) == pytest.approx(17.872, abs=4 * error)
    # the stationary law has about the constants by which states are standardised
    np.testing.assert_allclose(start.std(0), assimilation.STD, rtol=0.06)
    assert abs(float(start[:, 2].mean()) - 25) < 2


def test_protocols_observe_what_they_say():
    for name, count in (("flowdas", 14), ("lo", 9), ("hi", 65)):
        protocol = assimilation.PROTOCOLS[name]
        truth, values = map(np.asarray, protocol.draw(3, 200))
        seen = ~np.isnan(values)
        assert (seen.sum(1) == count).all()
        x = np.arctan(truth[..., :1] / 8) if name == "flowdas" else truth[..., :1]
        error = (values - x)[seen].std()
        assert error == pytest.approx(protocol.system.observation_std, rel=0.06)
    assert assimilation.PROTOCOLS["lo"].system.observation_std == pytest.approx(0.05 * 8)
    assert assimilation.PROTOCOLS["hi"].system.observation_std == pytest.approx(0.25 * 8)


def test_scores_have_their_closed_forms():
    """Members and truth of N(0, I): CRPS 1/sqrt(pi), E|X - truth| 2/sqrt(pi), spread = skill."""
    x = np.random.default_rng(0).normal(size=(400, 41, 6, 2)).astype(np.float32)
    truth, members = x[:, 0], x[:, 1:]
    row = baselines.score(
        SYSTEM, truth, truth[..., :1], 0 * truth, 1 + 0 * truth, members, scale=np.array([2.0, 4.0])
    )
    assert row["crps"] == pytest.approx(np.pi**-0.5, rel=0.03)
    assert row["w1_to_truth"] == pytest.approx(2 * np.pi**-0.5, rel=0.03)
    assert row["rmse"] == pytest.approx(1, rel=0.03)
    assert row["rmse_standardised"] == pytest.approx((5 / 32) ** 0.5, rel=0.03)
    # sqrt(2 (1 / 4 + 1 / 16)), less what Jensen's inequality takes: var / (8 mean^2)
    assert row["rmse_flowdas"] == pytest.approx(0.79 * (1 - 0.0283), rel=0.03)
    assert row["spread_skill"] == pytest.approx(1, rel=0.03)
    want = stats.norm.logpdf(truth[..., :1], 0, ERROR).sum((1, 2)).mean()
    assert row["log_likelihood"] == pytest.approx(want, rel=1e-5)
    few = members[:2, :5]
    apart = [np.abs(few[:, i] - few[:, j]) for i in range(5) for j in range(5)]
    want = np.abs(few - truth[:2, None]).mean(1) - np.sum(apart, 0) / (2 * 5 * 4)
    np.testing.assert_allclose(baselines.crps(few, truth[:2]), want, atol=1e-6)
    (first, second), want = np.split(members[:3], 2, 1), []
    for n in range(3):
        for at in np.ndindex(6, 2):
            want.append(stats.wasserstein_distance(first[n, :, *at], second[n, :, *at]))
    found = baselines.score(SYSTEM, truth[:3], truth[:3, ..., :1], 0 * truth[:3], truth[:3],
                             members[:3], scale=np.ones(2))  # fmt: skip
    assert found["w1_floor"] == pytest.approx(np.mean(want), rel=1e-5)
