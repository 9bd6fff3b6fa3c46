"""One base of images, its judges, and models that are fine-tuned from it, sampled and judged.

guidance_free.py compares methods by it. Every task (a training run, or the sampling and judging of
one model at one guidance scale) is a process of its own on one core; its outcome is a file under
runs/mclr_DATA, so that the same command continues after an interruption.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from tasks import ROOT, Files, Task, config_of, done

from mclr_jax import generate, images, runs
from mclr_jax.configs import base as configs_base
from mclr_jax.data import sources
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source
from mclr_jax.evaluation import evaluate, features, metrics
from mclr_jax.files import save_arrays

SETTINGS: dict[str, dict[str, Any]] = {
    "fashion_mnist": {"samples": 5000, "one_base": True,
                      "judge_steps": {"features": 1500, "accuracy": 2500}},
    "digits": {"samples": 2000, "one_base": False,
               "judge_steps": {"features": 600, "accuracy": 600}},
    # 100 classes: the configs of digits with longer training.
    "two_digits": {"samples": 5000, "one_base": True, "configs": "digits",
                   "source": "two_digits:pairs", "steps": {"": 4000, "_classifier": 2000},
                   "judge_steps": {"features": 2000, "accuracy": 3000}},
}  # fmt: skip
JUDGES: dict[str, dict[str, Any]] = {
    "features": {"weight_decay": 0.0, "network": {
        "name": "conv_classifier", "channels": (32, 64), "patch_size": 2}},
    "accuracy": {"weight_decay": 0.3, "network": {
        "name": "mlp_classifier", "width": 256, "depth": 2}},
}  # fmt: skip
JUDGED_BY = tuple(f"judge_{judge}" for judge in JUDGES)
REFERENCE = "sets/real_train.json"  # what the judges say of the images that all are compared with
METRICS = tuple(name for name in evaluate.METRICS if name != "kernel")  # and accuracy, copies
# A second judge, which has seen neither these images nor these classes: ImageNet features.
SECOND, SECOND_REFERENCE = "efficientnet_lite0", 10_000
SECOND_METRICS = ("frechet", "per_class_frechet")


@dataclasses.dataclass(frozen=True)
class Model:
    """A row of the table."""

    tuned: str  # name of the fine-tuning; with the seed, its work directory
    gamma: float  # guidance, or the strength that is given to the network, when sampling
    changes: dict[str, Any]  # of configs/DATA_mclr.py, see `tasks.config_of`
    interpolation: float = 1.0  # place on the line from the base's weights to the fine-tuned ones
    interval: tuple[float, float] | None = None  # noise levels to guide in; None for all
    weak: str = ""  # work directory of the weaker model of autoguidance
    needs: tuple[str, ...] = ()  # files that must be there first; {base} is the base's name

    def workdir(self, seed: int) -> str:
        return f"{self.tuned}_{seed}"

    def samples(self, seed: int) -> str:
        more = ("_interval" if self.interval else "") + ("_weak" if self.weak else "")
        share = f"_share_{self.interpolation:g}" if self.interpolation != 1 else ""
        return f"{self.workdir(seed)}_at_{self.gamma:g}{share}{more}"


@dataclasses.dataclass(frozen=True)
class Bench(Files):
    """The place of everything, and how each part is made.

    Its `models` by name are the rows of the table.
    """

    data: str
    base_steps: int = 0  # of another base than that of configs/DATA.py
    batch: int = 50  # samples at a time: on a CPU core twice as fast as 250, which leaves its cache

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.data}_{self.base_steps}" if self.base_steps else self.data

    @property
    def settings(self) -> dict[str, Any]:
        return SETTINGS[self.data]

    @property
    def root(self) -> pathlib.Path:  # type: ignore[override]
        return ROOT / "runs" / f"mclr_{self.name}"

    @property
    def configs(self) -> str:
        """How the names of its configs begin."""
        return self.settings.get("configs", self.data)

    @property
    def source(self) -> str:
        return self.settings.get("source", self.data)

    def config(self, name: str = "", changes: Mapping[str, Any] = {}) -> Any:
        steps = self.settings.get("steps", {}).get(name)
        own = {"data.name": self.source} | ({"num_steps": steps} if steps else {})
        return config_of(f"{self.configs}{name}", own | dict(changes))

    def base(self, seed: int) -> str:
        return "base" if self.settings["one_base"] else f"base_{seed}"

    def bases(self, seeds: Iterable[int]) -> list[str]:
        return [*dict.fromkeys(map(self.base, seeds))]

    def train_base(self, seed: int) -> None:
        config = self.config(changes={"seed": seed, "sample_every": 0})
        config.num_steps = self.base_steps or config.num_steps
        self.train(self.base(seed), self.configs, config)

    def share(self) -> None:
        """Posterior and judges are those of the base of configs/DATA.py, where it has some."""
        own = dataclasses.replace(self, base_steps=0).root
        for name in ("classifier", *JUDGED_BY):
            if (own / done(name)).exists() and not (self.root / name).exists():
                self.root.mkdir(parents=True, exist_ok=True)
                (self.root / name).symlink_to(own / name)

    def train_classifier(self) -> None:
        """The posterior that MCLR draws from."""
        self.train("classifier", f"{self.configs}_classifier", self.config("_classifier"))

    def judge(self, judge: str) -> None:
        """A classifier of clean images (noise of level 0.01), to judge samples with."""
        config = self.config("_classifier")
        config.noise = configs_base.options("loguniform", sigma_min=0.01, sigma_max=0.01)
        config.network = configs_base.options(**JUDGES[judge]["network"], dropout=0.1)
        config.optimizer.weight_decay = JUDGES[judge]["weight_decay"]
        config.num_steps = self.settings["judge_steps"][judge]
        config.batch_size, config.seed = 64, 100
        self.train(f"judge_{judge}", f"{self.configs}_classifier", config)

    def fine_tuning(self, seed: int, changes: Mapping[str, Any]) -> Any:
        """The config of MCLR, or of another objective with the same steps and learning rates."""
        own = {"init_from": str(self.root / self.base(seed)), "seed": seed + 1, "sample_every": 0,
               "companions.classifier": str(self.root / "classifier")}  # fmt: skip
        return self.config("_mclr", own | dict(changes))

    def tune(self, name: str, seed: int, changes: Mapping[str, Any]) -> None:
        self.train(name, f"{self.configs}_mclr", self.fine_tuning(seed, changes))

    def load(self, name: str, interpolation: float = 1.0, step: int | None = None) -> tuple:
        """(run, parameters) of this work directory, by default of its last step."""
        found = runs.load(self.root / name)
        return found, found.weights(step=step, interpolation=interpolation)[0]

    def weak(self, name: str) -> tuple[Any, Any]:
        """The model of a work directory and its parameters, for guidance."""
        found, params = self.load(name)
        return found.model, params

    def drawn(
        self, name: str, count: int, seed: int, guided: generate.Guidance = generate.NONE,
        interpolation: float = 1.0, step: int | None = None,
    ) -> tuple[runs.Run, np.ndarray, np.ndarray, dict[str, int]]:  # fmt: skip
        """A run, samples of its classes in turn, their labels, and the network calls of one."""
        found, params = self.load(name, interpolation, step)
        labels = np.resize(np.arange(found.model.null_label), count)
        samples = generate.generate(
            found.model, params, labels, found.sampler,
            guided=guided, seed=seed, batch_size=self.batch,
        )  # fmt: skip
        calls = {"network_calls": guided.calls(found.model, found.sampler)}
        return found, samples, labels, calls

    def sample(self, model: Model, seed: int) -> None:
        """Samples of a model, judged; features are kept to compare sets of samples."""
        count, weak = self.settings["samples"], self.weak(model.weak) if model.weak else None
        guided = generate.Guidance(1 + model.gamma, interval=model.interval, weak=weak)
        drawn = self.drawn(model.workdir(seed), count, seed, guided, model.interpolation)
        found, samples, labels, calls = drawn
        self.store(model.samples(seed), images.as_8_bits(samples), labels, calls, found.workdir)

    def real(self, split: str) -> None:
        """The floor: real images judged as samples are. `train` is the reference itself."""
        source = sources.load(self.source, split)
        count = len(source) if split == "train" else min(self.settings["samples"], len(source))
        pixels, labels = source[np.arange(count)]
        self.store(f"real_{split}", np.asarray(to_float(pixels)), labels, {})

    def store(
        self, name: str, pixels: Any, labels: Any, more: dict, workdir: pathlib.Path | None = None
    ) -> None:
        """Features and metrics of images (n, ...) in [-1, 1] -> NAME.npz, NAME.json."""
        found = self.judged("features", pixels, labels)
        row: dict[str, Any] = {"samples": len(pixels), **more}
        if name != "real_train":
            real = reference(self.root / "sets" / "real_train.npz")
            row |= evaluate.measure(found, real, METRICS, self.judged("accuracy", pixels, labels))
            if (copied := self.copied(more)) is not None:
                row["memorized"] = evaluate.memorized(pixels, copied)
        save_arrays(
            self.root / "sets" / f"{name}.npz", features=found.features, labels=labels,
            images=images.to_uint8(np.asarray(pixels)),
        )  # fmt: skip
        self.write(f"sets/{name}", row, workdir)

    def copied(self, row: Mapping[str, Any]) -> Source | None:
        """The training images that copies are looked for among; None: there are none."""
        del row
        return sources.load(self.source, "train")

    def second(self, name: str) -> None:
        """A set of images before the second judge -> second/NAME.json."""
        kept = self.root / "second" / "real_train.npz"
        with np.load(self.root / "sets" / f"{name}.npz") as file:
            pixels, labels = file["images"], file["labels"]
        if name == "real_train":
            rows = np.linspace(0, len(labels) - 1, SECOND_REFERENCE).astype(int)
            pixels, labels = pixels[rows], labels[rows]
        found, row = features.load(SECOND)(pixels, labels), {"samples": len(labels)}
        if name == "real_train":
            save_arrays(kept, features=found.features, labels=labels)
        else:
            row |= evaluate.measure(found, reference(kept), SECOND_METRICS)
            row.pop("accuracy")  # of ImageNet's classes
        self.write(f"second/{name}", row)

    def judged(self, judge: str, pixels: Any, labels: Any) -> features.Features:
        """Features of images in [-1, 1] by a judge."""
        return features.load(f"classifier:{self.root / f'judge_{judge}'}")(pixels, labels)

    def row(self, name: str) -> dict[str, Any]:
        """A set of images: what was measured, and its origin."""
        row = self.read(f"sets/{name}") | self.made_by(f"sets/{name}")
        if self.there(f"second/{name}"):
            row[SECOND] = self.read(f"second/{name}") | self.made_by(f"second/{name}")
        return row

    def judging(self, *needs: str) -> list[Task]:
        """The judges, which need these files, and the real images before them."""
        do, judges, reference = functools.partial, tuple(map(done, JUDGED_BY)), REFERENCE
        return [
            *(Task(f"judge_{j}", do(self.judge, j), done(f"judge_{j}"), needs) for j in JUDGES),
            Task("real_train", do(self.real, "train"), reference, judges),
            Task("real_test", do(self.real, "test"), "sets/real_test.json", (reference,)),
        ]

    def tasks(self, seeds: tuple[int, ...]) -> list[Task]:
        """All tasks, each after those it needs."""
        do = functools.partial
        tasks = [Task("classifier", self.train_classifier, done("classifier")), *self.judging()]
        for seed, name in zip(seeds, self.bases(seeds), strict=False):
            tasks.append(Task(name, do(self.train_base, seed), done(name)))
        for seed, model in itertools.product(seeds, self.models().values()):
            workdir, samples = model.workdir(seed), model.samples(seed)
            needs = (need.format(base=self.base(seed)) for need in model.needs)
            start = (done(self.base(seed)), done("classifier"), *needs)
            read = (*map(done, filter(None, (workdir, model.weak))), REFERENCE)
            tasks += [
                Task(workdir, do(self.tune, workdir, seed, model.changes), done(workdir), start),
                Task(samples, do(self.sample, model, seed), f"sets/{samples}.json", read),
            ]
        return once(tasks)

    def second_tasks(self, outputs: Iterable[str]) -> list[Task]:
        """The second judge's tasks for the sets of images among these files."""
        found = []
        for path in (path for path in outputs if path.startswith("sets/")):
            name = pathlib.Path(path).name.removesuffix(".json")
            needs = (path,) if name == "real_train" else (path, "second/real_train.json")
            run = functools.partial(self.second, name)
            found.append(Task(f"second_{name}", run, f"second/{name}.json", needs))
        return found


def once(tasks: Iterable[Task]) -> list[Task]:
    """The tasks without those that are there twice, by name."""
    return [*{task.name: task for task in tasks}.values()]


def reference(path: pathlib.Path) -> evaluate.RealStatistics:
    """The stored features of training images, to compare others with."""
    with np.load(path) as file:
        nothing = np.zeros((len(file["labels"]), 0))
        kept = features.Features(file["features"], nothing, file["labels"])
    return evaluate.RealStatistics(metrics.moments(kept.features), kept, "")
