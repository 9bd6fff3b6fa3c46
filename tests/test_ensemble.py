"""Classical filters against Kalman's answers, and their parts against NumPy and integrals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from test_emulator import small_model

from mclr_jax.assimilation import ensemble
from mclr_jax.assimilation.ensemble import Settings
from mclr_jax.assimilation.observe import Downsample, Identity, Matrix, Operator, Own, Select

PROCESS = oracle.Process()
FRAMES = 12
RNG = np.random.default_rng(0)


def step(key, x):
    noise = jax.random.normal(key, x.shape) * np.sqrt(1 - PROCESS.rho**2)
    return x @ jnp.asarray(PROCESS.step.T, x.dtype) + noise


def run(seen, lag=0, settings=Settings(inflation=1.0), climate=8192, **options):  # noqa: B008
    states = np.random.default_rng(1).normal(size=(climate, 2))
    return ensemble.assimilate(step, states, seen, settings, lag, **options)


@pytest.mark.parametrize(("method", "members"), [("enkf", 4000), ("particle", 16_000)])
def test_filter_and_smoothers_are_kalmans(method, members):
    """One run has frames of each regime; the first state is drawn from its law, or known."""
    lags = np.array([np.inf] * 4 + [2] * 4 + [0] * 4)
    until = np.minimum(np.arange(FRAMES) + lags, FRAMES - 1).astype(int)
    for known in (False, True):
        truth, seen = PROCESS.draw(4, FRAMES, 0.3, missing=(3, 7), seed=2, initial=known)
        found = run(seen, lags, method=method, ensemble=members, forecast=2)
        frames = slice(known, FRAMES + 2)
        mean, std = PROCESS.posterior(seen, np.append(until, [FRAMES - 1] * 2), FRAMES + 2)
        wrong, ratio = oracle.errors(found.members[:, :, frames], mean[:, frames], std[frames])
        assert found.members.shape == (4, members, FRAMES + 2, 2)
        assert wrong < 0.05
        assert abs(ratio - 1) < 0.03
        if known and method == "particle":
            np.testing.assert_allclose(found.members[:, 7, 0], truth[:, 0], atol=1e-6)


def test_the_serial_update_without_localisation_is_kalmans_of_the_ensemble():
    """Mean and covariance exactly, of both frames of a window, with 9 members; one value of five is
    missing and each has its own noise."""
    z, matrix = RNG.normal(size=(2, 9, 4)), RNG.normal(size=(5, 4))
    y, std = RNG.normal(size=5), np.array([0.3, 1.0, 2.0, 0.5, 0.7])
    predicted, y[3] = z[1] @ matrix.T, np.nan
    near = np.ones((5, 4)), np.ones((5, 5))
    found = np.asarray(ensemble.kalman(*map(jnp.asarray, (z, predicted, y, std, *near))))
    whole = np.concatenate(z, 1)
    kept = np.isfinite(y)
    h = np.concatenate([np.zeros((5, 4)), matrix], 1)[kept]
    cov = np.cov(whole.T)
    gain = cov @ h.T @ np.linalg.inv(h @ cov @ h.T + np.diag(std[kept] ** 2))
    after = np.concatenate(found, 1)
    mean = whole.mean(0) + gain @ (y[kept] - h @ whole.mean(0))
    np.testing.assert_allclose(after.mean(0), mean, atol=1e-5)
    np.testing.assert_allclose(np.cov(after.T), cov - gain @ h @ cov, atol=1e-5)


def test_the_localised_update_is_that_of_whitaker_and_hamill_in_numpy():
    """Where values are coordinates, what is predicted for later ones is what members became."""
    z, seen, radius = RNG.normal(size=(2, 6, 8)), [1, 4, 6], 2.0
    y, std = RNG.normal(size=3), 0.8
    operator = Operator(Select(tuple(seen)))
    near = ensemble.weights(operator, (8,), radius)
    inputs = map(jnp.asarray, (z, z[1][:, seen], y, np.float64(std), *near))
    found = np.asarray(ensemble.kalman(*inputs))
    x = z.copy()
    for j, at in enumerate(seen):
        own = x[1, :, at].copy()
        deviation = own - own.mean()
        variance = own.var(ddof=1)
        apart = np.abs(np.arange(8) - at)
        taper = ensemble.gaspari_cohn(np.minimum(apart, 8 - apart), radius)
        for w in range(2):
            covariance = np.array([np.cov(x[w, :, i], own)[0, 1] for i in range(8)])
            gain = taper * covariance / (variance + std**2)
            less = gain / (1 + np.sqrt(std**2 / (variance + std**2)))
            x[w] += gain * (y[j] - own.mean()) - less * deviation[:, None]
    np.testing.assert_allclose(found, x, atol=1e-5)
    assert near[0][0, 5] == 0  # 4 places from place 1


def test_the_taper_is_the_convolution_of_a_cone_with_itself():
    """In three dimensions by its Fourier transform; 5/24 at the radius (Gaspari and Cohn)."""
    r, k = np.linspace(0, 1, 2001), np.linspace(1e-4, 400, 20_001)
    spectrum = np.array([np.trapezoid((1 - r) * r * np.sin(q * r), r) / q for q in k])
    z = np.array([1e-3, 0.3, 0.7, 1.0, 1.4, 1.9, 2.0, 3.0])
    cone = np.array([np.trapezoid(spectrum**2 * k * np.sin(k * d), k) / d for d in z])
    found = ensemble.gaspari_cohn(5 * z, 5.0)
    np.testing.assert_allclose(found, cone / cone[0], atol=1e-4)
    assert found[3] == pytest.approx(5 / 24)
    np.testing.assert_array_equal(found[-2:], 0)


def test_distances_are_on_a_ring_or_a_torus_to_the_nearest_coordinate_of_a_value():
    found, values = ensemble.distances(Operator(Select((0, 5))), (8,))
    np.testing.assert_array_equal(found[1], [3, 4, 3, 2, 1, 0, 1, 2])
    np.testing.assert_array_equal(values, [[0, 3], [3, 0]])
    mean = Operator(Matrix(((0.5, 0.5, 0, 0, 0, 0),)))
    np.testing.assert_array_equal(ensemble.distances(mean, (6,))[0], [[0, 0, 1, 2, 2, 1]])
    field = ensemble.distances(Operator(Downsample(4)), (4, 8, 2))[0].reshape(2, 2, 4, 8, 2)
    np.testing.assert_array_equal(field[0, 0, :, :, 0], field[0, 0, :, :, 1])
    assert field[0, 0, 1, 1, 0] == 0  # its pixels are 1 and 2 of both axes
    assert field[0, 0, 0, 7, 0] == pytest.approx(np.hypot(1, 2))
    with pytest.raises(ValueError, match=r"has no places.*set scheme\.radius=0"):
        ensemble.distances(Operator(Own(np.sum)), (6,))


def test_inflation_and_relaxation_are_their_formulas():
    x, before = RNG.normal(size=(2, 5, 3)) * np.array([1.0, 2.0])[:, None, None]
    found = np.asarray(ensemble.inflated(x, before, 1.1, 0.4))
    want = x.std(0) + 0.4 * (before.std(0) - x.std(0))
    np.testing.assert_allclose(found.std(0), 1.1 * want, rtol=1e-6)
    np.testing.assert_allclose(found.mean(0), x.mean(0), atol=1e-6)


def test_resampling_is_systematic():
    """Copies of each member: its expected number, rounded up or down; unbiased over keys."""
    weights = np.array([0.1, 0.45, 0.05, 0.4])
    predicted, y = 3 * np.sqrt(-2 * np.log(weights))[:, None], jnp.array([0.0, np.nan])
    counts = np.array([
        np.bincount(ensemble.resampled(predicted, y, 3.0, jax.random.key(i)), minlength=4)
        for i in range(300)
    ])  # fmt: skip
    assert np.all(counts >= np.floor(4 * weights))
    assert np.all(counts <= np.ceil(4 * weights))
    np.testing.assert_allclose(counts.mean(0), 4 * weights, atol=0.1)


def small(frames=6, **options):
    return PROCESS.draw(2, frames, 0.3, **options)[1]


@pytest.mark.parametrize("method", ["enkf", "particle"])
def test_a_continued_run_is_the_run_without_a_pause(method):
    options = {"method": method, "ensemble": 5, "settings": Settings()}
    seen, lag = small(8), 2
    first, second = (dataclasses.replace(seen, values=seen.values[:, part])
                     for part in (slice(0, 4), slice(4, None)))  # fmt: skip
    whole = run(seen, lag, **options)
    start = run(first, lag, **options)
    rest = run(second, lag, state=start.state, **options)
    assert (start.first, rest.first, rest.before, rest.state.frames) == (0, 2, 2, 8)
    np.testing.assert_allclose(rest.members, whole.members[:, :, 2:], atol=1e-4)
    np.testing.assert_allclose(start.members[:, :, :2], whole.members[:, :, :2], atol=1e-4)
    np.testing.assert_allclose(rest.state.members, whole.state.members, atol=1e-4)
    # The second trajectory is the same beside others or alone: its number decides.
    alone = dataclasses.replace(seen, values=seen.values[:1])
    np.testing.assert_allclose(run(alone, lag, **options).members, whole.members[:1], atol=1e-4)


def test_states_off_the_attractor_are_moved_back_and_nan_is_an_error():
    def away(key, x):
        del key
        return 1e9 * x

    states, seen = np.random.default_rng(0).normal(size=(64, 2)), small(3)
    options = {"ensemble": 4, "method": "enkf"}
    found = ensemble.assimilate(away, states, seen, Settings(clip=2.0), 0, **options).members
    limits = states.mean(0) + 2 * states.std(0) * np.array([[-1], [1]])
    assert np.all(found[:, :, 1:] >= limits[0] - 1e-5)
    assert np.all(found[:, :, 1:] <= limits[1] + 1e-5)
    with pytest.raises(FloatingPointError, match="of 2 of 2 trajectories are not finite"):
        ensemble.assimilate(lambda key, x: x * np.nan, states, seen, Settings(), 0, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": 1}, "ensemble is 1"),
        ({"method": "enks"}, "method.*'enks'"),
        ({"time_step": 0.2, "timed": 0.5}, "time step of 0.5, the model 0.2"),
        ({"state": ensemble.State(np.zeros((2, 5, 1, 3)), np.zeros((2, 0, 1)), 4)},
         r"\(2, 5, 3, 1\); expected \(2, 4, 2, 1\)"),
        ({"ensemble": 10**9}, "2 trajectories of 1000000000 members and 7 frames need"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options, message):
    seen = dataclasses.replace(small(), time_step=options.pop("timed", 0.0))
    with pytest.raises(ValueError, match=message):
        run(seen, **({"ensemble": 4} | options))


@pytest.mark.parametrize("variance", [False, True])
def test_an_emulator_forecasts_in_the_units_of_the_data(variance):
    """x' = x + b in the network's units; the noise has the learned standard deviation."""
    offset, scale = np.array([1.0, -2.0]), np.array([3.0, 0.5])
    model, params = small_model(
        bias=[0.3, -0.1, *[2 * np.log(0.2), 2 * np.log(0.4)] * variance],
        offset=tuple(offset), scale=tuple(scale), variance=variance,
    )  # fmt: skip
    x = RNG.normal(size=(4000, 2))
    found = ensemble.Emulator(model, params)(jax.random.key(0), jnp.asarray(x, jnp.float32))
    change = (np.asarray(found) - x) / scale - np.array([0.3, -0.1])
    std = np.array([0.2, 0.4]) * variance
    np.testing.assert_allclose(change.mean(0), 0, atol=4 * std.max() / 63 + 1e-5)
    np.testing.assert_allclose(change.std(0), std, atol=0.02 * variance + 1e-5)


def test_each_state_gets_one_of_the_errors_of_an_emulator():
    model, params = small_model(bias=[0.0, 0.0])
    errors = np.array([[1.0, 2.0], [-3.0, 5.0], [0.0, 0.5]], np.float32)
    x = np.zeros((3000, 2), np.float32)
    found = ensemble.Emulator(model, params, errors)(jax.random.key(0), x)
    kinds, counts = np.unique(found, axis=0, return_counts=True)
    np.testing.assert_allclose(kinds, np.unique(errors, axis=0))
    assert counts.min() > 900


def test_all_coordinates_without_a_radius_have_weight_1():
    near, beside = ensemble.weights(Operator(Identity()), (3,), 0.0)
    assert near.tolist() == beside.tolist() == np.ones((3, 3)).tolist()
