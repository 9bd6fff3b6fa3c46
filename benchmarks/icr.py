"""ICR on Fashion-MNIST: against the noise level, along training with few and many images, and
after fine-tuning.

  python benchmarks/icr.py                # all parts, --jobs tasks at a time, one core each
  python benchmarks/icr.py --parts=b      # data-rich against data-limited training alone

Parts a and c read the runs of benchmarks/guidance_free.py (--runs), b its judge of features. Every
task makes a file under runs/icr_fashion_mnist, so that the same command continues after an
interruption. The complete parts go to benchmarks/results/icr_fashion_mnist.json and
docs/icr_fashion_mnist.png. Needs the package installed (pip install -e .).
"""

import argparse
import dataclasses
import functools
import pathlib
import time

import figures
import guidance_free
import jax
import numpy as np
from matplotlib.figure import Figure
from tasks import ROOT, Files, Task, add_flags, config_of, run

from mclr_jax import generate, images, runs
from mclr_jax.config import Training
from mclr_jax.data import pipeline
from mclr_jax.evaluation import evaluate, features, metrics
from mclr_jax.experiment import Experiment
from mclr_jax.files import write_json
from mclr_jax.representation import blocks, monitor, perturb, sweep
from mclr_jax.training.step import make_update

STEPS = {256: 30000, 1024: 24000, 4096: 6000, 0: 8000}  # by number of images; 0 is all
READINGS = 20  # along each run
SAMPLES = 1000  # at each reading
EARLY = 0.01  # memorized fraction from which samples count as memorized
INTERVAL = 1000  # steps between readings, for their cost
# Fine-tuned runs of guidance_free.py, of the first seed, by the words of their method. An input of
# strength is 0 here, as for a sample without guidance.
TUNED = {
    f"{guidance_free.place_of(method)}_0": words
    for method, words in {
        "dsm": "DSM control",
        "mclr": "MCLR",
        "mclr null, beta 1": "null",
        "gft": "GFT",
        "cca": "CCA",
        "ddo": "DDO",
        "dpo": "DPO",
        "contrastive_flow": "contrastive flow",
        "model_guidance": "model guidance",
    }.items()
}


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

    # ---- a and c: noise levels ----------------------------------------------------------------

    def sweep(self, name: str, workdir: pathlib.Path, every_layer: bool) -> None:
        """ICR and probe accuracy of a run against sigma."""
        found = runs.load(workdir)
        layers = list(blocks.sizes(found.model)) if every_layer else []
        rows = self.measured(found, found.weights()[0], layers=layers)
        self.write(f"sweeps/{name}", rows, workdir)

    def measured(self, found: runs.Run, params, **options) -> list[dict]:
        """Rows of `sweep.sweep`, of the run's own data."""
        data, count = found.training.data, self.scaled(4096, 256)
        return sweep.sweep(
            found.model, params, found.source("train"), found.source("test"),
            augmentation=perturb.Augmentation(flip=bool(data.flip or data.augment)),
            num_images=count, **options,
        )  # fmt: skip

    # ---- b: few images and many ---------------------------------------------------------------

    def config(self, limit: int):
        """Patches of 7 make a step half as dear as configs/fashion_mnist.py has it; the rate is
        constant, so that the length of a run shapes nothing."""
        config = config_of("fashion_mnist")
        config.data.limit = limit
        config.num_steps = self.scaled(STEPS[limit], READINGS)
        config.network.patch_size = 7
        config.network.depth = 6
        config.optimizer.learning_rate = 3e-3
        config.optimizer.schedule = "constant"
        config.sample_every = 0
        config.icr.every_steps = config.checkpoint_every = config.num_steps // READINGS
        config.keep_checkpoints = 10 * READINGS  # all
        return config

    def train_on(self, limit: int) -> None:
        self.train(name_of(limit), "fashion_mnist", self.config(limit))

    def curve(self, limit: int) -> None:
        """Beside each reading: copies among samples, their distance to held-out images, a probe."""
        workdir = self.root / name_of(limit)
        found = runs.load(workdir)
        model, train, test = found.model, found.source("train"), found.source("test")
        judge = features.load(f"classifier:{self.runs / 'judge_features'}")
        held_out = metrics.moments(judge(*test[np.arange(len(test))]).features)
        labels = np.resize(np.arange(model.null_label), self.scaled(SAMPLES, 20))
        sampler = dataclasses.replace(found.sampler, method="dpmpp_2m")
        rows = []
        for step, value in monitor.past(workdir, found.training.num_steps):
            params, _ = found.weights(step=step)
            samples = images.clip(generate.generate(model, params, labels, sampler, batch_size=50))
            judged = metrics.moments(judge(samples, labels).features)
            share = evaluate.memorized(samples, train)
            (seen,) = self.measured(found, params, sigmas=[found.training.icr.sigma])
            rows.append(
                seen
                | {"step": step, "icr_in_training": value, "memorized": share}
                | {"frechet": metrics.frechet_distance(judged, held_out)}
            )
        self.write(f"curves/{name_of(limit)}", rows, workdir)

    def cost(self) -> None:
        """Time of a reading as a share of the steps between two, at configs/fashion_mnist.py."""
        config = config_of("fashion_mnist")
        config.icr.every_steps = INTERVAL
        experiment, base = (
            Experiment(Training.parse(config), self.root),
            runs.load(self.runs / "base"),
        )
        training, task, devices = experiment.training, experiment.task, experiment.devices
        (params, _), (state, _) = base.weights(), experiment.first_state()
        update = devices.compile(make_update(task, devices.axis_name))
        stream = pipeline.stream(experiment.source, training.batch_size, training.seed)
        flip = bool(training.data.flip or training.data.augment)
        read = monitor.Monitor(training.icr, task.model, training.sampler, experiment.source, flip,
                               self.root, 0)  # fmt: skip
        dispatches, length = self.scaled(20, 1), training.dispatch
        seconds: dict[str, list[float]] = {"steps": [], "reading": []}
        for _ in range(4):  # the first compiles
            start = time.perf_counter()
            for _ in range(dispatches):
                batches = devices.put_batches(pipeline.stack(stream, length, length))
                state, readings = update(state, {}, batches, devices.put_state(np.int32(length)))
            jax.block_until_ready(readings)
            seconds["steps"].append(time.perf_counter() - start)
            start = time.perf_counter()
            read(0, params)
            seconds["reading"].append(time.perf_counter() - start)
        per_step = min(seconds["steps"][1:]) / (dispatches * length)
        reading = min(seconds["reading"][1:])
        self.write("cost", {"every_steps": INTERVAL, "seconds_of_a_reading": reading,
                            "seconds_of_a_step": per_step,
                            "share_of_training": reading / (INTERVAL * per_step)},
                   base.workdir)  # fmt: skip

    # ---- the parts together -------------------------------------------------------------------

    def tasks(self, parts: str) -> list[Task]:
        tasks = []

        def add(name, function, *arguments, output="", needs=()):
            part = functools.partial(function, *arguments)
            tasks.append(Task(name, part, output or f"{name}.json", needs))

        if "b" in parts:
            for limit in STEPS:
                name = name_of(limit)
                add(name, self.train_on, limit, output=f"{name}/done.json")
            for limit in STEPS:
                name = name_of(limit)
                trained = (f"{name}/done.json",)
                add(f"curve_{name}", self.curve, limit, output=f"curves/{name}.json", needs=trained)
                add(f"sweep_{name}", self.sweep, name, self.root / name, False,
                    output=f"sweeps/{name}.json", needs=trained)  # fmt: skip
        names = ["base"] * ("a" in parts) + list(TUNED) * ("c" in parts)
        for name in names:
            add(f"sweep_{name}", self.sweep, name, self.runs / name, name == "base",
                output=f"sweeps/{name}.json")  # fmt: skip
        if "a" in parts:
            add("cost", self.cost)
        return tasks


def name_of(limit: int) -> str:
    return f"images_{limit or 'all'}"


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
    """The paper's claims about training with few and many images."""
    found = {}
    for name, rows in curves.items():
        readings = [(row["step"], row["icr_in_training"]) for row in rows]
        ends = [i for i in range(1, len(rows) + 1) if monitor.turned(readings[:i]) is not None]
        copied = [row["step"] for row in rows if row["memorized"] >= EARLY]
        numbers = {
            "step_of_minimum": min(readings, key=lambda r: r[1])[0],
            "minimum": min(value for _, value in readings),
            "last": readings[-1][1],
            "turned_up": monitor.turned(readings) is not None,
            "step_of_warning": readings[ends[0] - 1][0] if ends else None,
            "first_step_with_memorized_samples": copied[0] if copied else None,
            "memorized_at_the_end": rows[-1]["memorized"],
            "step_of_best_frechet": min(rows, key=lambda row: row["frechet"])["step"],
            "best_frechet": min(row["frechet"] for row in rows),
            "last_frechet": rows[-1]["frechet"],
        }
        if name == name_of(0):
            claim, held = "ICR does not turn up with all images", not ends
        else:
            claim = f"ICR turns up with {words(name)}, no later than samples are memorized"
            early = not copied or numbers["step_of_minimum"] <= copied[0]
            held = numbers["turned_up"] and early
        found[claim] = {"held": held, **numbers}
    return found


def collect(bench: Bench) -> dict:
    """All complete parts, and the claims that they support."""

    def there(name: str) -> bool:
        return (bench.root / f"{name}.json").exists()

    made_by: dict[str, dict] = {}

    def found(folder: str) -> dict:
        names = [n for n in [*map(name_of, STEPS), "base", *TUNED] if there(f"{folder}/{n}")]
        made_by.update({f"{folder}/{name}": bench.made_by(f"{folder}/{name}") for name in names})
        return {name: bench.read(f"{folder}/{name}") for name in names}

    sweeps, curves = found("sweeps"), found("curves")
    claims: dict[str, dict] = {}
    middle: dict[str, list] = {}
    for name, rows in sweeps.items():
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        layer = layers[(len(layers) - 1) // 2]
        middle[name] = [row for row in rows if row["layer"] == layer]
    if "base" in middle:
        claims |= noise_claims(middle["base"])
    few = name_of(min(filter(None, STEPS)))
    if few in middle:
        ratios = [row["icr"] for row in middle[few]]
        claims[f"after training on {words(few)} ICR rises from the lowest noise level on"] = {
            "held": sorted(ratios) == ratios, "by_sigma": ratios,
        }  # fmt: skip
    claims |= training_claims(curves)
    tuned = {
        TUNED.get(name, name): {
            "icr_minimum": min(row["icr"] for row in rows),
            "sigma_of_minimum": min(rows, key=lambda row: row["icr"])["sigma"],
            "probe_accuracy_peak": max(row["probe_accuracy"] for row in rows),
        }
        for name, rows in middle.items()
        if not name.startswith("images_")
    }
    if there("cost"):
        cost, made_by["cost"] = bench.read("cost"), bench.made_by("cost")
        claims["a reading takes under 3% of training time"] = {
            "held": cost["share_of_training"] < 0.03, **cost
        }  # fmt: skip
    configs = {"base": bench.runs / "base", **{n: bench.root / n for n in curves}}
    return {
        "config": {
            name: dict(runs.load(path).config)
            for name, path in configs.items()
            if (path / "run.json").exists()
        },
        "scale": bench.scale,
        "claims": claims,
        "fine_tuning": tuned,
        "sweeps": sweeps,
        "curves": curves,
        "made_by": made_by,
    }


def figure(result: dict, path: pathlib.Path) -> None:
    """Noise levels above, training below."""
    drawing = Figure(figsize=(18, 8), layout="constrained")
    panels = drawing.subplots(2, 4)

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
            elif name in TUNED:
                title, label = "fine-tuned, middle block", TUNED[name]
                draw(panels[0, 2], title, some, "sigma", "icr", label)
                draw(panels[0, 3], title, some, "sigma", "probe_accuracy", label)
            else:
                draw(panels[1, 3], "at the end of training", some, "sigma", "icr", words(name))
    titles = {
        "icr_in_training": "along training",
        "memorized": "share of samples that copy",
        "frechet": "distance to held-out images",
    }
    for name, rows in result["curves"].items():
        for panel, (key, title) in zip(panels[1], titles.items(), strict=False):
            draw(panel, title, rows, "step", key, words(name))
    panels[1, 2].set_yscale("log")
    figures.save(drawing, path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="abc", help="any of a, b and c")
    parser.add_argument("--root", type=pathlib.Path, default=ROOT / "runs" / "icr_fashion_mnist")
    parser.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "mclr_fashion_mnist")
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps, to try it out")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT, help="has benchmarks/results")
    add_flags(parser)
    arguments = parser.parse_args()
    bench = Bench(arguments.root, arguments.runs, arguments.scale)
    result = run(bench.root, bench.tasks(arguments.parts), arguments) | collect(bench)
    write_json(arguments.out / "benchmarks" / "results" / "icr_fashion_mnist.json", result)
    figure(result, arguments.out / "docs" / "icr_fashion_mnist.png")
    for claim, found in result["claims"].items():
        print("held    " if found["held"] else "NOT HELD", claim)


if __name__ == "__main__":
    main()
