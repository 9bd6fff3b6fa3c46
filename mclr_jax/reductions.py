"""Metrics with their own reduction: over rows, accumulated parts, devices and steps.

Parts of a metric are summed, and divided only in the report. The way in which a batch was split
therefore changes nothing, and a subset without members is left out of the report instead of NaN.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Sums(struct.PyTreeNode):
    """A function of sums, such as a mean.

    Attributes:
      parts: arrays whose leading axis is summed over.
      value: the sums -> the reported number. A metric whose last sum is 0 is not reported.
    """

    parts: tuple[jax.Array, ...]
    value: Callable[..., Any] = struct.field(pytree_node=False)


class Max(struct.PyTreeNode):
    """The largest value."""

    parts: jax.Array


Metrics = dict[str, Sums | Max]


def _effective_share(total: Any, squares: Any, count: Any) -> Any:
    return total**2 / (squares * count) if squares else 0.0


def mean(values: jax.Array, where: jax.Array | None = None) -> Sums:
    """The mean of values (B,), over the rows for which `where` (B,) is true."""
    kept = jnp.ones_like(values) if where is None else where.astype(values.dtype)
    return Sums((jnp.where(kept > 0, values, 0), kept), operator.truediv)


def ratio(above: jax.Array, below: jax.Array) -> Sums:
    """sum(above) / sum(below), of (B,) each."""
    return Sums((above, below), operator.truediv)


def effective_share(weights: jax.Array) -> Sums:
    """Effective sample size of weights (B,), divided by B: (sum w)^2 / (B sum w^2)."""
    return Sums((weights, weights**2, jnp.ones_like(weights)), _effective_share)


def maximum(values: jax.Array) -> Max:
    """The largest of values (B,); NaN counts as infinity.

    XLA's maximum over devices can lose a NaN, which must stop the run.
    """
    return Max(jnp.where(jnp.isnan(values), jnp.inf, values))


def _reduce(metrics: Metrics, add: Callable, largest: Callable) -> Metrics:
    return {
        name: jax.tree.map(add if isinstance(metric, Sums) else largest, metric)
        for name, metric in metrics.items()
    }


def over_rows(metrics: Metrics) -> Metrics:
    """Reduce the leading axis of all parts."""
    return _reduce(metrics, lambda x: x.sum(0), lambda x: x.max(0))


def over_devices(metrics: Metrics, axis_name: str) -> Metrics:
    """Reduce over all devices along a mapped axis."""
    add, largest = (functools.partial(f, axis_name=axis_name) for f in (jax.lax.psum, jax.lax.pmax))
    return _reduce(metrics, add, largest)


def report(metrics: Metrics) -> dict[str, float]:
    """Reduced metrics (on the host) as numbers; metrics without members are left out."""
    values = {}
    for name, metric in metrics.items():
        if isinstance(metric, Max):
            values[name] = float(metric.parts)
        elif metric.parts[-1]:
            values[name] = float(metric.value(*map(np.float64, metric.parts)))
    return values
