"""Samplers of flow matching in time: Runge-Kutta methods of the ODE, and the SDE of SiT and REPA.

The state is x_u = a(u) x0 + s(u) n, from noise at u = 1 to data at u = 0, on the path of a
`Velocity`. Every method is a linear recurrence over the calls of a network with output F, without
its output preconditioning: sigma = s / a is infinite at u = 1, and at u = 0 the denoised x does not
hold the velocity. A call of stage i of a step gives a slope, and the slopes so far the next input,

    k_i = from_x x + from_f F,    x = base + sum_j weights_ij k_j,

where `base` is the state at the start of the step. Sources: SiT (Ma et al. 2024, arXiv 2401.08740);
REPA (Yu et al. 2024, arXiv 2410.06940); Butcher's tables as in torchdiffeq.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.denoiser import PATHS, Preconditioning, Velocity
from mclr_jax.noise import step_noise
from mclr_jax.schema import look_up
from mclr_jax.types import Condition, as_condition, expand

# (x_u, the network's time, condition, level of guidance) -> F. The level is sigma at the start of
# the step, (B,): guidance is on or off for a whole step, as in REPA's method of Heun.
FlowFn = Callable[[jax.Array, jax.Array, Condition, jax.Array], jax.Array]

LAST = 0.04  # of u: the size of the last step of the SDE, which has no noise
END = 1e-3  # of u: distance from the ends, where a path or a prediction is singular there


class Method(NamedTuple):
    """An explicit Runge-Kutta method: for each stage, the weights of the stages so far in its
    result; the last result ends the step."""

    weights: tuple[tuple[float, ...], ...]
    noise: str = ""  # "after" or "before" a step of the SDE; "": the ODE
    euler_last: bool = False  # the last step has one call


EULER = ((1.0,),)
HEUN = ((1.0,), (1 / 2, 1 / 2))
METHODS = {
    "ode_euler": Method(EULER),
    "ode_heun": Method(HEUN, euler_last=True),
    "ode_heun2": Method(HEUN),
    "ode_rk4": Method(((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0), (1 / 8, 3 / 8, 3 / 8, 1 / 8))),
    "ode_dopri5": Method((
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    )),
    "sde_euler": Method(EULER, "after", euler_last=True),
    "sde_heun": Method(HEUN, "before", euler_last=True),
}  # fmt: skip

# The diffusion w(u) of the SDE, which has the same marginals for each of them, given (u, s(u)).
DIFFUSIONS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "sigma": lambda u, s: s,
    "linear": lambda u, s: u,
    "constant": lambda u, s: np.ones_like(u),
    "decreasing": lambda u, s: (np.cos(np.pi * (1 - u)) + 1) ** 2 / 4,
    "increasing_decreasing": lambda u, s: np.sin(np.pi * (1 - u)) ** 2,
}


class Calls(NamedTuple):
    """One row per network call."""

    clock: np.ndarray  # (calls,) time that the network gets
    sigma: np.ndarray  # noise level of guidance
    from_x: np.ndarray
    from_f: np.ndarray
    stage: np.ndarray
    weights: np.ndarray  # (calls, stages), with the size of the step
    fresh: np.ndarray  # std of the noise before the call
    ends_step: np.ndarray  # bool: the result becomes the next `base`


def _slopes(model: Velocity, u: np.ndarray, diffusion: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The coefficients (of x, of F) of dx/du in the SDE with this diffusion; 0 is the ODE."""
    power, at, _, pace = PATHS[model.path]
    a, s = at(u)
    da, ds = -(s ** (power - 1)) / pace(u, a, s), a ** (power - 1) / pace(u, a, s)
    zero, one = np.zeros_like(u), np.ones_like(u)
    if model.prediction == "velocity":
        velocity = np.stack([zero, -one if model.data_at else one])
        # x = a x0 + s n and velocity = da x0 + ds n
        noise = (a * velocity - da * np.stack([one, zero])) / (a * ds - da * s)
    else:
        noise = np.stack([zero, one if model.prediction == "noise" else -s])
        velocity = ds * noise + da / a * (np.stack([one, zero]) - s * noise)
    # -diffusion * score = diffusion n / s
    return velocity + np.where(diffusion > 0, diffusion / np.where(s > 0, s, 1), 0) * noise


def _times(model: Velocity, num_steps: int, stochastic: bool) -> np.ndarray:
    """The times (num_steps + 1,) of a grid, which ends before a singular end of the path."""
    is_velocity, is_vp = model.prediction == "velocity", model.path == "vp"
    start = 1 if is_velocity or is_vp else 1 - END
    if stochastic:
        return np.append(np.linspace(start, LAST, num_steps), 0)
    return np.linspace(start, 0 if is_velocity and not is_vp else END, num_steps + 1)


def tabulate(
    preconditioning: Preconditioning, method: str, num_steps: int, diffusion: str = "sigma"
) -> Calls:
    """The calls of a method in `num_steps` equal steps, for the SDE before the last of size LAST.

    SiT counts points and not steps: its `num_steps` is one more for the ODE. Raises ValueError for
    a preconditioning other than `velocity`.
    """
    if not isinstance(preconditioning, Velocity):
        raise ValueError(
            f"Sampler {method!r} needs a network of the preconditioning velocity; got "
            f"{type(preconditioning).__name__}. Use a sampler such as heun."
        )
    at = PATHS[preconditioning.path].at
    weights, noise, euler_last = look_up(METHODS, method, "sampler")
    u = _times(preconditioning, num_steps, bool(noise))
    steps, stages = np.diff(u), len(weights)
    table = np.array([[*row, *[0.0] * (stages - len(row))] for row in weights])
    times = (u[:-1, None] + steps[:, None] * np.append(0, table[:-1].sum(1))).ravel()

    def width(u: np.ndarray) -> np.ndarray:
        return bool(noise) * DIFFUSIONS[diffusion](u, at(u)[1])

    a, s = at(u[:-1])
    with np.errstate(divide="ignore"):
        levels = s / np.maximum(a, 0)  # the cosine of pi / 2 is no exact 0
    added = np.zeros((num_steps, stages))
    added[:-1, 0] = np.sqrt(2 * width(u[:-1]) * np.abs(steps))[:-1]
    from_x, from_f = _slopes(preconditioning, times, width(times))
    calls = Calls(
        clock=1 - times if preconditioning.data_at else times,
        sigma=np.repeat(levels, stages),
        from_x=from_x,
        from_f=from_f,
        stage=np.tile(np.arange(stages), num_steps),
        weights=(steps[:, None, None] * table).reshape(-1, stages),
        fresh=np.roll(added, noise == "after", axis=0).ravel(),
        ends_step=np.tile(np.arange(stages) == stages - 1, num_steps),
    )
    if euler_last and stages > 1:
        calls = Calls(*(part[: 1 - stages] for part in calls))
        calls.weights[-1], calls.ends_step[-1] = steps[-1] * np.eye(stages)[0], True
    kinds = {"stage": np.int32, "ends_step": bool}
    return Calls(*(p.astype(kinds.get(n, np.float32)) for n, p in calls._asdict().items()))


def sample(
    network: FlowFn,
    x_init: jax.Array,
    condition: Condition | jax.Array,
    calls: Calls,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Integrate along the path from x_init (B, ...), normal noise, to samples of its shape.

    `calls` are those of `tabulate`; its arrays may be traced. `keys` (B,) are needed for the SDE.
    """
    condition = as_condition(condition)

    def call(carry, row):
        base, x, slopes = carry
        number, c = row
        if keys is not None:
            x = x + c.fresh * step_noise(keys, number, x)
            base = jnp.where(c.fresh > 0, x, base)
        clock, sigma = (jnp.broadcast_to(level, len(x)) for level in (c.clock, c.sigma))
        f = network(x, clock, condition, sigma)
        slopes = slopes.at[c.stage].set(c.from_x * x + c.from_f * f)
        new = base + (expand(c.weights, slopes) * slopes).sum(0)
        return (jnp.where(c.ends_step, new, base), new, slopes), None

    slopes = jnp.zeros((calls.weights.shape[-1], *x_init.shape), x_init.dtype)
    rows = (jnp.arange(len(calls.clock)), calls)
    (x, _, _), _ = jax.lax.scan(call, (x_init, x_init, slopes), rows)
    return x
