"""The types that everything shares: what a denoiser is, and what it is told beside x and sigma."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


class Condition(struct.PyTreeNode):
    """What a model is told of each example beside its noisy sample and noise level.

    Every leaf has a leading axis B. None means absent: a `Model` fills in zeros where its network
    wants the input, and a network ignores what it has no input for.

    Attributes:
      label: (B,) int32; num_classes is the null label, which means no class.
      strength: (B,) guidance strength (beta; guidance_scale - 1), 0 for none.
      augment: (B, 9) what was done to the image, see `data.augment`; zeros for nothing.
      dropout_keys: (B,) typed PRNG keys; None for no dropout.
    """

    label: jax.Array
    strength: jax.Array | None = None
    augment: jax.Array | None = None
    dropout_keys: jax.Array | None = None


# (x (B, ...), sigma (B,) or (B, F), condition) -> estimate of E[x0 | x, condition], the shape of x.
# x = x0 + sigma n, n ~ N(0, I). sigma is (B, F) where x is a trajectory (B, F, ...) whose frames
# have noise levels of their own.
DenoiseFn = Callable[[jax.Array, jax.Array, Any], jax.Array]


def as_condition(condition: Condition | jax.Array) -> Condition:
    """A condition, also from bare labels (B,): what samplers and guidance accept from a user."""
    if isinstance(condition, Condition):
        return condition
    return Condition(jnp.asarray(condition, jnp.int32))


def label_of(condition: Condition | jax.Array) -> jax.Array:
    """The labels (B,) of a condition, or the bare labels themselves."""
    return as_condition(condition).label


def with_label(condition: Condition | jax.Array, label: jax.Array | int) -> Condition:
    """The same condition under other labels: (B,), or one number for all."""
    condition = as_condition(condition)
    label = jnp.asarray(label, condition.label.dtype)
    return condition.replace(label=jnp.broadcast_to(label, condition.label.shape))


def expand(values: jax.Array, x: jax.Array) -> jax.Array:
    """values (), (B,) or (B, F), with axes of length 1 behind, to be multiplied with x (B, ...)."""
    values = jnp.asarray(values)
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))
