"""The inputs of objectives and posteriors: the problem, the models and a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import struct

from mclr_jax.noise import NoiseLevels
from mclr_jax.reductions import Metrics
from mclr_jax.schema import class_factors
from mclr_jax.types import Condition, DenoiseFn, MomentsFn

# (x (B, ...), sigma (B,) or (B, F), condition) -> log-odds of the classes (B, K)
LogitsFn = Callable[[jax.Array, jax.Array, Any], jax.Array]
# The result of an objective: loss (B,), and metrics whose parts have a leading axis of rows.
Loss = tuple[jax.Array, Metrics]
# (x, sigma, condition, keys (B,)) -> log p(class | x_sigma = x), (B, K). Random estimates draw from
# `keys`; an estimate that tries a subset of the classes includes condition.label.
PosteriorFn = Callable[[jax.Array, jax.Array, Condition, jax.Array], jax.Array]


class Answers(NamedTuple):
    """The two functions of a network; only one of them is valid for a given network."""

    denoise: DenoiseFn
    logits: LogitsFn


class Models(NamedTuple):
    """The functions that an objective may call: of the model in training and of frozen models.

    Frozen models, by their names in `needs`, have no gradient, no dropout and strength 0.
    """

    denoise: DenoiseFn
    logits: LogitsFn
    frozen: Mapping[str, Answers] = {}
    posterior: PosteriorFn | None = None  # if "posterior" is in `needs`
    moments: MomentsFn | None = None  # of the model in training, if its network has a variance


@dataclasses.dataclass(frozen=True)
class Problem:
    """Properties of the data and choices of the config."""

    levels: NoiseLevels  # distribution of the noise levels in training
    weight: Callable[[jax.Array], jax.Array]  # sigma -> loss weight of the shape of sigma
    null_label: int  # num_classes
    class_prior: tuple[float, ...] = ()  # share of each class in the data
    sigma_data: float = 0.5  # standard deviation of the data
    frames: tuple[int, ...] = ()  # shape of the noise levels of one example, () or (F,)
    strength: tuple[float, ...] = ()  # (low, high) of the strength as an input, () without it
    class_strengths: tuple[float, ...] = ()  # factors of the strength by class, () for all 1

    def __post_init__(self):
        if self.class_strengths:
            class_factors("config.class_strengths", self.class_strengths, self.null_label)
            if self.strength:
                raise ValueError(
                    "config.class_strengths is set, and the strength is an input of the network "
                    "(config.strength): leave one of them empty. Such a network is given its "
                    "strengths by class when sampling, by --class_strengths."
                )


class Batch(struct.PyTreeNode):
    """Scaled and augmented examples; every leaf has a leading axis B.

    Attributes:
      x0: (B, ...) clean data.
      condition: labels, augmentation parameters, dropout keys.
      other: (B, ...) clean data of other examples, if "other" is in `needs`.
      generated: samples (B, ...) of the frozen model and their labels (B,), if "generated" is.
    """

    x0: jax.Array
    condition: Condition
    other: jax.Array | None = None
    generated: tuple[jax.Array, jax.Array] | None = None
