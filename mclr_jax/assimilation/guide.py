"""Guidance by observations: functions `correct` of `samplers.sample` for trajectories.

The denoiser that `sample` gets is here `moments`, (x, sigma, condition) -> (D, v): the estimates of
the mean and of the variance of each coordinate of x0 given x. Only active frames are changed, and
only their observations are used: a frame that is finished or waits sees no later observation.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mclr_jax.assimilation.observe import Operator
from mclr_jax.samplers import CorrectFn, Level


class Seen(NamedTuple):
    """Observations of B trajectories of F frames, and the units of the model."""

    values: jax.Array  # (B, F, m); NaN where missing
    std: jax.Array  # () or (m,)
    offset: Any = 0.0  # physical state = offset + scale * x
    scale: Any = 1.0


def _full(level: Level, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """sigma and stop, to multiply with x (B, F, ...), and active (B, F)."""
    sigma, stop, active = (jnp.broadcast_to(a.reshape(len(x), -1), x.shape[:2]) for a in level)
    ones = (1,) * (x.ndim - 2)
    return sigma.reshape(*sigma.shape, *ones), stop.reshape(*stop.shape, *ones), active


def posterior(operator: Operator, seen: Seen, *, c: float = 0.5, iterations: int = 2) -> CorrectFn:
    """E[x0 | x, y] = D + V A'^T (A' V A'^T + R)^-1 (y - A D), with V = sigma^2 J^T and J = dD/dx.

    V is the covariance of x0 given x, of all frames together, by Tweedie's formula. The system is
    solved by conjugate gradients with the preconditioner R + A' v A'^T, which is diagonal; each
    iteration is one vector-Jacobian product through the network. One iteration is a step along the
    guidance D + sigma^2 J^T A'^T (y - A D) / (R + v), with the length that is best for V: where
    many frames say the same, the step is shorter than for independent frames.

    `c` bounds the length of the steps: the curvature p^T A' V A'^T p, which a network knows less
    well than v, counts as at least c p^T A' v A'^T p. With c = 1 no step is longer than for
    independent values. A nonlinear operator is linearised under N(D, v).

    The first iteration is about as expensive as a denoiser call with its gradient.
    """

    def correct(moments: Any, x: jax.Array, level: Level, condition: Any):
        sigma, _, active = _full(level, x)
        d, pull, v = jax.vjp(lambda x: moments(x, level.sigma, condition), x, has_aux=True)
        variance = jnp.broadcast_to(seen.scale**2 * v, x.shape)
        predicted, slope, rest = operator.predict(seen.offset + seen.scale * d, variance)

        def project(state):  # A' of the model's units
            return slope * operator.linear(seen.scale * state)

        back = jax.linear_transpose(project, d)
        known = jnp.isfinite(seen.values) & active[..., None]
        noise, spread = seen.std**2 + rest, slope**2 * operator.linear(variance, 2)

        def dot(a, b):
            return (a * b).sum((1, 2), keepdims=True)

        residual = jnp.where(known, seen.values - predicted, 0)
        ready = residual / (noise + spread)
        direction, size = ready, dot(residual, ready)
        for i in range(iterations):
            (gain,) = pull(back(direction)[0])
            gain = sigma**2 * jnp.where(sigma > 0, gain, 0)
            effect = jnp.where(known, project(gain), 0)
            curvature = jnp.maximum(dot(direction, effect), c * dot(direction, spread * direction))
            curvature = curvature + dot(direction, noise * direction)
            length = size / jnp.maximum(curvature, 1e-30)
            d = d + jnp.where(sigma > 0, length.reshape(-1, *(1,) * (x.ndim - 1)) * gain, 0)
            if i + 1 < iterations:
                residual = residual - length * (effect + noise * direction)
                ready = residual / (noise + spread)
                before, size = size, dot(residual, ready)
                direction = ready + size / jnp.maximum(before, 1e-30) * direction
        return d, jnp.zeros_like(d)

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
            _, slope, _ = operator.predict(state, jnp.zeros_like(state))
            noise = seen.std**2 + g * slope**2 * operator.linear(level_variance, 2)
            error = jnp.where(known, seen.values - operator(state), 0)
            total = (error**2 / jax.lax.stop_gradient(noise)).sum((1, 2))
            return jnp.sqrt(jnp.where(total > 0, total, 1)).sum(), d

        slope, d = jax.grad(loss, has_aux=True)(x)
        shift = -zeta * jnp.sqrt((1 + sigma**2) * (1 + stop**2)) * slope
        shown = active.reshape(*active.shape, *(1,) * (x.ndim - 2))
        return d, jnp.where(shown, shift, 0)

    return correct
