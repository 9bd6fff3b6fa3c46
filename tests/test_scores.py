"""Metrics of analyses against closed forms and independent computations."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mclr_jax.assimilation import scores

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=(3, 5, 2))
MEMBERS = RNG.normal(size=(3, 7, 5, 2)) * 1.5 + 0.3


def test_rmse_in_both_units():
    mean = TRUTH + np.array([3.0, -4.0])
    assert scores.rmse(mean, TRUTH) == pytest.approx(np.sqrt(12.5))
    assert scores.rmse(mean, TRUTH, np.array([3.0, 2.0])) == pytest.approx(np.sqrt(2.5))


def test_crps_is_fair():
    """Against all pairs written out, and its expectation for 2 members of a normal distribution.

    With truth and members from N(0, 1) it is E|x - y| - E|x - x'| / 2 = 1 / sqrt(pi), for any E.
    """
    total = 0
    for n, t, d in np.ndindex(*TRUTH.shape):
        x = MEMBERS[n, :, t, d]
        pairs = np.mean([abs(a - b) for a, b in itertools.permutations(x, 2)])
        total += np.abs(x - TRUTH[n, t, d]).mean() - pairs / 2
    assert scores.crps(MEMBERS, TRUTH) == pytest.approx(total / TRUTH.size)
    for size in (2, 10):
        x, y = RNG.normal(size=(1, size, 200_000, 1)), RNG.normal(size=(1, 200_000, 1))
        assert scores.crps(x, y) == pytest.approx(1 / np.sqrt(np.pi), abs=6e-3)
    with pytest.raises(ValueError, match="2 members or more; got 1"):
        scores.crps(MEMBERS[:, :1], TRUTH)


def test_spread_and_skill_agree_for_exchangeable_members():
    for size in (2, 10):
        x, y = RNG.normal(size=(1, size, 100_000, 1)), RNG.normal(size=(1, 100_000, 1))
        assert scores.spread_skill(x, y) == pytest.approx(1, abs=0.01)
        assert scores.spread_skill(x / 2, y) == pytest.approx(
            0.5 * np.sqrt((size + 1) / (size + 0.25)), abs=0.01
        )


def test_rank_histogram():
    members = np.array([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).repeat(4, 2)
    truth = np.array([0.0, 1.5, 1.7, 9.0]).reshape(1, 4, 1)
    np.testing.assert_array_equal(scores.rank_histogram(members, truth), [0.25, 0.5, 0, 0.25])
    tied = scores.rank_histogram(np.array([1.0, 2, 2]).reshape(1, 3, 1, 1), np.full((1, 1, 1), 2.0))
    np.testing.assert_allclose(tied, [0, 1 / 3, 1 / 3, 1 / 3])
    x, y = RNG.normal(size=(1, 4, 100_000, 1)), RNG.normal(size=(1, 100_000, 1))
    np.testing.assert_allclose(scores.rank_histogram(x, y), 0.2, atol=0.01)


@pytest.mark.parametrize("count", [40, 57])
def test_w1_is_scipys(count):
    a, b = RNG.normal(size=(40, 3)), 2 * RNG.normal(size=(count, 3)) + 1
    expected = [stats.wasserstein_distance(a[:, i], b[:, i]) for i in range(3)]
    np.testing.assert_allclose(scores.wasserstein1(a, b), expected, rtol=1e-10)


def test_log_prior_and_likelihood_are_those_of_scipy():
    """The prior of a linear process is one normal density of the whole path."""
    step, std = np.array([[0.9, 0.2], [-0.1, 0.8]]), np.array([0.3, 0.5])
    path = RNG.normal(size=(4, 6, 2))
    expected = [
        sum(
            stats.multivariate_normal.logpdf(x[k + 1], step @ x[k], np.diag(std**2))
            for k in range(5)
        )
        for x in path
    ]
    np.testing.assert_allclose(scores.log_prior(path, lambda x: x @ step.T, std), expected)
    values = path[..., :1] + 0.1
    values[:, 2] = np.nan
    got = scores.log_likelihood(values, path[..., :1], 0.25)
    np.testing.assert_allclose(got, 5 * stats.norm.logpdf(0.1, scale=0.25))


def test_spectrum_of_single_waves_and_of_all():
    n = 16
    y, x = np.meshgrid(np.arange(n), np.arange(n), indexing="ij")
    field = 3 + 2 * np.sin(2 * np.pi * 3 * x / n) + np.cos(2 * np.pi * (3 * y + 4 * x) / n)
    spectrum = scores.energy_spectrum(field)
    expected = np.zeros(9)
    expected[[0, 3, 5]] = 9, 2, 0.5  # the mean squared, and half the squared amplitudes
    np.testing.assert_allclose(spectrum, expected, atol=1e-12)
    noise = RNG.normal(size=(2, n, n))
    assert np.all(scores.energy_spectrum(noise).sum(-1) < (noise**2).mean((1, 2)))


def test_a_summary_says_what_can_be_said():
    found = scores.summary(MEMBERS, TRUTH, (2.0, 2.0))
    assert found["standardised"] == pytest.approx(found["rmse"] / 2)
    assert found.keys() == {"rmse", "standardised", "crps", "spread_skill"}
    assert scores.summary(MEMBERS[:, :1], TRUTH, ()).keys() == {"rmse"}
