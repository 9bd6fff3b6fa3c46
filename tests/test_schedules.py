"""Schedules entry by entry."""

import numpy as np
import pytest

from mclr_jax.assimilation.schedules import Scheme, lags, levels, updates


def until(lag, frames, before=0):
    k = np.arange(-before, frames)
    return np.minimum(k + lag, frames - 1).astype(int)


def order(observed, lag, window, **options):
    return [tuple(update) for update in updates(np.array(observed, bool), lag, window, **options)]


def test_the_order_of_the_updates():
    every = [1] * 5
    assert order(every, until(0, 5), 4) == [(1, 0), (2, 1), (3, 2), (4, 3), (5, 4)]
    assert order(every, until(2, 5), 4) == [(3, 2), (4, 3), (5, 4)]
    assert order(every, until(np.inf, 5), 5) == [(5, 4)]
    # Frames without an observation come with the observation before them.
    assert order([1, 0, 0, 1, 0], until(0, 5), 8) == [(3, 0), (5, 3)]
    assert order([0, 0, 1, 0, 0], until(0, 5), 8) == [(2, -1), (5, 2)]
    # A forecast comes with the last observation; at most half a window is new.
    assert order(every, until(0, 5), 4, forecast=2)[-2:] == [(6, 4), (7, 4)]
    assert order([1, 1], until(np.inf, 2), 8, forecast=6) == [(8, 1)]
    # Blocks of a long trajectory.
    assert order([1] * 9, until(np.inf, 9), 4) == [(4, 3), (6, 5), (8, 7), (9, 8)]
    # A continued run, with two frames before it that may see more now.
    assert order([1] * 3, until(2, 3, before=2), 8, started=True) == [(1, 0), (2, 1), (3, 2)]
    assert order([0, 1], until(0, 2), 8, started=True) == [(1, -1), (2, 1)]


def test_updates_never_show_more_than_allowed_and_end_with_all():
    rng = np.random.default_rng(0)
    for _ in range(200):
        frames, window = rng.integers(1, 12), rng.integers(2, 9)
        observed, lag = rng.random(frames) < 0.6, rng.integers(0, window, frames)
        allowed = np.minimum(np.arange(frames) + lag, frames - 1)
        found, best = updates(observed, allowed, window), np.full(frames, -2)
        ends = [0, *(update.end for update in found)]
        assert np.all(np.diff(ends[1:]) > 0)
        for end, seen in found:
            assert not observed[seen + 1 : end].any()  # the window shows no other observation
            k = np.arange(max(0, end - window), min(end, frames))
            k = k[allowed[k] >= seen]
            best[k] = seen
        for f in range(frames):
            past = np.flatnonzero(observed[: allowed[f] + 1])
            assert best[f] == (past.max() if len(past) else -1), (observed, lag, window, found)


def test_levels_of_an_update():
    scheme = Scheme(sigma_min=0.01, restart=1.0)
    new, clean = np.array([False, False, True]), np.array([True, False, False])
    grid = levels(scheme, new, clean, 3, 100.0)
    np.testing.assert_allclose(grid, [[0, 1, 100], [0, 0.1, 1], [0, 0.01, 0.01], [0, 0, 0]])


def test_a_regime_is_a_lag():
    np.testing.assert_array_equal(lags("filter", 2, 3), [0, 0])
    np.testing.assert_array_equal(lags("fixed_lag", 2, 3), [3, 3])
    np.testing.assert_array_equal(lags("batch", 2), [np.inf, np.inf])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"restart": 30.0}, "scheme.restart is 30.0; expected a number above 0.006 and at most 20"),
        ({"sigma_min": 1e-40}, "scheme.sigma_min is 1e-40; expected a number of at least 1e-09"),
        ({"method": "ancestor"}, "Did you mean 'ancestral'"),
    ],
)
def test_schemes_without_a_meaning_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Scheme(**values)


@pytest.mark.parametrize("text", ["-1", "nan", "0.5", "0:2,10:1", "0:2,5:1,5:0", "2:1", "x"])
def test_lags_without_a_meaning_are_refused(text):
    with pytest.raises(ValueError, match=r"The lag is .*frames below 10 in rising order"):
        lags("fixed_lag", 10, text.split(","))
    with pytest.raises(ValueError, match="Did you mean 'filter'"):
        lags("filtre", 3)
