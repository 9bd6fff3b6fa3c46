"""Guidance by observations: functions `correct` of `samplers.sample` for trajectories.

The denoiser that `sample` gets is here `moments`, (x, sigma, condition) -> (D, v): the estimates of
the mean and of the variance of each coordinate of x0 given x. Only active frames are changed, and
only their observations are used: a frame that is finished or waits sees no later observation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.assimilation.observe import Operator
from mclr_jax.samplers import CorrectFn, Level
from mclr_jax.types import expand


class Seen(NamedTuple):
    """Observations of B trajectories of F frames, and the units of the model."""

    values: jax.Array  # (B, F, m); NaN where missing
    std: jax.Array  # () or (m,)
    offset: Any = 0.0  # physical state = offset + scale * x
    scale: Any = 1.0


def _full(level: Level, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """sigma and stop, to multiply with x (B, F, ...), and active (B, F)."""
    sigma, stop, active = (jnp.broadcast_to(a.reshape(len(x), -1), x.shape[:2]) for a in level)
    return expand(sigma, x), expand(stop, x), active


def linearised(operator: Operator, seen: Seen, moments: Any, x, level: Level, condition) -> tuple:
    """The observations as linear functions A' of x0 around D, under N(D, V): a tuple.

    D and v, as x; parts (B, F, m): y - A D, 0 where y is unknown, the variance of the noise, with
    what is not linear in A, and the variance of A x0 by v; and two functions: p (B, F, m) ->
    V A'^T p, and a state -> A' of it, 0 where y is unknown.
    """
    sigma, _, active = _full(level, x)
    d, pull, v = jax.vjp(lambda x: moments(x, level.sigma, condition), x, has_aux=True)
    variance = jnp.broadcast_to(seen.scale**2 * v, d.shape)
    found = operator.linearise(seen.offset + seen.scale * d, variance)
    known = jnp.isfinite(seen.values) & active[..., None]
    residual = jnp.where(known, seen.values - found.predicted, 0)

    def project(state):  # of the model's units
        return found.project(seen.scale * state)

    back = jax.linear_transpose(project, d)
    return (
        d, v, residual, seen.std**2 + found.rest, found.spread(variance),
        lambda p: jnp.where(sigma > 0, sigma**2 * pull(back(p)[0])[0], 0),
        lambda state: jnp.where(known, project(state), 0),
    )  # fmt: skip


def posterior(
    operator: Operator, seen: Seen, *, c: float = 1.0, overlap: float = 0.5, reach: float = 4.0
) -> CorrectFn:
    """D + a V A'^T p with p = (y - A D) / (R + c v): the posterior mean where the V is a network's.

    V = sigma^2 J^T with J = dD/dx is the covariance of x0 given x by Tweedie's formula. A network
    knows the variance v that it has learned better than the diagonal of V, and that better than
    nothing off the diagonal. For independent values the length a is 1. Where the values of several
    frames say the same, all of them together would move the estimate too far, and the length is

        a = p (y - A D) / (p (R + c v) p + overlap max(0, p (A' V A'^T - its diagonal) p)),

    with sums over the values around a frame, weighted by exp(-distance / reach). The diagonal is
    estimated with fixed random signs (Hutchinson). No coordinate moves by more than
    sqrt(v (1 + p (y - A D))): Cauchy and Schwarz's bound of the exact answer, and 1 for the
    approximation. A nonlinear operator is linearised under N(D, v). Costs two vector-Jacobian
    products.
    """

    def correct(moments: Any, x: jax.Array, level: Level, condition: Any):
        d, v, residual, noise, spread, gain, project = linearised(
            operator, seen, moments, x, level, condition
        )
        distance = np.abs(np.subtract.outer(np.arange(x.shape[1]), np.arange(x.shape[1])))
        near = jnp.asarray(np.exp(-distance / reach), x.dtype)
        p = residual / (noise + c * spread)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], p.shape[1:]).astype(x.dtype)
        step = gain(p)
        among = p * project(step) - signs * p * project(gain(signs * p))
        size, among = (a.sum(2) @ near for a in (p * residual, among))
        length = size / jnp.maximum(size + overlap * jnp.maximum(among, 0), 1e-30)
        bound = expand(jnp.sqrt(1 + size), x) * jnp.sqrt(v)
        return d + (expand(length, x) * step).clip(-bound, bound), jnp.zeros_like(x)

    return correct


def norm(operator: Operator, seen: Seen, *, zeta: float = 2.0, g: float = 0.01) -> CorrectFn:
    """The guidance of ForcingDAS (Jia et al. 2026, arXiv 2605.14285): the gradient of one norm.

    L = || w_k (y_k - A D_k) ||_2 over the active frames, with w_k = 1 / sqrt(std^2 + g sigma_k^2).
    The paper subtracts zeta dL/dz from z = x / sqrt(1 + sigma^2), at the end of the step. In the
    units of x this is zeta sqrt((1 + sigma^2) (1 + stop^2)) dL/dx.
    """

    def correct(moments: Any, x: jax.Array, level: Level, condition: Any):
        sigma, stop, active = _full(level, x)
        known = jnp.isfinite(seen.values) & active[..., None]
        level_variance = jnp.broadcast_to((seen.scale * sigma) ** 2, x.shape)

        def loss(x):
            d, _ = moments(x, level.sigma, condition)
            state = seen.offset + seen.scale * d
            spread = operator.linearise(state, jnp.zeros_like(state)).spread
            noise = seen.std**2 + g * spread(level_variance)
            error = jnp.where(known, seen.values - operator(state), 0)
            total = (error**2 / jax.lax.stop_gradient(noise)).sum((1, 2))
            return jnp.sqrt(jnp.where(total > 0, total, 1)).sum(), d

        slope, d = jax.grad(loss, has_aux=True)(x)
        shift = -zeta * jnp.sqrt((1 + sigma**2) * (1 + stop**2)) * slope
        return d, jnp.where(expand(active, x), shift, 0)

    return correct
