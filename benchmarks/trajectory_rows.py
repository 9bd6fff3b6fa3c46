"""Shared by the benchmarks of trajectory models: the run, an estimate as a row, settings."""

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from assimilation import System
from assimilation_baselines import score

from mclr_jax import runs
from mclr_jax.assimilation import observe, regimes, scores
from mclr_jax.assimilation.schedules import Scheme, lags
from mclr_jax.files import digest


class Subject:
    """A trained run, and how its rows name it."""

    def __init__(self, workdir: pathlib.Path):
        self.run = runs.load(workdir)
        self.params, step = self.run.weights()
        self.name = {"step": step, "weights": digest(self.params)}

    def estimate(
        self, seen: observe.Observations, scheme: Scheme, ahead: np.ndarray, **options: Any
    ) -> tuple[np.ndarray, float]:
        """Members (N, E, T, ...), and the seconds that they took; options as of `assimilate`."""
        start = time.monotonic()
        found = regimes.assimilate(self.run.model, self.params, seen, scheme, ahead, **options)
        return found.members, time.monotonic() - start


def parser(doc: str | None, folder: bool = True) -> argparse.ArgumentParser:
    """The flags of all drivers."""
    found = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    found.add_argument("--workdir", type=pathlib.Path, required=True)
    if folder:
        found.add_argument("--folder", type=pathlib.Path, required=True)
        found.add_argument("--ensemble", type=int, default=16)
    return found


def ahead_of(regime: str, frames: int) -> np.ndarray:
    """How many frames each frame looks ahead in filter, lagL or batch; more words follow a _."""
    kind = regime.partition("_")[0]
    if kind.startswith("lag"):
        return lags("fixed_lag", frames, int(kind.removeprefix("lag")))
    return lags(kind, frames)


def analysed(
    subject: Subject, path: pathlib.Path, system: System, regime: str, scheme: Scheme,
    trajectories: int, together: int = 1, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row: a regime on the first trajectories of a file of the baselines.

    With a fixed lag, `together` frames are read from one update.
    """
    arrays = observe.load(path)
    whole, some = observe.parse(arrays, path), slice(0, trajectories)
    initial = None if whole.initial is None else whole.initial[some]
    seen = dataclasses.replace(whole, values=whole.values[some], initial=initial)
    frames, calls = seen.values.shape[1], []
    ahead = ahead_of(regime, frames)
    if regime.startswith("lag"):  # fewer updates: a frame is read where up to so many see the same
        ahead = ahead - np.arange(frames) % together
    options["progress"] = lambda members, updates: calls.append(members)
    x, seconds = subject.estimate(seen, scheme, ahead, **options)
    truth, mean = arrays["truth"][some], x.mean(1)
    row = score(
        system, truth, np.asarray(seen.values), mean, x.std(1, ddof=1), x,
        regime.startswith("batch"),
        arrays["state_scale"],
    )  # fmt: skip
    # the mean of E members has (E + 1) / E of the error of the exact mean, as the spread is judged
    row["spread_skill"] *= (1 + 1 / x.shape[1]) ** 0.5
    row["ranks"] = scores.rank_histogram(x, truth).tolist()
    return {
        **row, "members": x.shape[1], "trajectories": len(x), "c": scheme.c, "zeta": scheme.zeta,
        "lags": np.unique(ahead[np.isfinite(ahead)]).tolist(),
        "updates_of_members": int(sum(calls)), "seconds": seconds,
    }  # fmt: skip


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
