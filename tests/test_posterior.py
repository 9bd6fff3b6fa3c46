"""Posteriors against Bayes' rule in float64.

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

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from mclr_jax import posterior
from mclr_jax.mixture import GaussianMixture, toy
from mclr_jax.types import Answers, Condition

PRIOR = (0.6, 0.3, 0.1)
SIGMA_DATA, DRAWS = 1.0, 4000


def plane() -> GaussianMixture:
    """Three classes of two components in two dimensions."""
    return GaussianMixture(
        jnp.array([[[-1.2, 0.0], [0.7, 1.0]], [[0.5, -0.6], [1.5, 0.2]], [[0.0, 0.4], [-0.8, -1]]]),
        jnp.array([[0.3, 0.5], [0.4, 0.2], [0.6, 0.3]]),
        jnp.array([[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]]),
        jnp.array(PRIOR),
    )


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


@functools.partial(jax.jit, static_argnames=("levels", "image"))
def _estimate(mixture, x, sigma, label, seeds, levels, image):
    def denoise(x, sigma, condition):
        return mixture.denoise(x.reshape(len(x), -1), sigma, condition).reshape(x.shape)

    run = posterior.from_denoiser(denoise, mixture.class_prior, SIGMA_DATA, levels)
    keys = jax.vmap(jax.random.key)(seeds)
    return run(x.reshape(len(x), *image), sigma, Condition(label), keys)


def estimate(mixture, x, sigma, label=None, levels=2, image=(2,)):
    """`from_denoiser` with the mixture's exact denoiser and a seed for each example, (B, K)."""
    sigma = np.broadcast_to(np.float32(sigma), len(x))
    label = np.broadcast_to(np.int32(mixture.num_classes if label is None else label), len(x))
    x, seeds = np.asarray(x, np.float32), np.arange(len(x))
    return np.asarray(_estimate(mixture, x, sigma, label, seeds, levels, image))


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
    expected = bayes(mixture, x, sigma[:, None, None])
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    same = jax.jit(mixture.posterior)(x, sigma)
    np.testing.assert_allclose(np.exp(actual), same, rtol=1e-5, atol=1e-6)


def test_exact_refuses_data_of_another_shape():
    message = r"vectors of length 2 .*shape \(8, 8, 1\).*posterior.name='classifier' or 'denoiser'"
    with pytest.raises(ValueError, match=message):
        posterior.exact(plane())(jnp.zeros((5, 8, 8, 1)), jnp.ones(5), None, None)


@pytest.mark.parametrize(("sigma", "levels"), [(0.4, 1), (2.0, 5)])
def test_log_likelihood_differences_are_unbiased(sigma, levels):
    """Their means over keys are the integral; it is log p_sigma(x|a) - log p_sigma(x|b) nearly."""
    mixture = plane()
    x = np.array([[0.0, 0.0], [-1.0, 0.5], [1.2, 0.9], [0.3, -1.0]])
    log_p = estimate(mixture, np.repeat(x, DRAWS, axis=0), sigma, label=1, levels=levels)
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


def test_the_posterior_of_a_denoiser_converges_to_the_exact_one():
    """Its error falls as levels^(-1/2), to that of the two ends of the integral."""
    mixture = plane()
    x, _ = noisy(mixture, 300, 0.5)
    exact = bayes(mixture, x, 0.5)
    few, many = (
        total_variation(estimate(mixture, x, 0.5, levels=levels), exact) for levels in (8, 512)
    )
    assert many < 0.2 * few
    assert many < 0.012
    as_images = estimate(mixture, x, 0.5, levels=8, image=(2, 1, 1))
    np.testing.assert_allclose(as_images, estimate(mixture, x, 0.5, levels=8), rtol=1e-4, atol=1e-4)


def test_the_posterior_does_not_depend_on_the_units_of_the_data():
    """Data, noise level and sigma_data times 4, of the same keys: the same estimate."""
    mixture = plane()
    x, label = noisy(mixture, 50, 0.5)
    keys = jax.vmap(jax.random.key)(np.arange(50))

    def run(unit):
        def denoise(x, sigma, condition):
            return unit * mixture.denoise(x / unit, sigma / unit, condition)

        of = posterior.from_denoiser(denoise, PRIOR, unit * SIGMA_DATA, 4)
        sigma = jnp.full(50, unit * 0.5, jnp.float32)
        return jax.jit(of)(unit * jnp.asarray(x, jnp.float32), sigma, Condition(label), keys)

    np.testing.assert_allclose(run(4.0), run(1.0), rtol=1e-4, atol=1e-4)


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
    options = posterior.Denoiser(levels=3)
    found = options(frozen, problem)(*inputs)
    by_hand = posterior.from_denoiser(mixture.denoise, (0.5, 0.2, 0.3), 1.3, 3)
    np.testing.assert_allclose(found, by_hand(*inputs), rtol=1e-5)
    needs = [posterior.Exact().needs, posterior.Classifier().needs, options.needs]
    assert needs == [set(), {"classifier"}, {"reference", "class_prior"}]
