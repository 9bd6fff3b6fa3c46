"""Posteriors against Bayes' rule in float64, and how far a posterior can be believed.

The identity of `posterior.from_denoiser`, for noisy data
---------------------------------------------------------
Write q for p_sigma(. | c), q_t for q * N(0, t I), which is p_s(. | c) at s^2 = sigma^2 + t, and
r_t = N(x, t I) for the point x with the same noise. Both obey the heat equation d/dt = (Laplace)/2,
so that, by parts (relative de Bruijn identity),

    d/dt KL(r_t || q_t) = -1/2 E_{y ~ r_t} |grad log r_t(y) - grad log q_t(y)|^2.

With t = tau^2 and y = x + tau n, grad log r_t(y) = -n / tau and dt = 2 tau^2 dln(tau); hence

    KL(low) - KL(high) = int_low^high E |n + tau score_c(x + tau n, s)|^2 dln(tau).

The entropy of r_t is the same for all classes, so that up to such terms
KL(tau) = -E log p_s(x + tau n | c) =: -L_c(tau), and the integral is L_c(high) - L_c(low). For
low -> 0, L_c(low) is log p_sigma(x | c); for high -> infinity, L_c(high) is the same for all c.
The first test compares with L_c at the two ends that are used, the second ends with log p itself.
"""

import functools
import itertools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from mclr_jax import posterior
from mclr_jax.mixture import GaussianMixture, toy
from mclr_jax.types import Answers, Condition

PRIOR = (0.6, 0.3, 0.1)
UNEQUAL = (0.4, 0.3, 0.15, 0.1, 0.05)
SIGMA_DATA, DRAWS = 1.0, 4000


def plane(prior=PRIOR) -> GaussianMixture:
    """Three classes of two components in two dimensions."""
    return GaussianMixture(
        jnp.array([[[-1.2, 0.0], [0.7, 1.0]], [[0.5, -0.6], [1.5, 0.2]], [[0.0, 0.4], [-0.8, -1]]]),
        jnp.array([[0.3, 0.5], [0.4, 0.2], [0.6, 0.3]]),
        jnp.array([[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]]),
        jnp.array(prior),
    )


def points(prior=PRIOR, classes=5, dim=2) -> GaussianMixture:
    """A component of std 0.3 for each class, at random places."""
    means = jax.random.normal(jax.random.key(3), (classes, 1, dim))
    one = jnp.ones((classes, 1))
    return GaussianMixture(means, 0.3 * one, one, jnp.array(prior))


def log_density(mixture, x, sigma):
    """log p_sigma(x | c), (..., K), of x (..., d): float64, and no code of the package."""
    means, stds, weights = (
        np.asarray(a, np.float64) for a in (mixture.means, mixture.stds, mixture.weights)
    )
    variance = stds**2 + sigma**2
    distance = ((np.asarray(x, np.float64)[..., None, None, :] - means) ** 2).sum(-1)
    log_normal = -distance / (2 * variance) - means.shape[-1] / 2 * np.log(2 * np.pi * variance)
    return logsumexp(np.log(weights) + log_normal, axis=-1)


def bayes(mixture, x, sigma):
    """log p(c | x_sigma = x), (B, K)."""
    log_prior = np.log(np.asarray(mixture.class_prior, np.float64))
    return log_softmax(log_density(mixture, x, sigma) + log_prior, axis=-1)


def smoothed(mixture, x, sigma, tau):
    """L_c(tau) = E log p_s(x + tau n | c), s^2 = sigma^2 + tau^2, by quadrature, (B, K)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    n = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    weights = np.outer(weights, weights).ravel() / weights.sum() ** 2
    values = log_density(mixture, x[:, None] + tau * n, np.hypot(sigma, tau))
    return np.einsum("n,bnk->bk", weights, values)


@functools.partial(jax.jit, static_argnames=("levels", "candidates", "image"))
def _estimate(mixture, x, sigma, label, seeds, levels, candidates, image):
    def denoise(x, sigma, condition):
        return mixture.denoise(x.reshape(len(x), -1), sigma, condition).reshape(x.shape)

    run = posterior.from_denoiser(denoise, mixture.class_prior, SIGMA_DATA, levels, candidates)
    keys = jax.vmap(jax.random.key)(seeds)
    return run(x.reshape(len(x), *image), sigma, Condition(label), keys)


def estimate(mixture, x, sigma, label=None, seeds=None, levels=2, candidates=0, image=(2,)):
    """`from_denoiser` with the mixture's exact denoiser and a seed for each example, (B, K)."""
    sigma = np.broadcast_to(np.float32(sigma), len(x))
    null = mixture.num_classes
    label = np.broadcast_to(np.int32(null if label is None else label), len(x))
    seeds = np.arange(len(x)) if seeds is None else seeds
    x = np.asarray(x, np.float32)
    return np.asarray(_estimate(mixture, x, sigma, label, seeds, levels, candidates, image))


def total_variation(log_p, log_q):
    return np.abs(np.exp(log_p) - np.exp(log_q)).sum(-1).mean() / 2


def noisy(mixture, n, sigma):
    """x_sigma (n, d) and labels (n,), float64."""
    rng = np.random.default_rng(1)
    means, stds, weights, prior = (
        np.asarray(a, np.float64)
        for a in (mixture.means, mixture.stds, mixture.weights, mixture.class_prior)
    )
    joint = (weights * prior[:, None]).ravel()
    label, part = np.unravel_index(rng.choice(joint.size, n, p=joint / joint.sum()), weights.shape)
    spread = np.sqrt(stds[label, part] ** 2 + sigma**2)[:, None]
    return means[label, part] + spread * rng.normal(size=(n, means.shape[-1])), label


def test_exact_is_bayes_rule():
    mixture = plane()
    x, _ = noisy(mixture, 200, 0.7)
    sigma = np.geomspace(0.05, 20, 200)
    actual = jax.jit(posterior.exact(mixture))(x, sigma, None, None)
    expected = np.concatenate([bayes(mixture, x[i : i + 1], sigma[i]) for i in range(200)])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    same = jax.jit(mixture.posterior)(x, sigma)
    np.testing.assert_allclose(np.exp(actual), same, rtol=1e-5, atol=1e-6)


def test_exact_refuses_data_of_another_shape():
    message = r"vectors of length 2 .*shape \(8, 8, 1\).*posterior.name='classifier' or 'denoiser'"
    with pytest.raises(ValueError, match=message):
        posterior.exact(plane())(jnp.zeros((5, 8, 8, 1)), jnp.ones(5), None, None)


# With all 3 classes as candidates there is no choice, and nothing to correct for.
@pytest.mark.parametrize(("levels", "candidates"), [(1, 0), (5, 3)])
@pytest.mark.parametrize("sigma", [0.4, 2.0])
def test_log_likelihood_differences_are_unbiased(sigma, levels, candidates):
    """Their means over keys are the integral; it is log p_sigma(x|a) - log p_sigma(x|b) nearly."""
    mixture = plane()
    x = np.array([[0.0, 0.0], [-1.0, 0.5], [1.2, 0.9], [0.3, -1.0]])
    options = {"label": 1, "levels": levels, "candidates": candidates}
    log_p = estimate(mixture, np.repeat(x, DRAWS, axis=0), sigma, **options)
    likelihood = log_p.astype(np.float64) - np.log(PRIOR)
    difference = (likelihood[:, :1] - likelihood[:, 1:]).reshape(len(x), DRAWS, 2)
    low, high = sigma / 10, 20 * SIGMA_DATA + 10 * sigma
    integral = smoothed(mixture, x, sigma, low) - smoothed(mixture, x, sigma, high)
    integral = integral[:, :1] - integral[:, 1:]
    error = difference.std(axis=1) / np.sqrt(DRAWS)
    assert error.max() < 0.12
    assert np.all(np.abs(difference.mean(axis=1) - integral) < 4 * error + 1e-3)
    exact = log_density(mixture, x, sigma)
    np.testing.assert_allclose(integral, exact[:, :1] - exact[:, 1:], atol=0.06)


@pytest.mark.parametrize("prior", [PRIOR, (1 / 3, 1 / 3, 1 / 3)])
def test_the_posterior_of_a_denoiser_converges_to_the_exact_one(prior):
    """Its error falls as levels^(-1/2), to that of the two ends of the integral."""
    mixture = plane(prior)
    x, _ = noisy(mixture, 300, 0.5)
    exact = bayes(mixture, x, 0.5)
    few, many = (
        total_variation(estimate(mixture, x, 0.5, levels=levels), exact) for levels in (8, 512)
    )
    assert many < 0.2 * few
    assert many < 0.012


def test_images_are_vectors():
    mixture = points(UNEQUAL, dim=4)
    x, _ = noisy(mixture, 200, 0.6)
    images = estimate(mixture, x, 0.6, levels=64, image=(2, 1, 2))
    assert total_variation(images, bayes(mixture, x, 0.6)) < 0.05


def test_each_example_depends_on_its_own_key_alone():
    mixture, rng = points(UNEQUAL), np.random.default_rng(2)
    x, label = noisy(mixture, DRAWS, 0.6)
    sigma, seeds = rng.uniform(0.3, 2, DRAWS), np.arange(DRAWS)

    def run(rows, seeds):
        log_p = estimate(mixture, x[rows], sigma[rows], label[rows], seeds, candidates=3)
        return np.exp(log_p)

    first = run(seeds, seeds)
    order = rng.permutation(DRAWS)
    np.testing.assert_allclose(run(order, order), first[order], rtol=1e-4, atol=1e-6)
    changed = seeds % 7 == 1
    other = run(seeds, np.where(changed, seeds + DRAWS, seeds))
    np.testing.assert_allclose(other[~changed], first[~changed], rtol=1e-4, atol=1e-6)
    assert (np.abs(other - first).max(axis=1) > 1e-3)[changed].mean() > 0.9


# At this noise every class is as likely as any other: the posterior is the prior.
FAR = 1000.0


@functools.cache
def at_high_noise(label, prior, candidates):
    mixture = points(prior)
    x = FAR * np.random.default_rng(0).normal(size=(DRAWS, 2))
    return np.exp(estimate(mixture, x, FAR, label=label, candidates=candidates))


@pytest.mark.parametrize("candidates", [2, 3])
def test_the_label_is_always_tried_and_the_others_equally_often(candidates):
    for label in (0, 3):
        p = at_high_noise(label, UNEQUAL, candidates)
        tried = p > 0
        np.testing.assert_array_equal(tried.sum(axis=1), candidates)
        assert tried[:, label].all()
        share = (candidates - 1) / 4
        error = np.sqrt(share * (1 - share) / len(p))
        assert np.abs(np.delete(tried.mean(axis=0), label) - share).max() < 4 * error
        np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize("candidates", [2, 3])
def test_those_drawn_stand_for_those_not_drawn(candidates):
    """1 / p(label) = 1 + sum of the odds of the others, whose estimate is unbiased."""
    for label in (0, 3):
        inverse = 1 / at_high_noise(label, UNEQUAL, candidates)[:, label].astype(np.float64)
        error = inverse.std() / np.sqrt(len(inverse))
        assert abs(inverse.mean() - 1 / UNEQUAL[label]) < 4 * error
        # Equal classes: the sum is known whoever is drawn, and p(label) is right every time.
        p = at_high_noise(label, (0.2,) * 5, candidates)
        np.testing.assert_allclose(p[:, label], 0.2, atol=0.006)
        np.testing.assert_allclose(p.mean(axis=0), 0.2, atol=0.02)


@pytest.mark.parametrize("candidates", [2, 3])
@pytest.mark.parametrize("prior", [UNEQUAL, (0.2,) * 5])
def test_without_a_label_all_classes_are_tried_equally_often(prior, candidates):
    """The mean of p is that over all subsets of the classes, each with its own normaliser."""
    p = at_high_noise(None, prior, candidates)
    np.testing.assert_array_equal((p > 0).sum(axis=1), candidates)
    subsets = list(itertools.combinations(range(5), candidates))
    expected = np.zeros(5)
    for subset in subsets:
        expected[list(subset)] += np.array(prior)[list(subset)] / np.take(prior, subset).sum()
    error = p.std(axis=0) / np.sqrt(len(p))
    assert np.all(np.abs(p.mean(axis=0) - expected / len(subsets)) < 4 * error + 1e-3)


@pytest.mark.parametrize("candidates", [1, 4, -1])
def test_a_number_of_candidates_that_makes_no_sense_is_refused(candidates):
    with pytest.raises(ValueError, match=f"candidates is {candidates}; expected 0, or 2 to 3"):
        posterior.from_denoiser(plane().denoise, PRIOR, 1.0, candidates=candidates)


def test_a_classifier_is_asked_without_a_label_and_normalised():
    mixture, seen = plane(), []
    x, own = noisy(mixture, 50, 0.7)
    expected = bayes(mixture, x, 0.7)

    def logits(x, sigma, condition):
        seen.append(condition)
        return np.float32(expected) + 10 * sigma[:, None]

    sigma = np.linspace(0.5, 3, 50, dtype=np.float32)
    told = Condition(jnp.asarray(own, jnp.int32), augment=jnp.ones((50, 9)))
    actual = posterior.from_classifier(logits, 3)(x, sigma, told, None)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    (shown,) = seen
    np.testing.assert_array_equal(shown.label, np.full(50, 3))
    assert shown.label.dtype == jnp.int32
    np.testing.assert_array_equal(shown.augment, told.augment)


def test_a_denoiser_is_asked_for_every_class_and_told_all_else():
    """2 signs times the levels times the classes; +n and -n, and all classes, on the same noise."""
    seen = []

    def denoise(x, sigma, condition):
        def keep(*shown):
            seen.append([np.asarray(value) for value in shown])

        jax.debug.callback(keep, x, sigma, condition.label, condition.augment, ordered=True)
        return 0 * x

    x0 = jax.random.normal(jax.random.key(0), (7, 2))
    told = Condition(jnp.zeros(7, jnp.int32), augment=jnp.arange(63.0).reshape(7, 9))
    keys = jax.random.split(jax.random.key(1), 7)
    sigma = jnp.linspace(0.5, 2, 7)
    posterior.from_denoiser(denoise, PRIOR, 1.0, levels=4)(x0, sigma, told, keys)
    jax.effects_barrier()
    assert len(seen) == 2 * 4 * 3
    calls = [seen[i : i + 6] for i in range(0, 24, 6)]
    for stratum, group in enumerate(calls):
        tau = np.sqrt(group[0][1] ** 2 - sigma**2)
        low, high = sigma / 10, 20 * 1.0 + 10 * sigma
        place = np.log(tau / low) / np.log(high / low) * 4
        assert np.all((stratum <= place + 1e-3) & (place <= stratum + 1 + 1e-3))
        for number, (x, level, label, augment) in enumerate(group):
            sign = (-1) ** number
            np.testing.assert_allclose(level, group[0][1])
            np.testing.assert_allclose(sign * (x - x0), group[0][0] - x0, rtol=1e-4, atol=1e-5)
            np.testing.assert_array_equal(label, np.full(7, number // 2))
            np.testing.assert_array_equal(augment, told.augment)


def test_the_options_of_a_config_make_the_same_posteriors():
    """The dataclasses of config.posterior, on the mixture of configs/mixture.py."""
    mixture = toy()
    x, sigma = jnp.array([[0.3, -0.2], [1.0, 1.0]]), jnp.array([0.4, 2.0])
    keys = jax.random.split(jax.random.key(0), 2)
    inputs = x, sigma, Condition(jnp.array([0, 1])), keys
    problem = cases.problem(None, class_prior=(0.5, 0.2, 0.3), sigma_data=1.3)
    frozen = {
        "reference": Answers(mixture.denoise, cases.no_answer),
        "classifier": Answers(cases.no_answer, lambda x, s, c: 3 * x[:, :1] * jnp.arange(3.0)),
    }
    found = posterior.Exact()({}, problem)(*inputs)
    np.testing.assert_allclose(found, bayes(mixture, x, np.asarray(sigma)[:, None, None]), 1e-4)
    found = posterior.Classifier()(frozen, problem)(*inputs)
    np.testing.assert_allclose(found, log_softmax(3 * x[:, :1] * np.arange(3), axis=1), 1e-4)
    options = posterior.Denoiser(levels=3, candidates=2)
    found = options(frozen, problem)(*inputs)
    by_hand = posterior.from_denoiser(mixture.denoise, (0.5, 0.2, 0.3), 1.3, 3, 2)
    np.testing.assert_allclose(found, by_hand(*inputs), rtol=1e-5)
    needs = [posterior.Exact().needs, posterior.Classifier().needs, options.needs]
    assert needs == [set(), {"classifier"}, {"reference", "class_prior"}]


def binary(confidence, correct):
    """Two classes, always sure of class 0 by `confidence` (n,); it is right where `correct`."""
    confidence = np.asarray(confidence, np.float64)
    log_p = np.log(np.stack([confidence, 1 - confidence], axis=1))
    return log_p, np.where(correct, 0, 1)


def share(n, accuracy):
    return np.arange(n) < round(n * accuracy)


def test_calibration_error_in_closed_form():
    calibrated = binary([0.7] * 10 + [0.95] * 20, [*share(10, 0.7), *share(20, 0.95)])
    actual = posterior.calibration_error(*calibrated)
    assert actual["expected_calibration_error"] == pytest.approx(0, abs=1e-12)
    assert actual["accuracy"] == pytest.approx(26 / 30)
    entropy = [-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (0.7, 0.95)]
    assert actual["cross_entropy"] == pytest.approx((10 * entropy[0] + 20 * entropy[1]) / 30)

    overconfident = posterior.calibration_error(*binary([0.9] * 50, share(50, 0.6)))
    assert overconfident["expected_calibration_error"] == pytest.approx(0.3)
    # Gaps of +0.2 (share 1/4) and -0.1 (3/4) add up by size; in one bin they cancel in part.
    two = binary([0.6] * 20 + [0.9] * 60, [*share(20, 0.8), *share(60, 0.8)])
    separate, together = (posterior.calibration_error(*two, bins=b) for b in (15, 1))
    assert separate["expected_calibration_error"] == pytest.approx(0.2 / 4 + 0.1 * 3 / 4)
    assert together["expected_calibration_error"] == pytest.approx(abs(0.2 / 4 - 0.1 * 3 / 4))
    # Certainty belongs to the last bin.
    certain = np.log([[1.0, 1e-300]] * 4)
    certain = posterior.calibration_error(certain, np.array([0, 0, 0, 1]))
    assert certain["expected_calibration_error"] == pytest.approx(0.25)


def test_the_exact_posterior_is_calibrated_and_a_sharpened_one_is_not():
    mixture = plane()
    x, label = noisy(mixture, 40_000, 0.8)
    log_p = bayes(mixture, x, 0.8)
    exact = posterior.calibration_error(log_p, label)
    confidence = np.exp(log_p.max(axis=1))
    assert exact["expected_calibration_error"] < 0.015
    assert abs(exact["accuracy"] - confidence.mean()) < 0.01
    assert exact["cross_entropy"] == pytest.approx(
        -(np.exp(log_p) * log_p).sum(-1).mean(), abs=0.01
    )
    sharp = log_softmax(3 * log_p, axis=1)  # the same choices, and each bin overconfident
    gap = np.exp(sharp.max(axis=1)).mean() - confidence.mean()
    assert gap > 0.1
    actual = posterior.calibration_error(sharp, label)
    assert actual["expected_calibration_error"] == pytest.approx(gap, abs=0.012)
    assert actual["cross_entropy"] > exact["cross_entropy"] + 0.05


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(2, 6), st.integers(1, 20))
def test_calibration_ignores_the_order_of_examples_and_of_classes(seed, n, classes, bins):
    rng = np.random.default_rng(seed)
    log_p = log_softmax(rng.uniform(0, 8) * rng.normal(size=(n, classes)), axis=1)
    label = rng.integers(classes, size=n)
    actual = posterior.calibration_error(log_p, label, bins)
    assert 0 <= actual["expected_calibration_error"] <= 1
    # |mean accuracy - mean confidence| is the error of a single bin, and no more bins can lower it.
    single = posterior.calibration_error(log_p, label, 1)["expected_calibration_error"]
    assert actual["expected_calibration_error"] >= single - 1e-12
    order, names = rng.permutation(n), rng.permutation(classes)
    shuffled = posterior.calibration_error(log_p[order], label[order], bins)
    renamed = posterior.calibration_error(log_p[:, names], np.argsort(names)[label], bins)
    chex.assert_trees_all_close(shuffled, actual, rtol=1e-12, atol=1e-12)
    chex.assert_trees_all_close(renamed, actual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "labels", "message"),
    [((4,), (4,), r"\(4,\) and labels \(4,\)"), ((4, 3), (5,), r"\(4, 3\) and labels \(5,\)")],
)
def test_calibration_refuses_shapes_that_do_not_fit(shape, labels, message):
    with pytest.raises(ValueError, match=message + r"; expected \(n, K\) and \(n,\)"):
        posterior.calibration_error(np.zeros(shape), np.zeros(labels, int))


def test_options_out_of_range_are_refused_before_they_are_used():
    with pytest.raises(ValueError, match="levels is 0; expected an integer of at least 1"):
        posterior.Denoiser(levels=0)
    with pytest.raises(ValueError, match="candidates is -1; expected an integer of at least 0"):
        posterior.Denoiser(candidates=-1)
