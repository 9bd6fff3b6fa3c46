"""Samplers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, each one `lax.scan`.

Every method here is a linear recurrence over denoiser calls: with `base` the state at the start of
a step, x where the denoiser is called, D its answer and D_prev the answer before,

    new = from_base * base + from_x * x + from_d * D + from_prev * D_prev,

so a method is a table of coefficients with a row per call, computed from the grid. One network call
stands in the compiled program whatever the method, and the grid may be a traced array.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.denoiser import DenoiseFn
from mclr_jax.names import look_up
from mclr_jax.noise import normal_like


class Churn(NamedTuple):
    """Stochastic churn of EDM (Karras et al. 2022, Algorithm 2); fields may be traced scalars.

    Attributes:
      amount: S_churn; noise is raised by a factor 1 + min(S_churn / num_steps, sqrt(2) - 1).
      sigma_min, sigma_max: S_min, S_max; only steps that start within them are churned.
      noise_scale: S_noise; standard deviation of the fresh noise relative to the exact one.
    """

    amount: float = 40.0
    sigma_min: float = 0.05
    sigma_max: float = 50.0
    noise_scale: float = 1.003


class _Calls(NamedTuple):
    """One row per denoiser call; every array is (num_calls,)."""

    sigma: jax.Array  # noise level of the call
    from_base: jax.Array
    from_x: jax.Array
    from_d: jax.Array
    from_prev: jax.Array
    ends_step: np.ndarray  # bool: the result becomes the next `base`


def _euler(start: jax.Array, stop: jax.Array) -> _Calls:
    ratio, zero = stop / start, jnp.zeros_like(start)
    return _Calls(start, zero, ratio, 1 - ratio, zero, np.ones(len(start), bool))


def _heun(start: jax.Array, stop: jax.Array) -> _Calls:
    """EDM Algorithm 1: an Euler step, then the trapezoidal rule, but for the last step to 0."""
    predict = _euler(start, stop)
    a, b = start[:-1], stop[:-1]
    half = (b - a) / 2
    # base + half * ((base - D_prev) / a + (x - D) / b)
    correct = _Calls(b, 1 + half / a, half / b, -half / b, -half / a, np.ones(len(a), bool))
    ends_step = np.append(np.tile([False, True], len(a)), True)

    def alternate(p, c):
        return jnp.append(jnp.stack([p[:-1], c], 1).reshape(-1), p[-1])

    return jax.tree.map(alternate, predict, correct)._replace(ends_step=ends_step)


def _dpmpp_2m(start: jax.Array, stop: jax.Array) -> _Calls:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, Algorithm 2) in the variable sigma."""
    calls = _euler(start, stop)
    h = jnp.log(start[:-1] / start[1:])  # of every step but the last, which goes to 0 in one
    extra = jnp.zeros_like(start).at[1:-1].set(h[1:] / (2 * h[:-1]) if len(start) > 2 else 0)
    return calls._replace(from_d=calls.from_d * (1 + extra), from_prev=-calls.from_d * extra)


METHODS = {"euler": _euler, "heun": _heun, "dpmpp_2m": _dpmpp_2m}


def call_levels(sigmas: np.ndarray, method: str = "heun") -> np.ndarray:
    """The noise level of each denoiser call that `sample` makes on this grid: (num_calls,)."""
    grid = jnp.asarray(sigmas)
    return np.asarray(look_up(METHODS, method, "sampler")(grid[:-1], grid[1:]).sigma)


def sample(
    denoise: DenoiseFn,
    x_init: jax.Array,
    label: jax.Array,
    sigmas: jax.Array,
    method: str = "heun",
    *,
    churn: Churn | None = None,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Integrate from sigmas[0] to 0.

    Args:
      denoise: the model, guided or not.
      x_init: (B, ...) state at sigmas[0], usually sigmas[0] * standard normal noise.
      label: (B,) int32.
      sigmas: (N + 1,) falling noise levels that end in 0; see `noise.rho_grid`.
      method: "euler" (N denoiser calls), "heun" (2N - 1) or "dpmpp_2m" (N).
      churn: stochastic sampling for the single-step methods; None is deterministic.
      keys: (B,) typed keys, needed with churn; example i uses keys[i] alone.

    Returns:
      (B, ...) samples, in the type of x_init.

    Raises:
      ValueError: on an unknown method, a grid that is not falling to 0, churn without keys or
        with a multistep method.
    """
    tabulate = look_up(METHODS, method, "sampler")
    if churn is not None and (keys is None or method == "dpmpp_2m"):
        raise ValueError(
            f"Churn needs per-sample keys (got {'none' if keys is None else 'some'}) and a "
            f"single-step method, euler or heun (got {method!r})."
        )
    if jnp.ndim(sigmas) != 1 or jnp.size(sigmas) < 2:
        raise ValueError(
            f"sigmas has shape {jnp.shape(sigmas)}; expected (num_steps + 1,) with num_steps >= 1."
        )
    if not isinstance(sigmas, jax.core.Tracer):
        grid = np.asarray(sigmas)
        if grid[-1] != 0 or not np.all(np.diff(grid) < 0):
            raise ValueError(f"sigmas must fall and end in 0; got {grid}.")
    sigmas = jnp.asarray(sigmas, x_init.dtype)
    num_steps = len(sigmas) - 1
    start, fresh_noise = sigmas[:-1], None
    if churn is not None:
        churned = (churn.sigma_min <= start) & (start <= churn.sigma_max)
        rise = jnp.where(churned, jnp.minimum(churn.amount / num_steps, np.sqrt(2) - 1), 0)
        # sqrt(raised^2 - start^2), in a form that rounding cannot make negative
        fresh_noise = start * jnp.sqrt(rise * (2 + rise)) * churn.noise_scale
        start = start * (1 + rise)
    calls = tabulate(start, sigmas[1:])
    if fresh_noise is not None:  # added before the first call of each step
        begins_step = np.append(True, calls.ends_step[:-1])
        fresh_noise = jnp.zeros_like(calls.sigma).at[np.flatnonzero(begins_step)].set(fresh_noise)

    def call(carry, row):
        base, x, prev = carry
        number, noise_std, c = row
        if keys is not None and churn is not None:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            x = x + noise_std * normal_like(step_keys, x)
            base = jnp.where(noise_std > 0, x, base)
        d = denoise(x, jnp.full(x.shape[:1], c.sigma), label).astype(x.dtype)
        new = c.from_base * base + c.from_x * x + c.from_d * d + c.from_prev * prev
        return (jnp.where(c.ends_step, new, base), new, d), None

    rows = (jnp.arange(len(calls.sigma)), fresh_noise, calls)
    (x, _, _), _ = jax.lax.scan(call, (x_init, x_init, jnp.zeros_like(x_init)), rows)
    return x
