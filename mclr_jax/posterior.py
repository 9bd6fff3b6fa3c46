"""p(class | x_sigma): exact, or from a classifier of noisy data.

The dataclasses, whose fields are the keys of config.posterior, apply the functions to the frozen
models of a task.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mclr_jax import mixture
from mclr_jax.mixture import GaussianMixture
from mclr_jax.objectives.base import Problem
from mclr_jax.types import Answers, LogitsFn, PosteriorFn, with_label


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


def exact(mixture: GaussianMixture) -> PosteriorFn:
    """The posterior of a mixture, which raises ValueError on data of another shape."""

    def log_posterior(x, sigma, condition, keys):
        del condition, keys
        if x.shape[1:] != mixture.means.shape[-1:]:
            raise ValueError(
                f"The exact posterior is for vectors of length {mixture.means.shape[-1]} "
                f"(data.name='mixture'); got data of shape {x.shape[1:]}. Set "
                "posterior.name='classifier'."
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
