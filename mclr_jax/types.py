"""Types that all modules share: the functions of a network and their condition."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct


class Condition(struct.PyTreeNode):
    """The inputs of a network beside the noisy sample and the noise level.

    Every leaf has a leading axis B. None means absent: a `Model` replaces it by zeros if its
    network has that input.
    """

    label: jax.Array  # (B,) int32; num_classes is the null label, which means no class
    strength: jax.Array | None = None  # (B,) guidance strength: beta, guidance_scale - 1; 0 is none
    augment: jax.Array | None = None  # (B, 9) parameters of `data.augment`; zeros for none
    dropout_keys: jax.Array | None = None  # (B,) typed PRNG keys; None for no dropout


# (x (B, ...), sigma (B,) or (B, F), condition) -> estimate of E[x0 | x, condition], the shape of x.
# x = x0 + sigma n, n ~ N(0, I). sigma is (B, F) if x is a trajectory (B, F, ...) whose frames have
# their own noise levels.
DenoiseFn = Callable[[jax.Array, jax.Array, Any], jax.Array]
# The same inputs -> the estimate and the variance of each coordinate of x0 given x, as x.
MomentsFn = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array]]
# The same inputs -> log-odds of the classes (B, K).
LogitsFn = Callable[[jax.Array, jax.Array, Any], jax.Array]
# x (B, F, *state) -> mean of the state after each frame, and its variance or None, both as x.
ForecastFn = Callable[[jax.Array], tuple[jax.Array, jax.Array | None]]
# (x, sigma, condition, keys (B,)) -> log p(class | x_sigma = x), (B, K), which a random estimate
# draws from `keys`.
PosteriorFn = Callable[[jax.Array, jax.Array, Condition, jax.Array], jax.Array]


class Answers(NamedTuple):
    """The two functions of a network; only one of them is valid for a given network."""

    denoise: DenoiseFn
    logits: LogitsFn


def as_condition(condition: Condition | jax.Array) -> Condition:
    """The condition itself, or a condition made from bare labels (B,)."""
    if isinstance(condition, Condition):
        return condition
    return Condition(jnp.asarray(condition, jnp.int32))


def label_of(condition: Condition | jax.Array) -> jax.Array:
    """The labels (B,) of a condition, or the bare labels themselves."""
    return as_condition(condition).label


def with_label(condition: Condition | jax.Array, label: jax.Array | int) -> Condition:
    """The condition with other labels: (B,), or one number for all examples."""
    condition = as_condition(condition)
    return condition.replace(label=jnp.full_like(condition.label, label))


def expand(values: jax.Array, x: jax.Array) -> jax.Array:
    """Append axes of length 1 to values (), (B,) or (B, F), to multiply them with x (B, ...)."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
