"""Metrics reduced over rows, parts and devices are those of the whole, computed in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mclr_jax import reductions


def of(values, weights, kept):
    """A metric of each kind, of rows (B,)."""
    return {
        "mean": reductions.mean(values),
        "some": reductions.mean(values, where=kept),
        "none": reductions.mean(values, where=jnp.zeros_like(kept)),
        "ratio": reductions.ratio(values * weights, weights),
        "share": reductions.effective_share(weights),
        "largest": reductions.maximum(values),
    }


def by_hand(values, weights, kept):
    values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
    found = {
        "mean": values.mean(),
        "share": weights.sum() ** 2 / (len(weights) * (weights**2).sum() or np.inf),
        "largest": values.max(),
    }
    if kept.any():
        found["some"] = values[kept].mean()
    if weights.any():
        found["ratio"] = np.average(values, weights=weights)
    return found


def rows(seed, count):
    """Values, non-negative weights of which some are 0, and a subset that may be empty."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=count) + rng.choice([-3, 0, 3])
    weights = rng.exponential(size=count) * (rng.uniform(size=count) < 0.5)
    return [np.float32(values), np.float32(weights), rng.uniform(size=count) < rng.uniform()]


def together(*parts):
    """The metrics of several parts of a batch, from those of each part."""
    return reductions.over_rows(jax.tree.map(lambda *x: jnp.stack(x), *parts))


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.integers(1, 24), st.data())
def test_any_split_into_parts_is_the_whole(seed, count, data):
    """Of whatever lengths, in whatever order they are added."""
    everything = rows(seed, count)
    cuts = data.draw(st.lists(st.integers(1, count - 1), max_size=5) if count > 1 else st.just([]))
    ends = sorted({0, count, *cuts})
    parts = [
        reductions.over_rows(of(*(values[a:b] for values in everything)))
        for a, b in itertools.pairwise(ends)
    ]
    order = data.draw(st.permutations(parts))  # with a negative maximum in some of them
    report = reductions.report(together(*order))
    assert_same(report, by_hand(*everything))
    assert all(isinstance(value, float) for value in report.values())


def test_devices_together_have_the_whole():
    """On every device."""

    def device(*shard):
        return reductions.over_devices(reductions.over_rows(of(*shard)), "data")

    run = jax.pmap(device, axis_name="data")
    for seed in range(4):
        everything = rows(seed, 24)
        everything[0] -= 9 * seed  # with a negative maximum, which a start from 0 would lose
        found = jax.device_get(run(*(values.reshape(8, 3) for values in everything)))
        for one in (0, 7):
            report = reductions.report(jax.tree.map(lambda x, i=one: x[i], found))
            assert_same(report, by_hand(*everything))


def test_empty_subsets_are_left_out_and_add_nothing():
    nothing = reductions.over_rows(of(jnp.ones(2), jnp.zeros(2), jnp.zeros(2, bool)))
    assert reductions.report(nothing) == {"mean": 1.0, "share": 0.0, "largest": 1.0}
    values = jnp.array([jnp.nan, 5.0])  # where a row is not counted its value has no effect
    some = {"some": reductions.mean(values, where=jnp.array([False, True]))}
    assert reductions.report(reductions.over_rows(some)) == {"some": 5.0}
    total = together(reductions.over_rows(some), {"some": nothing["some"]})
    assert reductions.report(total) == {"some": 5.0}


@pytest.mark.parametrize("reduce", ["rows", "parts", "pmap"])
@pytest.mark.parametrize("first", [True, False])
def test_what_is_not_a_number_is_reported(reduce, first):
    """A run must not go on over it, wherever it stands."""
    bad, good = jnp.array([jnp.nan]), jnp.array([3.0])
    pair = [bad, good] if first else [good, bad]

    def one(values):
        return reductions.over_rows(of(values, values, jnp.ones(len(values), bool)))

    if reduce == "rows":
        found = one(jnp.concatenate(pair))
    elif reduce == "parts":
        found = together(one(pair[0]), one(pair[1]))
    else:
        device = jax.pmap(
            lambda values: reductions.over_devices(one(values), "data"),
            axis_name="data",
            devices=jax.devices()[:2],
        )
        found = jax.tree.map(lambda x: np.asarray(x[0]), device(jnp.stack(pair)))
    report = reductions.report(found)
    assert report.pop("largest") == np.inf  # devices' maximum may lose a NaN
    assert set(report) == {"mean", "some", "ratio", "share"}
    assert np.isnan(list(report.values())).all(), report
