"""Estimate trajectories from observations with a trained trajectory model, or an emulator.

  mclr assimilate --workdir=runs/lorenz63 --regime=filter --observations=seen.npz \\
      --ensemble=16 --seed=0 --out=analysis.npz

The observations file has `values` (T, m) or (N, T, m) with NaN where missing, `std`, and a matrix
`H` (m, d) or `operator_json`, such as {"name": "select", "indices": [0]}, unless --operator says
it. It may have `function`, `offset` and `scale` of each value, `initial`, `time_step` and `truth`.
Writes `members` (N, E, T, ...), their `mean` and `std`, in the units of the data, and what
--continue needs. With `truth`, errors are printed.

  filter     frame k from the observations up to k
  fixed_lag  frame k from the observations up to k + --lag
  batch      each frame from all observations

  trajectory  a run of a trajectory model, whose samples are guided by the observations
  enkf        a run of an emulator in a serial ensemble Kalman filter, and its smoother
  particle    a run of an emulator with a learned variance in a bootstrap particle filter

--tune=8 chooses settings on 8 held-out trajectories of the run, observed as those of the file, and
stores them with the run; later calls use them. --lag is a number of frames or inf, or has a number
for each segment, FRAME:LAG,...: with --lag=0:inf,50:0 the frames before 50 are smoothed by all
observations, later ones are filtered.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from mclr_jax import extras
from mclr_jax.assimilation import figure, methods, observe, regimes, schedules
from mclr_jax.files import write_atomically
from mclr_jax.labels import warn_untrained
from mclr_jax.launch import common
from mclr_jax.schema import fields
from mclr_jax.training.log import Progress

_, _, EMA = common.define("workdir", "data", "ema")
OBSERVATIONS = flags.DEFINE_string("observations", None, "File to read, NAME.npz.")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.npz.")
REGIME = flags.DEFINE_enum("regime", "filter", ["filter", "fixed_lag", "batch"], "See above.")
OPERATOR = flags.DEFINE_string(
    "operator", "", "In place of that of the file: JSON as above, or a name, such as identity or "
    "package.module:Name, one of your own."
)  # fmt: skip
METHOD = flags.DEFINE_enum(
    "method", None, list(methods.SETTINGS), "See above; default: trajectory or, of an emulator, "
    "enkf."
)  # fmt: skip
TUNE = flags.DEFINE_integer("tune", 0, "See above; 0 chooses nothing.", lower_bound=0)
LAG = flags.DEFINE_list("lag", ["0"], "Frames to look ahead, for fixed_lag. See above.")
ENSEMBLE = flags.DEFINE_integer(
    "ensemble", None, "Members of each trajectory; by default " + ", ".join(
        f"{number} ({name})" for name, number in methods.MEMBERS.items()) + ".", lower_bound=1,
)  # fmt: skip
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
FORECAST = flags.DEFINE_integer("forecast", 0, "Frames after the last one.", lower_bound=0)
CONTINUE = flags.DEFINE_string(
    "continue", None, "A file of an earlier --out: these observations come after those."
)
FIGURE = flags.DEFINE_bool("figure", False, "Draw the first trajectory beside --out, as PNG.")
SCHEME = flags.DEFINE_list(
    "scheme", [], "Settings as KEY=VALUE,..., of " + "; ".join(
        f"{name}: {', '.join(fields(kind))}" for name, kind in methods.SETTINGS.items()),
)  # fmt: skip
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Members at a time; by default 256 of a trajectory model, else 65536.",
    lower_bound=1,
)  # fmt: skip


def main() -> None:
    if FIGURE.value:
        extras.needed("matplotlib", "figures")
    if REGIME.value != "fixed_lag" and LAG.present:
        common.stop(f"--lag={','.join(LAG.value)} has no meaning for --regime={REGIME.value}.")
    arrays = observe.load(OBSERVATIONS.value)
    observations = observe.parse(arrays, OBSERVATIONS.value, OPERATOR.value)
    count, frames, _ = observations.values.shape
    with common.mistakes():
        lags = schedules.lags(REGIME.value, frames, LAG.value)
    run = common.load()
    method = methods.method_of(run, METHOD.value)
    with common.mistakes():
        scheme = methods.settings(run, method, SCHEME.value)
    ensemble, shape = ENSEMBLE.value or methods.MEMBERS[method], run.model.data.shape[1:]
    params, step = run.weights(EMA.value)
    solve = methods.solver(run, params, method)
    truth = observe.truth_of(arrays, count, shape, OBSERVATIONS.value)
    warn_untrained(run, [regimes.trajectory_label(run.model)])
    options: dict[str, Any] = {"ensemble": ensemble, "seed": SEED.value}
    if BATCH_SIZE.value:
        options["batch_size"] = BATCH_SIZE.value
    if TUNE.value:
        about = {"regime": REGIME.value, "lag": ",".join(LAG.value)}
        scheme, told = methods.tune(
            run, method, solve, scheme, observations, lags, TUNE.value, about, **options
        )
        print(told)
    settings = {"method": method, "regime": REGIME.value, "lag": ",".join(LAG.value),
                "seed": SEED.value, "scheme": dataclasses.asdict(scheme),
                "operator": observations.operator.describe(), "std": observations.std.tolist(),
                **common.made_by(step, params)}  # fmt: skip
    state = regimes.earlier(CONTINUE.value, settings) if CONTINUE.value else None
    out = common.output(OUT.value, ".npz")
    if out.resolve() == pathlib.Path(OBSERVATIONS.value).resolve():
        common.stop(f"--out is {OUT.value!r}, the file of --observations.")
    with Progress(count * ensemble, "member") as shown:
        result = solve(
            observations, scheme, lags, forecast=FORECAST.value, state=state,
            progress=regimes.counted(shown.update), **options,
        )  # fmt: skip
    regimes.write(out, result, settings)
    print(f"Wrote {out}: {result.described()}")
    if truth is not None:
        print(regimes.errors(result, truth, run.model.data.scale))
    if FIGURE.value:
        values, operator = observations.values[0], observations.operator
        shown = result.members[0], values, operator, None if truth is None else truth[0]
        write_atomically(out.with_suffix(".png"), figure.trajectory(*shown, result.before))


if __name__ == "__main__":
    common.run(main, "workdir", "observations", "out")
