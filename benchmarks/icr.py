"""ICR on Fashion-MNIST: against the noise level, and along training with few images.

  python benchmarks/icr.py                # --jobs tasks at a time, one core each

The noise levels are those of the base of benchmarks/guidance_free.py (--runs), whose judge measures
features. Every task makes a file under runs/icr_fashion_mnist, so that the same command continues
after an interruption. Complete parts go to benchmarks/results/icr_fashion_mnist.json and
docs/icr_fashion_mnist.png. Needs the package installed (pip install -e .).
"""

import argparse
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import figures
import jax
import numpy as np
from matplotlib.figure import Figure
from tasks import ROOT, Files, Task, add_flags, config_of, run

from mclr_jax import generate, images, runs
from mclr_jax.config import Training
from mclr_jax.data import pipeline
from mclr_jax.evaluation import evaluate, features, metrics
from mclr_jax.experiment import Experiment
from mclr_jax.files import read_lines, write_json
from mclr_jax.representation import blocks, monitor, perturb, sweep
from mclr_jax.training.step import make_update

STEPS = {256: 30000, 1024: 24000, 4096: 6000}  # by number of images
READINGS = 20  # along each run
SAMPLES = 1000  # at each reading
EARLY = 0.01  # memorized fraction from which samples count as memorized
PATIENCE = 3  # number of last readings that must lie above the minimum of ICR
MARGIN = 0.02  # the distance above the minimum, as a share of it
INTERVAL = 1000  # steps between readings, for their cost


@dataclasses.dataclass(frozen=True)
class Bench(Files):
    """Where everything is, and how each part is made.

    Attributes:
      root: of the outputs.
      runs: of benchmarks/guidance_free.py.
      scale: share of the steps, samples and images, to try things out.
    """

    root: pathlib.Path
    runs: pathlib.Path
    scale: float = 1.0

    def scaled(self, number: int, least: int = 1) -> int:
        return max(round(number * self.scale), least)

    def sweep(self, name: str, workdir: pathlib.Path, every_layer: bool) -> None:
        """ICR and probe accuracy of a run against sigma."""
        found = runs.load(workdir)
        layers = list(blocks.sizes(found.model)) if every_layer else []
        rows = self.measured(found, found.weights()[0], layers=layers)
        self.write(f"sweeps/{name}", rows, workdir)

    def measured(self, found: runs.Run, params: Any, **options: Any) -> list[dict]:
        """Rows of `sweep.sweep`, of the run's own data."""
        return sweep.sweep(
            found.model, params, found.source("train"), found.source("test"),
            augmentation=perturb.Augmentation(flip=found.data.mirrored),
            num_images=self.scaled(4096, 256), **options,
        )  # fmt: skip

    def config(self, limit: int) -> Any:
        """Patches of 7 make a step half as dear as configs/fashion_mnist.py has it; the rate is
        constant, so that the length of a run shapes nothing."""
        steps = self.scaled(STEPS[limit], READINGS)
        return config_of("fashion_mnist", {
            "data.limit": limit, "num_steps": steps, "network.patch_size": 7, "network.depth": 6,
            "optimizer.learning_rate": 3e-3, "optimizer.schedule": "constant", "sample_every": 0,
            "icr.every_steps": steps // READINGS, "checkpoint_every": steps // READINGS,
            "keep_checkpoints": 10 * READINGS,  # all
        })  # fmt: skip

    def curve(self, limit: int) -> None:
        """Beside each reading: copies among samples, their distance to held-out images, a probe."""
        workdir = self.root / name_of(limit)
        found = runs.load(workdir)
        model, train, test = found.model, found.source("train"), found.source("test")
        training = Training.parse(found.config)
        judge = features.load(f"classifier:{self.runs / 'judge_features'}")
        held_out = metrics.moments(judge(*test[np.arange(len(test))]).features)
        labels = np.resize(np.arange(model.null_label), self.scaled(SAMPLES, 20))
        sampler = dataclasses.replace(found.sampler, method="dpmpp_2m")
        rows = []
        for step, value in past(workdir, training.num_steps):
            params, _ = found.weights(step=step)
            samples = images.clip(generate.generate(model, params, labels, sampler, batch_size=50))
            judged = metrics.moments(judge(samples, labels).features)
            share = evaluate.memorized(samples, train)
            (seen,) = self.measured(found, params, sigmas=[training.icr.sigma])
            distance = metrics.frechet_distance(judged, held_out)
            rows.append({**seen, "step": step, "icr_in_training": value, "memorized": share,
                         "frechet": distance})  # fmt: skip
        self.write(f"curves/{name_of(limit)}", rows, workdir)

    def cost(self) -> None:
        """Time of a reading as a share of the steps between two, at configs/fashion_mnist.py."""
        config = config_of("fashion_mnist", {"icr.every_steps": INTERVAL})
        experiment = Experiment(Training.parse(config), self.root)
        training, base = experiment.training, runs.load(self.runs / "base")
        read = monitor.Monitor(training.icr, experiment.model, training.sampler, experiment.source,
                               training.data.mirrored)  # fmt: skip
        found = cost_of(experiment, base.weights()[0], read, INTERVAL, self.scaled(20, 1))
        self.write("cost", found, base.workdir)

    def tasks(self) -> list[Task]:
        """Training, curve and noise levels for each number of images; noise levels of the base."""
        do, tasks = functools.partial, []
        for limit in STEPS:
            name, trained = name_of(limit), (f"{name_of(limit)}/done.json",)
            tasks += [
                Task(name, do(self.train, name, "fashion_mnist", self.config(limit)), trained[0]),
                Task(f"curve_{name}", do(self.curve, limit), f"curves/{name}.json", trained),
                Task(f"sweep_{name}", do(self.sweep, name, self.root / name, False),
                     f"sweeps/{name}.json", trained),
            ]  # fmt: skip
        sweep = do(self.sweep, "base", self.runs / "base", True)
        return [*tasks, Task("sweep_base", sweep, "sweeps/base.json"),
                Task("cost", self.cost, "cost.json")]  # fmt: skip


def cost_of(
    experiment: Experiment, params: Any, read: Callable, every: int, dispatches: int
) -> dict[str, float]:
    """CPU time of read(step, params) as a share of that of `every` steps of a training."""
    training, task, devices = experiment.training, experiment.task, experiment.devices
    state, _ = experiment.first_state()
    update = devices.compile(make_update(task, devices.axis_name))
    stream = pipeline.stream(experiment.source, training.batch_size, training.seed)
    length = training.dispatch
    seconds: dict[str, list[float]] = {"steps": [], "reading": []}
    for _ in range(4):  # the first compiles
        start = time.process_time()
        for _ in range(dispatches):
            batches = devices.put_batches(pipeline.stack(stream, length, length))
            state, readings = update(state, {}, batches, devices.put_state(np.int32(length)))
        jax.block_until_ready(readings)
        seconds["steps"].append(time.process_time() - start)
        start = time.process_time()
        read(0, params)
        seconds["reading"].append(time.process_time() - start)
    per_step = min(seconds["steps"][1:]) / (dispatches * length)
    reading = min(seconds["reading"][1:])
    return {"every_steps": every, "seconds_of_a_reading": reading, "seconds_of_a_step": per_step,
            "share_of_training": reading / (every * per_step)}  # fmt: skip


def turned(readings: Sequence[tuple[int, float]]) -> int | None:
    """The step of the lowest of the readings (step, ICR) if the curve has turned up, else None.

    It has turned up if each of the last PATIENCE readings is above (1 + MARGIN) * minimum.
    """
    step, least = min(readings, key=lambda reading: reading[1], default=(0, 0.0))
    last = [value for at, value in readings if at > step][-PATIENCE:]
    risen = len(last) == PATIENCE and min(last) > (1 + MARGIN) * least
    return step if risen else None


def past(workdir: pathlib.Path, step: int) -> list[tuple[int, float]]:
    """The readings (step, ICR) of a run up to a step, from its metrics.jsonl."""
    records = [r for r in read_lines(workdir / "metrics.jsonl") if r["step"] <= step]
    return [(r["step"], r["icr"]) for r in records if isinstance(r.get("icr"), float)]


def name_of(limit: int) -> str:
    return f"images_{limit}"


def words(name: str) -> str:
    """images_256 -> 256 images."""
    return f"{name.removeprefix('images_')} images"


def noise_claims(rows: list[dict]) -> dict:
    """The paper's claims about noise levels, for the rows of one layer."""
    ratios, accuracies = ([row[key] for row in rows] for key in ("icr", "probe_accuracy"))
    least, best = ratios.index(min(ratios)), accuracies.index(max(accuracies))
    sigmas = [row["sigma"] for row in rows]
    return {
        "ICR is lowest at an intermediate noise level": {
            "held": 0 < least < len(rows) - 1,
            "sigma_of_minimum": sigmas[least], "minimum": ratios[least],
            "at_lowest_sigma": ratios[0], "at_highest_sigma": ratios[-1],
        },
        "probe accuracy peaks within one level of that minimum": {
            "held": abs(least - best) <= 1,
            "sigma_of_peak": sigmas[best], "peak": accuracies[best],
            "accuracy_at_minimum_of_icr": accuracies[least],
        },
    }  # fmt: skip


def training_claims(curves: dict[str, list[dict]]) -> dict:
    """The paper's claims about training with few images."""
    found = {}
    for name, rows in curves.items():
        readings = [(row["step"], row["icr_in_training"]) for row in rows]
        ends = [i for i in range(1, len(rows) + 1) if turned(readings[:i]) is not None]
        copied = [row["step"] for row in rows if row["memorized"] >= EARLY]
        numbers = {
            "step_of_minimum": min(readings, key=lambda r: r[1])[0],
            "minimum": min(value for _, value in readings),
            "last": readings[-1][1],
            "turned_up": turned(readings) is not None,
            "step_of_warning": readings[ends[0] - 1][0] if ends else None,
            "first_step_with_memorized_samples": copied[0] if copied else None,
            "memorized_at_the_end": rows[-1]["memorized"],
            "step_of_best_frechet": min(rows, key=lambda row: row["frechet"])["step"],
            "best_frechet": min(row["frechet"] for row in rows),
            "last_frechet": rows[-1]["frechet"],
        }
        early = not copied or numbers["step_of_minimum"] <= copied[0]
        claim = f"ICR turns up with {words(name)}, no later than samples are memorized"
        found[claim] = {"held": numbers["turned_up"] and early, **numbers}
    return found


def collect(bench: Bench) -> dict:
    """All complete parts, and the claims that they support."""
    names = [*map(name_of, STEPS), "base"]
    there = [f"{kind}/{name}" for kind in ("sweeps", "curves") for name in names]
    there = [name for name in [*there, "cost"] if bench.there(name)]
    found = {name: bench.read(name) for name in there}
    sweeps, curves = ({name: found[f"{kind}/{name}"] for name in names if f"{kind}/{name}" in found}
                      for kind in ("sweeps", "curves"))  # fmt: skip
    claims: dict[str, dict] = {}
    middle: dict[str, list] = {}
    for name, rows in sweeps.items():
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        layer = layers[(len(layers) - 1) // 2]
        middle[name] = [row for row in rows if row["layer"] == layer]
    if "base" in middle:
        claims |= noise_claims(middle["base"])
    few = name_of(min(STEPS))
    if few in middle:
        ratios = [row["icr"] for row in middle[few]]
        claims[f"after training on {words(few)} ICR rises from the lowest noise level on"] = {
            "held": sorted(ratios) == ratios, "by_sigma": ratios,
        }  # fmt: skip
    claims |= training_claims(curves)
    if cost := found.get("cost"):
        held = cost["share_of_training"] < 0.03
        claims["a reading takes under 3% of training time"] = {"held": held, **cost}
    places = {"base": bench.runs / "base", **{n: bench.root / n for n in curves}}
    configs = {n: dict(runs.load(p).config) for n, p in places.items() if (p / "run.json").exists()}
    return {"config": configs, "scale": bench.scale, "claims": claims, "sweeps": sweeps,
            "curves": curves, "made_by": {name: bench.made_by(name) for name in there}}  # fmt: skip


def figure(result: dict, path: pathlib.Path) -> None:
    """Noise levels above, training below."""
    drawing = Figure(figsize=(14, 8), layout="constrained")
    panels = drawing.subplots(2, 3)

    def draw(panel, title, rows, x, y, label):
        panel.plot([r[x] for r in rows], [r[y] for r in rows], "o-", markersize=3, label=label)
        panel.set(
            title=title, xlabel=x, xscale="log" if x == "sigma" else "linear",
            ylabel={"icr": "ICR", "icr_in_training": "ICR"}.get(y, y.replace("_", " ")),
        )  # fmt: skip
        panel.legend(fontsize=7)

    for name, rows in result["sweeps"].items():
        for layer in dict.fromkeys(row["layer"] for row in rows):
            some = [row for row in rows if row["layer"] == layer]
            if name == "base":
                draw(panels[0, 0], "base, by block", some, "sigma", "icr", layer)
                draw(panels[0, 1], "base, by block", some, "sigma", "probe_accuracy", layer)
            else:
                draw(panels[0, 2], "at the end of training", some, "sigma", "icr", words(name))
    titles = {"icr_in_training": "along training", "memorized": "share of samples that copy",
              "frechet": "distance to held-out images"}  # fmt: skip
    for name, rows in result["curves"].items():
        for panel, (key, title) in zip(panels[1], titles.items(), strict=False):
            draw(panel, title, rows, "step", key, words(name))
    panels[1, 2].set_yscale("log")
    figures.save(drawing, path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=ROOT / "runs" / "icr_fashion_mnist")
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "mclr_fashion_mnist")
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps, to try it out")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT, help="has benchmarks/results")
    add_flags(parser)
    arguments = parser.parse_args()
    bench = Bench(arguments.root, arguments.runs, arguments.scale)
    result = run(bench.root, bench.tasks(), arguments) | collect(bench)
    write_json(arguments.out / "benchmarks" / "results" / "icr_fashion_mnist.json", result)
    figure(result, arguments.out / "docs" / "icr_fashion_mnist.png")
    for claim, found in result["claims"].items():
        print("held    " if found["held"] else "NOT HELD", claim)


if __name__ == "__main__":
    main()
