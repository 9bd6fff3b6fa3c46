"""ICR on Fashion-MNIST: against the noise level, and along training with few images.

  python benchmarks/icr.py                # --jobs tasks at a time, one core each

The noise levels are those of the base of benchmarks/guidance_free.py (--runs), whose judge measures
features. Every task makes a file under runs/icr_fashion_mnist, so that the same command continues
after an interruption. Complete parts go to benchmarks/results/icr_fashion_mnist.json and
docs/icr_fashion_mnist.png. Needs the package installed (pip install -e .).
"""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import figures
import jax
import numpy as np
from matplotlib.figure import Figure
from tasks import RESULTS, ROOT, TASKS, Files, Task, config_of, done, parsed, run

from mclr_jax import generate, images, runs
from mclr_jax.config import Training
from mclr_jax.data import pipeline
from mclr_jax.evaluation import evaluate, features, metrics
from mclr_jax.experiment import Experiment
from mclr_jax.files import read_lines, write_json
from mclr_jax.representation import blocks, perturb, sweep
from mclr_jax.training.step import make_update

STEPS = {256: 30000, 1024: 24000, 4096: 6000}  # by number of images
READINGS = 20  # along each run
SAMPLES, IMAGES = 1000, 4096  # of a reading: drawn, and read
EARLY = 0.01  # memorized fraction from which samples count as memorized
PATIENCE = 3  # number of last readings that must lie above the minimum of ICR
MARGIN = 0.02  # the distance above the minimum, as a share of it
INTERVAL, DISPATCHES = 1000, 20  # steps between readings, for their cost; dispatches timed


@dataclasses.dataclass(frozen=True)
class Bench(Files):
    """Where everything is, and how each part is made.

    Attributes:
      root: of the outputs.
      runs: of benchmarks/guidance_free.py.
    """

    root: pathlib.Path
    runs: pathlib.Path

    def sweep(self, name: str, workdir: pathlib.Path, every_layer: bool) -> None:
        """ICR and probe accuracy of a run against sigma."""
        found = runs.load(workdir)
        layers = list(blocks.sizes(found.model)) if every_layer else []
        self.write(f"sweeps/{name}", measured(found, found.weights()[0], layers=layers), workdir)

    def config(self, limit: int) -> Any:
        """Patches of 7 make a step half as dear as configs/fashion_mnist.py has it; the rate is
        constant, so that the length of a run shapes nothing."""
        every = STEPS[limit] // READINGS
        return config_of("fashion_mnist", {
            "data.limit": limit, "num_steps": STEPS[limit], "network.patch_size": 7,
            "network.depth": 6, "optimizer.learning_rate": 3e-3, "optimizer.schedule": "constant",
            "sample_every": 0, "icr.every_steps": every, "checkpoint_every": every,
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
        labels = np.resize(np.arange(model.null_label), SAMPLES)
        sampler = dataclasses.replace(found.sampler, method="dpmpp_2m")
        rows = []
        for step, value in past(workdir, training.num_steps):
            params, _ = found.weights(step=step)
            samples = images.clip(generate.generate(model, params, labels, sampler, batch_size=50))
            judged = metrics.moments(judge(samples, labels).features)
            share = evaluate.memorized(samples, train)
            (seen,) = measured(found, params, sigmas=[training.icr.sigma])
            distance = metrics.frechet_distance(judged, held_out)
            rows.append({**seen, "step": step, "icr_in_training": value, "memorized": share,
                         "frechet": distance})  # fmt: skip
        self.write(f"curves/{name_of(limit)}", rows, workdir)

    def cost(self) -> None:
        """Time of a reading as a share of the steps between two, at configs/fashion_mnist.py."""
        config = config_of("fashion_mnist", {"icr.every_steps": INTERVAL})
        experiment = Experiment(Training.parse(config), self.root)
        training, base = experiment.training, runs.load(self.runs / "base")
        read = sweep.Monitor(training.icr, experiment.model, training.sampler, experiment.source,
                             training.data.mirrored)  # fmt: skip
        found = cost_of(experiment, base.weights()[0], read, INTERVAL, DISPATCHES)
        self.write("cost", found, base.workdir)

    def tasks(self) -> list[Task]:
        """Training, curve and noise levels for each number of images; noise levels of the base."""
        do, tasks = functools.partial, []
        for limit, name in zip(STEPS, map(name_of, STEPS), strict=True):
            train = do(self.train, name, "fashion_mnist", self.config(limit))
            sweep, trained = do(self.sweep, name, self.root / name, False), done(name)
            tasks += [
                Task(name, train, trained),
                Task(f"curve_{name}", do(self.curve, limit), f"curves/{name}.json", (trained,)),
                Task(f"sweep_{name}", sweep, f"sweeps/{name}.json", (trained,)),
            ]
        sweep = do(self.sweep, "base", self.runs / "base", True)
        return [*tasks, Task("sweep_base", sweep, "sweeps/base.json"),
                Task("cost", self.cost, "cost.json")]  # fmt: skip


def measured(found: runs.Run, params: Any, **options: Any) -> list[dict]:
    """Rows of `sweep.sweep`, of the run's own data."""
    flips = perturb.Augmentation(flip=found.data.mirrored)
    sources = (found.source(split) for split in ("train", "test"))
    options |= {"augmentation": flips, "num_images": IMAGES}
    return sweep.sweep(found.model, params, *sources, **options)


def cost_of(experiment: Experiment, params: Any, read: Any, every: int, dispatches: int) -> dict:
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
    keys = ("icr", "probe_accuracy", "sigma")
    ratios, accuracies, sigmas = ([row[key] for row in rows] for key in keys)
    least, best = ratios.index(min(ratios)), accuracies.index(max(accuracies))
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
        step, least = min(readings, key=lambda reading: reading[1])
        numbers = {
            "step_of_minimum": step, "minimum": least, "last": readings[-1][1],
            "turned_up": turned(readings) is not None,
            "step_of_warning": readings[ends[0] - 1][0] if ends else None,
            "first_step_with_memorized_samples": copied[0] if copied else None,
            "memorized_at_the_end": rows[-1]["memorized"],
        }  # fmt: skip
        early = not copied or numbers["step_of_minimum"] <= copied[0]
        claim = f"ICR turns up with {words(name)}, no later than samples are memorized"
        found[claim] = {"held": numbers["turned_up"] and early, **numbers}
    return found


def collect(bench: Bench) -> dict:
    """All complete parts, and the claims that they support."""
    names = [*map(name_of, STEPS), "base"]
    sweeps, curves = ({name: bench.read(f"{kind}/{name}") for name in names
                       if bench.there(f"{kind}/{name}")}
                      for kind in ("sweeps", "curves"))  # fmt: skip
    claims: dict[str, dict] = {}
    if "base" in sweeps:
        claims |= noise_claims(middle(sweeps["base"]))
    if (few := name_of(min(STEPS))) in sweeps:
        ratios = [row["icr"] for row in middle(sweeps[few])]
        claim = f"after training on {words(few)} ICR rises from the lowest noise level on"
        claims[claim] = {"held": sorted(ratios) == ratios, "by_sigma": ratios}
    claims |= training_claims(curves)
    if has_cost := bench.there("cost"):
        cost = bench.read("cost")
        held = cost["share_of_training"] < 0.03
        claims["a reading takes under 3% of training time"] = {"held": held, **cost}
    there = [*(f"sweeps/{n}" for n in sweeps), *(f"curves/{n}" for n in curves)]
    places = {"base": bench.runs / "base", **{n: bench.root / n for n in curves}}
    configs = {n: dict(runs.load(p).config) for n, p in places.items() if (p / "run.json").exists()}
    made_by = {name: bench.made_by(name) for name in [*there, *["cost"] * has_cost]}
    return {"config": configs, "claims": claims, "sweeps": sweeps, "curves": curves,
            "made_by": made_by}  # fmt: skip


def middle(rows: list[dict]) -> list[dict]:
    """The rows of the middle one of the layers."""
    layers = [*sweep.by_layer(rows).values()]
    return layers[(len(layers) - 1) // 2]


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
        for layer, some in sweep.by_layer(rows).items():
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
    own = ROOT / "runs" / "icr_fashion_mnist"
    flags = parsed(__doc__, root=(own, "of the outputs"), **TASKS,
                   runs=(own.with_name("mclr_fashion_mnist"), "of guidance_free.py"))  # fmt: skip
    bench = Bench(flags.root, flags.runs)
    result = run(bench.root, bench.tasks(), flags) | collect(bench)
    write_json(RESULTS / "icr_fashion_mnist.json", result)
    figure(result, ROOT / "docs" / "icr_fashion_mnist.png")
    for claim, found in result["claims"].items():
        print("held    " if found["held"] else "NOT HELD", claim)


if __name__ == "__main__":
    main()
