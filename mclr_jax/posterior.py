"""p(class | x_sigma) in one interface: exact, from a classifier of noisy data, from a denoiser."""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax import mixture
from mclr_jax.mixture import GaussianMixture
from mclr_jax.noise import normal_like, split
from mclr_jax.problem import Answers, LogitsFn, PosteriorFn, Problem
from mclr_jax.types import DenoiseFn, expand, with_label


@dataclasses.dataclass(frozen=True)
class Exact:
    """The oracle's, for data.name "mixture"."""

    needs = frozenset[str]()

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn:
        return exact(mixture.toy())


@dataclasses.dataclass(frozen=True)
class Classifier:
    """That of the run in config.companions.classifier; see `from_classifier`."""

    needs = frozenset({"classifier"})

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn:
        return from_classifier(frozen["classifier"].logits, problem.null_label)


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """That which the model in config.init_from implies; see `from_denoiser`."""

    levels: int = 8
    candidates: int = 0

    needs = frozenset({"reference", "class_prior"})

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn:
        return from_denoiser(
            frozen["reference"].denoise,
            problem.class_prior,
            problem.sigma_data,
            self.levels,
            self.candidates,
        )


def exact(mixture: GaussianMixture) -> PosteriorFn:
    """The posterior of the oracle; raises ValueError on data of another shape."""

    def log_posterior(x, sigma, condition, keys):
        del condition, keys
        if x.shape[1:] != mixture.means.shape[-1:]:
            raise ValueError(
                f"The exact posterior is for vectors of length {mixture.means.shape[-1]} "
                f"(data.name='mixture'); got data of shape {x.shape[1:]}. Set "
                "posterior.name='classifier' or 'denoiser'."
            )
        log_joint = mixture.log_prob_given_label(x, sigma) + jnp.log(mixture.class_prior)
        return jax.nn.log_softmax(log_joint)

    return log_posterior


def from_classifier(logits: LogitsFn, num_classes: int) -> PosteriorFn:
    """The posterior of a trained classifier of noisy data; see `objectives.classify`.

    It is that of the classes as frequent as in the classifier's training data.
    """

    def log_posterior(x, sigma, condition, keys):
        del keys
        return jax.nn.log_softmax(logits(x, sigma, with_label(condition, num_classes)))

    return log_posterior


def from_denoiser(
    denoise: DenoiseFn,
    class_prior: Sequence[float],
    sigma_data: float,
    levels: int = 8,
    candidates: int = 0,
) -> PosteriorFn:
    """The posterior that a conditional denoiser implies: a diffusion classifier of noisy data.

    x_sigma is taken as clean data to which noise of level tau is added. By the I-MMSE identity

        log p_sigma(x | c) = -int E |n + tau score_c(x + tau n, sqrt(sigma^2 + tau^2))|^2 dln(tau)

    up to a term that is the same for all classes, with score_c(y, s) = (D_c(y, s) - y) / s^2. The
    integral over tau in [sigma / 10, 20 sigma_data + 10 sigma] is a stratified sum, with +n and -n
    for each stratum and the same numbers for all classes. The estimate of the integral is unbiased,
    the posterior made from it is not; it costs 2 * levels * (candidates or K) calls.

    Source: Kong et al. 2023 (arXiv:2302.03792) for the identity, Li et al. 2023 (arXiv:2303.16203)
    for the classifier; the form with noisy data is derived in the tests.

    Args:
      denoise: the frozen model.
      class_prior: (K,) probabilities.
      sigma_data: standard deviation of the clean data.
      levels: strata of the integral.
      candidates: classes tried for each example: its label and others drawn evenly, which then
        stand for those not drawn. 0 tries all. With the null label the classes not drawn count for
        nothing.
    """
    log_prior, num_classes = jnp.log(jnp.asarray(class_prior)), len(class_prior)
    tried = candidates or num_classes
    if not 2 <= tried <= num_classes:
        raise ValueError(f"candidates is {candidates}; expected 0, or 2 to {num_classes} classes.")

    def log_likelihoods(x, sigma, condition, keys, classes):  # classes (B, M) -> (B, M)
        k_level, k_noise = split(keys, 2)
        low, high = jnp.log(sigma / 10), jnp.log(20 * sigma_data + 10 * sigma)
        offsets = jax.vmap(lambda key: jax.random.uniform(key, (levels,)))(k_level)
        steps = (high - low) / levels

        def stratum(total, j):
            tau = jnp.exp(low + (j + offsets[:, j]) * steps)
            noise = normal_like(jax.vmap(jax.random.fold_in, (0, None))(k_noise, j), x)
            level = jnp.sqrt(sigma**2 + tau**2)

            def square(sign, label):
                noisy = x + sign * expand(tau, x) * noise
                denoised = denoise(noisy, level, with_label(condition, label))
                score = (denoised - noisy) / expand(level, x) ** 2
                residual = sign * noise + expand(tau, x) * score
                return jnp.sum(residual**2, axis=tuple(range(1, x.ndim))) / 2

            both = jax.lax.map(lambda c: square(1.0, c) + square(-1.0, c), classes.T)
            return total - steps[:, None] * both.T, None

        zeros = jnp.zeros(classes.shape, x.dtype)
        return jax.lax.scan(stratum, zeros, jnp.arange(levels))[0]

    def log_posterior(x, sigma, condition, keys):
        label = condition.label
        k_classes, k_integral = split(keys, 2)
        if tried == num_classes:
            classes = jnp.broadcast_to(jnp.arange(num_classes), (len(x), num_classes))
            weight = log_prior[classes]
        else:
            order = jax.vmap(lambda key: jax.random.uniform(key, (num_classes,)))(k_classes)
            order = jnp.where(jnp.arange(num_classes) == label[:, None], -1, order)
            classes = jnp.argsort(order, axis=-1)[:, :tried]
            # Each of the others stands for (K - 1) / (M - 1) classes, where `label` is given.
            given = label[:, None] < num_classes
            share = jnp.where(given, (num_classes - 1) / (tried - 1), 1.0)
            own = classes == label[:, None]
            weight = log_prior[classes] + jnp.where(own, 0.0, jnp.log(share))
        log_joint = log_likelihoods(x, sigma, condition, k_integral, classes) + weight
        rows = jnp.arange(len(x))[:, None]
        full = jnp.full((len(x), num_classes), -jnp.inf, x.dtype).at[rows, classes].set(log_joint)
        return jax.nn.log_softmax(full)

    return log_posterior


def calibration_error(
    log_posterior: np.ndarray, label: np.ndarray, bins: int = 15
) -> dict[str, float]:
    """How far a posterior's confidence in its first choice can be believed.

    Args:
      log_posterior: (n, K) log probabilities.
      label: (n,) true classes.
      bins: of equal width in the confidence.

    Returns:
      `expected_calibration_error`, sum over bins of (share of examples) |accuracy - confidence|
      (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599), `accuracy` and `cross_entropy`
      (nats).
    """
    log_posterior, label = np.asarray(log_posterior, np.float64), np.asarray(label)
    if log_posterior.ndim != 2 or label.shape != log_posterior.shape[:1] or not label.size:
        raise ValueError(
            f"Got log probabilities {log_posterior.shape} and labels {label.shape}; expected "
            "(n, K) and (n,), n > 0."
        )
    confidence = np.exp(log_posterior.max(axis=1))
    correct = (log_posterior.argmax(axis=1) == label).astype(np.float64)
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)
    return {
        "expected_calibration_error": float(np.abs(gaps).sum() / len(label)),
        "accuracy": float(correct.mean()),
        "cross_entropy": float(-log_posterior[np.arange(len(label)), label].mean()),
    }
