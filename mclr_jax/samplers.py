"""Samplers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma, each one `lax.scan`.

Every method is a linear recurrence over denoiser calls. With `base` the state at the start of a
step, x the input of the call, D its output and D_prev the output of the call before,

    new = from_base * base + from_x * x + from_d * D + from_prev * D_prev + fresh * noise.

A method is therefore a table of coefficients, computed from the grid, with one row per call. The
compiled program contains one network call for all methods, and the grid may be a traced array.
Ancestral methods, `ddpm` and `ddim` have fresh noise: they sample the reverse stochastic
differential equation. `Sampler` also has the methods of `flow`, which go by time instead of sigma.

A grid of shape (num_steps + 1, F) gives each frame of a trajectory (B, F, ...) its own levels. A
step in which the level of a frame stays the same does not change the frame, and the next step of a
multistep method is of first order for that frame.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax import flow
from mclr_jax.denoiser import Preconditioning
from mclr_jax.noise import SIGMA_RANGE, rho_grid, step_noise
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
    # ln of the ratio of the highest and the lowest std of the noise before the call, for `ddpm`
    spread: jax.Array | None = None


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


def _ddpm(start: jax.Array, stop: jax.Array) -> _Calls:
    """Ancestral sampling whose noise has a learned std (arXiv 2102.09672, eq. 15; DiT's sampler).

    The variance lies between that of x_stop given x_start and x0, and beta = 1 - alpha_bar(start) /
    alpha_bar(stop), both in units of sigma.
    """
    calls = _euler(start, stop, 1.0)
    a, b = (jnp.where(calls.active & (stop > 0), level, 1) for level in (start, stop))
    spread = jnp.log(a / b) - jnp.log((1 + a**2) / (1 + b**2)) / 2
    return calls._replace(spread=jnp.roll(spread, 1, axis=0))


class Method(NamedTuple):
    """The calls of a method, (start, stop) -> `_Calls`, and what else `sample` has to know."""

    tabulate: Callable[..., _Calls]
    noise: bool = False  # fresh noise in each step
    churn: bool = False  # may have churn: no memory of earlier steps, no noise of its own
    unit: bool = False  # starts from x_t = x / sqrt(1 + sigma^2) of a variance-preserving process


METHODS = {
    "euler": Method(_euler, churn=True),
    "heun": Method(_heun, churn=True),
    "dpmpp_2m": Method(_dpmpp_2m),
    "ddpm": Method(_ddpm, noise=True, unit=True),
    "ddim": Method(_euler, noise=True, unit=True),
    "ancestral": Method(functools.partial(_euler, eta=1.0), noise=True),
    "ancestral_2m": Method(functools.partial(_dpmpp_2m, eta=1.0), noise=True),
}


# The steps of a process with `steps` steps, in `count` of them; ValueError if none has the count.
SPACINGS: dict[str, Callable[[int, int], np.ndarray]] = {
    # a sum, as DiT has it: its halves are rounded like the official ones
    "even": lambda count, steps: np.round(
        np.cumsum([0.0, *[(steps - 1) / max(count - 1, 1)] * (count - 1)])
    ).astype(int),
    "leading": lambda count, steps: np.arange(count) * (steps // count),
    "ddim": lambda count, steps: np.arange(0, steps, -(-steps // count)),
}


@dataclasses.dataclass(frozen=True)
class Sampler(Keys, where="config.sampler"):
    """The keys of config.sampler: a method, see `sample` and `flow`, and a grid.

    The grid is `noise.rho_grid`, or steps of the model's process; methods of `flow` have equal
    steps of time.
    """

    method: str = key("heun", words=(*METHODS, *flow.METHODS), says="euler, heun or dpmpp_2m; ddpm "
                      "or ddim of DiT; ode_* or sde_* of SiT and REPA, see flow")  # fmt: skip
    num_steps: int = key(18, 1, 100_000, says="steps of the grid")
    sigma_min: float = key(0.002, *SIGMA_RANGE, says="last noise level before 0")
    sigma_max: float = key(80.0, *SIGMA_RANGE, says="first noise level")
    rho: float = key(7.0, 0.1, 100.0, says="larger: more steps at low noise")
    spacing: str = key("rho", words=("rho", *SPACINGS), says="of the grid: rho between sigma_max "
                       "and sigma_min, or of the steps of the model's process even (DiT's N), "
                       "ddim (DiT's ddimN) or leading (diffusers)")  # fmt: skip
    eta: float = key(0.0, 0.0, 1.0, says="fresh noise of ddim: 0 none, 1 that of ancestral")
    diffusion: str = key("sigma", words=flow.DIFFUSIONS, says="fresh noise of sde_*: sigma of SiT, "
                         "linear of REPA")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        rho_grid(self.num_steps, self.sigma_min, self.sigma_max, self.rho)

    def grid(self, preconditioning: Preconditioning | None = None) -> np.ndarray:
        """The noise levels (num_steps + 1,), those that the preconditioning knows.

        ValueError: the spacing is in steps, and the process has none or not so many.
        """
        if self.spacing == "rho":
            known = (0.0, np.inf) if preconditioning is None else preconditioning.sigma_range
            low, high = max(self.sigma_min, known[0]), min(self.sigma_max, known[1])
            grid = rho_grid(self.num_steps, low, high, self.rho)
            rounded = getattr(preconditioning, "rounded", None)
            return grid if rounded is None else rounded(grid)
        table = np.asarray(getattr(preconditioning, "table", ()))
        found = SPACINGS[self.spacing](self.num_steps, len(table)) if len(table) else ()
        if len(np.unique(found)) != self.num_steps:
            raise ValueError(
                f"config.sampler.spacing is {self.spacing!r} with {self.num_steps} steps; the "
                f"model's process has {len(table)}. Use spacing rho, or another num_steps."
            )
        return np.append(table[found][::-1], 0.0)

    def settings(self) -> dict[str, Any]:
        """The keys, for a file about samples; those of later versions only where they count."""
        later = {"spacing": "rho", "eta": 0.0, "diffusion": "sigma"}
        return {k: v for k, v in dataclasses.asdict(self).items() if v != later.get(k)}

    def table(self, preconditioning: Preconditioning) -> Any:
        """Arrays that `draw` needs of the grid; their values may be traced."""
        if self.method in flow.METHODS:
            return flow.tabulate(preconditioning, self.method, self.num_steps, self.diffusion)
        return jax.tree.map(np.float32, (self.grid(preconditioning), self.eta))

    def levels(self, preconditioning: Preconditioning) -> np.ndarray:
        """The noise levels (num_calls,) for which each network call has guidance or not."""
        if self.method in flow.METHODS:
            return self.table(preconditioning).sigma
        return call_levels(self.grid(preconditioning), self.method)


def call_levels(sigmas: np.ndarray, method: str = "heun") -> np.ndarray:
    """The noise levels (num_calls, ...) of the denoiser calls of `sample` on this grid."""
    grid = jnp.asarray(sigmas)
    return np.asarray(look_up(METHODS, method, "sampler").tabulate(grid[:-1], grid[1:]).sigma)


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


def _has_noise(
    method: str, fresh: bool, may_churn: bool, churn: Churn | None, keys: jax.Array | None
) -> bool:
    """Fresh noise or none; raises ValueError if the arguments do not fit together."""
    if churn is not None and (keys is None or not may_churn):
        raise ValueError(
            f"Churn needs per-sample keys (got {'none' if keys is None else 'some'}) and a "
            f"single-step method without fresh noise of its own, euler or heun (got {method!r})."
        )
    if fresh and keys is None:
        raise ValueError(f"Fresh noise (method {method!r}) needs per-sample keys; got none.")
    return fresh or churn is not None


def sample(
    denoise: DenoiseFn,
    x_init: jax.Array,
    condition: Condition | jax.Array,
    sigmas: jax.Array,
    method: str = "heun",
    *,
    churn: Churn | None = None,
    keys: jax.Array | None = None,
    correct: CorrectFn | None = None,
    eta: Any = 0.0,
) -> jax.Array:
    """Integrate from sigmas[0] to 0: samples of the shape and type of x_init.

    Args:
      denoise: the model, with or without guidance.
      x_init: (B, ...) state at sigmas[0], usually sigmas[0] * standard normal noise.
      condition: a `Condition` or bare labels (B,) int32.
      sigmas: (N + 1,) noise levels that fall to 0, see `noise.rho_grid`; or (N + 1, F) for
        trajectories (B, F, ...), where no column rises.
      method: "euler" (N denoiser calls), "heun" (2N - 1) or "dpmpp_2m" (N); with fresh noise in
        each step "ancestral" (N, first order), "ancestral_2m" (N, second order), "ddim" (N) or
        "ddpm" (N), for which the denoiser may have more channels than x: the learned place of the
        noise's log variance, -1 for its lower and 1 for its upper end; without it, the upper end.
      churn: stochastic sampling with euler or heun; None for none.
      keys: (B,) typed keys, needed with fresh noise; example i uses only keys[i].
      correct: replaces the call of the denoiser: it gets `denoise`, x, a `Level` and the condition,
        and gives the estimate and a shift that is added to active frames at the end of the step.
      eta: share of fresh noise for "ddim", from 0 (none) to 1 (ancestral).

    Raises:
      ValueError: on an unknown method, an invalid grid, fresh noise without keys, or churn with a
        method that has none.
    """
    tabulate, fresh, may_churn, _ = look_up(METHODS, method, "sampler")
    condition = as_condition(condition)
    noisy = _has_noise(method, fresh, may_churn, churn, keys)
    _checked(sigmas)
    sigmas = jnp.asarray(sigmas, x_init.dtype)
    start, stop, fresh_noise = sigmas[:-1], sigmas[1:], None
    if churn is not None:
        churned = (churn.sigma_min <= start) & (start <= churn.sigma_max) & (stop != start)
        rise = jnp.where(churned, jnp.minimum(churn.amount / len(start), np.sqrt(2) - 1), 0)
        # sqrt(raised^2 - start^2), in a form that rounding cannot make negative
        fresh_noise = start * jnp.sqrt(rise * (2 + rise)) * churn.noise_scale
        start = start * (1 + rise)
    calls = tabulate(start, stop, eta) if method == "ddim" else tabulate(start, stop)
    noise_std = jnp.roll(calls.fresh, 1, axis=0)  # before the next call; the last one, at 0, is 0
    if fresh_noise is not None:  # added before the first call of each step
        begins_step = np.append(True, calls.ends_step[:-1])
        noise_std = noise_std.at[np.flatnonzero(begins_step)].set(fresh_noise)

    def call(carry, row):
        base, x, prev, place = carry
        number, noise_std, c = row
        level = Level(
            *(jnp.broadcast_to(a, (len(x), *a.shape)) for a in (c.sigma, c.stop, c.active))
        )
        # the entries of the row, () or (F,), broadcast against x
        noise_std, c = jax.tree.map(lambda values: expand(values[None], x), (noise_std, c))
        if keys is not None and noisy:
            std = noise_std if c.spread is None else noise_std * jnp.exp(c.spread * place)
            x = x + std * step_noise(keys, number, x)
            base = jnp.where(noise_std > 0, x, base)
        if correct is None:
            found, shift = denoise(x, level.sigma, condition), jnp.zeros((), x.dtype)
            d, learned = jnp.split(found.astype(x.dtype), [x.shape[-1]], axis=-1)
            place = (1 + learned) / 2 if method == "ddpm" and learned.size else place
        else:
            d, shift = correct(denoise, x, level, condition)
        new = c.from_base * base + c.from_x * x + c.from_d * d + c.from_prev * prev
        last = c.ends_step | (c.stop == 0)  # Heun's method ends with its first call there
        new = jnp.where(c.active, new + jnp.where(last, shift, 0), x)
        return (jnp.where(c.ends_step, new, base), new, d, place), None

    rows = (jnp.arange(len(calls.sigma)), noise_std, calls)
    place = jnp.ones_like(x_init) if method == "ddpm" else jnp.ones(())
    (x, *_), _ = jax.lax.scan(call, (x_init, x_init, jnp.zeros_like(x_init), place), rows)
    return x


def draw(
    model: Any, noise: jax.Array, condition: Any, table: Any, method: str, *,
    churn: Churn | None = None, keys: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """Samples from normal noise (B, ...), with the `table` of a `Sampler`; raises like `sample`.

    The model is a DenoiseFn, or for a method of `flow` a FlowFn.
    """
    if method in flow.METHODS:
        noisy = _has_noise(method, bool(flow.METHODS[method].noise), False, churn, keys)
        return flow.sample(model, noise, condition, table, keys if noisy else None)
    sigmas, eta = table
    # x_t of a variance-preserving process has variance 1
    start = jnp.sqrt(1 + sigmas[0] ** 2) if METHODS[method].unit else sigmas[0]
    return sample(model, start * noise, condition, sigmas, method, churn=churn, keys=keys, eta=eta)
