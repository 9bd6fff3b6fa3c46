"""Classical filters around any forecast: ensemble Kalman filter, particle filter, their smoothers.

A forecast is a function (key, states (E, *state)) -> the next states, in physical units: an
`Emulator`, `Dynamics.step`, or a function of one's own. A frame's members are the forecasts of
those before it; an observation changes them and those of the frames that may see it:

    frame  k - lag ... k - 1   k          `path` has the members of all frames;
             |___________|_____|          the newest observation changes a window of them
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mclr_jax.assimilation.observe import Observations, Operator, Own
from mclr_jax.assimilation.regimes import Result, State, beginning, units
from mclr_jax.model import Model
from mclr_jax.noise import sample_keys
from mclr_jax.schema import Keys, in_range, key, look_up

Forecast = Callable[[jax.Array, jax.Array], jax.Array]
MEMBERS = {"enkf": 100, "particle": 4096}  # by default


@dataclasses.dataclass(frozen=True)
class Limits(Keys):
    """Settings of the particle filter."""

    clip: float = key(6.0, 0.0, ends="(", says="states are at most so many standard deviations of "
                      "all states from their mean")  # fmt: skip

    where: ClassVar[str] = "scheme"


@dataclasses.dataclass(frozen=True)
class Settings(Limits):
    """Settings of the ensemble Kalman filter."""

    radius: float = key(0.0, 0.0, says="of the localisation, in places on the ring or torus of a "
                        "state: weights are 0 from twice this distance on; 0: none")  # fmt: skip
    inflation: float = key(1.02, 0.0, 100.0, says="of members about their mean, after each frame "
                           "with observations")  # fmt: skip
    relaxation: float = key(0.0, 0.0, 1.0, says="of their spread to that before the observations")


class Emulator(struct.PyTreeNode):
    """The forecast of an emulator's run; random with a learned variance, or with `errors`.

    `errors` (M, *state) are those of forecasts of the data, in physical units. Each state gets one
    of them: unlike a variance of each value, they know which values err together.
    """

    model: Model = struct.field(pytree_node=False)
    params: Any
    errors: Any = None

    def __call__(self, key: jax.Array, states: jax.Array) -> jax.Array:
        offset, scale = units(self.model)
        x = (states - offset) / scale
        mean, variance = self.model.forecast(self.params)(x[:, None])
        if variance is not None:
            mean += jnp.sqrt(variance) * jax.random.normal(key, mean.shape)
        found = offset + scale * mean[:, 0]
        if self.errors is not None:
            found += self.errors[jax.random.randint(key, (len(x),), 0, len(self.errors))]
        return found


def as_tree(step: Forecast) -> Any:
    """The forecast as a tree, whose arrays are arguments of compiled functions."""
    is_tree = isinstance(step, Emulator | jax.tree_util.Partial)
    return step if is_tree else jax.tree_util.Partial(step)


# ---- localisation --------------------------------------------------------------------------------


def gaspari_cohn(distance: np.ndarray, radius: float) -> np.ndarray:
    """The correlation function of compact support: 1 at 0, about .21 at the radius, 0 from 2 on.

    Source: Gaspari and Cohn 1999 (doi 10.1002/qj.49712555417), eq. 4.10.
    """
    z = np.abs(distance) / radius
    inner = 1 - 5 / 3 * z**2 + 5 / 8 * z**3 + z**4 / 2 - z**5 / 4
    far = np.maximum(z, 1)  # no division by 0 where it is not used
    outer = 4 - 5 * z + 5 / 3 * z**2 + 5 / 8 * z**3 - z**4 / 2 + z**5 / 12 - 2 / (3 * far)
    return np.where(z <= 1, inner, np.where(z < 2, outer, 0))


def distances(operator: Operator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Of each value to each coordinate (m, d) and to each value (m, m), in places.

    Coordinates (d,) are on a ring, fields (H, W, C) on a torus. A value is at all coordinates that
    it depends on, and the distance is that to the nearest one.
    """
    if isinstance(operator.linear, Own):
        raise ValueError(
            "An operator of your own has no places, which localisation needs: set scheme.radius=0 "
            "and take more members than there are directions of growing errors."
        )
    size, sides = math.prod(shape), shape[:2] if len(shape) == 3 else shape
    basis = jnp.eye(size).reshape(1, size, *shape)
    support = np.asarray(operator.linear(basis))[0].T != 0
    place = np.indices(sides).reshape(len(sides), -1).repeat(size // math.prod(sides), 1)
    period = np.array(sides)[:, None, None]
    to_states = []
    for row in support:
        apart = np.abs(place[:, row, None] - place[:, None])
        apart = np.minimum(apart, period - apart)
        to_states.append(np.sqrt((apart**2).sum(0)).min(0, initial=np.inf))
    found = np.stack(to_states)
    return found, np.stack([found[:, row].min(1, initial=np.inf) for row in support], 1)


def weights(
    operator: Operator, shape: tuple[int, ...], radius: float
) -> tuple[np.ndarray, np.ndarray]:
    """`gaspari_cohn` of `distances`; 1 without a radius."""
    if not radius:
        m = operator.size(shape)
        return np.ones((m, math.prod(shape)), np.float32), np.ones((m, m), np.float32)
    near, beside = (gaspari_cohn(x, radius) for x in distances(operator, shape))
    return near.astype(np.float32), beside.astype(np.float32)


# ---- one analysis: (z (W, E, d), predicted values (E, m), y (m,), ...) -> z ----------------------


def kalman(z, predicted, y, std, near, beside):
    """The serial square-root filter: one value after the other, of a window z of frames.

    Each member's change of the value is regressed on the members: gain (y - mean - a deviation)
    with a = 1 / (1 + sqrt(R / (R + variance))), so that mean and variance are Kalman's. Missing
    values change nothing. Source: Whitaker and Hamill 2002 (doi
    10.1175/1520-0493(2002)130<1913:EDAWPO>2.0.CO;2), eq. 4, 10 and 11.
    """
    members = len(predicted)

    def one(carry, inputs):
        (z, predicted), (j, y, r, near, beside) = carry, inputs
        own = predicted[:, j]
        mean = own.mean()
        deviation = own - mean
        total = deviation @ deviation / (members - 1) + r
        move = (y - mean) - deviation / (1 + jnp.sqrt(r / total))
        move = jnp.where(jnp.isfinite(y), move / total / (members - 1), 0)
        z = z + move[:, None] * (near * jnp.einsum("e,wed->wd", deviation, z))[:, None]
        predicted = predicted + move[:, None] * (beside * (deviation @ predicted))
        return (z, predicted), None

    variance = jnp.broadcast_to(std**2, y.shape)
    inputs = jnp.arange(len(y)), y, variance, near, beside
    return jax.lax.scan(one, (z, predicted), inputs)[0][0]


def inflated(x, before, inflation, relaxation):
    """Members x (E, d) with more spread; `before` are those before the observations.

    The spread times `inflation`, and with a share `relaxation` of what the observations took
    (Whitaker and Hamill 2012, doi 10.1175/MWR-D-11-00276.1, eq. 2).
    """
    mean, std, old = x.mean(0), x.std(0), before.std(0)
    factor = inflation * (1 + relaxation * (old - std) / jnp.maximum(std, 1e-12))
    return mean + factor * (x - mean)


def resampled(predicted, y, std, key):
    """Indices (E,) of the members that continue: systematic resampling by their likelihood."""
    misfit = jnp.where(jnp.isfinite(y), ((y - predicted) / std) ** 2, 0).sum(1) / 2
    cumulative = jnp.cumsum(jax.nn.softmax(jnp.where(jnp.isfinite(misfit), -misfit, -jnp.inf)))
    places = (jnp.arange(len(misfit)) + jax.random.uniform(key)) / len(misfit)
    return jnp.minimum(jnp.searchsorted(cumulative, places), len(misfit) - 1)


# ---- all frames ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("operator", "method", "window", "shape", "started"))
def _filtered(step, path, values, keys, until, std, limits, spread, *, operator, method, window,
              shape, started):  # fmt: skip
    """Members of all frames of some trajectories: path (N, window + frames, E, d) -> path.

    Frame k is at place window + k. `values` (N, frames, m), keys (N, frames), `until` (window +
    frames,) the last frame that each may see, `limits` (low, high) of states, `spread` of the
    ensemble Kalman filter those of `weights`, inflation and relaxation.
    """

    def predict(x):
        return operator(x.reshape(1, -1, *shape))[0]

    def frame(path, inputs):
        t, y, key = inputs
        k_step, k_pick = jax.random.split(key)
        x = step(k_step, path[window + t - 1].reshape(-1, *shape)).reshape(path.shape[1:])
        x = jnp.where((t == 0) & (not started), path[window], x.clip(*limits))
        path = path.at[window + t].set(x)
        old = jax.lax.dynamic_slice_in_dim(path, t + 1, window)
        predicted, known = predict(x), jnp.isfinite(y).any()
        if method == "enkf":
            near, beside, *numbers = spread
            new = kalman(old, predicted, y, std, near, beside)
            new = new.at[-1].set(inflated(new[-1], x, *numbers).clip(*limits))
        else:
            new = old[:, resampled(predicted, y, std, k_pick)]
        opened = known & (jax.lax.dynamic_slice_in_dim(until, t + 1, window) >= t)
        new = jnp.where(opened[:, None, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(path, new, t + 1, 0), None

    def one(path, values, keys):
        return jax.lax.scan(frame, path, (jnp.arange(len(values)), values, keys))[0]

    return jax.vmap(one)(path, values, keys)


def assimilate(
    step: Forecast,
    states: np.ndarray,  # (M, *state) of the system: its climate
    observations: Observations,
    settings: Any,  # Settings, or Limits of the particle filter
    lags: np.ndarray,  # (T,) see schedules.lags
    *,
    method: str = "enkf",
    ensemble: int = 0,  # 0: MEMBERS
    seed: int = 0,
    forecast: int = 0,  # frames after the last one
    state: State | None = None,  # of an earlier run; frame 0 of these observations comes next
    batch_size: int = 65_536,  # members at a time
    time_step: float = 0.0,  # between two frames of `step`; 0: not known
    progress: Callable[[int, int], Any] = lambda members, updates: None,
) -> Result:
    """Members of each trajectory, given its observations.

    The first members are some of `states`, or the observations' `initial` state; limits of states
    follow from `states`, too. Trajectory n depends on (seed, n) and the number of members alone.
    ValueError: parts that do not fit. FloatingPointError: members that are not finite.
    """
    look_up(MEMBERS, method, "method")
    shape, ensemble = states.shape[1:], ensemble or MEMBERS[method]
    obs = observations.for_states(shape, time_step)
    count, frames, _ = obs.values.shape
    in_range("ensemble", ensemble, 2)
    in_range("forecast", forecast, 0)
    in_range("seed", seed, 0, 2**32 - 1)
    lags, before = np.broadcast_to(lags, frames), 0
    if state is not None:
        before = int(min(lags[0], state.members.shape[2], state.frames))
    numbers = np.arange(-before, frames)
    until = np.minimum(numbers + np.append(np.full(before, lags[0]), lags), frames - 1).astype(int)
    window = 1 + int((until - numbers).max())
    # the last frame to see is -1 of frames that are not read
    seen = np.concatenate([np.full(window - before, -1), until, np.full(forecast, frames)])
    path = beginning(obs, shape, ensemble, window, forecast, state, copies=3)
    if state is None and obs.initial is None:
        for n in range(count):
            rng, twice = np.random.default_rng((seed, n)), len(states) < ensemble
            path[n, :, window] = states[rng.choice(len(states), ensemble, replace=twice)]
    values = np.pad(obs.values, ((0, 0), (0, forecast), (0, 0)), constant_values=np.nan)
    done, fold = state.frames if state else 0, jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold, (0, None))(sample_keys(seed, np.arange(count)),
                                     done + np.arange(frames + forecast))  # fmt: skip
    mean, reach = states.mean(0).ravel(), settings.clip * states.std(0).ravel()
    limits, step = np.asarray([mean - reach, mean + reach], np.float32), as_tree(step)
    spread: tuple[Any, ...] = ()
    if method == "enkf":
        factors = np.asarray([settings.inflation, settings.relaxation], np.float32)
        spread = (*weights(obs.operator, shape, settings.radius), *factors)
    some = max(1, batch_size // ensemble)
    for start in range(0, count, some):
        rows = slice(start, start + some)
        here = path[rows].swapaxes(1, 2)
        found = _filtered(
            step, here.reshape(*here.shape[:3], -1), values[rows], keys[rows], seen, obs.std,
            limits, spread, operator=obs.operator, method=method, window=window, shape=shape,
            started=state is not None,
        )  # fmt: skip
        path[rows] = np.asarray(found).reshape(here.shape).swapaxes(1, 2)
        progress(len(here) * ensemble, 1)
    if lost := (~np.isfinite(path).reshape(count, -1).all(1)).sum():
        raise FloatingPointError(
            f"Members of {lost} of {count} trajectories are not finite with {settings}. Take more "
            "members, a smaller scheme.clip, or scheme.relaxation=0.4, or check the forecast and "
            "the observations."
        )
    kept = path[:, :, frames : window + frames]
    nothing = np.zeros((count, 0, obs.values.shape[2]), np.float32)
    return Result(path[:, :, window - before :], done - before, before,
                  State(kept, nothing, done + frames))  # fmt: skip
