"""The terms that objectives share, each against its definition."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Level

from mclr_jax import noise
from mclr_jax.objectives import base
from mclr_jax.types import Condition, label_of

DRAWS = 40_000


def condition(n=6, classes=3):
    """A condition of n rows that has everything."""
    rows = jnp.arange(n)
    keys = jax.random.split(jax.random.key(9), n)
    return Condition(rows % classes, 0.1 * rows, rows[:, None] * jnp.ones(9), keys)


def same(a, b):
    """Whether two trees have the same numbers, keys among them."""
    return jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), a, b))


def test_an_interval_includes_its_upper_end_and_not_its_lower_one():
    """In one frame, and in all of several frames; without an interval every level is inside."""
    levels = jnp.array([0.25, 0.5, 0.75, 1.5, 1.75])
    expected = [False, False, True, True, False]
    np.testing.assert_array_equal(base.inside(levels, (0.5, 1.5)), expected)
    frames = jnp.array([[1.5, 0.75], [0.5, 0.75], [1.5, 1.75], [1.5, 1.5]])
    np.testing.assert_array_equal(base.inside(frames, (0.5, 1.5)), [True, False, False, True])
    np.testing.assert_array_equal(base.inside(frames, ()), [True] * 4)


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [(), (3,)])
def test_the_log_ratio_is_the_gain_over_the_reference_summed_over_dimensions(frames):
    rng = np.random.default_rng(0)
    denoised, reference, x0 = (jnp.asarray(a) for a in rng.normal(size=(3, 5, 3, 4)))
    sigma = jnp.asarray(rng.uniform(0.5, 2, size=(5, *frames)), jnp.float32)
    problem = cases.problem(Level(1.0), weight=lambda sigma: 1 / sigma**2)
    got = base.log_ratio(problem, sigma, denoised, reference, x0)
    weight = 1 / np.asarray(sigma).reshape(5, *frames, *[1] * (2 - len(frames))) ** 2
    expected = (weight * ((reference - x0) ** 2 - (denoised - x0) ** 2)).sum((1, 2))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


# ---- calls of the network ------------------------------------------------------------------------


def test_one_call_for_several_inputs_has_the_answers_of_separate_calls():
    calls, told = [], condition()

    def denoise(x, sigma, condition):  # depends on all that it is shown
        calls.append(len(x))
        drops = jax.vmap(jax.random.uniform)(condition.dropout_keys)
        row = sigma + label_of(condition) + condition.strength + condition.augment.sum(-1) + drops
        return jnp.tanh(x) * row[:, None]

    x, sigma = jax.random.normal(jax.random.key(0), (6, 2)), jnp.arange(1.0, 7.0)
    some = jax.tree.map(lambda v: v[::3], (x + 1, 2 * sigma, told))
    last = (x[:1], sigma[:1], jax.tree.map(lambda v: v[:1], told))
    inputs = [(x, sigma, told), some, last]
    got = base.in_one_call(denoise, *inputs)
    assert calls == [9]
    assert [len(answer) for answer in got] == [6, 2, 1]
    for answer, alone in zip(got, inputs, strict=True):
        np.testing.assert_allclose(answer, denoise(*alone), rtol=1e-6)


# ---- draws ---------------------------------------------------------------------------------------


def many():
    return jax.random.split(jax.random.key(0), DRAWS)


def frequencies(classes, own):
    """Of each class among the rows of each own label, (3, 3)."""
    pairs = np.bincount(3 * np.asarray(own) + np.asarray(classes), minlength=9).reshape(3, 3)
    return pairs / pairs.sum(1, keepdims=True)


@pytest.mark.parametrize("by_row", [False, True])
def test_a_class_is_drawn_by_its_probability_and_never_the_excluded_one(by_row):
    prior = np.array([0.5, 0.2, 0.3])
    logits = jnp.log(jnp.asarray(prior)) + 1.7  # need not be normalised
    own = jnp.arange(DRAWS) % 3
    if by_row:  # rows whose own label is c have logits turned by c
        logits = jnp.stack([jnp.roll(logits, c) for c in range(3)])[own]
        rows = np.stack([np.roll(prior, c) for c in range(3)])
    else:
        rows = np.tile(prior, (3, 1))
    error = 4 * np.sqrt(0.25 / (DRAWS / 3))
    found = frequencies(base.draw_label(many(), logits), own)
    np.testing.assert_allclose(found, rows, atol=error)
    found = frequencies(base.draw_label(many(), logits, other_than=own), own)
    assert np.all(np.diag(found) == 0)
    expected = rows * (1 - np.eye(3))
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=error)


def test_a_strength_is_drawn_by_its_law_only_where_the_network_takes_one():
    told, keys = condition(DRAWS), many()
    fixed, unchanged = base.draw_strength(
        told, keys, cases.problem(Level(1.0)), 0.7, base.arcsine_law
    )
    assert fixed == 0.7
    assert unchanged is told
    problem = cases.problem(Level(1.0), strength=(0.5, 2.5))
    strength, shown = base.draw_strength(
        told, keys, problem, 0.7, lambda u, low, high: low + u * (high - low)
    )
    np.testing.assert_array_equal(shown.strength, strength)
    assert same(shown.replace(strength=told.strength), told)
    spread = np.abs(np.sort(strength) - np.linspace(0.5, 2.5, DRAWS)).max() / 2
    assert spread < 1.95 / np.sqrt(DRAWS)  # Kolmogorov and Smirnov, 1 in 1000
    again, _ = base.draw_strength(told, keys[:9], problem, 0.7, lambda u, low, high: u)
    np.testing.assert_allclose(0.5 + 2 * again, strength[:9], rtol=1e-6)


def test_the_arcsine_law_has_its_distribution():
    """P(share of the range < y) = 2 / pi arcsin(sqrt(y)), from one end to the other."""
    uniform = jnp.linspace(0, 1, 1001)
    strength = np.asarray(base.arcsine_law(uniform, 0.5, 2.5), np.float64)
    np.testing.assert_allclose(strength[[0, -1]], [0.5, 2.5])
    share = np.clip((strength - 0.5) / 2, 0, 1)
    np.testing.assert_allclose(2 / np.pi * np.arcsin(np.sqrt(share)), uniform, atol=1e-3)


def test_of_one_class_there_is_no_other():
    with pytest.raises(ValueError, match="the data have one class; train an unconditional model"):
        base.draw_label(many(), jnp.zeros(1), other_than=jnp.zeros(DRAWS, jnp.int32))


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [(), (3,)])
def test_noise_is_added_at_its_level_and_labels_are_dropped_at_their_rate(frames):
    told = condition(DRAWS)
    x0 = jax.random.normal(jax.random.key(1), (DRAWS, 3, 2))
    problem = cases.problem(noise.LogNormal(-0.4, 1.2), frames=frames)
    noisy = jax.jit(lambda keys: base.perturb(problem, x0, told, keys, 0.3))(many())
    assert noisy.sigma.shape == (DRAWS, *frames)
    log_sigma = np.log(np.asarray(noisy.sigma, np.float64))
    np.testing.assert_allclose(log_sigma.mean(0), np.full(frames, -0.4), atol=4 * 1.2 / 200)
    np.testing.assert_allclose(log_sigma.std(0), np.full(frames, 1.2), atol=4 * 1.2 / 280)
    added = np.asarray(noisy.x - x0, np.float64)
    n = added / np.asarray(noisy.sigma).reshape(DRAWS, *frames, *[1] * (2 - len(frames)))
    n = n.reshape(DRAWS, 6)
    np.testing.assert_allclose(np.cov(n.T), np.eye(6), atol=4 * 1.5 / 200)
    assert np.abs(n.mean(0)).max() < 4 / 200
    dropped = np.asarray(noisy.condition.label == 3)
    np.testing.assert_array_equal(noisy.condition.label[~dropped], told.label[~dropped])
    assert abs(dropped.mean() - 0.3) < 4 * np.sqrt(0.21) / 200
    assert same(noisy.condition.replace(label=told.label), told)
    # what is drawn apart is independent: levels, noise, labels and what the keys give later
    later = np.asarray(jax.vmap(jax.random.normal)(noisy.keys))
    level = log_sigma.reshape(DRAWS, -1)[:, 0]
    draws = np.stack([level, n[:, 0], dropped, later, np.asarray(x0)[:, 0, 0]])
    np.testing.assert_allclose(np.corrcoef(draws), np.eye(5), atol=4 / 200)
