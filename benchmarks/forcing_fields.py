"""Trajectory models on Lorenz-96 and Kuramoto-Sivashinsky, and forecasts from partial observations.

  python -m launch.train --config=configs/lorenz96_forcing.py --workdir=DIR
  python benchmarks/dapper_baselines.py --part lorenz96 --folder FOLDER
  python benchmarks/forcing_fields.py --system=lorenz96 --workdir=DIR --folder=FOLDER

and the same for ks with configs/kuramoto_sivashinsky_forcing.py. Settings of the sampling are
chosen one after the other, by the RMSE on the first trajectories of the validation set.

  python -m launch.train --config=configs/lorenz96_emulator.py --workdir=ONE
  python benchmarks/forcing_fields.py --system=lorenz96 --workdir=ONE --folder=FOLDER \\
      --tasks filter lag8 lag24 --ensemble=40 [--equations]

is an emulator, or the equations, in an ensemble Kalman filter, whose settings are chosen by the
CRPS on the validation set. Of a trajectory model and of an emulator

      --tasks forecast known --trajectories 16 --every 2

makes forecasts. results/README.md explains the rows. Writes
benchmarks/results/forcing_fields.json; rows that are there are kept.
"""

import functools
from typing import Any

import numpy as np
from tasks import Rows
from trajectory_rows import (
    Subject,
    ahead_of,
    analysed,
    chosen,
    parser,
    some_of,
    stored_rmse,
    tuning,
)

from mclr_jax.assimilation import methods, observe, scores

# task -> settings at the start, and what is tried for each; lag8 has the settings of the filter
TASKS: dict[str, tuple[dict, dict]] = {
    "filter": ({"sigma_max": 5.0, "restart": 0.5, "window": 16, "c": 0.5, "steps": 8},
               {"restart": (0.3, 0.5, 1.0), "c": (0.5, 1.0), "steps": (8, 16)}),
    "lag8": ({}, {}),
    "batch": ({"c": 0.5, "window": 0}, {"c": (0.25, 0.5, 1.0), "window": (0, 32)}),
    "forecast": ({"c": 0.5, "window": 32}, {"c": (0.25, 0.5, 1.0)}),
    "known": ({"window": 32}, {}),
    "lag24": ({}, {}),  # of an emulator
}  # fmt: skip
CHOSEN_ON, TUNED_ON, OBSERVED = 2, 8, 32  # trajectories, twice; frames before a forecast


def forecast(subject: Subject, path, scheme: Any, asked: dict, **options) -> dict:
    """Frames 0 .. 31 from observations that are made here, and a forecast of the others."""
    truth = observe.load(path)["truth"]
    every, some = asked["every"], slice(0, asked["trajectories"])
    noise = np.random.default_rng(0).standard_normal(truth[:, :OBSERVED, ::every].shape)
    values, truth, initial = (truth[:, :OBSERVED, ::every] + noise)[some], truth[some], None
    if asked["task"] == "known":
        values, truth = np.full_like(values[:, :1], np.nan), truth[:, OBSERVED - 1 :]
        initial = truth[:, 0]
    operator = observe.Operator(observe.Select(tuple(range(0, truth.shape[2], every))))
    frames = values.shape[1]
    members, seconds = subject.estimate(
        observe.Observations(values, operator, 1.0, initial), scheme,
        ahead_of("filter" if subject.method == "enkf" else "batch", frames),
        forecast=truth.shape[1] - frames,
        **options,
    )  # fmt: skip
    early, late = ((members[:, :, part], truth[:, part])
                   for part in (slice(0, frames), slice(frames, None)))  # fmt: skip
    seen = {} if initial is not None else scores.summary(*early, ())
    by_frame = np.sqrt(((members.mean(1) - truth) ** 2).mean((0, 2)))
    return {
        **{f"observed_{key}": value for key, value in seen.items()}, **scores.summary(*late, ()),
        "rmse_by_frame": np.round(by_frame.astype(float), 3).tolist(),
        "climatology": float(truth.std()), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--system", choices=["lorenz96", "ks"], required=True)
    found.add_argument("--tasks", choices=TASKS, nargs="+", default=["filter", "lag8", "batch"])
    found.add_argument("--every", type=int, default=4, help="coordinates, for forecasts")
    found.add_argument("--trajectories", type=int, default=8)
    found.add_argument("--equations", action="store_true", help="in place of the emulator")
    flags = found.parse_args()
    subject, rows = Subject(flags.workdir, "", flags.equations), Rows("forcing_fields")
    frames = subject.run.model.data.shape[0]

    def row(task: str, which: str, plan: dict, trajectories: int) -> dict:
        asked = {"system": flags.system, "task": task, "set": which, "plan": plan,
                 "frames": frames, **subject.name, "trajectories": trajectories,
                 "members": flags.ensemble}  # fmt: skip
        path = flags.folder / f"{flags.system}_{which}.npz"
        scheme = methods.SETTINGS[subject.method](**plan)
        options = {"ensemble": flags.ensemble, "batch_size": 32}
        if task in ("forecast", "known"):
            asked["every"] = flags.every
            return rows.row(asked, lambda: forecast(subject, path, scheme, asked, **options))
        return rows.row(
            asked, lambda: analysed(subject, path, task, scheme, trajectories, **options)
        )

    best: dict = {}
    for task in flags.tasks:
        start, grid = TASKS[task]
        if subject.method == "enkf":
            path = flags.folder / f"{flags.system}_validation.npz"
            arrays = observe.load(path)
            data = some_of(observe.parse(arrays, path), TUNED_ON), arrays["truth"][:TUNED_ON]
            asked = {"system": flags.system, "task": "tuning", "set": "validation",
                     "members": flags.ensemble, **subject.name}  # fmt: skip
            best = rows.row(asked, lambda d=data: tuning(subject, *d, flags.ensemble))["plan"]
        else:
            best = chosen(
                lambda plan, t=task: row(t, "validation", plan, CHOSEN_ON), start or best, grid
            )
        row(task, "test", best, flags.trajectories)
        if subject.method != "enkf" and task in ("filter", "lag8"):
            key = {"system": flags.system, "task": task, "trajectories": flags.trajectories}
            path = flags.folder / f"{flags.system}_test.npz"
            found = functools.partial(stored_rmse, path, task, flags.trajectories)
            rows.row(key, found, "dapper")


if __name__ == "__main__":
    main()
