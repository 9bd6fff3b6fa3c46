"""Ensemble Kalman filters and smoothers of dapper 1.7.1 on Lorenz-63 and on fields.

  python benchmarks/dapper_baselines.py --part lo|hi|flowdas --folder DIR    # Lorenz-63
  python benchmarks/dapper_baselines.py --part lorenz96|ks --folder DIR

It needs dapper (pip install --no-deps dapper==1.7.1 struct-tools==0.2.5 mpl-tools==0.4.1, then
tabulate ipython matplotlib scipy tqdm dill pyyaml colorama threadpoolctl patlib pathos) beside jax
and flax. Each part is a key, dapper_PART, of benchmarks/results/assimilation_baselines.json.

lo hi flowdas  the files of assimilation_baselines.py in DIR; of each method's settings (inflation,
               members, lag) the best RMSE on "validation" is chosen, and also run on "test"
lorenz96       40 coordinates, forcing 8, dt = .05, no process noise; every second coordinate at
               each of 100 frames, std 1; 16 trajectories a set; writes DIR/lorenz96_SET.npz
ks             Kuramoto-Sivashinsky, 128 points, length 32 pi, dt = .5, a frame every 2 steps, all
               points at each of 100 frames, std 1; 16 trajectories a set; writes DIR/ks_SET.npz

results/README.md explains the rows and the settings.
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from unittest import mock

import assimilation
import dapper
import dapper.da_methods as methods
import dapper.mods as modelling
import dapper.tools.progressbar
import jax
import numpy as np
from assimilation_baselines import score, update
from dapper.mods import KS, Lorenz63, Lorenz96
from dapper.stats import Stats
from dapper.tools.localization import nd_Id_localization

INFLATION = (1.0, 1.01, 1.02, 1.03, 1.05, 1.1, 1.2)
# regime -> method with {} for the inflation, the inflations; lags in frames
LORENZ63 = {
    "filter": ("EnKF('Sqrt', N=100, infl={})", "EnKF('PertObs', N=100, infl={})",
               "LETKF(N=100, infl={}, loc_rad=1e6)"),
    "lag8": ("EnKS('Sqrt', N=100, Lag=8, infl={})", "iEnKS('Sqrt', N=24, Lag=8, nIter=5, infl={})",
             "iEnKS('Sqrt', N=24, Lag=8, nIter=5, MDA=True, infl={})"),
    "lag16": ("EnKS('Sqrt', N=100, Lag=16, infl={})",),
    "batch": ("EnKS('Sqrt', N=100, Lag=64, infl={})", "EnRTS('Sqrt', N=100, DeCorr=1, infl={})"),
}  # fmt: skip
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


def method(words: str, every: int = 1):
    """An experiment from its words; dapper counts lags in observations, `every` frames apart."""
    experiment = eval(words, vars(methods))
    if hasattr(experiment, "Lag"):
        experiment.Lag = -(-experiment.Lag // every)
    return experiment


@dataclasses.dataclass(frozen=True)
class Case:
    """A model of dapper, observed at every `every`-th frame of `stride` steps each.

    pool (n, d) are states of the attractor; scale (d,) standardises; noise is a variance per time.
    """

    step: object
    time_step: float
    pool: np.ndarray
    observed: np.ndarray
    std: float
    scale: np.ndarray
    noise: float = 0.0
    every: int = 1
    stride: int = 1
    arctan: bool = False

    def system(self, frames: int, initial: np.ndarray | None, noise: bool):
        """For one trajectory, and the step of its first frame."""
        size, period = len(self.scale), self.every * self.stride
        dynamics = {"M": size, "model": self.step, "noise": self.noise if noise else 0}
        observation = modelling.partial_Id_Obs(size, self.observed)
        if self.arctan:
            observation["model"] = lambda x: np.arctan(x[..., self.observed] / self.scale[0])
        observation["noise"] = self.std**2
        whole = (size,) if size == 3 else (2,)
        observation["localizer"] = nd_Id_localization((size,), whole, self.observed)
        start = 0 if initial is not None else period
        last = start + (frames - 1) * self.stride
        times = modelling.Chronology(self.time_step, dko=period, Ko=last // period - 1)

        def first(n):
            if initial is not None:
                return np.tile(initial, (n, 1))
            return self.pool[dapper.rng.choice(len(self.pool), n, replace=False)]

        states = modelling.RV(size, func=first)
        return modelling.HiddenMarkovModel(dynamics, observation, times, states), start

    def members(self, words: str, values: np.ndarray, initial=None) -> np.ndarray:
        """One trajectory's ensemble (N, T, d), from observations (T, m)."""
        experiment = method(words, self.every)
        system, start = self.system(len(values), initial, not words.startswith("iEnKS"))
        found = {}

        def keep(stats, k, ko=None, faus=None, E=None, **_):
            if "u" in (faus or "u"):
                found[k] = E.copy()

        seen = values[:: self.every] if initial is None else values[1:]
        truth = np.zeros((system.tseq.K + 1, len(self.scale)))  # for dapper's statistics
        with mock.patch.object(Stats, "assess", keep):
            experiment.assimilate(system, truth, np.asarray(seen, np.float64))
        frames = [start + self.stride * frame for frame in range(len(values))]
        found.setdefault(0, system.X0.sample(experiment.N))
        return np.stack([found[k] for k in frames], 1)

    def row(self, words: str, regime: str, data: dict, likelihood) -> dict:
        """Numbers of all trajectories of a set, whose file is `data`."""
        start, members = time.time(), []
        for n, values in enumerate(data["values"]):
            dapper.set_seed(n + 1)
            initial = data["initial"][n] if "initial" in data else None
            with np.errstate(all="ignore"):
                members.append(self.members(words, values, initial))
        members = np.stack(members)
        mean, std = members.mean(1), members.std(1, ddof=1)
        numbers = score(likelihood, data["truth"], data["values"], mean, std, members,
                         scale=self.scale)  # fmt: skip
        wanted = ("rmse", "rmse_error", "rmse_second_half", "rmse_standardised", "spread_skill",
                  "crps")  # fmt: skip
        return {
            "regime": regime, "method": words, **{key: numbers[key] for key in wanted},
            "seconds": round(time.time() - start, 1), "mean": mean, "std": std,
        }  # fmt: skip


def compare(case: Case, table: dict, data: dict, likelihood, tune: int) -> list[dict]:
    """The best inflation of each method on `tune` trajectories, then all of both sets."""
    rows = []
    few = {key: value[:tune] if np.ndim(value) and key in ("truth", "values", "initial") else value
           for key, value in data["validation"].items()}  # fmt: skip
    for regime, several in table.items():
        for words in several:
            tried = {}
            for value in INFLATION:
                try:
                    tried[value] = case.row(words.format(value), regime, few, likelihood)["rmse"]
                except (np.linalg.LinAlgError, ValueError, FloatingPointError) as error:
                    print(words.format(value), type(error).__name__, error)
            tried = {value: rmse for value, rmse in tried.items() if np.isfinite(rmse)}
            best = min(tried, key=tried.get)
            for which in data:
                row = case.row(words.format(best), regime, data[which], likelihood)
                rows.append({"set": which, **row, "rmse_by_inflation": tried})
                print({k: v for k, v in rows[-1].items() if np.ndim(v) == 0}, flush=True)
    return rows


def lorenz63(name: str, folder: pathlib.Path) -> list[dict]:
    """The files of a protocol of assimilation.py."""
    protocol = assimilation.PROTOCOLS[name]
    pool = np.asarray(assimilation.attractor(jax.random.key(77), 4096), np.float64)
    step = np.asarray(assimilation.rk4(pool))
    np.testing.assert_allclose(step, Lorenz63.step(pool, 0, assimilation.TIME_STEP), atol=1e-3)
    case = Case(
        Lorenz63.step, assimilation.TIME_STEP, pool, np.array([0]),
        protocol.system.observation_std, assimilation.STD,
        noise=protocol.system.process_std**2 / assimilation.TIME_STEP,
        every=protocol.every, arctan=protocol.known,
    )  # fmt: skip
    data = {which: dict(np.load(folder / f"{name}_{which}.npz")) for which in assimilation.SETS}
    table = LORENZ63
    if protocol.known:  # an ensemble without spread and noise stays one point
        table = {key: tuple(w for w in words if "iEnKS" not in w) for key, words in table.items()}
    return compare(case, table, data, protocol.system, 64)


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
    case = Case(step, time_step, pool, observed, 1.0, scale, stride=stride)
    data = {}
    for which, x in zip(assimilation.SETS, np.split(first, 2), strict=True):
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
    # score only asks for densities that are not kept here
    likelihood = assimilation.System(lambda x: x, 1.0, lambda x: x[..., observed], 1.0)
    rows = compare(case, FIELDS[name], data, likelihood, tune)
    for which in data:
        for regime in FIELDS[name]:
            some = [row for row in rows if (row["set"], row["regime"]) == (which, regime)]
            best = min(some, key=lambda row: row["rmse"])
            data[which] |= {f"{regime}_{key}": best[key] for key in ("mean", "std")}
        path = folder / f"{name}_{which}.npz"
        np.savez_compressed(path, **{k: np.asarray(v, np.float32) for k, v in data[which].items()})
    return rows


def main() -> None:
    parts = {name: functools.partial(lorenz63, name) for name in assimilation.PROTOCOLS}
    parts |= {name: functools.partial(fields, name) for name in FIELDS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=parts, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    flags = parser.parse_args()
    dapper.rc.liveplotting = False
    dapper.tools.progressbar.disable_progbar = True
    rows = parts[flags.part](flags.folder)
    rows = [{k: v for k, v in row.items() if k not in ("mean", "std")} for row in rows]
    update(f"dapper_{flags.part}", rows, dapper=dapper.__version__)


if __name__ == "__main__":
    main()
