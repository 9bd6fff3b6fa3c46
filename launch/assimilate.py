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
"""

import dataclasses
import json
import pathlib

from absl import flags

from launch import common
from mclr_jax import runs
from mclr_jax.assimilation import figure, metrics, observe, regimes
from mclr_jax.assimilation.schedules import Plan, lags
from mclr_jax.files import provenance, save_arrays, write_atomically
from mclr_jax.names import nearest
from mclr_jax.training.devices import banner
from mclr_jax.training.log import Progress

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run of launch.train.")
OBSERVATIONS = flags.DEFINE_string("observations", None, "File to read, NAME.npz.")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.npz.")
REGIME = flags.DEFINE_enum("regime", "filter", ["filter", "fixed_lag", "batch"], "See above.")
LAG = flags.DEFINE_integer("lag", 0, "Frames to look ahead, for fixed_lag.", lower_bound=0)
ENSEMBLE = flags.DEFINE_integer("ensemble", 16, "Members of each trajectory.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
FORECAST = flags.DEFINE_integer("forecast", 0, "Frames after the last one.", lower_bound=0)
CONTINUE = flags.DEFINE_string(
    "continue", None, "A file of an earlier --out: these observations come after those."
)
FIGURE = flags.DEFINE_bool("figure", False, "Draw the first trajectory beside --out, as PNG.")
PLAN = flags.DEFINE_list(
    "plan", [], "Settings of the sampling as KEY=VALUE,..., of " +
    ", ".join(field.name for field in dataclasses.fields(Plan)) + "."
)  # fmt: skip
EMA = flags.DEFINE_string("ema", "", "Average of the weights, as of launch.sample.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Members at a time.", lower_bound=1)


def plan() -> Plan:
    """The settings of --plan."""
    known, values = {field.name: field.default for field in dataclasses.fields(Plan)}, {}
    for text in PLAN.value:
        key, _, value = text.partition("=")
        if key not in known:
            common.stop(f"--plan has no setting {key!r}. {nearest(key, known)}")
        kind = type(known[key])
        try:
            values[key] = value.lower() == "true" if kind is bool else kind(value)
        except ValueError:
            common.stop(f"--plan: {key} is {value!r}; expected {kind.__name__}.")
    return Plan(**values)


def earlier(path: str) -> regimes.State:
    """The state in a file of an earlier --out."""
    arrays = observe.load(path)
    if missing := {"state_members", "state_values", "state_frames"} - arrays.keys():
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}: it is no file of --out.")
    values = arrays["state_members"], arrays["state_values"], int(arrays["state_frames"])
    return regimes.State(*values)


def main() -> None:
    out, sampling = pathlib.Path(OUT.value), plan()
    if out.suffix != ".npz":
        common.stop(f"--out is {OUT.value!r}; expected a name that ends in .npz.")
    if LAG.value and REGIME.value != "fixed_lag":
        common.stop(f"--lag={LAG.value} has no meaning for --regime={REGIME.value}.")
    arrays = observe.load(OBSERVATIONS.value)
    observations, truth = observe.parse(arrays, OBSERVATIONS.value), arrays.get("truth")
    state = earlier(CONTINUE.value) if CONTINUE.value else None
    run = runs.load(WORKDIR.value)
    common.use_cores(run.model.network)
    params, step = run.weights(EMA.value)
    frames = observations.values.shape[1]
    with Progress(None, "member") as shown:
        result = regimes.assimilate(
            run.model,
            params,
            observations,
            sampling,
            lags(REGIME.value, frames, LAG.value),
            ensemble=ENSEMBLE.value,
            seed=SEED.value,
            forecast=FORECAST.value,
            state=state,
            batch_size=BATCH_SIZE.value,
            progress=shown.update,
        )
    members = result.members
    mean, std = members.mean(1), members.std(1)
    settings = {"workdir": WORKDIR.value, "step": step, "regime": REGIME.value, "lag": LAG.value,
                "seed": SEED.value, "plan": dataclasses.asdict(sampling), **provenance(),
                "device": banner()}  # fmt: skip
    save_arrays(
        out, members=members, mean=mean, std=std, first=result.first,
        settings_json=json.dumps(settings),
        **{f"state_{name}": value for name, value in result.state._asdict().items()},
    )  # fmt: skip
    print(f"Wrote {out}: {members.shape[1]} members of frames {result.first} to "
          f"{result.first + members.shape[2] - 1} of {len(members)} trajectories.")  # fmt: skip
    begins = (state.frames if state else 0) - result.first  # place of the first observed frame
    if truth is not None:
        truth = truth.reshape(len(members), -1, *members.shape[3:])
        shared = slice(begins, begins + min(truth.shape[1], members.shape[2] - begins))
        truth = truth[:, : shared.stop - shared.start]
        for name, value in metrics.summary(
            members[:, :, shared], truth, run.model.data.scale
        ).items():
            print(f"{name:15s} {value:.4g}")
    if FIGURE.value:
        drawn = figure.trajectory(members[0], None if truth is None else truth[0], begins)
        write_atomically(out.with_suffix(".png"), drawn)


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "observations", "out"])
    common.run(main)
