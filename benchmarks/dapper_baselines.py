"""Ensemble Kalman filters and smoothers of dapper 1.7.1 on fields.

  python benchmarks/dapper_baselines.py --part lorenz96|ks --folder DIR

It needs dapper (pip install --no-deps dapper==1.7.1 struct-tools==0.2.5 mpl-tools==0.4.1, then
tabulate ipython matplotlib scipy tqdm dill pyyaml colorama threadpoolctl patlib pathos) beside jax
and flax. Each part writes DIR/PART_SET.npz with 16 trajectories a set, and the key dapper_PART of
benchmarks/results/assimilation_baselines.json.

lorenz96  40 coordinates, forcing 8, dt = .05, no process noise; every second coordinate at each of
          100 frames, std 1
ks        Kuramoto-Sivashinsky, 128 points, length 32 pi, dt = .5, a frame every 2 steps, all points
          at each of 100 frames, std 1

Of each method's settings the inflation of the best RMSE on "validation" is chosen, and also run on
"test". results/README.md explains the rows.
"""

import dataclasses
import pathlib
import time
from unittest import mock

import dapper
import dapper.da_methods as methods
import dapper.mods as modelling
import dapper.tools.progressbar
import numpy as np
from assimilation import SETS
from assimilation_baselines import score, update
from dapper.mods import KS, Lorenz96
from dapper.stats import Stats
from dapper.tools.localization import nd_Id_localization
from tasks import parsed

INFLATION = (1.0, 1.01, 1.02, 1.03, 1.05, 1.1, 1.2)
# regime -> method with {} for the inflation, the inflations; lags in frames
FIELDS = {
    "lorenz96": {
        "filter": ("EnKF('Sqrt', N=100, infl={})", "EnKF('PertObs', N=100, infl={})",
                   *(f"LETKF(N=40, infl={{}}, loc_rad={radius})" for radius in (4, 5, 6, 8))),
        "lag8": ("EnKS('PertObs', N=100, Lag=8, infl={})",
                 "iEnKS('Sqrt', N=40, Lag=8, nIter=3, MDA=True, infl={})"),
    },
    "ks": {
        "filter": ("EnKF('Sqrt', N=100, infl={})", "LETKF(N=16, infl={}, rot=True, loc_rad=28)"),
        "lag8": ("EnKS('Sqrt', N=100, Lag=8, infl={})",
                 "iEnKS('Sqrt', N=40, Lag=8, nIter=1, MDA=True, infl={})"),
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of dapper, observed with noise of std 1 at every frame, of `stride` steps each.

    pool (n, d) are states of the attractor; scale (d,) standardises.
    """

    step: object
    time_step: float
    pool: np.ndarray
    observed: np.ndarray
    scale: np.ndarray
    stride: int

    def system(self, frames: int):
        """For one trajectory, whose first frame is one period of observation after the start."""
        size = len(self.scale)
        dynamics = {"M": size, "model": self.step, "noise": 0}
        observation = modelling.partial_Id_Obs(size, self.observed)
        observation["noise"] = 1.0
        observation["localizer"] = nd_Id_localization((size,), (2,), self.observed)
        times = modelling.Chronology(self.time_step, dko=self.stride, Ko=frames - 1)

        def first(n):
            return self.pool[dapper.rng.choice(len(self.pool), n, replace=False)]

        states = modelling.RV(size, func=first)
        return modelling.HiddenMarkovModel(dynamics, observation, times, states)

    def members(self, words: str, values: np.ndarray) -> np.ndarray:
        """One trajectory's ensemble (N, T, d), from observations (T, m)."""
        experiment, system, found = eval(words, vars(methods)), self.system(len(values)), {}

        def keep(stats, k, ko=None, faus=None, E=None, **_):
            if "u" in (faus or "u"):
                found[k] = E.copy()

        truth = np.zeros((system.tseq.K + 1, len(self.scale)))  # for dapper's statistics
        with mock.patch.object(Stats, "assess", keep):
            experiment.assimilate(system, truth, np.asarray(values, np.float64))
        return np.stack([found[self.stride * (frame + 1)] for frame in range(len(values))], 1)

    def row(self, words: str, regime: str, data: dict) -> dict:
        """Numbers of all trajectories of a set, whose file is `data`."""
        start, members = time.process_time(), []
        for n, values in enumerate(data["values"]):
            dapper.set_seed(n + 1)
            with np.errstate(all="ignore"):
                members.append(self.members(words, values))
        members = np.stack(members)
        mean, std = members.mean(1), members.std(1, ddof=1)
        numbers = score(data["truth"], mean, std, members, self.scale)
        seconds = round(time.process_time() - start, 1)
        return {"regime": regime, "method": words, **numbers, "seconds": seconds, "mean": mean,
                "std": std}  # fmt: skip


def compare(case: Case, table: dict, data: dict, tune: int) -> list[dict]:
    """The best inflation of each method on `tune` trajectories, then all of both sets."""
    rows = []
    few = {key: data["validation"][key][:tune] for key in ("truth", "values")}
    for regime, several in table.items():
        for words in several:
            tried = {}
            for value in INFLATION:
                try:
                    tried[value] = case.row(words.format(value), regime, few)["rmse"]
                except (np.linalg.LinAlgError, ValueError, FloatingPointError) as error:
                    print(words.format(value), type(error).__name__, error)
            tried = {value: rmse for value, rmse in tried.items() if np.isfinite(rmse)}
            best = min(tried, key=tried.get)
            for which in data:
                row = case.row(words.format(best), regime, data[which])
                rows.append({"set": which, **row, "rmse_by_inflation": tried})
                print({k: v for k, v in rows[-1].items() if np.ndim(v) == 0}, flush=True)
    return rows


def fields(name: str, folder: pathlib.Path) -> list[dict]:
    """Draw both sets, run the methods, write the files with the posterior of the best ones."""
    model = KS.Model(dt=0.5) if name == "ks" else None
    size, time_step, stride, spin_up = (128, 0.5, 2, 600) if model else (40, 0.05, 1, 600)
    step = model.step if model else Lorenz96.step
    start = model.x0 if model else Lorenz96.x0(size)
    dapper.set_seed(5000)
    pool = start + dapper.rng.standard_normal((1024 + 32, size))
    if model:  # dapper's model never damps the shortest wave: its derivative has the wave number 0
        wave = np.resize([1.0, -1.0], size)
        pool -= (pool @ wave / size)[:, None] * wave
    for _ in range(spin_up):
        pool = step(pool, np.nan, time_step)
    pool, first = pool[:1024], pool[1024:]
    tune = 4 if model else 16
    observed = np.arange(0, size, 1 if model else 2)
    scale = np.full(size, pool.std())
    case = Case(step, time_step, pool, observed, scale, stride)
    data = {}
    for which, x in zip(SETS, np.split(first, 2), strict=True):
        truth = []
        for _ in range(100):
            truth.append(x)
            for _ in range(stride):
                x = step(x, np.nan, time_step)
        truth = np.stack(truth, 1)
        values = truth[..., observed] + dapper.rng.standard_normal((16, 100, len(observed)))
        data[which] = {
            "truth": truth, "values": values, "H": np.eye(size)[observed], "std": 1.0,
            "time_step": time_step * stride, "state_scale": scale,
        }  # fmt: skip
    rows = compare(case, FIELDS[name], data, tune)
    for which in data:
        for regime in FIELDS[name]:
            some = [row for row in rows if (row["set"], row["regime"]) == (which, regime)]
            best = min(some, key=lambda row: row["rmse"])
            data[which] |= {f"{regime}_{key}": best[key] for key in ("mean", "std")}
        path = folder / f"{name}_{which}.npz"
        np.savez_compressed(path, **{k: np.asarray(v, np.float32) for k, v in data[which].items()})
    return rows


def main() -> None:
    flags = parsed(__doc__, part=(str, "the system", FIELDS),
                   folder=(pathlib.Path, "of the files to write"))  # fmt: skip
    dapper.rc.liveplotting = False
    dapper.tools.progressbar.disable_progbar = True
    rows = [{k: v for k, v in row.items() if k not in ("mean", "std")}
            for row in fields(flags.part, flags.folder)]  # fmt: skip
    update(f"dapper_{flags.part}", rows, dapper=dapper.__version__)


if __name__ == "__main__":
    main()
