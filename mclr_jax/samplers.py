"""Samplers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, each one `lax.scan`.

Every method is a linear recurrence over denoiser calls. With `base` the state at the start of a
step, x the input of the call, D its output and D_prev the output of the call before,

    new = from_base * base + from_x * x + from_d * D + from_prev * D_prev + fresh * noise.

A method is therefore a table of coefficients, computed from the grid, with one row per call. The
compiled program contains one network call for all methods, and the grid may be a traced array.
Ancestral methods have fresh noise: they sample the reverse stochastic differential equation.

A grid of shape (num_steps + 1, F) gives each frame of a trajectory (B, F, ...) its own levels. A
step in which the level of a frame stays the same does not change the frame, and the next step of a
multistep method is of first order for that frame.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.noise import SIGMA_RANGE, normal_like, rho_grid
from mclr_jax.schema import Keys, key, look_up
from mclr_jax.types import Condition, DenoiseFn, as_condition, expand


class Churn(NamedTuple):
    """Stochastic churn of EDM (Karras et al. 2022, Algorithm 2); fields may be traced scalars.

    In steps that start in [sigma_min, sigma_max] churn raises the noise level by a factor
    1 + min(amount / num_steps, sqrt(2) - 1), with fresh noise.
    """

    amount: float = 40.0  # S_churn
    sigma_min: float = 0.05  # S_min
    sigma_max: float = 50.0  # S_max
    noise_scale: float = 1.003  # S_noise: std of the fresh noise relative to the exact one


class Level(NamedTuple):
    """The noise levels of a denoiser call, each (B,) or (B, F), for a function `correct`."""

    sigma: jax.Array  # of x
    stop: jax.Array  # at the end of the step
    active: jax.Array  # bool: the call changes the frame, which is neither finished nor waiting


# (denoise, x, level, condition) -> (denoised, shift), both of the shape of x
CorrectFn = Callable[[Any, jax.Array, Level, Condition], tuple[jax.Array, jax.Array]]


class _Calls(NamedTuple):
    """One row per denoiser call; the arrays are (num_calls,) or (num_calls, F)."""

    sigma: jax.Array  # noise level of the call
    stop: jax.Array  # noise level at the end of its step
    from_base: jax.Array
    from_x: jax.Array
    from_d: jax.Array
    from_prev: jax.Array
    fresh: jax.Array  # std of the noise at the end of the step
    active: jax.Array  # bool: the call changes x; otherwise the coefficients are not used
    ends_step: np.ndarray  # bool (num_calls,): the result becomes the next `base`


def _euler(start: jax.Array, stop: jax.Array, eta: Any = 0.0) -> _Calls:
    """Euler's method, or with fresh noise DDIM (Song et al. 2020, arXiv 2010.02502, eq. 16)."""
    moves, zero = stop != start, jnp.zeros_like(start)
    ratio = jnp.where(moves, stop / jnp.where(moves, start, 1), 1)
    fresh = eta * stop * jnp.sqrt(1 - ratio**2)
    keep = ratio * jnp.sqrt(1 - eta**2 * (1 - ratio**2))
    ends_step = np.ones(len(start), bool)
    return _Calls(start, stop, zero, keep, 1 - keep, zero, fresh, moves, ends_step)


def _heun(start: jax.Array, stop: jax.Array) -> _Calls:
    """EDM Algorithm 1: an Euler step, then the trapezoidal rule, except in a step to 0."""
    predict = _euler(start, stop)
    active = (predict.active & (stop > 0))[:-1]
    a, b = (jnp.where(active, level[:-1], 1) for level in (start, stop))
    half, always = (b - a) / 2, np.ones(len(a), bool)
    # base + half * ((base - D_prev) / a + (x - D) / b)
    end, zero = stop[:-1], jnp.zeros_like(half)
    correct = _Calls(end, end, 1 + half / a, half / b, -half / b, -half / a, zero, active, always)
    ends_step = np.append(np.tile([False, True], len(a)), True)

    def alternate(p, c):
        return jnp.append(jnp.stack([p[:-1], c], 1).reshape(-1, *p.shape[1:]), p[-1:], axis=0)

    return jax.tree.map(alternate, predict, correct)._replace(ends_step=ends_step)


def _dpmpp_2m(start: jax.Array, stop: jax.Array, eta: Any = 0.0) -> _Calls:
    """DPM-Solver++(2M), or with eta = 1 SDE-DPM-Solver++(2M), in the variable sigma.

    Source: Lu et al. 2022, arXiv 2211.01095, Algorithm 2 and Appendix B.
    """
    calls = _euler(start, stop, eta)
    smooth = calls.active & (stop > 0)
    h = jnp.log(jnp.where(smooth, start, jnp.e) / jnp.where(smooth, stop, 1))  # 1 where not smooth
    second = smooth[1:] & smooth[:-1]
    extra = jnp.zeros_like(start).at[1:].set(jnp.where(second, h[1:] / (2 * h[:-1]), 0))
    return calls._replace(from_d=calls.from_d * (1 + extra), from_prev=-calls.from_d * extra)


METHODS: dict[str, Callable[..., _Calls]] = {
    "euler": _euler,
    "heun": _heun,
    "dpmpp_2m": _dpmpp_2m,
    "ancestral": functools.partial(_euler, eta=1.0),
    "ancestral_2m": functools.partial(_dpmpp_2m, eta=1.0),
}


@dataclasses.dataclass(frozen=True)
class Sampler(Keys):
    """The keys of config.sampler: a method, see `sample`, and a grid, see `noise.rho_grid`."""

    where: ClassVar[str] = "config.sampler"

    method: str = key("heun", words=METHODS, says="euler, heun or dpmpp_2m")
    num_steps: int = key(18, 1, 100_000, says="steps of the grid")
    sigma_min: float = key(0.002, *SIGMA_RANGE, says="last noise level before 0")
    sigma_max: float = key(80.0, *SIGMA_RANGE, says="first noise level")
    rho: float = key(7.0, 0.1, 100.0, says="larger: more steps at low noise")

    def __post_init__(self):
        super().__post_init__()
        self.grid()

    def grid(self, sigma_range: tuple[float, float] = (0.0, np.inf)) -> np.ndarray:
        """The grid (num_steps + 1,), within the `sigma_range` of the model's preconditioning."""
        low, high = max(self.sigma_min, sigma_range[0]), min(self.sigma_max, sigma_range[1])
        return rho_grid(self.num_steps, low, high, self.rho)


def call_levels(sigmas: np.ndarray, method: str = "heun") -> np.ndarray:
    """The noise levels (num_calls, ...) of the denoiser calls of `sample` on this grid."""
    grid = jnp.asarray(sigmas)
    return np.asarray(look_up(METHODS, method, "sampler")(grid[:-1], grid[1:]).sigma)


def stabilised(denoise: DenoiseFn, floor: float) -> DenoiseFn:
    """The denoiser with noise levels below `floor` replaced by `floor`; x does not change.

    Networks are not trained at level 0, the level of the finished frames of a trajectory (the
    stabilization level of Chen et al. 2024, arXiv 2407.01392).
    """
    return lambda x, sigma, condition: denoise(x, jnp.maximum(sigma, floor), condition)


def _checked(sigmas: jax.Array) -> None:
    """Raise ValueError on an invalid grid; of a traced grid only the shape is checked."""
    if jnp.ndim(sigmas) not in (1, 2) or len(sigmas) < 2:
        raise ValueError(
            f"sigmas has shape {jnp.shape(sigmas)}; expected (num_steps + 1,) or "
            "(num_steps + 1, frames) with num_steps >= 1."
        )
    if not isinstance(sigmas, jax.core.Tracer):
        grid = np.asarray(sigmas)
        fall = np.diff(grid, axis=0).reshape(len(grid) - 1, -1)
        if np.any(grid[-1] != 0) or np.any(fall > 0) or not np.all(fall.min(1) < 0):
            raise ValueError(
                f"sigmas must fall in every step for some frame and end in 0; got {grid}."
            )


def _has_noise(method: str, churn: Churn | None, keys: jax.Array | None, eta: Any) -> bool:
    """Whether there is fresh noise; raises ValueError if the arguments do not fit together."""
    ancestral = method.startswith("ancestral") or eta is not None
    if churn is not None and (keys is None or ancestral or method == "dpmpp_2m"):
        raise ValueError(
            f"Churn needs per-sample keys (got {'none' if keys is None else 'some'}) and a "
            f"single-step method without fresh noise of its own, euler or heun (got {method!r}, "
            f"eta {eta})."
        )
    if ancestral and (keys is None or method == "heun"):
        raise ValueError(
            f"Fresh noise (method {method!r}, eta {eta}) needs per-sample keys (got "
            f"{'none' if keys is None else 'some'}) and a method other than heun."
        )
    return ancestral or churn is not None


def sample(
    denoise: DenoiseFn,
    x_init: jax.Array,
    condition: Condition | jax.Array,
    sigmas: jax.Array,
    method: str = "heun",
    *,
    churn: Churn | None = None,
    keys: jax.Array | None = None,
    eta: Any = None,
    correct: CorrectFn | None = None,
) -> jax.Array:
    """Integrate from sigmas[0] to 0: samples of the shape and type of x_init.

    Args:
      denoise: the model, with or without guidance.
      x_init: (B, ...) state at sigmas[0], usually sigmas[0] * standard normal noise.
      condition: a `Condition` or bare labels (B,) int32.
      sigmas: (N + 1,) noise levels that fall to 0, see `noise.rho_grid`; or (N + 1, F) for
        trajectories (B, F, ...), where no column rises.
      method: "euler" (N denoiser calls), "heun" (2N - 1) or "dpmpp_2m" (N); with fresh noise in
        each step "ancestral" (N, first order) or "ancestral_2m" (N, second order).
      churn: stochastic sampling with euler or heun; None for none.
      keys: (B,) typed keys, needed with fresh noise; example i uses only keys[i].
      eta: share of fresh noise of all methods but heun (DDIM's eta, 0 to 1); None: the method's.
      correct: replaces the call of the denoiser: it gets `denoise`, x, a `Level` and the condition,
        and gives the estimate and a shift that is added to active frames at the end of the step.

    Raises:
      ValueError: on an unknown method, an invalid grid, fresh noise without keys, or churn or eta
        with a method that has none.
    """
    tabulate = look_up(METHODS, method, "sampler")
    condition = as_condition(condition)
    noisy = _has_noise(method, churn, keys, eta)
    _checked(sigmas)
    sigmas = jnp.asarray(sigmas, x_init.dtype)
    start, stop, fresh_noise = sigmas[:-1], sigmas[1:], None
    if churn is not None:
        churned = (churn.sigma_min <= start) & (start <= churn.sigma_max) & (stop != start)
        rise = jnp.where(churned, jnp.minimum(churn.amount / len(start), np.sqrt(2) - 1), 0)
        # sqrt(raised^2 - start^2), in a form that rounding cannot make negative
        fresh_noise = start * jnp.sqrt(rise * (2 + rise)) * churn.noise_scale
        start = start * (1 + rise)
    calls = tabulate(start, stop) if eta is None else tabulate(start, stop, eta=eta)
    noise_std = jnp.roll(calls.fresh, 1, axis=0)  # before the next call; the last one, at 0, is 0
    if fresh_noise is not None:  # added before the first call of each step
        begins_step = np.append(True, calls.ends_step[:-1])
        noise_std = noise_std.at[np.flatnonzero(begins_step)].set(fresh_noise)

    def call(carry, row):
        base, x, prev = carry
        number, noise_std, c = row
        level = Level(
            *(jnp.broadcast_to(a, (len(x), *a.shape)) for a in (c.sigma, c.stop, c.active))
        )
        # the entries of the row, () or (F,), broadcast against x
        noise_std, c = jax.tree.map(lambda values: expand(values[None], x), (noise_std, c))
        if keys is not None and noisy:
            step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            x = x + noise_std * normal_like(step_keys, x)
            base = jnp.where(noise_std > 0, x, base)
        if correct is None:
            d, shift = denoise(x, level.sigma, condition).astype(x.dtype), jnp.zeros((), x.dtype)
        else:
            d, shift = correct(denoise, x, level, condition)
        new = c.from_base * base + c.from_x * x + c.from_d * d + c.from_prev * prev
        last = c.ends_step | (c.stop == 0)  # Heun's method ends with its first call there
        new = jnp.where(c.active, new + jnp.where(last, shift, 0), x)
        return (jnp.where(c.ends_step, new, base), new, d), None

    rows = (jnp.arange(len(calls.sigma)), noise_std, calls)
    (x, _, _), _ = jax.lax.scan(call, (x_init, x_init, jnp.zeros_like(x_init)), rows)
    return x
