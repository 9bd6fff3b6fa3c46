"""One trajectory model on Lorenz-63 in all regimes, against a particle filter of 16,384 particles.

  python -m launch.train --config=configs/lorenz63_forcing.py --workdir=DIR
  python benchmarks/assimilation_baselines.py --folder=FOLDER
  python benchmarks/lorenz63.py --workdir=DIR --folder=FOLDER

Protocols and the numbers of a row are those of assimilation.py and assimilation_baselines.py; all
regimes use the same weights. `c` of the guidance, or `zeta` of the paper's in "batch_norm", is
chosen on the validation set, by the RMSE: for each protocol in the batch regime on all of its
trajectories, and in the filter on the first 16, for the fixed lag as well. Where each frame is
observed, an update serves four frames, whose lags are 13 to 16. The rows of the set "test" are on
other trajectories. `ratio` is the RMSE over that of the particle filter or smoother; `ranks` the
shares of the truths with 0, 1, ... E members below them. A second row of the batch regime has
members inflated by the inverse of spread/skill on the validation set. Writes
benchmarks/results/lorenz63.json, row by row; rows that are there are not made again.
"""

import argparse
import dataclasses
import json
import pathlib
import time

import numpy as np
from assimilation import PROTOCOLS
from assimilation_baselines import score
from tasks import RESULTS, made

from mclr_jax import runs
from mclr_jax.assimilation import observe, regimes, scores
from mclr_jax.assimilation.schedules import Scheme, lags
from mclr_jax.files import digest, provenance, write_json
from mclr_jax.training.devices import banner

REGIMES = {"filter": ("filter", 0), "lag8": ("fixed_lag", 8), "lag16": ("fixed_lag", 16),
           "batch": ("batch", 0), "batch_norm": ("batch", 0)}  # fmt: skip
FILE = RESULTS / "lorenz63.json"
GRIDS = {"posterior": ("c", (0.25, 0.5, 1.0)), "norm": ("zeta", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0))}
CHOSEN_ON = {"filter": 16, "batch": 64, "batch_norm": 64}  # trajectories
# the frame that a fixed lag reads has frames on both sides of it in the window
SCHEMES = {
    "filter": Scheme(window=32, steps=12),
    "lag16": Scheme(window=52, steps=12),
    "batch": Scheme(),
    "batch_norm": Scheme(guidance="norm"),  # the guidance of the paper
}


def analyse(run, params, path: pathlib.Path, system, regime: str, scheme: Scheme, options) -> dict:
    """One row: `regime` on the first trajectories of a file of the baselines."""
    arrays = observe.load(path)
    whole = observe.parse(arrays, path)
    some = slice(0, options["trajectories"])
    initial = None if whole.initial is None else whole.initial[some]
    seen = dataclasses.replace(whole, values=whole.values[some], initial=initial)
    frames, kind = seen.values.shape[1], REGIMES[regime]
    ahead = lags(kind[0], frames, kind[1])
    if kind[0] == "fixed_lag":  # fewer updates: a frame is read where up to so many see the same
        ahead = ahead - np.arange(frames) % options.get("together", 1)
    start, calls = time.monotonic(), []
    found = regimes.assimilate(
        run.model, params, seen, scheme, ahead, ensemble=options["ensemble"], seed=0,
        batch_size=options.get("batch_size", 512), progress=calls.append,
    )  # fmt: skip
    x, truth = found.members, arrays["truth"][some]
    row = score(
        system, truth, np.asarray(seen.values), x.mean(1), x.std(1, ddof=1), x, kind[0] == "batch",
        arrays["scale"],
    )  # fmt: skip
    # the mean of E members has (E + 1) / E of the error of the exact mean, as the spread is judged
    row["spread_skill"] *= (1 + 1 / x.shape[1]) ** 0.5
    row["ranks"] = scores.rank_histogram(x, truth).tolist()
    name = f"{regime.removesuffix('_norm')}_mean"
    exact = np.sqrt(((arrays.get(name, np.nan * x.mean(1))[some] - truth) ** 2).mean())
    return {
        "regime": regime, "ratio": float(row["rmse"] / exact), **row,
        "particle_filter_rmse": float(exact), "members": x.shape[1], "trajectories": len(x),
        "c": scheme.c, "zeta": scheme.zeta, "lags": np.unique(ahead[np.isfinite(ahead)]).tolist(),
        "updates_of_members": int(sum(calls)), "seconds": time.monotonic() - start,
    }  # fmt: skip


def changed(scheme: Scheme) -> dict:
    """The settings that are not those of `Scheme()`."""
    return {k: v for k, v in dataclasses.asdict(scheme).items() if v != getattr(Scheme(), k)}


def summary(rows: list[dict]) -> dict:
    """The numbers on FlowDAS's protocol, test set, and those of the particle filter."""
    baselines = json.loads((RESULTS / "assimilation_baselines.json").read_text())
    exact = {
        r["regime"]: r for r in baselines["particle_filter_flowdas"]["rows"] if r["set"] == "test"
    }
    keys = {"rmse": "rmse", "rmse_flowdas": "rmse_flowdas", "w1": "w1_to_truth",
            "w1_standardised": "w1_standardised", "w1_floor": "w1_floor",
            "log_prior": "log_prior", "log_prior_members": "log_prior_members",
            "log_likelihood": "log_likelihood_members"}  # fmt: skip
    short = lambda row: {key: row.get(name) for key, name in keys.items()}  # noqa: E731
    ours = {
        r["regime"]: r for r in rows
        if (r["protocol"], r["set"]) == ("flowdas", "test") and "inflation" not in r["plan"]
    }  # fmt: skip
    names = {"filter": "filter", "lag16": "fixed_lag", "batch": "batch", "batch_norm": "batch_norm"}
    found = {names[regime]: short(row) for regime, row in ours.items()}
    best = min(ours.values(), key=lambda row: row["rmse"], default=None)
    found |= {"best": short(best) | {"regime": best["regime"]}} if best else {}
    return found | {
        "particle_filter": short(exact["filter"]),
        "particle_smoother": short(exact["batch"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--ensemble", type=int, default=16)
    parser.add_argument("--protocols", choices=PROTOCOLS, nargs="+", default=[*PROTOCOLS])
    parser.add_argument("--regimes", choices=SCHEMES, nargs="+", default=[*SCHEMES])
    flags = parser.parse_args()
    run = runs.load(flags.workdir)
    params, step = run.weights()
    result = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    weights = digest(params)
    for name in flags.protocols:

        def row(
            which: str, regime: str, value: float, trajectories: int, inflation: float = 1.0,
            name: str = name,
        ) -> dict:  # fmt: skip
            settings = {GRIDS[SCHEMES[regime].guidance][0]: value, "inflation": inflation}
            scheme = dataclasses.replace(SCHEMES[regime], **settings)
            asked = {"set": which, "protocol": name, "regime": regime, "step": step,
                     "weights": weights, "trajectories": trajectories,
                     "members": flags.ensemble, "plan": changed(scheme)}  # fmt: skip
            if old := made(result["rows"], asked):
                return old
            path = flags.folder / f"{name}_{which}.npz"
            options = {"trajectories": trajectories, "ensemble": flags.ensemble,
                       "together": 4 if PROTOCOLS[name].every == 1 else 1}  # fmt: skip
            new = analyse(run, params, path, PROTOCOLS[name].system, regime, scheme, options)
            result["rows"].append({**asked, **new, **provenance(), "device": banner()})
            write_json(FILE, {"rows": result["rows"], "summary": summary(result["rows"])})
            print(name, which, value, {k: new[k] for k in ("regime", "ratio", "spread_skill")},
                  flush=True)  # fmt: skip
            return result["rows"][-1]

        for regime in flags.regimes:
            judge = "filter" if regime == "lag16" else regime
            key, values = GRIDS[SCHEMES[regime].guidance]
            tried = [row("validation", judge, value, CHOSEN_ON[judge]) for value in values]
            best = min(tried, key=lambda r: r["rmse"])
            row("test", regime, best[key], 64)
            if regime == "batch":
                row("test", regime, best[key], 64, inflation=1 / best["spread_skill"])


if __name__ == "__main__":
    main()
