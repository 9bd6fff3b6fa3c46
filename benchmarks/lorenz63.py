"""Models of Lorenz-63 in all regimes, against a particle filter of 16,384 particles.

  python -m launch.train --config=configs/lorenz63_forcing.py --workdir=DIR
  python benchmarks/assimilation_baselines.py --folder=FOLDER
  python benchmarks/lorenz63.py --workdir=DIR --folder=FOLDER
  python -m launch.train --config=configs/lorenz63_emulator.py --workdir=ONE
  python benchmarks/lorenz63.py --workdir=ONE --folder=FOLDER [--equations]

The run is a trajectory model, or an emulator for a particle filter, in whose place the equations
can be. The regime `blind` is a particle filter without observations.
Protocols are those of assimilation.py; results/README.md explains the rows and how the strength of
the guidance is chosen. Writes benchmarks/results/lorenz63.json; rows that are there are kept.
"""

import dataclasses
import json
import pathlib
import re

from assimilation import PROTOCOLS
from tasks import RESULTS, Rows
from trajectory_rows import Subject, analysed, chosen, parser, stored_rmse

from mclr_jax import runs
from mclr_jax.assimilation.ensemble import MEMBERS, Limits
from mclr_jax.assimilation.schedules import Scheme

GRIDS = {"posterior": ("c", (0.25, 0.5, 1.0)), "norm": ("zeta", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0))}
CHOSEN_ON = {"filter": 16, "batch": 64, "batch_norm": 64}  # trajectories
# the frame that a fixed lag reads has frames on both sides of it in the window
SCHEMES = {
    "filter": Scheme(window=32, steps=12),
    "lag16": Scheme(window=52, steps=12),
    "batch": Scheme(),
    "batch_norm": Scheme(guidance="norm"),  # the guidance of the paper
}


KEYS = {"rmse": "rmse", "rmse_flowdas": "rmse_flowdas", "w1": "w1_to_truth",
        "w1_standardised": "w1_standardised", "w1_floor": "w1_floor", "log_prior": "log_prior",
        "log_prior_members": "log_prior_members",
        "log_likelihood": "log_likelihood_members"}  # fmt: skip


def summary(rows: list[dict]) -> dict:
    """The numbers on FlowDAS's protocol, test set, and those of the particle filter."""
    baselines = json.loads((RESULTS / "assimilation_baselines.json").read_text())
    exact = {r["regime"]: r for r in baselines["particle_filter_flowdas"]["rows"]
             if r["set"] == "test"}  # fmt: skip
    found = {
        re.sub(r"lag\d+", "fixed_lag", r["regime"]): r for r in rows
        if (r["protocol"], r["set"], r.get("method")) == ("flowdas", "test", None)
        and "inflation" not in r["plan"]
    }  # fmt: skip
    if found:
        found["best"] = min(found.values(), key=lambda row: row["rmse"])
    found |= {"particle_filter": exact["filter"], "particle_smoother": exact["batch"]}
    return {name: {key: row.get(of) for key, of in KEYS.items()} for name, row in found.items()}


def particles(subject: Subject, rows: Rows, path: pathlib.Path, name: str, regime: str) -> dict:
    """The row of a particle filter or smoother on a file of the protocol `name`."""
    asked = {"set": "test", "protocol": name, "regime": regime, **subject.name, "plan": {},
             "trajectories": 64, "members": MEMBERS["particle"]}  # fmt: skip

    def make() -> dict:
        blind = regime == "blind"
        judge = "filter" if blind else regime
        new = analysed(subject, path, PROTOCOLS[name].system, judge, Limits(), 64, blind=blind,
                       ensemble=MEMBERS["particle"])  # fmt: skip
        del new["ranks"], new["rmse_by_trajectory"]
        baselines = json.loads((RESULTS / "assimilation_baselines.json").read_text())
        exact = next(r["rmse"] for r in baselines[f"particle_filter_{name}"]["rows"]
                     if (r["set"], r["regime"]) == ("test", judge))  # fmt: skip
        return {"ratio": new["rmse"] / exact, **new, "particle_filter_rmse": exact}

    return rows.row(asked, make)


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--protocols", choices=PROTOCOLS, nargs="+", default=[*PROTOCOLS])
    found.add_argument("--regimes", choices=SCHEMES, nargs="+", default=[*SCHEMES])
    found.add_argument("--equations", action="store_true", help="in place of the emulator")
    flags = found.parse_args()
    is_emulator = runs.load(flags.workdir).model.is_emulator
    subject = Subject(flags.workdir, "particle" * is_emulator, flags.equations)
    rows = Rows("lorenz63", summary)

    def row(name: str, which: str, regime: str, settings: dict, trajectories: int) -> dict:
        scheme = dataclasses.replace(SCHEMES[regime], **settings)
        used = dataclasses.asdict(scheme).items()
        path = flags.folder / f"{name}_{which}.npz"
        asked = {"set": which, "protocol": name, "regime": regime, **subject.name,
                 "trajectories": trajectories, "members": flags.ensemble,
                 "plan": {k: v for k, v in used if v != getattr(Scheme(), k)}}  # fmt: skip

        def make() -> dict:
            new = analysed(
                subject, path, PROTOCOLS[name].system, regime, scheme, trajectories,
                together=4 if PROTOCOLS[name].every == 1 else 1, ensemble=flags.ensemble,
                batch_size=512,
            )  # fmt: skip
            exact = stored_rmse(path, regime.removesuffix("_norm"), trajectories)["rmse"]
            return {"ratio": new["rmse"] / exact, **new, "particle_filter_rmse": exact}

        return rows.row(asked, make)

    for name in flags.protocols if subject.method == "particle" else ():
        for regime in ("filter", "lag16", "batch", *["blind"] * PROTOCOLS[name].known):
            particles(subject, rows, flags.folder / f"{name}_test.npz", name, regime)
    for name in flags.protocols if subject.method == "trajectory" else ():
        for regime in flags.regimes:
            judge = "filter" if regime == "lag16" else regime
            key, values = GRIDS[SCHEMES[regime].guidance]

            def tried(settings: dict, name: str = name, judge: str = judge) -> dict:
                return row(name, "validation", judge, settings, CHOSEN_ON[judge])

            best = chosen(tried, {}, {key: values})
            row(name, "test", regime, best, 64)
            if regime == "batch":
                inflated = {"inflation": 1 / tried(best)["spread_skill"]}
                row(name, "test", regime, best | inflated, 64)


if __name__ == "__main__":
    main()
