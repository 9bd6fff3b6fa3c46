"""Models of Lorenz-63 in all regimes, against a particle filter of 16,384 particles.

  python -m launch.train --config=configs/lorenz63_forcing.py --workdir=DIR
  python benchmarks/assimilation_baselines.py --folder=FOLDER
  python benchmarks/lorenz63.py --workdir=DIR --folder=FOLDER

The same with --protocols flowdas, of a training with --config.noise.short=0.6
--config.noise.prefix=0.3 --config.noise.independent=0.1 --config.noise.shared=0.45
--config.noise.segments=0.15 --config.objective.variance_power=0.1, has the key `short`.

  python -m launch.train --config=configs/lorenz63_emulator.py --workdir=ONE
  python benchmarks/lorenz63.py --workdir=ONE --folder=FOLDER [--equations]

The run is a trajectory model, or an emulator for a particle filter, in whose place the equations
can be. The regime `blind` is a particle filter without observations.
Protocols are those of assimilation.py; results/README.md explains the rows and how the strength of
the guidance is chosen. Writes benchmarks/results/lorenz63.json; rows that are there are kept.
"""

import dataclasses
import itertools
from typing import Any

from assimilation import PROTOCOLS
from tasks import Rows
from trajectory_rows import Subject, analysed, chosen, parser, stored_rmse

from mclr_jax import runs
from mclr_jax.assimilation.ensemble import MEMBERS, Limits
from mclr_jax.assimilation.schedules import Scheme

GRIDS = {"posterior": ("c", (0.25, 0.5, 1.0, 4.0, 16.0, 64.0, 256.0)),
         "norm": ("zeta", (0.01, 0.03, 0.1, 0.3, 1.0, 3.0))}  # fmt: skip
CHOSEN_ON = {"filter": 16, "batch": 64, "batch_norm": 64}  # trajectories
# the frame that a fixed lag reads has frames on both sides of it in the window
SCHEMES = {
    "filter": Scheme(window=32, steps=12),
    "lag16": Scheme(window=52, steps=12),
    "batch": Scheme(),
    "batch_norm": Scheme(guidance="norm"),  # the guidance of the paper
}


def main() -> None:
    found = parser(__doc__)
    found.add_argument("--equations", action="store_true", help="in place of the emulator")
    found.add_argument("--protocols", choices=PROTOCOLS, nargs="+", default=[*PROTOCOLS])
    flags = found.parse_args()
    is_emulator = runs.load(flags.workdir).model.is_emulator
    subject = Subject(flags.workdir, "particle" * is_emulator, flags.equations)
    rows = Rows("lorenz63")

    def row(name: str, which: str, regime: str, scheme: Any, trajectories: int) -> dict:
        path = flags.folder / f"{name}_{which}.npz"
        judge = {"blind": "filter"}.get(regime, regime.removesuffix("_norm"))
        options = {"ensemble": MEMBERS["particle"]} if is_emulator else {
            "ensemble": flags.ensemble, "batch_size": 512,
            "together": 4 if PROTOCOLS[name].every == 1 else 1}  # fmt: skip
        default = dataclasses.asdict(type(scheme)())
        changed = {k: v for k, v in dataclasses.asdict(scheme).items() if v != default[k]}
        asked = {"set": which, "protocol": name, "regime": regime, **subject.name,
                 "trajectories": trajectories, "members": options["ensemble"],
                 "plan": changed}  # fmt: skip

        def make() -> dict:
            blind = regime == "blind"
            new = analysed(subject, path, judge, scheme, trajectories, blind=blind, **options)
            exact = stored_rmse(path, judge, trajectories)["rmse"]
            return {"ratio": new["rmse"] / exact, **new, "particle_filter_rmse": exact}

        return rows.row(asked, make)

    for name in flags.protocols if is_emulator else ():
        for regime in ("filter", "lag16", "batch", *["blind"] * PROTOCOLS[name].known):
            row(name, "test", regime, Limits(), 64)
    for name, regime in itertools.product(() if is_emulator else flags.protocols, SCHEMES):
        scheme = SCHEMES[regime]
        tuned_as = "filter" if regime == "lag16" else regime
        key, values = GRIDS[scheme.guidance]

        def tried(settings: dict, name: str = name, regime: str = tuned_as) -> dict:
            changed = dataclasses.replace(SCHEMES[regime], **settings)
            return row(name, "validation", regime, changed, CHOSEN_ON[regime])

        best = chosen(tried, {}, {key: values})
        row(name, "test", regime, dataclasses.replace(scheme, **best), 64)
        if regime == "batch":
            best["inflation"] = 1 / tried(best)["spread_skill"]
            row(name, "test", regime, dataclasses.replace(scheme, **best), 64)


if __name__ == "__main__":
    main()
