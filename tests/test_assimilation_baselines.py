"""Particle filter, smoothers and scores of benchmarks/ against exact Gaussian conditioning."""

import assimilation
import assimilation_baselines as baselines
import jax
import jax.numpy as jnp
import linear_gaussian
import navier_stokes
import numpy as np
import pytest
import trajectory_rows
from assimilation import System
from scipy import stats

from mclr_jax.assimilation import observe
from mclr_jax.assimilation.dynamics import Lorenz63

PROCESS, ERROR, FRAMES = linear_gaussian.PROCESS, 0.6, 9
NOISE = (1 - PROCESS.rho**2) ** 0.5
SYSTEM = System(lambda x: x @ PROCESS.step.T, NOISE, lambda x: x[..., :1], ERROR)


def gaussian(values, last):
    """Mean (T, 2) and covariance (2 T, 2 T) of all states given the observations up to `last`."""
    covariance = PROCESS.covariance(FRAMES)
    seen = [k for k in range(last + 1) if not np.isnan(values[k, 0])]
    observe = np.eye(2 * FRAMES)[[2 * k for k in seen]]
    noisy = observe @ covariance @ observe.T + ERROR**2 * np.eye(len(seen))
    gain = covariance @ observe.T @ np.linalg.inv(noisy)
    mean = gain @ values[seen, 0]
    return mean.reshape(FRAMES, 2), covariance - gain @ observe @ covariance


def exact(values, lag):
    """Mean and standard deviation (T, 2) of frame k given the observations up to k + lag."""
    mean, std = np.zeros((2, FRAMES, 2))
    for k in range(FRAMES):
        means, covariance = gaussian(values, min(k + lag, FRAMES - 1))
        mean[k], std[k] = means[k], np.sqrt(np.diag(covariance).reshape(FRAMES, 2)[k])
    return mean, std


@pytest.fixture(scope="module")
def case():
    """Observations with a gap, and 100,000 particles that have seen them."""
    truth = SYSTEM.trajectories(jax.random.key(1), jnp.ones((1, 2)), FRAMES)[0]
    values = truth[:, :1] + ERROR * jax.random.normal(jax.random.key(2), (FRAMES, 1))
    values = values.at[jnp.array([2, 5])].set(jnp.nan)
    particles = jax.random.normal(jax.random.key(3), (100_000, 2))
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
    std = np.sqrt(np.diag(covariance))
    assert np.abs((x.mean(0) - mean).ravel() / std).max() < 0.13
    found = np.cov(x.reshape(1000, -1).T)
    assert np.abs((found - covariance) / np.outer(std, std)).max() < 0.15


def test_one_step_of_lorenz63_is_that_of_the_package():
    start = jnp.array([1.5, -1.5, 25.0])
    np.testing.assert_allclose(assimilation.rk4(start), Lorenz63().advance(start), rtol=1e-5)


def test_log_prior_of_the_truth_is_that_of_the_table():
    """17.88 in FlowDAS's table: 14 steps, the sum over coordinates, units of the state."""
    system = assimilation.PROTOCOLS["flowdas"].system
    start = assimilation.attractor(jax.random.key(0), 2000)
    x = system.trajectories(jax.random.key(1), start, 15)
    noise = x[:, 1:] - system.step(x[:, :-1])
    log_prior = stats.norm.logpdf(noise, 0, system.process_std).sum((1, 2))
    assert log_prior.mean() == pytest.approx(17.872, abs=4 * log_prior.std() / 2000**0.5)
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
    row = baselines.score(truth, 0 * truth, 1 + 0 * truth, members, scale=np.array([2.0, 4.0]))
    assert row["crps"] == pytest.approx(np.pi**-0.5, rel=0.03)
    assert row["w1_standardised"] == pytest.approx(2 * np.pi**-0.5 * (1 / 2 + 1 / 4) / 2, rel=0.03)
    assert row["rmse"] == pytest.approx(1, rel=0.03)
    # sqrt(2 (1 / 4 + 1 / 16)), less what Jensen's inequality takes: var / (8 mean^2)
    assert row["rmse_flowdas"] == pytest.approx(0.79 * (1 - 0.0283), rel=0.03)
    assert row["spread_skill"] == pytest.approx(1, rel=0.03)


# ---- rows and figures ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", assimilation.PROTOCOLS)
def test_files_of_the_baselines_are_observations_of_the_protocol(name):
    """Their values without noise are those of the operator that the package reads in them."""
    protocol, truth = assimilation.PROTOCOLS[name], np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    values = np.asarray(protocol.system.observe(truth))
    seen = observe.parse(baselines.described(protocol, truth, values), name).for_states((3,))
    np.testing.assert_allclose(seen.operator(truth), values, rtol=1e-6)
    assert (seen.initial is None) != protocol.known


def test_settings_are_chosen_one_after_the_other():
    """The lowest RMSE of the second key is searched at the best value of the first."""
    tried = []

    def row(settings):
        tried.append(settings)
        return {"rmse": (settings["a"] - 2) ** 2 + (settings.get("b", 9) - 10 * settings["a"]) ** 2}

    best = trajectory_rows.chosen(row, {"a": 9, "c": 1}, {"a": (0, 1, 2), "b": (10, 20)})
    assert best == {"a": 1, "b": 10, "c": 1}
    assert tried[-1] == {"a": 1, "b": 20, "c": 1}
    assert len(tried) == 5


def test_interpolation_in_space_and_time_is_the_conditional_gaussian():
    """Against one dense solve for each frame, with any frames ahead and with single frames."""
    rng, count, frames = np.random.default_rng(0), 5, 4
    half, rows = rng.normal(size=(count, count)), rng.normal(size=(count, 2))
    space, course = half @ half.T, 0.6 ** np.arange(frames)
    values = rng.normal(size=(3, frames, 2))
    apart = abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    for ahead in (None, np.array([0, 1, 0, 2])):
        mean, std = navier_stokes.interpolated(values, rows, 0.3, space, course, ahead)
        for k in range(frames):
            seen = [k] if ahead is None else list(range(min(frames, k + ahead[k] + 1)))
            seen_rows = np.kron(np.eye(frames)[:, seen], rows)
            whole = np.kron(course[apart], space)
            inverse = np.linalg.inv(seen_rows.T @ whole @ seen_rows + 0.09 * np.eye(2 * len(seen)))
            gain = whole[k * count : (k + 1) * count] @ seen_rows @ inverse
            np.testing.assert_allclose(mean[:, k], values[:, seen].reshape(3, -1) @ gain.T)
            left = space - gain @ seen_rows.T @ whole[:, k * count : (k + 1) * count]
            np.testing.assert_allclose(std[0, k], np.sqrt(np.diag(left)))


def test_the_linear_process_has_the_covariance_of_its_oracle():
    """Of two successive states, x' = A x + noise with x ~ N(0, I)."""
    system, covariance = linear_gaussian.Linear(), linear_gaussian.PROCESS.covariance(2)
    step = np.asarray(system.advance(np.eye(2, dtype=np.float32))).T
    np.testing.assert_allclose(step, covariance[2:, :2], atol=1e-6)
    later = step @ step.T + system.noise**2 * np.eye(2)
    np.testing.assert_allclose(later, covariance[2:, 2:], atol=1e-6)
