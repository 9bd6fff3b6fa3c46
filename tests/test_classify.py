"""Classification of noisy data against Bayes' rule by quadrature, on a mixture in one dimension."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Level
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from mclr_jax import noise
from mclr_jax.objectives.base import Batch, Models
from mclr_jax.objectives.classify import Classify
from mclr_jax.types import Condition

DRAWS = 40_000
PRIOR = np.array([0.5, 0.2, 0.3])
MEANS = np.array([[-1.5, 1.0], [0.0, 2.0], [-0.5, 0.7]])
STDS = np.array([[0.3, 0.4], [0.5, 0.2], [0.4, 0.3]])
WEIGHTS = np.array([[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]])
LEVELS = noise.LogUniform(0.2, 3.0)


def log_joint(x, sigma, xp=np, logsumexp=logsumexp):
    """log [p(c) p_sigma(x | c)], (n, 3), of x (n,) and sigma (n,) or ()."""
    variance = STDS**2 + xp.broadcast_to(sigma, x.shape)[:, None, None] ** 2
    distance = (x[:, None, None] - MEANS) ** 2
    log_normal = -distance / (2 * variance) - xp.log(2 * np.pi * variance) / 2
    return logsumexp(np.log(WEIGHTS) + log_normal, axis=-1) + np.log(PRIOR)


def bayes(x, sigma, *unused):
    """The logits of the exact posterior, as a model."""
    del unused
    return log_joint(x[:, 0], sigma, jnp, jax.nn.logsumexp)


def integrate(values, sigmas):
    """E values(x, log posterior) over x_sigma and over `sigmas` (S,); (n,), (n, 3) -> (n,)."""
    x = np.linspace(-20, 20, 8001)
    total = 0.0
    for sigma in sigmas:
        joint = log_joint(x, sigma)
        density = np.exp(logsumexp(joint, axis=-1))
        total += np.sum(density * values(x, log_softmax(joint, axis=-1))) * (x[1] - x[0])
    return total / len(sigmas)


def entropy(x, log_p):
    return -(np.exp(log_p) * log_p).sum(-1)


@functools.cache
def data(n=DRAWS):
    """Clean data (n, 1) and labels (n,) drawn from the mixture, and keys."""
    rng = np.random.default_rng(0)
    label = rng.choice(3, n, p=PRIOR)
    part = (rng.uniform(size=n) > WEIGHTS[label, 0]).astype(int)
    x0 = MEANS[label, part] + STDS[label, part] * rng.normal(size=n)
    keys = jax.random.split(jax.random.key(0), n)
    return jnp.asarray(x0[:, None], jnp.float32), jnp.asarray(label, jnp.int32), keys


def classify(model, x0, label, keys, levels=LEVELS, **given):
    """The loss and whether the first choice was right, (n,) each."""
    models = Models(cases.no_answer, model)
    batch = Batch(x0, Condition(label, **given))
    loss, metrics = Classify()(models, cases.problem(levels), batch, keys)
    return loss, metrics["accuracy"].parts[0]


def run(model, levels=LEVELS):
    found = jax.jit(lambda *data: classify(model, *data, levels))(*data())
    return [np.asarray(values, np.float64) for values in found]


# The midpoints of 24 strata of ln sigma, for the log-uniform distribution.
MIDPOINTS = np.exp(np.log(0.2) + np.log(3.0 / 0.2) * (np.arange(24) + 0.5) / 24)


@pytest.mark.parametrize(
    ("levels", "sigmas"), [(Level(0.8), [0.8]), (LEVELS, MIDPOINTS)], ids=["one", "many"]
)
def test_the_loss_of_the_exact_posterior_is_the_conditional_entropy(levels, sigmas):
    """H(c | x_sigma), and its accuracy that of the best guess, E max_c p(c | x_sigma)."""
    loss, correct = run(bayes, levels)
    error = loss.std() / np.sqrt(DRAWS)
    assert error < 0.005
    assert abs(loss.mean() - integrate(entropy, sigmas)) < 4 * error
    best = integrate(lambda x, log_p: np.exp(log_p.max(-1)), sigmas)
    assert abs(correct.mean() - best) < 4 * np.sqrt(best * (1 - best) / DRAWS)


@functools.partial(jax.jit, static_argnames="levels")
def excess(table, levels):
    """What logits moved by table[0] sin(2 x + 3 table[1]) add to each loss, and its slope, (n,)."""

    def loss(size):
        def model(x, sigma, condition):
            return bayes(x, sigma) + size * table[0] * jnp.sin(2 * x + 3 * table[1])

        return classify(model, *data(), levels)[0]

    return loss(1.0) - loss(0.0), jax.jvp(loss, (0.0,), (1.0,))[1]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.2, 3))
def test_moving_the_logits_raises_the_loss_by_the_divergence(seed, size):
    """E KL(posterior, softmax of the moved logits) > 0; its slope at the posterior is zero."""
    table = np.random.default_rng(seed).normal(size=(2, 3)) * np.array([[size], [1.0]])

    def divergence(x, log_p):
        moved = log_softmax(log_p + table[0] * np.sin(2 * x[:, None] + 3 * table[1]), axis=-1)
        return (np.exp(log_p) * (log_p - moved)).sum(-1)

    expected = integrate(divergence, [0.8])
    actual, slope = (np.asarray(v, np.float64) for v in excess(jnp.float32(table), Level(0.8)))
    assert expected > 0
    assert abs(actual.mean() - expected) < 5 * actual.std() / np.sqrt(DRAWS) + 1e-6
    assert abs(slope.mean()) < 5 * slope.std() / np.sqrt(DRAWS) + 1e-6


def test_the_model_gets_the_noise_level_but_never_the_label():
    seen = []

    def model(x, sigma, condition):
        seen.append((x, sigma, condition))
        return jnp.zeros((len(x), 3))

    x0, label, keys = (a[:4000] for a in data())
    augment = jnp.arange(4000.0)[:, None] * jnp.ones(9)
    loss, correct = classify(model, x0, label, keys, augment=augment, dropout_keys=keys)
    ((x, sigma, condition),) = seen
    np.testing.assert_array_equal(condition.label, np.full(4000, 3))
    np.testing.assert_array_equal(condition.augment, augment)
    assert jnp.all(condition.dropout_keys == keys)
    assert condition.strength is None
    n = np.asarray((x - x0)[:, 0] / sigma)  # x is x0 + sigma n for the sigma that is told
    assert abs(n.mean()) < 4 / np.sqrt(4000)
    assert abs((n**2).mean() - 1) < 4 * np.sqrt(2 / 4000)
    for part in (np.asarray(sigma) < 0.8, np.asarray(sigma) >= 0.8):
        half = n[part]
        assert abs((half**2).mean() - 1) < 4 * np.sqrt(2 / len(half))
    # A model that says nothing: ln 3, and it always guesses the first class.
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)
    np.testing.assert_array_equal(correct, label == 0)


def test_a_constant_in_the_logits_changes_nothing():
    shifted, _ = run(lambda x, sigma, condition: bayes(x, sigma) + 50 * jnp.cos(x))
    np.testing.assert_allclose(shifted, run(bayes)[0], atol=1e-4)


def test_each_example_depends_on_its_own_key_alone():
    x0, label, keys = (a[:8] for a in data())
    loss = jax.jit(lambda *a: classify(bayes, *a)[0])
    together = loss(x0, label, keys)
    order = np.array([5, 2, 7, 0, 1, 6, 3, 4])
    shuffled = loss(x0[order], label[order], keys[order])
    np.testing.assert_allclose(shuffled, together[order], rtol=1e-5)
    other = loss(x0, label, keys.at[1].set(keys[0]))
    rows = np.arange(8) != 1
    np.testing.assert_array_equal(other[rows], together[rows])
    assert other[1] != together[1]
