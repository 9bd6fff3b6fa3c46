"""Posteriors against Bayes' rule in float64."""

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
    message = r"vectors of length 2 .*shape \(8, 8, 1\).*posterior.name='classifier'"
    with pytest.raises(ValueError, match=message):
        posterior.exact(plane())(jnp.zeros((5, 8, 8, 1)), jnp.ones(5), None, None)


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
    needs = [posterior.Exact().needs, posterior.Classifier().needs]
    assert needs == [set(), {"classifier"}]
