"""MCLR, its rivals and plain fine-tuning from a base to a few images of classes it never saw.

  python benchmarks/transfer.py --per_class=64

The base knows seven classes of Fashion-MNIST at 16x16; it is fine-tuned to few images of the three
others. Every method has the same steps, noise levels, batches and learning rate; strengths are
chosen by the validation seed. Judges are trained on images that no fine-tuning sees; the second
has ImageNet features. Writes benchmarks/results/transfer.json and docs/transfer_N.png; --collect
writes the rows that are there, without making others.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import figures
import jax
import numpy as np
from image_bench import JUDGED_BY, REFERENCE, SECOND, Bench, once
from matplotlib.figure import Figure
from PIL import Image
from tasks import RESULTS, ROOT, SEEDS, Task, config_of, done, parsed, run

from mclr_jax import generate, images, inherit
from mclr_jax.data import sources
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source
from mclr_jax.experiment import Experiment
from mclr_jax.files import save_arrays, write_json

TARGET = (4, 7, 8)  # coat, sneaker, bag
POOL = 1500  # images of each target class that subsets are drawn from; judges see the others
VALIDATION, COUNT = 100, 2000
MATCHED, NEAR = 0.93, 0.01  # methods are compared at about this accuracy, too
INTERVAL = (0.0, 3.0)  # of noise levels that are guided
BASE_STEPS, SIZE = 8000, 16
STEPS = (400, 800, 1200, 1600, 2400, 3200)  # at which plain fine-tuning is judged
TUNING = {
    "batch_size": 32, "noise.mean": -0.2, "noise.std": 1.5, "optimizer.learning_rate": 2e-3,
    "optimizer.warmup_steps": 50, "optimizer.schedule": "constant", "ema.halflife_steps": 60.0,
    "log_every": 100, "checkpoint_every": 0, "eval_examples": 0, "steps_per_dispatch": 10,
}  # fmt: skip
PLAIN = {"objective.name": "dsm"}
NULL = {"objective.name": "mclr_null", "objective.teacher": "average"}
SOURCE = NULL | {"objective.wrong": "source"}
WITHIN = {"objective.sigma_interval": INTERVAL}
ADAPTER, RATE = {"adapter.rank": 4}, "optimizer.learning_rate"


@dataclasses.dataclass(frozen=True)
class Method:
    """A row: what is trained, how it is sampled, and the strengths that are tried."""

    changes: Mapping[str, Any]  # of the fine-tuning
    strengths: tuple[float, ...] = (0.0,)
    key: str = ""  # the key of the config that has the strength; "": it is that of sampling
    interval: tuple[float, float] | None = None  # of noise levels guided in sampling
    domain: bool = False  # guidance by the source's null answer
    searched: bool = False  # beside the comparison: by the validation seed alone


METHODS = {
    "plain": Method(PLAIN),
    "CFG": Method(PLAIN, (0.1, 0.25, 0.5, 1.0)),
    "CFG in an interval": Method(PLAIN, (0.25, 0.5, 1.0, 2.0), interval=INTERVAL),
    "DoG": Method(PLAIN, (0.05, 0.1, 0.2, 0.4), domain=True),
    "DoG in an interval": Method(PLAIN, (0.05, 0.1, 0.2), interval=INTERVAL, domain=True),
    "model_guidance": Method({"objective.name": "model_guidance"}, (0.1, 0.25, 0.4),
                             "objective.scale"),
    "mclr null": Method(NULL | WITHIN, (0.25, 0.5, 1.0), "objective.beta"),
    "DogFit": Method(SOURCE, (0.05, 0.1, 0.2), "objective.beta"),
    "mclr source": Method(SOURCE | WITHIN, (0.05, 0.1, 0.2), "objective.beta"),
    "plain, adapter": Method(PLAIN | ADAPTER, (2e-3, 4e-3, 8e-3), RATE),
    "mclr source, adapter": Method(SOURCE | WITHIN | ADAPTER | {"objective.beta": 0.1},
                                   (2e-3, 4e-3, 8e-3), RATE),
    "plain, other rates": Method(PLAIN, (1e-3, 4e-3), RATE, searched=True),
    "mclr source, other rates": Method(SOURCE | WITHIN | {"objective.beta": 0.1}, (1e-3, 4e-3),
                                       RATE, searched=True),
}  # fmt: skip

# The curves of the figure, which all begin at plain fine-tuning: words, colour.
SHOWN = {
    "CFG": ("CFG, 2 calls", "#E69F00"),
    "CFG in an interval": ("CFG up to sigma 3", "#D55E00"),
    "DoG": ("DoG, 2 calls", "#56B4E9"),
    "DoG in an interval": ("DoG up to sigma 3", "#999933"),
    "model_guidance": ("model guidance", "black"),
    "mclr null": ("own null answer", "#009E73"),
    "DogFit": ("DogFit", "#0072B2"),
    "mclr source": ("source, up to sigma 3", "#CC79A7"),
}


@dataclasses.dataclass(frozen=True)
class Transfer(Bench):
    """The Bench of one base, and of subsets of so many images a class."""

    data: str = "fashion_mnist"
    per_class: int = 64
    steps: int = 2400

    root = ROOT / "runs" / "transfer"  # type: ignore[assignment]

    def sets(self) -> None:
        """base.npz: seven classes; pool.npz, judge.npz, test.npz. Labels are those of all ten."""
        pixels, labels = sources.load("fashion_mnist", "train")[np.arange(60_000)]
        held, label = sources.load("fashion_mnist", "test")[np.arange(10_000)]
        pixels, held = map(smaller, (pixels, held))
        pool = np.concatenate([np.flatnonzero(labels == c)[:POOL] for c in TARGET])
        rows = {"base": ~np.isin(labels, TARGET), "pool": pool,
                "judge": np.delete(np.arange(len(labels)), pool)}  # fmt: skip
        for name, some in rows.items():
            save_arrays(self.root / f"{name}.npz", images=pixels[some], labels=labels[some])
        ours = np.isin(label, TARGET)
        save_arrays(self.root / "test.npz", images=held[ours], labels=label[ours])
        self.write("sets_made", {"target": TARGET, "pool": POOL})

    def subset(self, seed: int) -> str:
        """The source of a subset of the pool, drawn by the seed, with labels 0, 1, 2 of TARGET."""
        path = self.root / f"subset_{self.per_class}_{seed}.npz"
        if not path.exists():
            with np.load(self.root / "pool.npz") as file:
                pixels, labels = file["images"], file["labels"]
            draw = np.random.default_rng(seed)
            rows = [draw.permutation(np.flatnonzero(labels == c))[: self.per_class] for c in TARGET]
            rows = np.concatenate(rows)
            save_arrays(path, images=pixels[rows], labels=np.searchsorted(TARGET, labels[rows]))
        return f"npz:{path}"

    def train_base(self, seed: int = 0) -> None:
        config = self.config(changes={
            "data.name": f"npz:{self.root / 'base.npz'}", "data.num_classes": 10,
            "num_steps": BASE_STEPS, "sample_every": 0, "eval_examples": 0})  # fmt: skip
        self.train("base", self.configs, config)

    def config(self, name: str = "", changes: Mapping[str, Any] = {}) -> Any:
        own = {"data.name": f"npz:{self.root / 'judge.npz'}", "data.num_classes": 10,
               "eval_examples": 0} if name == "_classifier" else {}  # fmt: skip
        return config_of(f"fashion_mnist{name}", own | dict(changes))

    @property
    def plain(self) -> str:
        """The work directory and the file of plain fine-tuning at STEPS."""
        return f"plain_steps_{self.per_class}"

    @property
    def shown(self) -> str:
        """The set of the images of a fine-tuning."""
        return f"real_subset_{self.per_class}"

    def name_of(self, method: str, strength: float, seed: int) -> str:
        """The work directory of a method; strengths of sampling share one."""
        trained = next(k for k, m in METHODS.items() if m.changes == METHODS[method].changes)
        at = f"_{strength:g}" if METHODS[method].key else ""
        return f"{trained.replace(' ', '_')}{at}_{self.per_class}_{self.steps}_{seed}"

    def fine_tuning(self, seed: int, changes: Mapping[str, Any]) -> Any:
        given = {"init_from": str(self.root / "base"), "data.name": self.subset(seed),
                 "num_steps": self.steps, "seed": seed + 1}  # fmt: skip
        return config_of("finetune", given | TUNING | dict(changes))

    def tune_method(self, method: str, strength: float, seed: int) -> None:
        found, name = METHODS[method], self.name_of(method, strength, seed)
        changes = found.changes | ({found.key: strength} if found.key else {})
        self.train(name, "finetune", self.fine_tuning(seed, changes))

    def plain_steps(self) -> None:
        """Plain fine-tuning of the validation seed at STEPS, judged by samples of seed 0."""
        name, rows = self.plain, []
        kept = {"num_steps": max(STEPS), "checkpoint_every": STEPS[0], "keep_checkpoints": 100}
        self.train(name, "finetune", self.fine_tuning(VALIDATION, PLAIN | kept))
        for step in STEPS:
            found, samples, labels, _ = self.drawn(name, COUNT, seed=0, step=step)
            row = {"method": "plain", "strength": 0.0, "seed": VALIDATION, "training_steps": step,
                   "per_class": self.per_class}  # fmt: skip
            self.store_drawn(f"{name}_{step}", samples, labels, row, found.workdir)
            rows.append(self.row(f"{name}_{step}"))
        self.write(name, rows)

    def store_drawn(self, name: str, samples: Any, labels: Any, *more: Any) -> None:
        """Samples of a fine-tuning, whose labels are places in TARGET, judged."""
        self.store(name, images.as_8_bits(samples), np.array(TARGET)[labels], *more)

    def draw(self, method: str, strength: float, seed: int) -> None:
        """Samples of a method, judged."""
        found = METHODS[method]
        weak = self.weak("base") if found.domain else None
        scale = 1.0 if found.key else 1 + strength
        guided = generate.Guidance(scale, interval=found.interval, weak=weak, domain=found.domain)
        place = self.name_of(method, strength, seed)
        own, samples, labels, calls = self.drawn(place, COUNT, seed, guided)
        row = {"method": method, "strength": strength, "seed": seed, "per_class": self.per_class}
        if "adapter.rank" in found.changes:
            config = self.fine_tuning(seed, found.changes)
            task = Experiment(inherit.training(config), self.root).task
            weights = jax.tree.leaves(task.shapes)
            row["trained_parameters"] = sum(leaf.size for leaf in weights)
        name = self.set_of(method, strength, seed)
        self.store_drawn(name, samples, labels, row | calls, own.workdir)

    def copied(self, row: Mapping[str, Any]) -> Source | None:
        """The images of the fine-tuning; real ones come from none."""
        return sources.load(self.subset(row["seed"]), "train") if "seed" in row else None

    def set_of(self, method: str, strength: float, seed: int) -> str:
        place = method.replace(" ", "_")
        return f"{place}_at_{strength:g}_{self.per_class}_{self.steps}_{seed}"

    def real(self, split: str) -> None:
        """The reference, images of the judges' set; the floor, test images; a subset itself."""
        path = {"train": self.root / "judge.npz", "test": self.root / "test.npz"}.get(split)
        source = sources.load(f"npz:{path}" if path else self.subset(VALIDATION), "train")
        classes = np.asarray(source.labels) if path else np.array(TARGET)[source.labels]
        rows = np.flatnonzero(np.isin(classes, TARGET))
        rows = rows if split == "train" else rows[:: max(len(rows) // COUNT, 1)]
        name = f"real_{split}" if path else self.shown
        self.store(name, np.asarray(to_float(source[rows][0])), classes[rows], {})

    def chosen(self, method: str) -> list[float]:
        """Strengths for all seeds, by the validation seed: the lowest FD, and about MATCHED."""
        sets = {s: self.set_of(method, s, VALIDATION) for s in METHODS[method].strengths}
        if METHODS[method].searched or not all(self.there(f"sets/{x}") for x in sets.values()):
            return []
        found = {s: self.read(f"sets/{name}") for s, name in sets.items()}
        off = {s: abs(row["accuracy"] - MATCHED) for s, row in found.items()}
        best, matched = min(found, key=lambda s: found[s]["frechet"]), min(off, key=off.get)
        return [*dict.fromkeys([matched, best] if off[matched] < NEAR else [best])]

    def tasks(self, seeds: tuple[int, ...], stage: int) -> list[Task]:
        """Stage 0 has all strengths for the validation seed, 1 also those chosen for all seeds."""
        do, sets = functools.partial, ("sets_made.json",)
        tasks = [
            Task("sets_made", self.sets, *sets),
            Task("base", self.train_base, done("base"), sets),
            *self.judging(*sets),
            Task(self.plain, self.plain_steps, f"{self.plain}.json", (done("base"), REFERENCE)),
            Task(self.shown, do(self.real, "subset"), f"sets/{self.shown}.json", (REFERENCE,)),
        ]
        tried = [(m, s, VALIDATION) for m, found in METHODS.items() for s in found.strengths]
        chosen = [(m, s, seed) for seed, m in itertools.product(seeds if stage else (), METHODS)
                  for s in self.chosen(m)]  # fmt: skip
        for method, strength, seed in tried + chosen:
            place, name = self.name_of(method, strength, seed), self.set_of(method, strength, seed)
            if self.there(f"sets/{name}"):  # its weights are needed no more
                continue
            tune, draw = (do(f, method, strength, seed) for f in (self.tune_method, self.draw))
            tasks += [
                Task(place, tune, done(place), (done("base"),)),
                Task(f"set_{name}", draw, f"sets/{name}.json", (done(place), REFERENCE)),
            ]
        names = ["real_train", "real_test", self.shown, *(self.set_of(*row) for row in chosen)]
        return once(tasks) + self.second_tasks(f"sets/{name}.json" for name in names if stage)


def smaller(pixels: np.ndarray) -> np.ndarray:
    """Grey images (n, h, w, 1) uint8, resized to SIZE by the mean of what a pixel covers."""
    found = [Image.fromarray(x).resize((SIZE, SIZE), Image.Resampling.BOX) for x in pixels[..., 0]]
    return np.stack([np.asarray(x) for x in found])[..., None]


def collect(bench: Transfer, seeds: tuple[int, ...]) -> dict[str, Any]:
    """The rows that are there."""
    real = {name: {"method": name} for name in ("real_test", bench.shown)}
    sets = [
        bench.set_of(method, strength, seed)
        for method, found in METHODS.items()
        for strength, seed in itertools.product(found.strengths, (VALIDATION, *seeds))
    ]
    rows = [bench.row(name) | real.get(name, {}) for name in [*real, *sets]
            if bench.there(f"sets/{name}")]  # fmt: skip
    steps = {"plain_by_steps": bench.read(bench.plain)} if bench.there(bench.plain) else {}
    return {"target": TARGET, "steps": bench.steps, **steps, "interval": INTERVAL, "seeds": seeds,
            "rows": rows, "other_runs": bench.trainings(["base", *JUDGED_BY])}  # fmt: skip


def figure(rows: Sequence[Mapping[str, Any]], path: pathlib.Path) -> None:
    """FD by two judges against accuracy: means over seeds, from plain fine-tuning on."""
    drawing = Figure(figsize=(11, 4.5), layout="constrained")
    panels = {"first judge: a classifier of these classes": lambda row: row["frechet"],
              "second judge: ImageNet features": lambda row: row[SECOND]["frechet"]}  # fmt: skip
    for panel, (title, judge) in zip(drawing.subplots(1, 2), panels.items(), strict=True):
        for method, (words, colour) in SHOWN.items():
            found: dict[float, list[Mapping[str, Any]]] = {}
            for row in rows:
                if row["method"] in ("plain", method) and SECOND in row and "seed" in row:
                    found.setdefault(row["strength"], []).append(row)
            across, up = ([float(np.mean([of(row) for row in found[s]])) for s in sorted(found)]
                          for of in (lambda row: 100 * row["accuracy"], judge))  # fmt: skip
            panel.plot(across, up, ".-", color=colour)
            below = method in ("DogFit", "mclr source", "CFG in an interval")
            panel.annotate(words, (across[-1], up[-1]), color=colour, fontsize=8,
                           xytext=(3, -9 if below else 4), textcoords="offset points")  # fmt: skip
        panel.set(title=title, xlabel="accuracy, %", ylabel="FD")
        panel.margins(x=0.2)
    figures.save(drawing, path)


def main() -> None:
    flags = parsed(__doc__, per_class=(64, "images of each class"),
                   steps=(2400, "of every fine-tuning"), **SEEDS)  # fmt: skip
    bench, seeds = Transfer(per_class=flags.per_class, steps=flags.steps), flags.seeds
    for stage in (1,) if flags.task else (0, 1):
        result = run(bench.root, bench.tasks(seeds, stage), flags)
    path = RESULTS / "transfer.json"
    before = json.loads(path.read_text())["sets"] if path.exists() else {}
    found = {(name := f"fashion_mnist_{bench.per_class}"): result | collect(bench, seeds)}
    write_json(path, {"sets": before | found})
    figure(found[name]["rows"], ROOT / "docs" / f"transfer_{bench.per_class}.png")


if __name__ == "__main__":
    main()
