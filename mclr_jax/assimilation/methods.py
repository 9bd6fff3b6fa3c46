"""The methods of `mclr assimilate` for a run, and the choice of their settings on held-out data."""

import ast
import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from mclr_jax.assimilation import ensemble, regimes, scores
from mclr_jax.assimilation.observe import Observations, Own
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.data.protocol import evenly
from mclr_jax.files import named, provenance, write_json
from mclr_jax.runs import Run
from mclr_jax.schema import in_range, look_up, read

SETTINGS: dict[str, Any] = {"trajectory": Scheme, "enkf": ensemble.Settings,
                            "particle": ensemble.Limits}  # fmt: skip
MEMBERS = {"trajectory": 16, **ensemble.MEMBERS}
# Values that `tuned` tries, one key after the other; localisation only of many coordinates.
GRIDS: dict[str, dict[str, tuple]] = {
    "trajectory": {"c": (0.25, 0.5, 1.0), "restart": (0.5, 1.0, 5.0)},
    "enkf": {"radius": (2.0, 4.0, 6.0, 8.0, 0.0), "inflation": (1.0, 1.01, 1.02, 1.05, 1.1),
             "relaxation": (0.0, 0.2, 0.4)},
}  # fmt: skip
CLIMATE, ERRORS = 4096, 1024  # states and errors that the classical filters know
FILE = "assimilation.json"  # of a run: the settings that were chosen

# (observations, settings, lags, ensemble=, seed=, ...) -> members
Solver = Callable[..., regimes.Result]


def method_of(run: Run, asked: str | None = None) -> str:
    """The method asked for, or that of the run; ValueError unless it has a model for it."""
    model = run.model
    method = asked or ("enkf" if model.is_emulator else "trajectory")
    look_up(SETTINGS, method, "method")
    told = f"{run.workdir} has the network {type(model.network).__name__}"
    if method == "trajectory":
        if not model.is_denoiser or not model.frames:
            advice = " An emulator's methods are enkf and particle." if model.is_emulator else ""
            raise ValueError(
                f"{told} for data of shape {model.data.shape}; expected a run of a trajectory "
                f"model, as of configs/trajectories.py.{advice}"
            )
    elif not model.is_emulator:
        raise ValueError(
            f"{told}; method {method!r} needs the run of an emulator, as of "
            "configs/lorenz96_emulator.py or trajectories:emulator."
        )
    elif method == "particle" and not model.has_variance:
        raise ValueError(
            f"{run.workdir} has an emulator without noise, whose particles become one; train it "
            "with config.network.variance=True, or use method 'enkf'."
        )
    return method


def solver(run: Run, params: Any, method: str) -> Solver:
    """`assimilate` of `regimes` or `ensemble` for a run and a method of `method_of`."""
    if method == "trajectory":
        return functools.partial(regimes.assimilate, run.model, params)
    source, errors = run.source("train"), None
    offset, scale = regimes.units(run.model)
    x = source[evenly(source, CLIMATE)][0]
    climate = offset + scale * x[:, 0]
    if not run.model.has_variance:
        some, forecast = x[:: -(-len(x) // ERRORS)], run.model.forecast(params)
        ahead = jax.lax.map(lambda x: forecast(x[None, :1])[0][0, 0], some, batch_size=32)
        errors = scale * (some[:, 1] - ahead)
    step, time_step = ensemble.Emulator(run.model, params, errors), run.model.data.time_step
    return functools.partial(ensemble.assimilate, step, climate, method=method, time_step=time_step)


# ---- settings ------------------------------------------------------------------------------------


def settings(run: Run, method: str, texts: Iterable[str] = ()) -> Any:
    """Settings KEY=VALUE of a method, beside those that `tune` has stored with the run.

    ValueError: the first unknown key or wrong value.
    """
    values = dict(_stored(run).get(method, {}).get("scheme", {}))
    for name, _, text in (text.partition("=") for text in texts):
        values[name] = text
        with contextlib.suppress(ValueError, SyntaxError):  # then it is a word
            values[name] = ast.literal_eval(text)
    return read(SETTINGS[method], values, "scheme")


def _stored(run: Run) -> dict[str, Any]:
    path = run.workdir / FILE
    with named(f"{path} is no file of mclr assimilate --tune"):
        return json.loads(path.read_text()) if path.exists() else {}


def held_out(run: Run, seen: Observations, count: int) -> tuple[np.ndarray, Observations]:
    """Truth (count, T, *state) of a run's held-out data, observed as `seen`, by other noise.

    Values are missing where those of `seen` are; an initial state is known if that of `seen` is.
    Of fewer held-out trajectories all are taken, with a warning.
    """
    frames = seen.values.shape[1]
    data = dataclasses.replace(run.data, options={**run.data.options, "frames": frames})
    with named(f"the held-out data of {run.workdir} give no trajectories of {frames} frames"):
        source = dataclasses.replace(run, data=data).source("test")
        if len(source) < count:
            text = "The held-out data of %s have %d trajectories of %d frames, fewer than %d."
            logging.warning(text, run.workdir, len(source), frames, count)
        offset, scale = regimes.units(run.model)
        truth = offset + scale * source[evenly(source, count)][0]
    values = np.asarray(seen.operator(truth))
    values = values + seen.std * np.random.default_rng(0).standard_normal(values.shape)
    missing = np.isnan(np.resize(seen.values, values.shape))
    initial = None if seen.initial is None else truth[:, 0]
    values = np.where(missing, np.nan, values)
    return truth, dataclasses.replace(seen, values=values, initial=initial)


def grid_of(method: str, seen: Observations, shape: tuple[int, ...]) -> dict[str, tuple]:
    """The values that `tuned` tries; ValueError: the method has no settings that are tuned."""
    grid = dict(look_up(GRIDS, method, "method with settings that are tuned"))
    if isinstance(seen.operator.linear, Own) or math.prod(shape) < 8:
        grid.pop("radius", None)
    return grid


def tuned(
    solve: Solver, start: Any, grid: Mapping[str, tuple], truth: np.ndarray, seen: Observations,
    lags: np.ndarray, **options: Any,
) -> tuple[Any, list[dict]]:  # fmt: skip
    """Settings of the lowest CRPS on trajectories with a known truth, one key after the other.

    And a row for each that was tried: its values of the keys of the grid, `crps` and `rmse`; both
    are infinite where members diverge.
    """
    rows: list[dict] = []

    def tried(settings: Any) -> float:
        row = {key: getattr(settings, key) for key in grid}
        found = next((r for r in rows if row.items() <= r.items()), None)
        if found is None:
            try:
                members = solve(seen, settings, lags, **options).members
                found = scores.summary(members, truth, ())
            except FloatingPointError:
                found = {"crps": math.inf, "rmse": math.inf}
            rows.append(found := {**row, **found})
        return found["crps"]

    best = start
    for key, values in grid.items():
        best = min((dataclasses.replace(best, **{key: value}) for value in values), key=tried)
    return best, rows


def tune(
    run: Run, method: str, solve: Solver, start: Any, seen: Observations, lags: np.ndarray,
    count: int, about: Mapping[str, Any], *, ensemble: int, **options: Any,
) -> tuple[Any, str]:  # fmt: skip
    """The settings chosen on `count` held-out trajectories, observed as `seen`, and a sentence.

    They are stored with the run, beside `about`; `settings` reads them.
    """
    in_range("--ensemble", ensemble, 2)  # for the CRPS
    grid = grid_of(method, seen, run.model.data.shape[1:])
    truth, here = held_out(run, seen, count)
    best, rows = tuned(solve, start, grid, truth, here, lags, ensemble=ensemble, **options)
    kept = {"scheme": dataclasses.asdict(best), "rows": rows, "trajectories": len(truth),
            "ensemble": ensemble, "operator": seen.operator.describe()}  # fmt: skip
    found = _stored(run) | {method: {**kept, **about, **provenance()}}
    write_json(run.workdir / FILE, found)
    told = ",".join(f"{key}={getattr(best, key)}" for key in grid)
    return best, f"Of {len(rows)} settings, stored in {run.workdir / FILE}: --scheme={told}"
