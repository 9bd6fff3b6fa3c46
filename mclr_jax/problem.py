"""What objectives and posteriors are given: the problem, the models and a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import struct

from mclr_jax.noise import NoiseLevels
from mclr_jax.types import Condition, DenoiseFn

# (x (B, ...), sigma (B,) or (B, F), condition) -> log-odds of the classes (B, K)
LogitsFn = Callable[[jax.Array, jax.Array, Any], jax.Array]
# (x, sigma, condition, keys (B,)) -> log p(class | x_sigma = x), (B, K). A posterior that is
# estimated by chance draws from `keys`; one that tries some classes only tries condition.label.
PosteriorFn = Callable[[jax.Array, jax.Array, Condition, jax.Array], jax.Array]


class Answers(NamedTuple):
    """The two ways to ask a network; which of them makes sense depends on the network."""

    denoise: DenoiseFn
    logits: LogitsFn


class Models(NamedTuple):
    """What an objective may call.

    Attributes:
      denoise, logits: the model in training.
      frozen: by the names in `needs`; no gradient, no dropout, strength 0.
      posterior: p(class | x_sigma) if `needs` has "posterior".
    """

    denoise: DenoiseFn
    logits: LogitsFn
    frozen: Mapping[str, Answers] = {}
    posterior: PosteriorFn | None = None


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the data say and the config chose.

    Attributes:
      levels: distribution of the noise levels that training draws.
      weight: sigma -> loss weight, the shape of sigma.
      null_label: num_classes.
      class_prior: share of each class in the data.
      sigma_data: standard deviation of the data.
      frames: shape of an example's noise levels, () or (F,).
      strength: (low, high) of the strength that the network takes as an input, or ().
    """

    levels: NoiseLevels
    weight: Callable[[jax.Array], jax.Array]
    null_label: int
    class_prior: tuple[float, ...] = ()
    sigma_data: float = 0.5
    frames: tuple[int, ...] = ()
    strength: tuple[float, ...] = ()


class Batch(struct.PyTreeNode):
    """Scaled and augmented examples; every leaf has a leading axis B.

    Attributes:
      x0: (B, ...) clean data.
      condition: labels, what augmentation did, dropout keys.
      other: (B, ...) clean data of other examples, if `needs` has "other".
      generated: samples (B, ...) of the frozen model and their labels (B,), if it has "generated".
    """

    x0: jax.Array
    condition: Condition
    other: jax.Array | None = None
    generated: tuple[jax.Array, jax.Array] | None = None
