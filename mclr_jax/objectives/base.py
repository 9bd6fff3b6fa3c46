"""What an objective is, and the terms that several objectives share."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from mclr_jax.metrics import Metrics
from mclr_jax.noise import normal_like, split
from mclr_jax.problem import Batch, Models, Problem
from mclr_jax.types import Condition, DenoiseFn, expand, with_label


class Objective(Protocol):
    """A frozen dataclass whose fields are the keys of config.objective, with their defaults.

    No operation may look across examples: the loss of some rows is that of the rows alone, so that
    devices and accumulation change nothing.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Names of what `models` and `batch` must hold beside the model and the data.

        "self" (the model, frozen), "average" (its averaged weights), "posterior", "class_prior",
        "other" (other examples), "generated" (samples of the model that training started from,
        config.data.generated); any other name is that of a companion run: "reference" is
        config.init_from, the rest is in config.companions.
        """
        return frozenset()

    def __call__(
        self, models: Models, problem: Problem, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Loss (B,) and metrics by name; example i is randomised by keys[i] alone."""

    def advice(self) -> str:
        """What to do when training diverges."""
        return (
            "Lower config.optimizer.learning_rate, set config.optimizer.clip_norm, or compute in "
            "float32."
        )


class Noisy(NamedTuple):
    """What an objective shows a network, and keys (B,) for whatever else it draws."""

    x: jax.Array
    sigma: jax.Array
    condition: Condition
    keys: jax.Array


def perturb(
    problem: Problem, x0: jax.Array, condition: Condition, keys: jax.Array, label_dropout: float
) -> Noisy:
    """Add noise of a drawn level; show some labels as the null label.

    Label dropout trains the null label that classifier-free guidance needs (Ho & Salimans 2022).
    """
    k_sigma, k_noise, k_label, k_rest = split(keys, 4)
    sigma = jax.vmap(lambda key: problem.levels.sample(key, problem.frames))(k_sigma)
    x = x0 + expand(sigma, x0) * normal_like(k_noise, x0)
    dropped = jax.vmap(jax.random.uniform)(k_label) < label_dropout
    label = jnp.where(dropped, problem.null_label, condition.label)
    return Noisy(x, sigma, with_label(condition, label), k_rest)


def square_error(a: jax.Array, b: jax.Array, sigma: jax.Array) -> jax.Array:
    """Mean of (a - b)^2 over what has one noise level: the shape of sigma, (B,) or (B, F)."""
    return jnp.mean((a - b) ** 2, axis=tuple(range(sigma.ndim, a.ndim)))


def per_example(values: jax.Array) -> jax.Array:
    """(B,) as it is; (B, F) averaged over frames."""
    return values.reshape(len(values), -1).mean(-1)


def in_one_call(
    denoise: DenoiseFn, *inputs: tuple[jax.Array, jax.Array, Condition]
) -> list[jax.Array]:
    """The denoiser's answers to several inputs (x, sigma, condition), from one call of it."""
    together = jax.tree.map(lambda *parts: jnp.concatenate(parts), *inputs)
    out, answers, start = denoise(*together), [], 0
    for x, _, _ in inputs:
        answers.append(out[start : start + len(x)])
        start += len(x)
    return answers


def at_labels(
    denoise: DenoiseFn, noisy: Noisy, labels: Sequence[jax.Array | int]
) -> list[jax.Array]:
    """D(x, sigma, label) for each of several labels, (B,) or one for all, in one call."""
    x, sigma, condition, _ = noisy
    return in_one_call(denoise, *((x, sigma, with_label(condition, label)) for label in labels))


def draw_label(
    keys: jax.Array, logits: jax.Array, other_than: jax.Array | None = None
) -> jax.Array:
    """A class (B,) for each example from logits ([B,] K), never `other_than` (B,)."""
    if other_than is not None:
        own = jnp.arange(logits.shape[-1]) == other_than[:, None]
        logits = jnp.where(own, -jnp.inf, logits)
    logits = jnp.broadcast_to(logits, (len(keys), logits.shape[-1]))
    return jax.vmap(jax.random.categorical)(keys, logits)


def log_prior(problem: Problem) -> jax.Array:
    """log p(c), (K,)."""
    return jnp.log(jnp.asarray(problem.class_prior, jnp.float32))


def draw_strength(
    condition: Condition,
    keys: jax.Array,
    problem: Problem,
    fixed: Any,
    law: Callable[[jax.Array, float, float], jax.Array],
) -> tuple[Any, Condition]:
    """The strength of each example, and the condition that tells the network of it.

    law(u (B,) uniform, low, high) -> (B,) in the range of a network that takes the strength as an
    input; `fixed` for all others.
    """
    if not problem.strength:
        return fixed, condition
    strength = law(jax.vmap(jax.random.uniform)(keys), *problem.strength)
    return strength, condition.replace(strength=strength)


def arcsine_law(uniform: jax.Array, low: float, high: float) -> jax.Array:
    """Draws the ends more often, which have neighbours on one side alone."""
    return low + (high - low) * jnp.sin(jnp.pi / 2 * uniform) ** 2


def log_ratio(
    problem: Problem, sigma: jax.Array, denoised: jax.Array, reference: jax.Array, x0: jax.Array
) -> jax.Array:
    """What preference losses take for log p_theta / p_ref: (B,).

    weight(sigma) (|D_ref - x0|^2 - |D - x0|^2), summed over dimensions.
    """
    gain = square_error(reference, x0, sigma) - square_error(denoised, x0, sigma)
    return x0[0].size * per_example(problem.weight(sigma) * gain)
