"""The warning of memorization: when it comes, and when copies come.

  python benchmarks/memorization.py --jobs=1      # tasks at a time, one core each

Small DiTs are trained on few and on many images: 8x8 digits, Fashion-MNIST, emoji in colour, and
digits from a base of Fashion-MNIST at 8x8. Along each run the gap is that of the
monitor in training, and copies are counted among samples of the same checkpoints. The rules, gap
less two standard errors against a threshold, are judged on these curves: EARLIER was fixed on other
runs; RULE, the default of config.memorization, and the level of the one-call form on the runs NAMED
here. Every task makes a file under runs/memorization, so that the same command continues after an
interruption. Complete parts go to benchmarks/results/memorization.json, whose other curves stay.
Needs the package installed (pip install -e .), and for emoji the packages of emoji_images.py.
"""

import argparse
import collections
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import image_bench
import numpy as np
from icr import cost_of, turned
from PIL import Image
from tasks import RESULTS, ROOT, Files, Task, add_flags, config_of, run

from mclr_jax import generate, hooks, images, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.evaluation import evaluate, features, metrics
from mclr_jax.experiment import Experiment
from mclr_jax.files import read_lines, save_arrays, write_json
from mclr_jax.representation import memorization

READINGS = 20  # along each run
SAMPLES = 600  # at each reading
FIRST, MANY = 0.005, 0.05  # shares of copies whose steps are told
FACTORS = (1.4, 2.0, 2.8, 4.0)  # of `first_level`: levels of the one-call form
EARLIER, RULE, LIKELY = 0.65, 0.6, 0.75  # thresholds
NAMED = ("images_64", "images_128", "images_256")
COSTS = ("digits", "fashion_mnist")
TUNED = "digits, fine-tuned"
JUDGED = {"digits": "digits", TUNED: "digits", "Fashion-MNIST": "fashion_mnist"}  # by kind: data
HELD_OUT = 2000  # images that the FD is to, at most
BASE = {"num_steps": 3000, "eval_examples": 0, "memorization.every_steps": -1}  # of fine-tuning
NARROW = {"network.width": 32, "network.heads": 2}


RATE = {"optimizer.learning_rate": 3e-3, "optimizer.schedule": "constant"}
FEWEST = 256  # images for readings of the ICR


class Case(NamedTuple):
    """A training: its name, images, steps, seed, changes of configs/FILE.py, and its kind."""

    name: str
    limit: int  # 0: all
    steps: int
    seed: int = 0
    changes: Mapping[str, Any] = {}
    file: str = "digits"
    kind: str = "digits"  # in words


def fashion(
    name: str, limit: int, steps: int, seed: int = 0, changes: Mapping[str, Any] = {}
) -> Case:
    return Case(name, limit, steps, seed, changes, "fashion_mnist", "Fashion-MNIST")


def emoji(name: str, steps: int, changes: Mapping[str, Any] = {}) -> Case:
    """In colour, 16x16 pixels, nine classes."""
    size = {"data.name": f"folder:{ROOT}/runs/memorization/emoji", "data.resolution": 16, **changes}
    return Case(name, 128, steps, 0, size, "fashion_mnist", "emoji")


def tuned(name: str, limit: int, steps: int, seed: int = 0) -> Case:
    base = {"init_from": f"{ROOT}/runs/memorization/base", "new_labels": "drawn"}
    return Case(name, limit, steps, seed, base, "digits", TUNED)


CASES = (
    Case("images_64", 64, 900), Case("images_128", 128, 1800), Case("images_256", 256, 4000),
    Case("images_64_seed_1", 64, 900, 1), Case("images_128_seed_1", 128, 1800, 1),
    Case("images_all", 0, 5000), Case("narrow_256", 256, 5000, 0, NARROW),
    Case("images_256_seed_1", 256, 4000, 1), tuned("fine_tuned_64", 64, 900),
    tuned("fine_tuned_128", 128, 1800), fashion("fashion_128", 128, 4000),
    emoji("emoji_128", 5000), Case("images_512", 512, 9000),
    fashion("fashion_narrow_256", 256, 9000, 0, NARROW),
    emoji("emoji_128_flip", 8000, {"data.flip": True}), fashion("fashion_256", 256, 10000),
    fashion("fashion_128_seed_1", 128, 4000, 1), tuned("fine_tuned_64_seed_1", 64, 900, 1),
    tuned("fine_tuned_128_seed_1", 128, 1800, 1),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bench(Files):
    """Where everything is, and how each part is made."""

    root: pathlib.Path
    scale: float = 1.0  # share of the steps and samples, to try things out

    def config(self, case: Case) -> Any:
        """The rate is constant, so that the length of a run shapes nothing."""
        every = max(round(case.steps * self.scale) // READINGS, 1)
        changes = {
            "data.limit": case.limit, "seed": case.seed, "num_steps": every * READINGS, **RATE,
            "checkpoint_every": every, "keep_checkpoints": 2 * READINGS, "log_every": every,
            "memorization.every_steps": every, "memorization.samples": 0, "sample_every": 0,
            "icr.every_steps": 0 if 0 < case.limit < FEWEST else every, "eval_examples": 512,
            **case.changes,
        }  # fmt: skip
        return config_of(case.file, changes)

    def emoji(self) -> None:
        """All emoji, in folders."""
        script = pathlib.Path(__file__).with_name("emoji_images.py")
        out = str(self.root / "emoji")
        subprocess.run([sys.executable, str(script), f"--out={out}"], check=True)
        self.write("emoji_made", out)

    def base(self) -> None:
        """The base of fine-tuning: configs/digits.py on Fashion-MNIST, by means of pixels."""
        pixels, labels = sources.load("fashion_mnist", "train")[np.arange(60_000)]
        small = [np.asarray(Image.fromarray(x).resize((8, 8), Image.Resampling.BOX))
                 for x in pixels[..., 0]]  # fmt: skip
        save_arrays(self.root / "base.npz", images=np.stack(small)[..., None], labels=labels)
        data = {"data.name": f"npz:{self.root / 'base.npz'}"}
        self.train("base", "digits", config_of("digits", BASE | RATE | data))

    def curve(self, case: Case) -> None:
        """Beside each reading: copies among samples, the one-call form at some levels, the FD."""
        workdir = self.root / case.name
        found = runs.load(workdir)
        model, train = found.model, found.source("train")
        training = Training.parse(found.config)
        monitor = memorization.Monitor(
            training.memorization, model, found.sampler, found.data, train, None, workdir, 0
        )
        judge, real = None, None
        if case.kind in JUDGED:
            judged_by = image_bench.Bench(JUDGED[case.kind]).root / "judge_features"
            judge = features.load(f"classifier:{judged_by}")
            rows = np.arange(min(HELD_OUT, len(found.source("test"))))
            real = metrics.moments(judge(*found.source("test")[rows]).features)
        labels = np.resize(np.arange(model.null_label), max(round(SAMPLES * self.scale), 20))
        sampler, seen = dataclasses.replace(found.sampler, method="dpmpp_2m"), []
        logged: dict[int, dict] = collections.defaultdict(dict)
        for record in read_lines(workdir / "metrics.jsonl"):
            logged[record["step"]] |= record
        for reading in memorization.past(workdir, training.num_steps):
            params, step = found.weights(step=reading["step"])
            samples = images.clip(generate.generate(model, params, labels, sampler, batch_size=60))
            row = {f"one_call_{factor}": monitor.one_call(params, factor * monitor.first_level)
                   for factor in FACTORS}  # fmt: skip
            row |= {key: logged[step][key] for key in ("eval_loss", "icr") if key in logged[step]}
            if judge:
                fake = metrics.moments(judge(samples, labels).features)
                row["frechet"] = metrics.frechet_distance(fake, real)
            copies = evaluate.memorized(samples, train, found.data.flip)
            seen.append({**reading, **row, "first_level": monitor.first_level, "copies": copies})
        self.write(f"curves/{case.name}", seen, workdir)

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
        """A training and its curve for each case, in the order of CASES, after the costs.

        Cases whose curve is in the result file are not made again.
        """
        do, stored = functools.partial, before().get("curves", {})
        tasks = [Task(f"cost_{file}", do(self.cost, file), f"cost_{file}.json") for file in COSTS
                 if not stored]  # fmt: skip
        judges = {data: str(image_bench.Bench(data).root / image_bench.done("judge_features"))
                  for data in JUDGED.values()}  # fmt: skip
        tasks += [Task(f"judge_{data}", do(image_bench.Bench(data).judge, "features"), there)
                  for data, there in judges.items()]  # fmt: skip
        base = image_bench.done("base")
        tasks += [Task("emoji", self.emoji, "emoji_made.json"), Task("base", self.base, base)]
        for case in CASES:
            if case.name in stored:
                continue
            train = do(self.train, case.name, case.file, self.config(case))
            trained = f"{case.name}/done.json"
            needs = {"emoji": "emoji_made.json", TUNED: base}.get(case.kind)
            judge = judges.get(JUDGED.get(case.kind, ""))
            tasks += [
                Task(case.name, train, trained, (needs,) if needs else ()),
                Task(f"curve_{case.name}", do(self.curve, case), f"curves/{case.name}.json",
                     (trained, judge) if judge else (trained,)),
            ]  # fmt: skip
        return tasks


def before() -> dict[str, Any]:
    path = RESULTS / "memorization.json"
    return json.loads(path.read_text()) if path.exists() else {}


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
        "kind": case.kind, "narrow": "narrow" in case.name, "flip": "flip" in case.name,
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
        **distances(rows, warned, copied), **turns(rows),
    }  # fmt: skip


def distances(rows: list[dict], warned: dict | None, copied: dict | None) -> dict[str, float]:
    """The FD of the reading before the warning, and the lowest one before the first copies.

    Each FD is the geometric mean over a reading and its neighbours.
    """
    if "frechet" not in rows[0]:
        return {}
    logs = np.log([row["frechet"] for row in rows])
    smooth = [float(np.exp(logs[max(i - 1, 0) : i + 2].mean())) for i in range(len(rows))]
    kept = rows.index(warned) - 1 if warned else len(rows) - 1
    before_copies = rows.index(copied) if copied else len(rows)
    return {"frechet_kept": smooth[kept], "frechet_best": min(smooth[:before_copies])}


def turns(rows: list[dict]) -> dict[str, int | None]:
    """The step where the ICR, by the rule of icr.py, has turned up."""
    if "icr" not in rows[0]:
        return {}
    readings = [(row["step"], row["icr"]) for row in rows]
    past = (readings[: i + 1] for i in range(len(readings)))
    return {"icr_warning": next((seen[-1][0] for seen in past if turned(seen)), None)}


def collect(bench: Bench) -> dict:
    """All complete curves, of this root and of the result file, and what they say."""
    old = before()
    there = [case.name for case in CASES if bench.there(f"curves/{case.name}")]
    curves = old.get("curves", {}) | {name: bench.read(f"curves/{name}") for name in there}
    made_by = old.get("made_by", {}) | {name: bench.made_by(f"curves/{name}") for name in there}
    costs = [{"config": f, **bench.read(f"cost_{f}")} for f in COSTS if bench.there(f"cost_{f}")]
    if costs:
        made_by |= {f"cost_{file}": bench.made_by(f"cost_{file}") for file in COSTS}
    rows = [{"name": case.name, **judged(case, curves[case.name])} for case in CASES
            if case.name in curves]  # fmt: skip
    return {"rows": rows, "costs": costs or old["costs"], "curves": curves, "scale": bench.scale,
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
