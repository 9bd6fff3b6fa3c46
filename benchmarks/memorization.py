"""The warning of memorization on 8x8 digits: when it comes, and when copies come.

  python benchmarks/memorization.py --jobs=1      # tasks at a time, one core each

Small DiTs are trained on few and on many images. Along each run the gap is that of the monitor in
training, and copies are counted among samples of the same checkpoints. The rules, gap less two
standard errors against a threshold, are judged on these curves: EARLIER was fixed on other runs;
RULE, the default of config.memorization, and the level of the one-call form on the runs NAMED here.
Every task makes a file under runs/memorization, so that the same command continues after an
interruption. Complete parts go to
benchmarks/results/memorization.json. Needs the package installed (pip install -e .).
"""

import argparse
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from icr import cost_of
from tasks import ROOT, Files, Task, add_flags, config_of, run

from mclr_jax import generate, hooks, images, runs
from mclr_jax.config import Training
from mclr_jax.evaluation import evaluate
from mclr_jax.experiment import Experiment
from mclr_jax.files import read_lines, write_json
from mclr_jax.representation import memorization

READINGS = 20  # along each run
SAMPLES = 600  # at each reading
FIRST, MANY = 0.005, 0.05  # shares of copies whose steps are told
FACTORS = (1.4, 2.0, 2.8, 4.0)  # of `first_level`: levels of the one-call form
EARLIER, RULE, LIKELY = 0.65, 0.6, 0.75  # thresholds
NAMED = ("images_64", "images_128", "images_256")
COSTS = ("digits", "fashion_mnist")
NARROW = {"network.width": 32, "network.heads": 2}


class Case(NamedTuple):
    """A training: its name, images, steps, seed and further changes of configs/digits.py."""

    name: str
    limit: int  # 0: all
    steps: int
    seed: int = 0
    changes: Mapping[str, Any] = {}


CASES = (
    Case("images_64", 64, 900), Case("images_128", 128, 1800), Case("images_256", 256, 4000),
    Case("images_64_seed_1", 64, 900, 1), Case("images_128_seed_1", 128, 1800, 1),
    Case("images_all", 0, 5000), Case("narrow_256", 256, 5000, 0, NARROW),
    Case("images_256_seed_1", 256, 4000, 1), Case("images_512", 512, 9000),
    Case("images_all_seed_1", 0, 5000, 1), Case("images_512_seed_1", 512, 9000, 1),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bench(Files):
    """Where everything is, and how each part is made."""

    root: pathlib.Path
    scale: float = 1.0  # share of the steps and samples, to try things out

    def config(self, case: Case) -> Any:
        """The rate is constant, so that the length of a run shapes nothing."""
        every = max(round(case.steps * self.scale) // READINGS, 1)
        return config_of("digits", {
            "data.limit": case.limit, "seed": case.seed, "num_steps": every * READINGS,
            "optimizer.learning_rate": 3e-3, "optimizer.schedule": "constant",
            "checkpoint_every": every, "keep_checkpoints": 2 * READINGS, "log_every": every,
            "memorization.every_steps": every, "memorization.samples": 0, **case.changes,
        })  # fmt: skip

    def curve(self, case: Case) -> None:
        """Beside each reading: copies among samples, and the one-call form at some levels."""
        workdir = self.root / case.name
        found = runs.load(workdir)
        model, train = found.model, found.source("train")
        training = Training.parse(found.config)
        monitor = memorization.Monitor(
            training.memorization, model, found.sampler, found.data, train, None, workdir, 0
        )
        labels = np.resize(np.arange(model.null_label), max(round(SAMPLES * self.scale), 20))
        sampler, rows = dataclasses.replace(found.sampler, method="dpmpp_2m"), []
        losses = {r["step"]: r["eval_loss"] for r in read_lines(workdir / "metrics.jsonl")
                  if "eval_loss" in r}  # fmt: skip
        for reading in memorization.past(workdir, training.num_steps):
            params, step = found.weights(step=reading["step"])
            samples = images.clip(generate.generate(model, params, labels, sampler, batch_size=60))
            calls = {
                f"one_call_{factor}": monitor.one_call(params, factor * monitor.first_level)
                for factor in FACTORS
            }
            copies = evaluate.memorized(samples, train)
            rows.append({**reading, "copies": copies, **calls, "eval_loss": losses[step],
                         "first_level": monitor.first_level})  # fmt: skip
        self.write(f"curves/{case.name}", rows, workdir)

    def cost(self, file: str) -> None:
        """CPU time of the readings of configs/FILE.py as they are, without samples."""
        training = Training.parse(config_of(file, {"memorization.samples": 0}))
        experiment = Experiment(training, self.root / "cost")
        (hook,) = hooks.memorization(experiment, 0)
        params = experiment.for_sampling(experiment.first_state()[0])
        found = cost_of(
            experiment, params, hook.run.read, hook.every, max(round(20 * self.scale), 1)
        )
        self.write(f"cost_{file}", found)

    def tasks(self) -> list[Task]:
        """A training and its curve for each case, in the order of CASES, after the costs."""
        do = functools.partial
        tasks = [Task(f"cost_{file}", do(self.cost, file), f"cost_{file}.json") for file in COSTS]
        for case in CASES:
            trained = f"{case.name}/done.json"
            train = do(self.train, case.name, "digits", self.config(case))
            tasks += [Task(case.name, train, trained),
                      Task(f"curve_{case.name}", do(self.curve, case),
                           f"curves/{case.name}.json", (trained,))]  # fmt: skip
        return tasks


def judged(case: Case, rows: list[dict]) -> dict[str, Any]:
    """When the warning and the copies have come in a run, and what was there when they came."""

    def first(key: str, least: float) -> dict | None:
        return next((row for row in rows if row[key] >= least), None)

    def step(row: dict | None) -> int | None:
        return row and row["step"]

    sure = [row[memorization.SHARE] - 2 * row[memorization.ERROR] for row in rows]
    rows = [{**row, "sure": value} for row, value in zip(rows, sure, strict=True)]
    earlier, warned, likely = (first("sure", least) for least in (EARLIER, RULE, LIKELY))
    copied = first("copies", FIRST)
    ratio = warned["step"] / copied["step"] if warned and copied else None
    return {
        "named": case.name in NAMED, "images": case.limit or 1437, "seed": case.seed,
        "narrow": bool(case.changes),
        "steps": rows[-1]["step"], "earlier": step(earlier), "warning": step(warned),
        "likely": step(likely),
        "first_copies": step(copied), "many_copies": step(first("copies", MANY)),
        "warning_by_first_copies": ratio,
        "gap_at_first_copies": copied and copied[memorization.SHARE],
        "copies_at_warning": warned and warned["copies"],
        "copies_at_likely": likely and likely["copies"],
        "largest_gap": max(row[memorization.SHARE] for row in rows),
        "largest_copies": max(row["copies"] for row in rows),
        "sigma": rows[-1][memorization.SIGMA], "copies_at_the_end": rows[-1]["copies"],
        "lowest_loss": min(rows, key=lambda row: row["eval_loss"])["step"],
        "one_call": {f: step(first(f"one_call_{f}", memorization.ONE_CALL)) for f in FACTORS},
    }  # fmt: skip


def collect(bench: Bench) -> dict:
    """All complete curves, and what they say."""
    cases = [case for case in CASES if bench.there(f"curves/{case.name}")]
    curves = {case.name: bench.read(f"curves/{case.name}") for case in cases}
    rows = [{"name": case.name, **judged(case, curves[case.name])} for case in cases]
    made_by = {name: bench.made_by(f"curves/{name}") for name in curves}
    made_by |= {f"cost_{file}": bench.made_by(f"cost_{file}") for file in COSTS}
    costs = [{"config": file, **bench.read(f"cost_{file}")} for file in COSTS]
    return {"rows": rows, "costs": costs, "curves": curves, "scale": bench.scale,
            "made_by": made_by}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=ROOT / "runs" / "memorization")
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps, to try it out")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT, help="has benchmarks/results")
    add_flags(parser)
    arguments = parser.parse_args()
    bench = Bench(arguments.root, arguments.scale)
    result = run(bench.root, bench.tasks(), arguments) | collect(bench)
    write_json(arguments.out / "benchmarks" / "results" / "memorization.json", result)
    for row in result["rows"]:
        print(row)


if __name__ == "__main__":
    main()
