"""Estimate trajectories from observations with a trained trajectory model.

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

--lag is a number of frames or inf, or has a number for each segment, FRAME:LAG,...: with
--lag=0:inf,50:0 the frames before 50 are smoothed by all observations, later ones are filtered.
"""

import dataclasses
import pathlib

import numpy as np
from absl import flags

from mclr_jax import cpu, extras, runs
from mclr_jax.assimilation import figure, observe, regimes, schedules
from mclr_jax.files import digest, provenance, write_atomically
from mclr_jax.labels import warn_untrained
from mclr_jax.launch import common
from mclr_jax.schema import fields
from mclr_jax.training.devices import banner
from mclr_jax.training.log import Progress

WORKDIR, EMA = common.define("workdir", "ema")
OBSERVATIONS = flags.DEFINE_string("observations", None, "File to read, NAME.npz.")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.npz.")
REGIME = flags.DEFINE_enum("regime", "filter", ["filter", "fixed_lag", "batch"], "See above.")
OPERATOR = flags.DEFINE_string(
    "operator", "", "In place of that of the file: JSON as above, or a name, such as identity or "
    "package.module:Name, one of your own."
)  # fmt: skip
LAG = flags.DEFINE_list("lag", ["0"], "Frames to look ahead, for fixed_lag. See above.")
ENSEMBLE = flags.DEFINE_integer("ensemble", 16, "Members of each trajectory.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0)
FORECAST = flags.DEFINE_integer("forecast", 0, "Frames after the last one.", lower_bound=0)
CONTINUE = flags.DEFINE_string(
    "continue", None, "A file of an earlier --out: these observations come after those."
)
FIGURE = flags.DEFINE_bool("figure", False, "Draw the first trajectory beside --out, as PNG.")
SCHEME = flags.DEFINE_list(
    "scheme", [], f"Settings of the sampling as KEY=VALUE,..., of "
    f"{', '.join(fields(schedules.Scheme))}."
)  # fmt: skip
BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "Members at a time.", lower_bound=1)


def asked(frames: int) -> tuple[schedules.Scheme, np.ndarray]:
    """The scheme, and the lag of each frame, by --scheme, --regime and --lag."""
    if REGIME.value != "fixed_lag" and LAG.present:
        common.stop(f"--lag={','.join(LAG.value)} has no meaning for --regime={REGIME.value}.")
    try:
        scheme = schedules.Scheme.parse(SCHEME.value)
        return scheme, schedules.lags_of(REGIME.value, LAG.value, frames)
    except ValueError as error:
        common.stop(str(error))


def main() -> None:
    if FIGURE.value:
        extras.needed("matplotlib", "figures")
    arrays = observe.load(OBSERVATIONS.value)
    observations = observe.parse(arrays, OBSERVATIONS.value, OPERATOR.value)
    count, frames, _ = observations.values.shape
    (scheme, lags), run = asked(frames), runs.load(WORKDIR.value)
    shape = regimes.state_shape(run)
    truth = observe.truth_of(arrays, count, shape, OBSERVATIONS.value)
    cpu.use_cores(run.model.network)
    warn_untrained(run, [regimes.trajectory_label(run.model)])
    params, step = run.weights(EMA.value)
    settings = {"workdir": WORKDIR.value, "step": step, "weights": digest(params),
                "regime": REGIME.value, "lag": ",".join(LAG.value), "seed": SEED.value,
                "scheme": dataclasses.asdict(scheme), "operator": observations.operator.describe(),
                "std": observations.std.tolist(), **provenance(), "device": banner()}  # fmt: skip
    state = regimes.earlier(CONTINUE.value, settings) if CONTINUE.value else None
    out = common.output(OUT.value, ".npz")
    if out.resolve() == pathlib.Path(OBSERVATIONS.value).resolve():
        common.stop(f"--out is {OUT.value!r}, the file of --observations.")
    with Progress(count * ENSEMBLE.value, "member") as shown:
        result = regimes.assimilate(
            run.model, params, observations, scheme, lags, ensemble=ENSEMBLE.value,
            seed=SEED.value, forecast=FORECAST.value, state=state, batch_size=BATCH_SIZE.value,
            progress=regimes.counted(shown.update),
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
