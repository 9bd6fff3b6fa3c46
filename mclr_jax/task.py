"""A training task: a model, an objective and all that a step needs of them, as pure functions."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import optax

from mclr_jax.data.augment import augment
from mclr_jax.data.pixels import random_flip, to_float
from mclr_jax.ema import Decay
from mclr_jax.metrics import Metrics
from mclr_jax.model import Model
from mclr_jax.noise import split
from mclr_jax.objectives.base import Objective
from mclr_jax.problem import Answers, Batch, Models, PosteriorFn, Problem
from mclr_jax.types import Condition, as_condition

# What an objective may need that is no other run.
MADE_HERE = frozenset({"self", "average", "posterior", "class_prior", "other", "generated"})


class Posterior(Protocol):
    """A frozen dataclass whose fields are the keys of config.posterior; see `posterior`."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained and how; it holds no training state.

    Attributes:
      model: in training.
      objective: of the training.
      problem: what the data say and the config chose.
      optimizer: of the parameters.
      learning_rate: step () -> rate (), to report.
      averages: of the parameters, by name; the first is what sampling takes by default.
      posterior: p(class | x_sigma) of objectives that need it.
      companions: other models that the objective may read, by name.
      flip: whether to flip images at random.
      augment: probability of EDM's augmentations.
      grad_accumulation: parts of a batch.
      seed: of parameters and of training.
    """

    model: Model
    objective: Objective
    problem: Problem
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any]
    averages: Mapping[str, Decay]
    posterior: Posterior | None = None
    companions: Mapping[str, Model] = dataclasses.field(default_factory=dict)
    flip: bool = False
    augment: float = 0.0
    grad_accumulation: int = 1
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """Of the objective and, where it needs one, of the posterior."""
        return needs_of(self.objective, self.posterior)

    @property
    def frozen(self) -> dict[str, Model]:
        """The companions that are needed: their parameters stand beside the state."""
        return {name: self.companions[name] for name in sorted(self.needs - MADE_HERE)}

    @property
    def _keys(self) -> jax.Array:
        return jax.random.split(jax.random.key(self.seed), 3)

    @property
    def step_key(self) -> jax.Array:
        """Root of the randomness of training steps."""
        return self._keys[0]

    @property
    def eval_key(self) -> jax.Array:
        """Root of the randomness of evaluation."""
        return self._keys[1]

    def init(self) -> Any:
        """Fresh parameters; a function of the seed alone."""
        return self.model.init(self._keys[2])

    def default(self, params: Any, averages: Mapping[str, Any]) -> Any:
        """The parameters that sampling takes: the first average, or the raw ones without any."""
        return averages[next(iter(self.averages))] if self.averages else params

    def loss(
        self, params: Any, frozen: Mapping[str, Any], batch: dict, keys: jax.Array, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """The objective on a batch of raw data.

        Args:
          params: of the model.
          frozen: parameters of `self.frozen` and, where it is needed, of the model's "average".
          batch: image (B, ...), label (B,) int32 and companions, as `data.pipeline` gives them.
          keys: (B,) typed keys of the examples.
          train: whether to augment and to drop out.

        Returns:
          loss (B,), and metrics whose parts have a leading axis of rows.
        """
        k_flip, k_augment, k_dropout, k_objective = split(keys, 4)
        x0, augment_label = to_float(batch["image"]), None
        if train and self.flip:
            x0 = random_flip(x0, k_flip)
        if train and self.augment:
            x0, augment_label = augment(x0, k_augment, self.augment)
        drops = train and bool(getattr(self.model.network, "dropout", 0))
        condition = Condition(
            batch["label"], augment=augment_label, dropout_keys=k_dropout if drops else None
        )
        other = generated = None
        if "other" in self.needs:
            other = to_float(batch["other_image"])
        if "generated" in self.needs:
            generated = to_float(batch["generated_image"]), batch["generated_label"]
        return self.objective(
            self._models(params, frozen),
            self.problem,
            Batch(x0, condition, other, generated),
            k_objective,
        )

    def _models(self, params: Any, frozen: Mapping[str, Any]) -> Models:
        """The model, and beside it what is needed: without gradient, dropout and strength."""
        own = {"self": params, "average": frozen.get("average")}
        models = self.frozen | {name: self.model for name in own if name in self.needs}
        weights = {**own, **frozen}
        held = {
            name: Answers(*map(_held, model.answers(weights[name])))
            for name, model in models.items()
        }
        posterior = None
        if "posterior" in self.needs:
            assert self.posterior is not None  # experiment.make_task checks it
            posterior = self.posterior(held, self.problem)
        return Models(*self.model.answers(params), held, posterior)


def needs_of(objective: Objective, posterior: Posterior | None) -> frozenset[str]:
    """What an objective needs and, where it needs a posterior, what that needs."""
    asked = posterior is not None and "posterior" in objective.needs
    return objective.needs | (posterior.needs if posterior and asked else frozenset())


def _held(answer: Callable) -> Callable:
    """A frozen model's answer: no gradient, no dropout, strength 0, but the augmentation label."""

    def held(x, sigma, condition):
        condition = as_condition(condition).replace(strength=None, dropout_keys=None)
        return jax.lax.stop_gradient(answer(x, sigma, condition))

    return held
