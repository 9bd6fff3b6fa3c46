"""An objective, its inputs, and the terms that several objectives share."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import struct

from mclr_jax import types
from mclr_jax.noise import NoiseLevels, normal_like, split
from mclr_jax.reductions import Metrics, mean
from mclr_jax.schema import check, class_factors, key
from mclr_jax.types import Answers, Condition, DenoiseFn, expand, with_label

# The result of an objective: loss (B,), and metrics whose parts have a leading axis of rows.
Loss = tuple[jax.Array, Metrics]


class Models(NamedTuple):
    """The functions that an objective may call: of the model in training and of frozen models.

    Frozen models, by their names in `needs`, have no gradient, no dropout and strength 0.
    """

    denoise: DenoiseFn
    logits: types.LogitsFn
    frozen: Mapping[str, Answers] = {}
    posterior: types.PosteriorFn | None = None  # if "posterior" is in `needs`
    # Of the model in training, if its network has a variance, is an emulator, or has a log-variance
    # head.
    moments: types.MomentsFn | None = None
    forecast: types.ForecastFn | None = None
    log_variance: Callable[[jax.Array], jax.Array] | None = None  # sigma (B,) -> (B,)


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
      step: (B,) int32, the number of updates done, in training, if "step" is.
    """

    x0: jax.Array
    condition: Condition
    other: jax.Array | None = None
    generated: tuple[jax.Array, jax.Array] | None = None
    step: jax.Array | None = None


class Objective(Protocol):
    """A frozen dataclass whose fields are the keys of config.objective, with their defaults.

    The loss of an example may not depend on other examples: devices and accumulation split batches.
    """

    where: ClassVar[str] = "config.objective"

    def __post_init__(self):
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the inputs beside the model and the data.

        "self" (the model, frozen), "average" (its averaged weights), "posterior", "class_prior",
        "other" (other examples), "generated" (config.data.generated, samples of the initial model),
        "step" (the number of the training step),
        "reference" (the run in config.init_from), and names of runs in config.companions.
        """
        return frozenset()

    @property
    def reads_null(self) -> frozenset[str]:
        """Those of `needs` that it asks for answers at the null label."""
        return frozenset()

    @property
    def reads_only_null(self) -> frozenset[str]:
        """Those of `reads_null` that it asks for no other answers: their classes may be others."""
        return frozenset()

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Loss (B,) and metrics by name; the random draws of example i depend only on keys[i]."""

    def advice(self) -> str:
        """Remedies for a training that diverges."""
        return "Lower config.optimizer.learning_rate, set optimizer.clip_norm, or use float32."


def label_dropout(default: float = 0.1) -> Any:
    """A key: the probability of the null label in place of an example's own."""
    return key(default, 0.0, 1.0, says="probability of the null label in place of an example's")


def sigma_interval() -> Any:
    """A key: noise levels (low, high]."""
    return key((), 0.0, ordered=True, says="contrast only if low < sigma <= high, in all frames")


def negative_share(what: str = "the contrast") -> Any:
    """A key: the share of rows with a negative term."""
    says = f"share of examples with {what}, which is scaled so that its mean stays the same"
    return key(1.0, words=(1.0, 0.5, 0.25), says=says)


class Noisy(NamedTuple):
    """The inputs of a network, and keys (B,) for further random draws."""

    x: jax.Array
    sigma: jax.Array
    condition: Condition
    keys: jax.Array


def perturb(
    problem: Problem, x0: jax.Array, condition: Condition, keys: jax.Array, label_dropout: float
) -> Noisy:
    """Add noise of a random level, and replace labels by the null label with a probability.

    Label dropout trains the null label of classifier-free guidance (Ho & Salimans 2022).
    """
    k_sigma, k_noise, k_label, k_rest = split(keys, 4)
    sigma = jax.vmap(lambda key: problem.levels.sample(key, problem.frames))(k_sigma)
    x = x0 + expand(sigma, x0) * normal_like(k_noise, x0)
    dropped = jax.vmap(jax.random.uniform)(k_label) < label_dropout
    label = jnp.where(dropped, problem.null_label, condition.label)
    return Noisy(x, sigma, with_label(condition, label), k_rest)


def square_error(a: jax.Array, b: jax.Array, sigma: jax.Array) -> jax.Array:
    """Mean of (a - b)^2 over each example or frame: the shape of sigma, (B,) or (B, F)."""
    return jnp.mean((a - b) ** 2, axis=tuple(range(sigma.ndim, a.ndim)))


def weighted(models: Models, problem: Problem, error: jax.Array, sigma: jax.Array) -> jax.Array:
    """The weight of each noise level times its error, of the shape of sigma.

    A network with a log-variance head u has weight error / e^u + u: the head learns the logarithm
    of the weighted error, and levels contribute alike to the gradient (Karras et al. 2024, arXiv
    2312.02696, eq. 14 and 21).
    """
    loss = problem.weight(sigma) * error
    if models.log_variance is None:
        return loss
    u = models.log_variance(sigma)
    return loss / jnp.exp(u) + u


def likelihood(
    estimate: jax.Array, variance: jax.Array, target: jax.Array, power: float, weight: Any = 1.0
) -> Loss:
    """The mean (B,) of (r^2 / u + ln u) / 2 * u^power, r^2 = weight * error, u = weight * variance.

    Times a power of its variance, without gradient through the power, a Gaussian's negative
    log-likelihood trains the mean more evenly (Seitzer et al. 2022, arXiv 2203.09168); power 1
    trains it by half the square error. Metrics: `error`, the square error, and `error_ratio`, its
    ratio to the variance, which is 1 for the true variance.
    """
    error, unit = (estimate - target) ** 2, variance * weight
    ratio = error / variance
    loss = (ratio + jnp.log(unit)) / 2 * jax.lax.stop_gradient(unit**power)
    metrics: Metrics = {"error": mean(per_example(error)), "error_ratio": mean(per_example(ratio))}
    return per_example(loss), metrics


def per_example(values: jax.Array) -> jax.Array:
    """Values (B,) or (B, F), averaged over frames: (B,)."""
    return values.reshape(len(values), -1).mean(-1)


def in_one_call(
    denoise: DenoiseFn, *inputs: tuple[jax.Array, jax.Array, Condition]
) -> list[jax.Array]:
    """The denoiser at several inputs (x, sigma, condition), computed in one call."""
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *inputs)
    ends = itertools.accumulate(len(x) for x, _, _ in inputs)
    return jnp.split(denoise(*together), [*ends][:-1])


def at_labels(
    denoise: DenoiseFn, noisy: Noisy, labels: Sequence[jax.Array | int]
) -> list[jax.Array]:
    """D(x, sigma, label) for each of several labels, (B,) or (), computed in one call."""
    x, sigma, condition, _ = noisy
    return in_one_call(denoise, *((x, sigma, with_label(condition, label)) for label in labels))


def inside(sigma: jax.Array, interval: Sequence[float]) -> jax.Array:
    """True (B,) if low < sigma <= high in all frames, for sigma (B,) or (B, F); () is no limit."""
    low, high = interval or (0.0, jnp.inf)
    levels = sigma.reshape(len(sigma), -1)
    return ((low < levels) & (levels <= high)).all(-1)


def contrast_strength(
    problem: Problem, noisy: Noisy, strength: Any, interval: Sequence[float]
) -> jax.Array:
    """The strength () or (B,) times its class's factor, (B,); 0 for dropped labels and outside."""
    label = noisy.condition.label
    there = inside(noisy.sigma, interval) & (label != problem.null_label)
    return jnp.where(there, strength * strength_factor(problem, label), 0.0)


def rows_with_negatives(share: float, rows: int) -> int:
    """k, if every k-th of the rows has a negative term; ValueError unless k divides the rows."""
    every = round(1 / share)
    if rows % every:
        raise ValueError(
            f"objective.negative_share={share} takes every {every}th row, but a part of the batch "
            f"has {rows} rows; expected a multiple of {every}. Change config.batch_size or "
            "config.grad_accumulation."
        )
    return every


def draw_label(
    keys: jax.Array, logits: jax.Array, other_than: jax.Array | None = None
) -> jax.Array:
    """A random class (B,) for each example, of logits ([B,] K), except `other_than` (B,)."""
    if other_than is not None:
        if logits.shape[-1] == 1:
            raise ValueError(
                "This objective compares a class with another one, and the data have one class; "
                "train an unconditional model by dsm."
            )
        own = jnp.arange(logits.shape[-1]) == other_than[:, None]
        logits = jnp.where(own, -jnp.inf, logits)
    logits = jnp.broadcast_to(logits, (len(keys), logits.shape[-1]))
    return jax.vmap(jax.random.categorical)(keys, logits)


def log_prior(problem: Problem) -> jax.Array:
    """log p(c), (K,)."""
    return jnp.log(jnp.asarray(problem.class_prior, jnp.float32))


def strength_factor(problem: Problem, label: jax.Array) -> jax.Array:
    """Factors of the strength by config.class_strengths, (B,); 1 for the null label."""
    factors = (*(problem.class_strengths or (1.0,) * problem.null_label), 1.0)
    return jnp.asarray(factors, jnp.float32)[label]


def arcsine_law(uniform: jax.Array, low: float, high: float) -> jax.Array:
    """Strengths that are near the ends of the range more often than uniform ones."""
    return low + (high - low) * jnp.sin(jnp.pi / 2 * uniform) ** 2


def draw_strength(
    condition: Condition,
    keys: jax.Array,
    problem: Problem,
    fixed: Any,
    law: Callable[[jax.Array, float, float], jax.Array] = arcsine_law,
) -> tuple[Any, Condition]:
    """The strength of each example, and the condition with it.

    If the strength is an input of the network, its range (low, high) and uniform numbers u (B,)
    give law(u, low, high) (B,); otherwise the strength is `fixed` and no input.
    """
    if not problem.strength:
        return fixed, condition
    strength = law(jax.vmap(jax.random.uniform)(keys), *problem.strength)
    return strength, condition.replace(strength=strength)


def log_ratio(
    problem: Problem, sigma: jax.Array, denoised: jax.Array, reference: jax.Array, x0: jax.Array
) -> jax.Array:
    """log p_theta / p_ref of preference losses, (B,):

    weight(sigma) (|D_ref - x0|^2 - |D - x0|^2), summed over dimensions.
    """
    gain = square_error(reference, x0, sigma) - square_error(denoised, x0, sigma)
    return x0[0].size * per_example(problem.weight(sigma) * gain)
