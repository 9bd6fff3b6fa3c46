"""Estimate trajectories from observations with a trained trajectory model.

  python -m launch.assimilate --workdir=runs/lorenz63 --regime=filter --observations=seen.npz \\
      --ensemble=16 --seed=0 --out=analysis.npz

The observations file has `values` (T, m) or (N, T, m) with NaN where missing, `std`, and a matrix
`H` (m, d) or `operator_json`, such as {"name": "select", "indices": [0]}; it may have `initial`,
`time_step` and `truth`. Writes `members` (N, E, T, ...), their `mean` and `std`, in the units of
the data, and what --continue needs. With `truth`, errors are printed.

  filter     frame k from the observations up to k
  fixed_lag  frame k from the observations up to k + --lag
  batch      each frame from all observations

--lag is a number of frames or inf, or has a number for each segment, FRAME:LAG,...: with
--lag=0:inf,50:0 the frames before 50 are smoothed by all observations, later ones are filtered.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import flags, logging

from launch import common
from mclr_jax import runs
from mclr_jax.assimilation import figure, observe, regimes, scores
from mclr_jax.assimilation.schedules import Scheme, lags
from mclr_jax.files import digest, flat, named, provenance, save_arrays, write_atomically
from mclr_jax.schema import nearest
from mclr_jax.training.devices import banner
from mclr_jax.training.log import Progress

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run of launch.train.")
OBSERVATIONS = flags.DEFINE_string("observations", None, "File to read, NAME.npz.")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.npz.")
REGIME = flags.DEFINE_enum("regime", "filter", ["filter", "fixed_lag", "batch"], "See above.")
LAG = flags.DEFINE_list("lag", ["0"], "Frames to look ahead, for fixed_lag. See above.")
ENSEMBLE = flags.DEFINE_integer("ensemble", 16, "Members of each trajectory.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
FORECAST = flags.DEFINE_integer("forecast", 0, "Frames after the last one.", lower_bound=0)
CONTINUE = flags.DEFINE_string(
    "continue", None, "A file of an earlier --out: these observations come after those."
)
FIGURE = flags.DEFINE_bool("figure", False, "Draw the first trajectory beside --out, as PNG.")
SCHEME = flags.DEFINE_list(
    "scheme", [], "Settings of the sampling as KEY=VALUE,..., of " +
    ", ".join(field.name for field in dataclasses.fields(Scheme)) + "."
)  # fmt: skip
EMA = flags.DEFINE_string("ema", "", "Average of the weights, as of launch.sample.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Members at a time.", lower_bound=1)

TRUTH_VALUES = {"true": True, "false": False}
FIXED = ("weights", "operator", "std")  # what a run has in common with the one that it continues


def scheme() -> Scheme:
    """The settings of --scheme."""
    known, values = {field.name: field.default for field in dataclasses.fields(Scheme)}, {}
    for text in SCHEME.value:
        key, _, value = text.partition("=")
        if key not in known:
            common.stop(f"--scheme has no setting {key!r}. {nearest(key, known)}")
        kind = type(known[key])
        try:
            values[key] = TRUTH_VALUES[value.lower()] if kind is bool else kind(value)
        except (ValueError, KeyError):
            common.stop(f"--scheme: {key} is {value!r}; expected {kind.__name__}.")
    return Scheme(**values)


def look_ahead(frames: int) -> np.ndarray:
    """The lag of each frame, by --regime and --lag."""
    given = ",".join(LAG.value)
    if REGIME.value != "fixed_lag":
        if LAG.present:
            common.stop(f"--lag={given} has no meaning for --regime={REGIME.value}.")
        return lags(REGIME.value, frames)
    try:
        parts = [text.rpartition(":") for text in LAG.value]
        starts, ahead = [int(part[0] or 0) for part in parts], [float(part[2]) for part in parts]
    except ValueError:
        starts, ahead = [], []
    whole = all(lag >= 0 and (lag == math.inf or lag.is_integer()) for lag in ahead)
    if starts[:1] != [0] or starts != sorted({*starts}) or starts[-1] >= frames or not whole:
        common.stop(
            f"--lag is {given!r}; expected a number of frames or inf, or segments FRAME:LAG,... "
            f"from frame 0 on, of frames below {frames} in rising order."
        )
    return np.repeat(ahead, np.diff([*starts, frames]))


def known_truth(truth: np.ndarray, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """The truth (count, frames, *shape) in a file of observations."""
    found = truth if truth.ndim == 2 + len(shape) else truth[None]
    fits = found.ndim == 2 + len(shape) and (len(found), *found.shape[2:]) == (count, *shape)
    if not fits or not found.size or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise ValueError(
            f"{OBSERVATIONS.value}: truth has shape {truth.shape} and type {truth.dtype}; expected "
            f"finite numbers ({count}, T, {', '.join(map(str, shape))})."
        )
    return found


def earlier(path: str, settings: Mapping[str, Any]) -> regimes.State:
    """The state in a file of an earlier --out, which must be of the same model and operator."""
    arrays = observe.load(path)
    with named(f"{path} is no file of an earlier --out"):
        before = json.loads(str(arrays["settings_json"]))
        before = flat({"scheme": before.pop("plan", {}), **before})  # "plan" in older files
        values = arrays["state_members"], arrays["state_values"], int(arrays["state_frames"])
    now = flat(settings)
    for key in sorted(before.keys() | now.keys()):
        old, new, compared = before.get(key), now.get(key), (*FIXED, "scheme", "seed")
        if old != new and key.startswith(compared):
            text = f"{path} was made with {key} {old}; this command has {new}."
            if key.startswith(FIXED):
                raise ValueError(f"{text} Only a run of the same model and operator continues it.")
            logging.warning(text)
    return regimes.State(*values)


def main() -> None:
    chosen, arrays = scheme(), observe.load(OBSERVATIONS.value)
    observations = observe.parse(arrays, OBSERVATIONS.value)
    count, frames, _ = observations.values.shape
    lag, run = look_ahead(frames), runs.load(WORKDIR.value)
    shape = run.model.data.shape
    if run.model.is_classifier or not run.model.frames:
        raise ValueError(
            f"{WORKDIR.value} has the network {type(run.model.network).__name__} for data of shape "
            f"{shape}; expected a run of a trajectory model, as of configs/lorenz63_forcing.py."
        )
    truth = arrays.get("truth")
    truth = None if truth is None else known_truth(truth, count, shape[1:])
    common.use_cores(run.model.network)
    params, step = run.weights(EMA.value)
    settings = {"workdir": WORKDIR.value, "step": step, "weights": digest(params),
                "regime": REGIME.value, "lag": ",".join(LAG.value), "seed": SEED.value,
                "scheme": dataclasses.asdict(chosen), "operator": observations.operator.describe(),
                "std": observations.std.tolist(), **provenance(), "device": banner()}  # fmt: skip
    settings = json.loads(json.dumps(settings))
    state = earlier(CONTINUE.value, settings) if CONTINUE.value else None
    out = common.output(OUT.value, ".npz")
    if out.resolve() == pathlib.Path(OBSERVATIONS.value).resolve():
        common.stop(f"--out is {OUT.value!r}, the file of --observations.")
    with Progress(None, "member") as shown:
        result = regimes.assimilate(
            run.model,
            params,
            observations,
            chosen,
            lag,
            ensemble=ENSEMBLE.value,
            seed=SEED.value,
            forecast=FORECAST.value,
            state=state,
            batch_size=BATCH_SIZE.value,
            progress=shown.update,
        )
    members = result.members
    mean, std = members.mean(1), members.std(1)
    save_arrays(
        out, members=members, mean=mean, std=std, first=result.first,
        settings_json=json.dumps(settings),
        **{f"state_{name}": value for name, value in result.state._asdict().items()},
    )  # fmt: skip
    print(f"Wrote {out}: {members.shape[1]} members of frames {result.first} to "
          f"{result.first + members.shape[2] - 1} of {len(members)} trajectories.")  # fmt: skip
    begins = (state.frames if state else 0) - result.first  # place of the first observed frame
    if truth is not None:
        shared = slice(begins, begins + min(truth.shape[1], members.shape[2] - begins))
        truth = truth[:, : shared.stop - shared.start]
        for name, value in scores.summary(
            members[:, :, shared], truth, run.model.data.scale
        ).items():
            print(f"{name:15s} {value:.4g}")
    if FIGURE.value:
        first = None if truth is None else truth[0]
        drawn = figure.trajectory(
            members[0], observations.values[0], observations.operator, first, begins
        )
        write_atomically(out.with_suffix(".png"), drawn)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "observations", "out"])
    common.run(main)
