"""Metrics that know how they are reduced: over rows, accumulated parts, devices and steps.

They add up everywhere and are divided only when reported, so that it does not matter how a batch
was split, and a subset without members is left out instead of being NaN.
"""

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
      value: the parts' sums -> the number to report; NaN where there is nothing to report.
    """

    parts: tuple[jax.Array, ...]
    value: Callable[..., Any] = struct.field(pytree_node=False)


class Max(struct.PyTreeNode):
    """The largest value."""

    parts: jax.Array


Metric = Sums | Max
Metrics = dict[str, Metric]


def _effective_share(total: Any, squares: Any, count: Any) -> Any:
    return total**2 / (squares * count) if squares else 0.0


def mean(values: jax.Array, where: jax.Array | None = None) -> Sums:
    """The mean of values (B,), over the rows `where` (B,) is true."""
    kept = jnp.ones_like(values) if where is None else where.astype(values.dtype)
    return Sums((jnp.where(kept > 0, values, 0), kept), operator.truediv)


def ratio(above: jax.Array, below: jax.Array) -> Sums:
    """sum(above) / sum(below), of (B,) each."""
    return Sums((above, below), operator.truediv)


def effective_share(weights: jax.Array) -> Sums:
    """Effective sample size of weights (B,) as a share of all: (sum w)^2 / (B sum w^2)."""
    return Sums((weights, weights**2, jnp.ones_like(weights)), _effective_share)


def maximum(values: jax.Array) -> Max:
    """The largest of values (B,); what is not a number counts as infinite.

    XLA's maximum over devices may lose a NaN, and the run would go on.
    """
    return Max(jnp.where(jnp.isnan(values), jnp.inf, values))


def _is_metric(tree: Any) -> bool:
    return isinstance(tree, Sums | Max)


def map_by_kind(sums: Callable, largest: Callable, *metrics: Metrics) -> Metrics:
    """`sums` applied to the arrays of every Sums, `largest` to those of every Max."""

    def one(first: Metric, *others: Metric) -> Metric:
        return jax.tree.map(sums if isinstance(first, Sums) else largest, first, *others)

    return jax.tree.map(one, *metrics, is_leaf=_is_metric)


def over_rows(metrics: Metrics) -> Metrics:
    """Reduce the leading axis of all parts."""
    return map_by_kind(lambda x: x.sum(0), lambda x: x.max(0), metrics)


def add(a: Metrics, b: Metrics) -> Metrics:
    """Of two parts of a batch together."""
    return map_by_kind(jnp.add, jnp.maximum, a, b)


def over_devices(metrics: Metrics, axis_name: str) -> Metrics:
    """Of all devices along a mapped axis together."""
    return map_by_kind(
        lambda x: jax.lax.psum(x, axis_name), lambda x: jax.lax.pmax(x, axis_name), metrics
    )


def report(metrics: Metrics) -> dict[str, float]:
    """Reduced metrics (on the host) as numbers; those without members are left out."""

    def value(metric: Metric) -> float:
        if isinstance(metric, Max):
            return float(metric.parts)
        return float(metric.value(*map(np.float64, metric.parts)))

    def empty(metric: Metric) -> bool:
        return isinstance(metric, Sums) and not metric.parts[-1]

    return {name: value(metric) for name, metric in metrics.items() if not empty(metric)}
