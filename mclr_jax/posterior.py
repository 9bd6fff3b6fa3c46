"""p(class | x_sigma): exact, from a classifier of noisy data, or from a conditional denoiser.

The dataclasses, whose fields are the keys of config.posterior, apply the functions to the frozen
models of a task.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from mclr_jax import mixture
from mclr_jax.mixture import GaussianMixture
from mclr_jax.noise import normal_like, split
from mclr_jax.objectives.base import Problem
from mclr_jax.schema import Keys, in_range, key
from mclr_jax.types import Answers, DenoiseFn, LogitsFn, PosteriorFn, expand, with_label


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

    where: ClassVar[str] = "config.posterior"
    needs = frozenset({"reference", "class_prior"})

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn:
        denoise = frozen["reference"].denoise
        return from_denoiser(denoise, problem.class_prior, problem.sigma_data, self.levels)


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
    denoise: DenoiseFn, class_prior: Sequence[float], sigma_data: float, levels: int = 8
) -> PosteriorFn:
    """The posterior of a conditional denoiser: a diffusion classifier of noisy data.

    With x_sigma as the clean data, to which noise of level tau is added, the I-MMSE identity is

        log p_sigma(x | c) = -int E |n + tau score_c(x + tau n, sqrt(sigma^2 + tau^2))|^2 dln(tau)

    up to a term that is the same for all classes, with score_c(y, s) = (D_c(y, s) - y) / s^2. The
    integral over tau in [sigma / 10, 20 sigma_data + 10 sigma] is a stratified sum, with +n and -n
    in each stratum and the same n for all classes. The estimate of the integral is unbiased, but
    not that of the posterior. The cost is 2 * levels * K calls.

    Source: Kong et al. 2023 (arXiv:2302.03792) for the identity, Li et al. 2023 (arXiv:2303.16203)
    for the classifier; the form with noisy data is derived in the tests.

    Args:
      denoise: the frozen model.
      class_prior: (K,) probabilities.
      sigma_data: standard deviation of the clean data.
      levels: number of strata of the integral.
    """
    in_range("posterior.levels", levels, 1)

    def log_posterior(x, sigma, condition, keys):
        _, keys = split(keys, 2)
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

            classes = jnp.arange(len(class_prior))
            both = jax.lax.map(lambda c: square(1.0, c) + square(-1.0, c), classes)
            return -steps[:, None] * both.T

        log_likelihoods = jax.lax.map(stratum, jnp.arange(levels)).sum(0)
        return jax.nn.log_softmax(log_likelihoods + jnp.log(jnp.asarray(class_prior)))

    return log_posterior
