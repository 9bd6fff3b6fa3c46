"""Data assimilation with one trajectory model: filter, fixed lag and batch.

`assimilate` keeps a window of frames that ends at the newest observation:

        frames already estimated          new
    | restart restart ... restart | max ... max |   noise levels at the start of an update
            denoise all of them together, under all observations of the window
    |    0       0    ...    0    |  0  ...  0  |   the next window starts later

Each update revises the window, and frame k is read from the last update that has seen no later
observation than its lag allows. Before the first frame the window holds unobserved frames.
"""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from scipy.special import gammaincinv

from mclr_jax import samplers
from mclr_jax.assimilation import guide, scores
from mclr_jax.assimilation.observe import Observations, Operator, load
from mclr_jax.assimilation.schedules import Scheme, Update, levels, updates
from mclr_jax.files import flat, named, save_arrays
from mclr_jax.generate import check_memory
from mclr_jax.noise import normal_like, sample_keys
from mclr_jax.schema import in_range
from mclr_jax.types import expand


class State(NamedTuple):
    """The start of a later run of `assimilate`: the last window, in the model's units."""

    members: np.ndarray  # (N, E, W, *state)
    values: np.ndarray  # (N, W, m) observations of these frames
    frames: int  # observed so far


class Result(NamedTuple):
    members: np.ndarray  # (N, E, frames, *state) in physical units
    first: int  # number of the first of these frames; a continued run continues the numbers
    before: int  # the number of these frames that an earlier run had too
    state: State

    def described(self) -> str:
        """The members, frames and trajectories in a sentence."""
        count, members, frames, *_ = self.members.shape
        last = self.first + frames - 1
        return f"{members} members of frames {self.first} to {last} of {count} trajectories."


# Settings that a run has in common with its continuation.
FIXED = ("weights", "method", "operator", "std")


def write(path: str | os.PathLike, result: Result, settings: Mapping[str, Any]) -> None:
    """Write an npz file of members, mean and std, which `earlier` reads."""
    state = {f"state_{name}": value for name, value in result.state._asdict().items()}
    members = result.members
    save_arrays(path, members=members, mean=members.mean(1), std=members.std(1),
                first=result.first, settings_json=json.dumps(settings), **state)  # fmt: skip


def earlier(path: str | os.PathLike, settings: Mapping[str, Any]) -> State:
    """The state in a file of `write`, to continue from with other `settings`.

    Warns of another scheme or seed; ValueError: another value of FIXED, or no such file.
    """
    arrays = load(path)
    with named(f"{path} is no file of an earlier --out"):
        old = {"method": "trajectory"} | json.loads(str(arrays["settings_json"]))
        scheme = old.pop("plan", old.get("scheme", {}))  # "plan" in older files
        old["scheme"] = {key: x for key, x in scheme.items() if key in settings["scheme"]}
        values = arrays["state_members"], arrays["state_values"], int(arrays["state_frames"])
    before, now = flat(old), flat(json.loads(json.dumps(settings)))
    for key in sorted(before.keys() | now.keys()):
        was, new = before.get(key), now.get(key)
        if was != new and key.startswith((*FIXED, "scheme", "seed")):
            text = f"{path} was made with {key} {was}; this command has {new}."
            if key.startswith(FIXED):
                raise ValueError(
                    f"{text} Only a run of the same model, method and operator continues it."
                )
            logging.warning(text)
    return State(*values)


def errors(result: Result, truth: np.ndarray, scale: tuple) -> str:
    """The measures of the new frames against the truth (N, T, *state), a line for each."""
    members = result.members[:, :, result.before :][:, :, : truth.shape[1]]
    found = scores.summary(members, truth[:, : members.shape[2]], scale)
    return "\n".join(f"{name:15s} {value:.4g}" for name, value in found.items())


# ---- one update ----------------------------------------------------------------------------------

_fold = jax.vmap(jax.random.fold_in, (0, None))


def plausible(operator: Operator, seen: guide.Seen, x: jax.Array, share: float) -> jax.Array:
    """True (B,) if the misfit of x (B, F, *state) is within this share of its chi-square law."""
    error = (seen.values - operator(seen.offset + seen.scale * x)) / seen.std
    known = jnp.isfinite(seen.values)
    misfit, count = jnp.where(known, error**2, 0).sum((1, 2)), known.sum((1, 2))
    # quantiles of the law for each number of values: a table takes no time to compile
    limits = 2 * gammaincinv(np.maximum(np.arange(error[0].size + 1), 1) / 2, share)
    return misfit <= jnp.asarray(limits, misfit.dtype)[count]


def screened(x: jax.Array, kept: jax.Array, group: jax.Array, keys: jax.Array) -> jax.Array:
    """Members x (B, ...) of trajectories `group` (B,); those not kept become others of theirs."""
    candidates = kept & (group == group[:, None])
    drawn = jax.vmap(jax.random.categorical)(keys, jnp.where(candidates, 0.0, -jnp.inf))
    return x[jnp.where(kept | ~candidates.any(1), jnp.arange(len(x)), drawn)]


def trajectory_label(model: Any) -> int:
    """The label of all trajectories: null, or the class if the data have but one."""
    return 0 if model.data.num_classes == 1 else model.null_label


@functools.lru_cache(maxsize=8)
def _compiled(model: Any, operator: Operator, scheme: Scheme) -> Callable:
    """(params, x, values, std, group, keys, grid (N + 1, F)) -> x, of rows of F frames.

    Frames start as x plus noise of the first level of the grid; x is 0 for new frames. Members of
    one trajectory have one number in `group` (B,).
    """
    if scheme.guidance == "posterior" and not getattr(model, "has_variance", True):
        raise ValueError(
            "The guidance 'posterior' needs a network that was trained with "
            "config.network.variance=True; set scheme.guidance to 'norm'."
        )

    def run(params, x, values, std, group, keys, grid):
        moments = samplers.stabilised(model.moments(params), scheme.sigma_min)
        label = jnp.full(len(x), trajectory_label(model), jnp.int32)
        seen = guide.Seen(values, std, *units(model))
        sigma = jnp.broadcast_to(grid[0], x.shape[:2])
        x = x + expand(sigma, x) * normal_like(keys, x)
        correct = scheme.correct(operator, seen)
        x = samplers.sample(
            moments, x, label, grid, scheme.method, keys=_fold(keys, 1), correct=correct
        )
        if scheme.screen == 1:
            return x
        return screened(x, plausible(operator, seen, x, scheme.screen), group, _fold(keys, 3))

    return jax.jit(run)


def units(model: Any) -> tuple[Any, Any]:
    """(offset, scale) with physical state = offset + scale * x, float32."""
    return np.float32(model.data.offset or 0), np.float32(model.data.scale or 1)


def _physical(model: Any, x: np.ndarray, ensemble: int, scheme: Scheme) -> np.ndarray:
    """Rows x in physical units (N, E, ...); FloatingPointError: some are not finite."""
    if not np.isfinite(x).all():
        raise FloatingPointError(
            f"{(~np.isfinite(x)).reshape(len(x), -1).any(1).sum()} of {len(x)} members are not "
            f"finite with {scheme}. Take more steps or scheme.guidance=posterior, or check the "
            "weights, the observations and the operator's offset and scale."
        )
    offset, scale = units(model)
    x = offset + scale * x.reshape(-1, ensemble, *x.shape[1:])
    if scheme.inflation == 1:
        return x
    mean = x.mean(1, keepdims=True)
    return mean + np.float32(scheme.inflation) * (x - mean)


def _whole_tokens(model: Any, frames: int) -> int:
    """The number of frames, rounded up to one that the network takes."""
    return frames + -frames % getattr(getattr(model, "network", None), "frames_per_token", 1)


# ---- the drivers ---------------------------------------------------------------------------------


def beginning(
    obs: Observations, shape: tuple[int, ...], ensemble: int, window: int, after: int,
    state: State | None, copies: int,
) -> np.ndarray:  # fmt: skip
    """Members (N, E, window + frames + `after`, *shape), of which frame k is at place window + k.

    Those of an earlier run come before it, or the `initial` state is frame 0; others are 0.
    ValueError: a run that does not fit, or no memory for so many copies of them.
    """
    count, frames, m = obs.values.shape
    total = window + frames + after
    what = f"{count} trajectories of {ensemble} members and {total} frames"
    remedy = "Take fewer members, or a part of the trajectories or frames in each call."
    check_memory(what, copies * count * ensemble * total * math.prod(shape), remedy)
    path = np.zeros((count, ensemble, total, *shape), np.float32)
    if state is not None:
        got = (*state.members.shape[:2], *state.members.shape[3:], state.values.shape[2])
        if got != (count, ensemble, *shape, m):
            raise ValueError(
                f"The run to continue has (trajectories, members, *state, values) {got}; expected "
                f"{(count, ensemble, *shape, m)}."
            )
        kept = state.members[:, :, -window:]
        path[:, :, window - kept.shape[2] : window] = kept
    elif obs.initial is not None:
        path[:, :, window] = obs.initial[:, None]
    return path


def _course(
    model: Any, obs: Observations, scheme: Scheme, lags: np.ndarray, ensemble: int, forecast: int,
    state: State | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Update], int, int]:  # fmt: skip
    """The start of `assimilate`: path, values, until, updates, window, ahead.

    `path` (N E, window + frames + forecast + ahead, *state) is in the model's units, with frame k
    at place window + k, as are the values (N, ..., m). `until` (before + frames + forecast,) is the
    last frame to see, from frame -before on. `ahead` frames after the last one wait at the highest
    level.
    """
    count, frames, m = obs.values.shape
    shape, lags = tuple(model.data.shape[1:]), np.broadcast_to(lags, frames)
    whole = np.isinf(lags).all() and state is None
    window = scheme.window or (frames + forecast if whole else model.data.shape[0])
    window, before = _whole_tokens(model, window), 0
    # a network has been trained on frames with others around them, not on short trajectories
    ahead = max(0, _whole_tokens(model, model.data.shape[0]) - window) if whole else 0
    in_range("ensemble", ensemble, 1)
    in_range("forecast", forecast, 0)
    path = beginning(obs, shape, ensemble, window, forecast + ahead, state, copies=2)
    path = path.reshape(-1, *path.shape[2:])
    if state is not None:
        if (held := state.members.shape[2]) < window:
            raise ValueError(
                f"The run to continue has a window of {held} frames; expected {window} or more: "
                "set scheme.window."
            )
        before = int(min(lags[0], window - 1, state.frames))
    numbers, lags = np.arange(-before, frames), np.append(np.full(before, lags[0]), lags)
    until = np.minimum(numbers + lags, frames - 1).astype(int)
    longest = (until - numbers)[np.isfinite(lags)].max(initial=0)
    if longest >= window:
        raise ValueError(
            f"A lag of {longest} frames needs a window of more frames; it has {window}. Set "
            "scheme.window, or use the batch regime."
        )
    observed = np.isfinite(obs.values).any((0, 2))
    order = updates(observed, until, window, forecast, state is not None)
    values = np.full((count, path.shape[1], m), np.nan, np.float32)
    values[:, window : window + frames] = obs.values
    if state is not None:
        values[:, :window] = state.values[:, -window:]
    return path, values, np.append(until, [frames] * forecast), order, window, ahead


def counted(update: Callable[[int], Any]) -> Callable[[int, int], None]:
    """A `progress` of `assimilate` that calls `update` with the number of new whole members."""
    done = 0

    def progress(members: int, updates: int) -> None:
        nonlocal done
        done += members
        update(done // updates - (done - members) // updates)

    return progress


def assimilate(
    model: Any,  # with moments(params), data, null_label and preconditioning.sigma_range
    params: Any,
    observations: Observations,
    scheme: Scheme,
    lags: np.ndarray,  # (T,) see schedules.lags
    *,
    ensemble: int = 16,
    seed: int = 0,
    forecast: int = 0,  # frames after the last one
    state: State | None = None,  # of an earlier run; frame 0 of these observations comes next
    batch_size: int = 256,  # members at a time
    progress: Callable[[int, int], Any] = lambda members, updates: None,  # at each of the updates
) -> Result:
    """Members of each trajectory, given its observations.

    With scheme.screen 1, member i of trajectory n depends on (seed, n, i) alone; otherwise on the
    members that are computed together. A continued run begins with the frames of the run before
    that may now see more; an `initial` state is not used.
    ValueError: observations, lags or state that do not fit the model, or each other.
    """
    in_range("seed", seed, 0, 2**32 - 1)
    obs = observations.for_states(tuple(model.data.shape[1:]), model.data.time_step)
    if obs.initial is not None:
        offset, scale = units(model)
        obs = dataclasses.replace(obs, initial=(obs.initial - offset) / scale)
    path, values, until, order, window, ahead = _course(
        model, obs, scheme, lags, ensemble, forecast, state
    )
    frames, (done, begun) = obs.values.shape[1], (state.frames, window) if state else (0, 0)
    before = len(until) - frames - forecast
    blocks = np.isinf(lags).any() and window < frames
    context = scheme.context or (window // 4 if blocks else 0)
    out = np.full((len(path), len(until), *path.shape[2:]), np.nan, np.float32)
    run = _compiled(model, obs.operator, scheme)
    high = min(scheme.sigma_max, model.preconditioning.sigma_range[1])
    size = min(batch_size // ensemble * ensemble or batch_size, len(path))
    for start in range(0, len(path), size):
        real = min(size, len(path) - start)  # others fill the last batch
        rows = np.resize(np.arange(start, start + real), size)
        here, group = path[rows], rows // ensemble
        keys = jax.vmap(jax.random.fold_in)(sample_keys(seed, group), rows % ensemble)
        last, estimated = -1, begun  # the last observation seen; places before have an estimate
        for end, seen in order:
            k = np.arange(end - window, end)
            old, informed = window + k < estimated, seen > last
            clean = old & (not informed)
            clean[:context] |= (old & (k + done >= 0))[:context]
            if not state and obs.initial is not None:
                clean |= k == 0
            steps = scheme.steps if old.any() else scheme.first_steps
            grid = levels(scheme, ~old, clean, steps, high)
            grid = np.pad(grid, ((0, 0), (0, ahead)), constant_values=grid.max())
            shown = slice(end, end + window + ahead)
            inputs = here[:, shown], values[group, shown], obs.std, group, _fold(keys, done + end)
            new = run(params, *inputs, np.float32(grid))
            here[:, window + k], last, estimated = new[:, :window], seen, window + end
            k = k[k >= -before]
            k = k[until[k + before] >= seen]
            out[rows[:real, None], k + before] = here[:real, window + k]
            progress(real, len(order))
        path[rows[:real]] = here[:real]
    members = _physical(model, out, ensemble, scheme)
    kept = slice(frames if state else max(frames, order[0].end), window + frames)
    past = path[:, kept].reshape(-1, ensemble, *path[:, kept].shape[1:])
    return Result(members, done - before, before, State(past, values[:, kept], done + frames))
