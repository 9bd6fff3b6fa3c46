"""Trajectory models on Lorenz-96 and Kuramoto-Sivashinsky, and forecasts from partial observations.

  python -m launch.train --config=configs/lorenz96_forcing.py --workdir=DIR
  python benchmarks/dapper_baselines.py --part lorenz96 --folder FOLDER
  python benchmarks/forcing_fields.py --system=lorenz96 --workdir=DIR --folder=FOLDER

and the same for ks with configs/kuramoto_sivashinsky_forcing.py. Protocols, trajectories and the
numbers of a row are those of dapper_baselines.py. Settings of the sampling are chosen one after the
other, by the RMSE on the first trajectories of the validation set.

  python -m launch.train --config=configs/lorenz96_forcing.py --workdir=ONE \\
      --config.data.frames=2 --config.network.frames_per_token=1 --config.batch_size=64 \\
      --config.noise.shared=0.2 --config.noise.independent=0 --config.noise.prefix=0.8 \\
      --config.noise.segments=0
  python benchmarks/forcing_fields.py --system=lorenz96 --workdir=DIR|ONE --folder=FOLDER \\
      --tasks forecast known --trajectories 16 --every 2

Every fourth coordinate of Lorenz-96 (--every) is observed in the first 32 frames (std 1), and the
other 68 are a forecast: by a trajectory model, which estimates the 32 frames together, and by a
model of two frames, p(x_k+1 | x_k), which draws frame after frame with guidance, after its members
were resampled by the likelihood. Both have the same blocks. In the task "known" nothing is
observed, and all members start from the true state of the last of the 32 frames, here number 0.
`rmse_by_frame` is of the mean of the members. Writes benchmarks/results/forcing_fields.json, row by
row; rows that are there are not made again.
"""

import argparse
import json
import pathlib
import time

import assimilation
import numpy as np
from lorenz63 import analyse
from tasks import RESULTS, made

from mclr_jax import runs
from mclr_jax.assimilation import observe, regimes, scores
from mclr_jax.assimilation.schedules import Scheme, lags
from mclr_jax.files import digest, provenance, write_json
from mclr_jax.training.devices import banner

FILE = RESULTS / "forcing_fields.json"
# task -> settings at the start, and what is tried for each; lag8 has the settings of the filter
TASKS: dict[str, tuple[dict, dict]] = {
    "filter": ({"sigma_max": 5.0, "restart": 0.5, "window": 16, "c": 0.5, "steps": 8},
               {"restart": (0.3, 0.5, 1.0), "c": (0.5, 1.0), "steps": (8, 16)}),
    "lag8": ({}, {}),
    "batch": ({"c": 0.5, "window": 0}, {"c": (0.25, 0.5, 1.0), "window": (0, 32)}),
    "forecast": ({"c": 0.5, "window": 32}, {"c": (0.25, 0.5, 1.0)}),
    "known": ({"window": 32}, {}),
}  # fmt: skip
KEPT = ("rmse", "rmse_error", "rmse_second_half", "spread_skill", "crps", "seconds")
CHOSEN_ON, OBSERVED = 2, 32  # trajectories; frames before a forecast


def assimilation_row(run, params, path, regime: str, scheme: Scheme, options: dict) -> dict:
    """The numbers of a regime."""
    rows = observe.load(path)["H"]
    system = assimilation.System(lambda x: x, 1.0, lambda x: x @ rows.T)
    row = analyse(run, params, path, system, regime, scheme, options)
    return {key: row[key] for key in KEPT}


def dapper_row(path: pathlib.Path, regime: str, trajectories: int) -> dict:
    """The RMSE of dapper's best method of a regime on the first trajectories of a file."""
    arrays = observe.load(path)
    square = ((arrays[f"{regime}_mean"] - arrays["truth"]) ** 2)[:trajectories]
    late = square[:, square.shape[1] // 2 :]
    return {"rmse": float(square.mean() ** 0.5), "rmse_second_half": float(late.mean() ** 0.5)}


def forecast_row(run, params, path, scheme: Scheme, options: dict) -> dict:
    """Frames 0 .. 31 from observations that are made here, and a forecast of the others."""
    start, truth = time.monotonic(), observe.load(path)["truth"]
    every, some = options["every"], slice(0, options["trajectories"])
    noise = np.random.default_rng(0).standard_normal(truth[:, :OBSERVED, ::every].shape)
    values, truth, initial = (truth[:, :OBSERVED, ::every] + noise)[some], truth[some], None
    if options["task"] == "known":
        values, truth = np.full_like(values[:, :1], np.nan), truth[:, OBSERVED - 1 :]
        initial = truth[:, 0]
    operator = observe.Operator(observe.Select(tuple(range(0, truth.shape[2], every))))
    frames = values.shape[1]
    members = regimes.assimilate(
        run.model, params, observe.Observations(values, operator, 1.0, initial), scheme,
        lags("batch" if scheme.revise else "filter", frames), ensemble=options["ensemble"],
        forecast=truth.shape[1] - frames, batch_size=options["batch_size"],
    ).members  # fmt: skip
    early, late = ((members[:, :, part], truth[:, part])
                   for part in (slice(0, frames), slice(frames, None)))  # fmt: skip
    seen = {} if initial is not None else scores.summary(*early, ())
    by_frame = np.sqrt(((members.mean(1) - truth) ** 2).mean((0, 2)))
    return {
        **{f"observed_{key}": value for key, value in seen.items()}, **scores.summary(*late, ()),
        "rmse_by_frame": np.round(by_frame.astype(float), 3).tolist(),
        "climatology": float(truth.std()), "seconds": time.monotonic() - start,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--system", choices=["lorenz96", "ks"], required=True)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--tasks", choices=TASKS, nargs="+", default=["filter", "lag8", "batch"])
    parser.add_argument("--every", type=int, default=4, help="coordinates, for forecasts")
    parser.add_argument("--ensemble", type=int, default=16)
    parser.add_argument("--trajectories", type=int, default=8)
    flags = parser.parse_args()
    run = runs.load(flags.workdir)
    params, step = run.weights()
    weights, frames = digest(params), run.model.data.shape[0]
    result = json.loads(FILE.read_text()) if FILE.exists() else {"dapper": [], "rows": []}
    rows = result["rows"]

    def row(task: str, which: str, scheme: dict, trajectories: int) -> dict:
        asked = {"system": flags.system, "task": task, "set": which, "plan": scheme,
                 "frames": frames, "step": step, "weights": weights, "trajectories": trajectories,
                 "members": flags.ensemble}  # fmt: skip
        asked |= {"every": flags.every} if task in ("forecast", "known") else {}
        if old := made(rows, asked):
            return old
        path = flags.folder / f"{flags.system}_{which}.npz"
        options = {**asked, "ensemble": flags.ensemble, "batch_size": 32}
        if task in ("forecast", "known"):
            new = forecast_row(run, params, path, Scheme(**scheme), options)
        else:
            new = assimilation_row(run, params, path, task, Scheme(**scheme), options)
        rows.append({**asked, **new, **provenance(), "device": banner()})
        write_json(FILE, result)
        print(task, which, scheme, {k: v for k, v in new.items() if np.ndim(v) == 0}, flush=True)
        return rows[-1]

    best: dict = {}
    for task in flags.tasks:
        start, grid = TASKS[task]
        best = start or best
        if frames < OBSERVED:
            best = best | {"window": frames, "revise": False}
        for key, values in grid.items():
            tried = [row(task, "validation", {**best, key: v}, CHOSEN_ON) for v in values]
            best = min(tried, key=lambda r: r["rmse"])["plan"]
        row(task, "test", best, flags.trajectories)
        if task in ("filter", "lag8"):
            key = {"system": flags.system, "task": task, "trajectories": flags.trajectories}
            path = flags.folder / f"{flags.system}_test.npz"
            new = key | dapper_row(path, task, flags.trajectories) | provenance()
            others = [r for r in result.get("dapper", []) if not key.items() <= r.items()]
            result["dapper"] = [*others, new]
            write_json(FILE, result)


if __name__ == "__main__":
    main()
