"""A training task: a model, an objective and all other parts of a step, as pure functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from mclr_jax.adapter import Adapter
from mclr_jax.data.augment import augment
from mclr_jax.data.pixels import from_moments, random_flip
from mclr_jax.model import Model, shapes_of
from mclr_jax.noise import split
from mclr_jax.objectives.base import Batch, Models, Objective, Problem
from mclr_jax.reductions import Metrics
from mclr_jax.training.ema import Decay
from mclr_jax.types import Answers, Condition, PosteriorFn, as_condition

# Needs of an objective that no other run provides.
MADE_HERE = frozenset({"self", "average", "posterior", "class_prior", "class_strengths", "other",
                       "generated", "step"})  # fmt: skip


class Posterior(Protocol):
    """The interface of the dataclasses in `posterior`; fields are the keys of config.posterior."""

    @property
    def needs(self) -> frozenset[str]: ...

    def __call__(self, frozen: Mapping[str, Answers], problem: Problem) -> PosteriorFn: ...


@dataclasses.dataclass(frozen=True)
class Task:
    """The definition of a training, without training state.

    Companions are other models that the objective may call, by name.
    """

    model: Model
    objective: Objective
    problem: Problem
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any]  # step () -> rate (), for the log
    averages: Mapping[str, Decay]  # of the parameters; sampling uses the first by default
    posterior: Posterior | None = None  # for objectives that need p(class | x_sigma)
    companions: Mapping[str, Model] = dataclasses.field(default_factory=dict)
    flip: bool = False  # whether to flip images at random
    augment: float = 0.0  # probability of EDM's augmentations
    grad_accumulation: int = 1  # number of parts of a batch
    seed: int = 0  # of the initial parameters and of the training
    adapter: Adapter = Adapter()  # which of them are trained; "reference" has the others
    new_labels: bool = False  # whether the data have other classes than the reference's

    @property
    def needs(self) -> frozenset[str]:
        """The needs of objective, posterior and adapter, see `needs_of`."""
        return needs_of(self.objective, self.posterior, self.adapter)

    @property
    def frozen(self) -> dict[str, Model]:
        """The needed companions, whose parameters are inputs of a step beside the state."""
        return {name: self.companions[name] for name in sorted(self.needs - MADE_HERE)}

    @property
    def _keys(self) -> jax.Array:
        return jax.random.split(jax.random.key(self.seed), 3)

    @property
    def step_key(self) -> jax.Array:
        """Key of the training steps."""
        return self._keys[0]

    @property
    def eval_key(self) -> jax.Array:
        """Key of the evaluation."""
        return self._keys[1]

    def init(self) -> Any:
        """Initial parameters in training, which depend only on the seed."""
        params = self.model.init(self._keys[2])
        if not self.adapter.used:
            return params
        new = self.model.label_inputs if self.new_labels else ()
        base = shapes_of(self.companions["reference"])
        return self.adapter.start(self._keys[2], params, base, new)

    @functools.cached_property
    def shapes(self) -> Any:
        """The shapes and types of the parameters in training."""
        return jax.eval_shape(self.init) if self.adapter.used else shapes_of(self.model)

    def merged(self, params: Any, frozen: Mapping[str, Any], in_layers: bool = False) -> Any:
        """All parameters of the model, of those in training and of the frozen models.

        `in_layers`: kernels may be `adapter.LowRank`, which the networks of this package know.
        """
        if not self.adapter.used:
            return params
        in_layers &= type(self.model.network).__module__.startswith("mclr_jax.")
        shapes = shapes_of(self.model)
        return self.adapter.merged(shapes, frozen["reference"], params, in_layers)

    def default(self, params: Any, averages: Mapping[str, Any]) -> Any:
        """The parameters in training for sampling: the first average or, without any, `params`."""
        return averages[next(iter(self.averages))] if self.averages else params

    def loss(
        self, params: Any, frozen: Mapping[str, Any], batch: dict, keys: jax.Array, train: bool
    ) -> tuple[jax.Array, Metrics]:
        """The objective on a batch of raw data.

        Args:
          params: parameters in training.
          frozen: parameters of `self.frozen` and, if needed, their "average".
          batch: image (B, ...), label (B,) int32 and further arrays from `data.pipeline`.
          keys: (B,) typed keys of the examples.
          train: whether to use augmentation and dropout.

        Returns:
          Loss (B,), and metrics whose parts have a leading axis of rows.
        """
        k_flip, k_augment, k_dropout, k_objective = split(keys, 4)
        channels = self.model.data.shape[-1]

        def example(name: str, number: int) -> jax.Array:
            """The images of this name; the keys of its draws differ from those of `split`."""
            draws = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return from_moments(batch[f"{name}image"], draws, channels)

        x0, augment_label = example("", 4), None
        if train and self.flip:
            x0 = random_flip(x0, k_flip)
        if train and self.augment:
            x0, augment_label = augment(x0, k_augment, self.augment)
        drops = train and bool(getattr(self.model.network, "dropout", 0))
        condition = Condition(
            batch["label"], augment=augment_label, dropout_keys=k_dropout if drops else None
        )
        other = example("other_", 5) if "other" in self.needs else None
        generated = None
        if "generated" in self.needs:
            generated = example("generated_", 6), batch["generated_label"]
        inputs = Batch(x0, condition, other, generated, batch.get("step"))
        return self.objective(self._models(params, frozen), self.problem, inputs, k_objective)

    def _models(self, params: Any, frozen: Mapping[str, Any]) -> Models:
        """The model in training, the needed frozen models and the posterior."""
        params = self.merged(params, frozen, in_layers=True)
        weights = {"self": params, **frozen}
        if "average" in self.needs:
            weights["average"] = self.merged(frozen["average"], frozen, in_layers=True)
        models = self.frozen | dict.fromkeys(self.needs & {"self", "average"}, self.model)
        held = {
            name: Answers(*(_held(f, self.model, other) for f in other.answers(weights[name])))
            for name, other in models.items()
        }
        posterior = None
        if self.posterior is not None and "posterior" in self.needs:
            posterior = self.posterior(held, self.problem)
        learned = self.model.has_variance and self.model.is_denoiser
        moments = self.model.moments(params) if learned else None
        forecast = self.model.forecast(params) if self.model.is_emulator else None
        log_variance = self.model.log_variance(params)
        answers = self.model.answers(params)
        return Models(*answers, held, posterior, moments, forecast, log_variance)


def needs_of(objective: Objective, posterior: Posterior | None, adapter: Adapter) -> frozenset[str]:
    """The needs of an objective, of an adapter and, if "posterior" is one, of the posterior."""
    found = objective.needs | adapter.needs
    return found | posterior.needs if posterior and "posterior" in found else found


def _held(answer: Callable, model: Model, other: Model) -> Callable:
    """The function without gradient, dropout or strength, but with the augmentation label.

    The null label of the model in training is that of the other one here.
    """
    null, its_null = model.null_label, other.null_label

    def held(x, sigma, condition):
        condition = as_condition(condition).replace(strength=None, dropout_keys=None)
        if null != its_null:
            label = jnp.where(condition.label == null, its_null, condition.label)
            condition = condition.replace(label=label)
        return jax.lax.stop_gradient(answer(x, sigma, condition))

    return held
