"""The cases of benchmarks/niche.py against NumPy, and filters of states with a past."""

import jax
import jax.numpy as jnp
import niche
import numpy as np
import pytest

from mclr_jax.assimilation import ensemble, observe
from mclr_jax.assimilation.dynamics import Lorenz96

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("name", ["plain", "abs", "sparse", "rare12", "means", "partial"])
def test_a_case_observes_what_it_says(name):
    case = niche.CASES[name]
    truth, seen = case.observed("test", 3)
    known = np.arange(40)[:: 2 if name == "partial" else 1]
    want = truth[..., :: 4 if name == "sparse" else 2]
    assert truth.shape == (3, 100, len(known))
    frames = {"rare12": np.arange(11, 100, 12), "means": np.arange(7, 100, 8)}
    if name == "abs":
        want = np.abs(want)
    if name == "means":
        want = np.stack([want[:, max(0, k - 7) : k + 1].mean(1) for k in range(100)], 1)
    rows = frames.get(name, np.arange(100))
    assert (np.isfinite(seen.values).all((0, 2)).nonzero()[0] == rows).all()
    noise = (seen.values - want)[:, rows]
    assert abs(noise.std() - 1) < 0.1
    assert abs(noise.mean()) < 0.15
    exact = seen.operator(jnp.asarray(truth))[:, rows]
    np.testing.assert_allclose(exact, want[:, rows], atol=1e-5)


def test_trajectories_of_the_cases_follow_the_equations():
    """And those of the two sets differ."""
    truth, _ = niche.CASES["plain"].observed("test", 2)
    np.testing.assert_allclose(Lorenz96().advance(truth[:, :-1]), truth[:, 1:], atol=1e-4)
    assert not np.allclose(truth, niche.CASES["plain"].observed("validation", 2)[0])


def test_partial_records_have_every_second_coordinate_and_their_past():
    state = Lorenz96().spin_up(jax.random.key(0))
    whole = Lorenz96().trajectory(jax.random.key(1), state, 9)
    half = niche.Half().trajectory(jax.random.key(1), state, 9)
    np.testing.assert_array_equal(half, whole[:, ::2])
    past = niche.Past().trajectory(jax.random.key(1), state, 6)
    assert past.shape == (6, *niche.Past.shape)
    for back in range(4):
        np.testing.assert_array_equal(past[:, :, 0, back], half[3 - back : 9 - back])


def test_the_mean_of_frames_has_the_variance_of_a_mean():
    mean = niche.Mean((0, 2), 4)
    x = RNG.normal(size=(2, 9, 3)).astype(np.float32)
    want = np.stack([x[:, k - 3 : k + 1, ::2].mean(1) for k in range(3, 9)], 1)
    np.testing.assert_allclose(mean(x)[:, 3:], want, atol=1e-6)
    np.testing.assert_allclose(mean(jnp.ones((1, 9, 3)), 2)[:, 3:], 1 / 4)


def test_a_filter_of_states_with_a_past_is_that_of_their_newest_frames():
    """Where only these are observed; also in the smoother."""
    system, frames = Lorenz96(), 8
    states = np.asarray(jax.vmap(system.spin_up)(jax.random.split(jax.random.key(2), 24)))
    truth = np.asarray(system.trajectory(jax.random.key(3), states[0], frames))[None]
    case = niche.Case(4)
    operator = observe.Operator(observe.Select(tuple(range(0, 40, 4))))
    seen = observe.Observations(truth[..., ::4] + RNG.normal(size=(1, frames, 10)), operator, 1.0)
    settings, lags = ensemble.Settings(radius=4.0, inflation=1.0), np.full(frames, np.inf)
    plain = ensemble.assimilate(system.step, states[1:], seen, settings, lags, ensemble=16)
    step = jax.tree_util.Partial(niche.remembering, jax.tree_util.Partial(system.step))
    twice = np.repeat(states[1:, :, None, None], 3, -1)
    found = ensemble.assimilate(
        step, twice, case.with_past(seen, 3), settings, lags, ensemble=16
    ).members[..., 0, :]
    np.testing.assert_allclose(found[..., 0], plain.members, atol=2e-2)
    np.testing.assert_allclose(found[0, :, 4, :, 1], found[0, :, 3, :, 0], atol=1e-3)


def test_means_of_a_state_that_stays_are_its_observations():
    states = RNG.normal(size=(30, 40)).astype(np.float32)
    truth = np.tile(states[:1], (6, 1))[None]
    case = niche.Case(2, 1, 4)
    operator = observe.Operator(observe.Select(tuple(range(0, 40, 2))))
    values = truth[..., ::2] + RNG.normal(size=(1, 6, 20))
    direct = observe.Observations(values, operator, 1.0)
    settings, lags = ensemble.Settings(inflation=1.0, radius=4.0), np.zeros(6)

    def stay(key, states):
        return states

    plain = ensemble.assimilate(stay, states[1:], direct, settings, lags, ensemble=16)
    step = jax.tree_util.Partial(niche.remembering, jax.tree_util.Partial(stay))
    still = np.repeat(states[1:, :, None, None], 4, -1)
    found = ensemble.assimilate(
        step, still, case.with_past(direct, 4), settings, lags, ensemble=16
    ).members[..., 0, 0]
    np.testing.assert_allclose(found[:, :, 0], plain.members[:, :, 0], atol=1e-4)
