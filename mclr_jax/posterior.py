"""p(class | x_sigma): exact, from a classifier of noisy data, or from a conditional denoiser.

The dataclasses, whose fields are the keys of config.posterior, apply the functions to the frozen
models of a task.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax import mixture
from mclr_jax.mixture import GaussianMixture
from mclr_jax.noise import normal_like, split
from mclr_jax.problem import Answers, LogitsFn, PosteriorFn, Problem
from mclr_jax.schema import Keys, in_range, key
from mclr_jax.types import DenoiseFn, expand, with_label


@dataclasses.dataclass(frozen=True)
class Exact:
    """`exact` for the mixture of data.name "mixture"."""

    needs = frozenset[str]()

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn:
        return exact(mixture.toy())


@dataclasses.dataclass(frozen=True)
class Classifier:
    """`from_classifier` with the run in config.companions.classifier."""

    needs = frozenset({"classifier"})

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn:
        return from_classifier(frozen["classifier"].logits, problem.null_label)


@dataclasses.dataclass(frozen=True)
class Denoiser(Keys):
    """`from_denoiser` with the model in config.init_from."""

    levels: int = key(8, 1, 10_000, says="noise levels of the estimate")
    candidates: int = key(0, 0, says="classes tried for each example; 0: all")

    where: ClassVar[str] = "config.posterior"
    needs = frozenset({"reference", "class_prior"})

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn:
        denoise, options = frozen["reference"].denoise, dataclasses.asdict(self)
        return from_denoiser(denoise, problem.class_prior, problem.sigma_data, **options)


def exact(mixture: GaussianMixture) -> PosteriorFn:
    """The posterior of a mixture, which raises ValueError on data of another shape."""

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
    """The posterior of a classifier trained by `objectives.classify`, with its class prior."""

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
    """The posterior of a conditional denoiser: a diffusion classifier of noisy data.

    With x_sigma as the clean data, to which noise of level tau is added, the I-MMSE identity is

        log p_sigma(x | c) = -int E |n + tau score_c(x + tau n, sqrt(sigma^2 + tau^2))|^2 dln(tau)

    up to a term that is the same for all classes, with score_c(y, s) = (D_c(y, s) - y) / s^2. The
    integral over tau in [sigma / 10, 20 sigma_data + 10 sigma] is a stratified sum, with +n and -n
    in each stratum and the same n for all classes. The estimate of the integral is unbiased, but
    not that of the posterior. The cost is 2 * levels * (candidates or K) calls.

    Source: Kong et al. 2023 (arXiv:2302.03792) for the identity, Li et al. 2023 (arXiv:2303.16203)
    for the classifier; the form with noisy data is derived in the tests.

    Args:
      denoise: the frozen model.
      class_prior: (K,) probabilities.
      sigma_data: standard deviation of the clean data.
      levels: number of strata of the integral.
      candidates: number of classes tried for each example, 0 for all: the label and randomly drawn
        other classes, which also represent the classes not drawn. For the null label the classes
        not drawn get probability 0.
    """
    log_prior, num_classes = jnp.log(jnp.asarray(class_prior)), len(class_prior)
    tried = candidates or num_classes
    in_range("posterior.levels", levels, 1)
    if not 2 <= tried <= num_classes:
        raise ValueError(f"candidates is {candidates}; expected 0, or 2 to {num_classes} classes.")

    def log_likelihoods(x, sigma, condition, keys, classes):  # classes (B, M) -> (B, M)
        k_level, k_noise = split(keys, 2)
        low, high = jnp.log(sigma / 10), jnp.log(20 * sigma_data + 10 * sigma)
        offsets = jax.vmap(lambda key: jax.random.uniform(key, (levels,)))(k_level)
        steps = (high - low) / levels

        def stratum(j):
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
            return -steps[:, None] * both.T

        return jax.lax.map(stratum, jnp.arange(levels)).sum(0)

    def log_posterior(x, sigma, condition, keys):
        label = condition.label[:, None]
        k_classes, k_integral = split(keys, 2)
        order = jax.vmap(lambda key: jax.random.uniform(key, (num_classes,)))(k_classes)
        order = jnp.where(jnp.arange(num_classes) == label, -1, order)  # the label is always tried
        classes = jnp.sort(jnp.argsort(order, axis=-1)[:, :tried], axis=-1)
        # Of M tried classes each one beside a label represents (K - 1) / (M - 1) classes.
        others = (label < num_classes) & (classes != label)
        weight = jnp.where(others, jnp.log((num_classes - 1) / (tried - 1)), 0)
        log_joint = log_likelihoods(x, sigma, condition, k_integral, classes)
        log_joint += log_prior[classes] + weight
        rows = jnp.arange(len(x))[:, None]
        full = jnp.full((len(x), num_classes), -jnp.inf, x.dtype).at[rows, classes].set(log_joint)
        return jax.nn.log_softmax(full)

    return log_posterior


def calibration_error(
    log_posterior: np.ndarray, label: np.ndarray, bins: int = 15
) -> dict[str, float]:
    """Calibration of log probabilities (n, K) against true labels (n,).

    Returns:
      `expected_calibration_error`: sum over `bins` bins of equal width in the confidence of (share
      of examples) |accuracy - confidence| (Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599);
      `accuracy`; `cross_entropy` (nats).
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
