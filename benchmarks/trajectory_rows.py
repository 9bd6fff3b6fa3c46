"""Shared by the benchmarks of trajectory models: the run, an estimate as a row, settings."""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from assimilation_baselines import score

from mclr_jax import runs
from mclr_jax.assimilation import ensemble, methods, observe, scores
from mclr_jax.assimilation.schedules import lags
from mclr_jax.files import digest


class Subject:
    """A trained run in a method of `mclr assimilate`, and how its rows name it.

    `equations`: an emulator's place is taken by the equations of its system.
    """

    def __init__(self, workdir: pathlib.Path, method: str = "", equations: bool = False):
        self.run = runs.load(workdir)
        self.params, step = self.run.weights()
        self.method = methods.method_of(self.run, method)
        self.solve = methods.solver(self.run, self.params, self.method)
        self.name: dict[str, Any] = {"step": step, "weights": digest(self.params)}
        if short := self.run.config["noise"].get("short"):
            self.name["short"] = short
        if self.method != "trajectory":
            noise = self.run.config["objective"].get("input_noise", 0.0)
            told = {"method": self.method, "seed": self.run.config["seed"], "input_noise": noise}
            self.name |= told
        if equations:
            step, climate = self.run.source("train").dynamics.step, self.solve.args[1]
            self.solve = functools.partial(ensemble.assimilate, step, climate, method=self.method)
            self.name = {"method": self.method, "weights": "equations"}

    def estimate(
        self, seen: observe.Observations, scheme: Any, ahead: np.ndarray, **options: Any
    ) -> tuple[np.ndarray, float]:
        """Members (N, E, T, ...), and the CPU seconds that they took; options as of `assimilate`.

        Those of a classical filter, which takes seconds, without those of compilation.
        """
        if self.method == "enkf":
            together = 1 if len(self.run.model.data.shape) > 2 else 4  # fields take longer
            options["batch_size"] = together * options["ensemble"]
            self.solve(some_of(seen, together), scheme, ahead, **options)
        start = time.process_time()
        found = self.solve(seen, scheme, ahead, **options)
        return found.members, time.process_time() - start


def parser(doc: str | None, folder: bool = True) -> argparse.ArgumentParser:
    """The flags of all drivers."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.add_argument("--workdir", type=pathlib.Path, required=True)
    if folder:
        found.add_argument("--folder", type=pathlib.Path, required=True)
        found.add_argument("--ensemble", type=int, default=16)
    return found


def ahead_of(regime: str, frames: int) -> np.ndarray:
    """How many frames each frame looks ahead in filter, lagL or batch."""
    if regime.startswith("lag"):
        return lags("fixed_lag", frames, int(regime.removeprefix("lag")))
    return lags(regime, frames)


def analysed(
    subject: Subject, path: pathlib.Path, regime: str, scheme: Any, trajectories: int,
    together: int = 1, blind: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row: a regime on the first trajectories of a file of the baselines.

    With a fixed lag, `together` frames are read from one update. `blind`: without observations.
    """
    arrays, some = observe.load(path), slice(0, trajectories)
    seen = some_of(observe.parse(arrays, path), trajectories)
    if blind:
        seen = dataclasses.replace(seen, values=np.full_like(seen.values, np.nan))
    frames, calls = seen.values.shape[1], []
    ahead = ahead_of(regime, frames)
    if regime.startswith("lag"):  # fewer updates: a frame is read where up to so many see the same
        ahead = ahead - np.arange(frames) % together
    options["progress"] = lambda members, updates: calls.append(members)
    x, seconds = subject.estimate(seen, scheme, ahead, **options)
    truth, mean = arrays["truth"][some], x.mean(1)
    few = x[:, :: max(1, x.shape[1] // 128)]  # of thousands of particles
    row = score(truth, mean, x.std(1, ddof=1), few, arrays["state_scale"])
    # the mean of E members has (E + 1) / E of the error of the exact mean, as the spread is judged
    row["spread_skill"] *= (1 + 1 / x.shape[1]) ** 0.5
    row["ranks"] = scores.rank_histogram(few, truth).tolist()
    row["rmse_by_trajectory"] = np.sqrt(((mean - truth) ** 2).mean((1, 2))).tolist()
    guidance = {key: getattr(scheme, key) for key in ("c", "zeta") if hasattr(scheme, key)}
    return {
        **row, "members": x.shape[1], "trajectories": len(x), **guidance,
        "lags": np.unique(ahead[np.isfinite(ahead)]).tolist(),
        "updates_of_members": int(sum(calls)), "seconds": seconds,
    }  # fmt: skip


def some_of(whole: observe.Observations, count: int) -> observe.Observations:
    """The first trajectories."""
    initial = None if whole.initial is None else whole.initial[:count]
    return dataclasses.replace(whole, values=whole.values[:count], initial=initial)


def tuning(
    subject: Subject, seen: observe.Observations, truth: np.ndarray, members: int, **grid: tuple
) -> dict[str, Any]:
    """The settings of a filter with the lowest CRPS; `grid` in place of that of `methods`."""
    tried = methods.grid_of(subject.method, seen, truth.shape[2:]) | grid
    start, ahead = methods.SETTINGS[subject.method](), ahead_of("filter", truth.shape[1])
    options = {"ensemble": members, "batch_size": members if truth.ndim > 3 else 65_536}
    best, rows = methods.tuned(subject.solve, start, tried, truth, seen, ahead, **options)
    return {"plan": {key: getattr(best, key) for key in tried}, "tried": rows, **subject.name,
            "trajectories": len(truth)}  # fmt: skip


def stored_rmse(path: pathlib.Path, regime: str, trajectories: int) -> dict[str, float]:
    """The RMSE of the mean that a file of the baselines has for a regime; NaN if it has none."""
    arrays = observe.load(path)
    truth = arrays["truth"]
    square = ((arrays.get(f"{regime}_mean", np.nan * truth) - truth) ** 2)[:trajectories]
    late = square[:, square.shape[1] // 2 :]
    return {"rmse": float(square.mean() ** 0.5), "rmse_second_half": float(late.mean() ** 0.5)}


def chosen(row: Callable[[dict], dict], start: dict, grid: Mapping[str, Iterable]) -> dict:
    """The settings of the lowest RMSE, found by one key after the other: settings -> row."""
    best = dict(start)
    for key, values in grid.items():
        tried = {value: row({**best, key: value})["rmse"] for value in values}
        best[key] = min(tried, key=tried.__getitem__)
    return best
