"""ICR and a linear probe where the network is told a label: MCLR and its rivals on digits.

  python benchmarks/icr_labels.py

One base, fine-tuned by each method at the noise levels of guidance_free.py, three seeds. Features
are read at the null label, at the class of each image, and at labels drawn without the image. A
network passes on the class that it is told: ICR counts the offset between classes as a property of
the image, and a probe reads it. The ratio within classes leaves the offset out, and at drawn labels
a probe has to read the image. Writes benchmarks/results/icr_labels_digits.json.
"""

import functools
import math
import pathlib
import statistics
from typing import Any

import numpy as np
from guidance_free import NOISE, ONCE, place_of
from image_bench import Bench
from tasks import RESULTS, ROOT, SEEDS, Task, done, parsed, run

from mclr_jax import runs
from mclr_jax.data.protocol import Arrays
from mclr_jax.files import write_json
from mclr_jax.representation import perturb, sweep

SIGMAS = (0.3, 2.0, 20.0)  # at the last nothing is left of the image
STEPS = 100  # of each fine-tuning, a tenth of the base's
METHODS: dict[str, dict[str, Any]] = {
    "DSM control": {"objective.name": "dsm"},
    "mclr null, beta 1": ONCE["mclr null, beta 1"],
    "mclr, beta 1": {},
    "model_guidance": ONCE["model_guidance"],
}
FILES = {method: f"labels_{place_of(method)}" for method in METHODS}
CONTROL = "DSM control"
READINGS = ("icr", "icr_within_classes", "probe_accuracy")


class Labels(Bench):
    """The base and its fine-tunings, which are read in place of sampled."""

    @property
    def root(self) -> pathlib.Path:  # type: ignore[override]
        return ROOT / "runs" / f"icr_labels_{self.data}"

    def base(self, seed: int) -> str:
        return "base"

    def tasks(self, seeds: tuple[int, ...]) -> list[Task]:
        """What all need, then all methods in one process: a training takes less than a start."""
        do, needs = functools.partial, (done("classifier"), done("base"))
        return [
            Task("classifier", self.train_classifier, needs[0]),
            Task("base", do(self.train_base, 0), needs[1]),
            Task("labels", do(self.read_all, seeds), f"{[*FILES.values()][-1]}.json", needs),
        ]

    def read_all(self, seeds: tuple[int, ...]) -> None:
        """Train what is not there, and read it at all noise levels and labels."""
        for method, file in FILES.items():
            rows = []
            for seed in seeds if not self.there(file) else ():
                name = f"{place_of(method)}_{seed}"
                if not self.there(f"{name}/done"):
                    self.tune(name, seed, {**METHODS[method], **NOISE, "num_steps": STEPS})
                found, params = self.load(name)
                rows += [
                    {"method": method, "seed": seed, "told": told, "sigma": sigma,
                     **reading(found, params, sigma, told)}
                    for told in ("null", "class", "drawn") for sigma in SIGMAS
                ]  # fmt: skip
            if rows:
                self.write(file, rows)


class Drawn(Arrays):
    """Images that are shown with labels drawn uniformly, without regard to the image."""

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        told = np.random.default_rng(len(self)).integers(0, self.num_classes, len(self))
        return self.images[indices], told.astype(np.int32)[indices]


def reading(found: runs.Run, params: Any, sigma: float, told: str) -> dict[str, float]:
    """ICR of the middle block's features, within classes too, and the accuracy of a linear probe.

    `told` is the label that the network is told: null, class or drawn; the probe's targets are
    always the classes. There is no ICR at drawn labels, which the views of an image share.
    """
    sources = [found.source(split) for split in ("train", "test")]
    if told == "drawn":
        sources = [Drawn(*each[np.arange(len(each))], each.num_classes) for each in sources]
    (row,) = sweep.sweep(
        found.model, params, *sources, sigmas=[sigma], num_images=len(sources[0]),
        at_labels=told != "null", augmentation=perturb.Augmentation(flip=found.data.mirrored),
    )  # fmt: skip
    return {name: row[name] for name in (READINGS[-1:] if told == "drawn" else READINGS)}


def spread(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard error; a single value has none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.mean(values), error


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds with standard errors, and those of the differences from the control.

    A difference is that of the same seed of the training; all have the same perturbations.
    """
    by = {(r["method"], r["seed"], r["told"], r["sigma"]): r for r in rows}
    found = []
    for method, told, sigma in dict.fromkeys((m, told, sigma) for m, _, told, sigma in by):
        seeds = [seed for m, seed, *where in by if (m, *where) == (method, told, sigma)]
        own = {"method": method, "told": told, "sigma": sigma, "seeds": len(seeds)}
        for name in READINGS:
            pairs = [[by[m, seed, told, sigma][name] for m in (method, CONTROL)] for seed in seeds
                     if name in by[method, seed, told, sigma]]  # fmt: skip
            if pairs:
                own[name], own[f"{name}_error"] = spread([value for value, _ in pairs])
                keys = f"{name}_difference", f"{name}_difference_error"
                own |= dict(zip(keys, spread([a - b for a, b in pairs]), strict=True))
        found.append(own)
    return found


def collect(bench: Labels, seeds: tuple[int, ...]) -> dict:
    """All that was read, and the runs that it was read from."""
    files = {method: file for method, file in FILES.items() if bench.there(file)}
    rows = [row for name in files.values() for row in bench.read(name)]
    names = [f"{place_of(method)}_{seed}" for method in files for seed in seeds]
    return {"noise": [*NOISE.values()], "summary": summary(rows), "rows": rows,
            "runs": bench.trainings(["base", "classifier", *names]),
            "readings": {m: bench.made_by(name) for m, name in files.items()}}  # fmt: skip


def main() -> None:
    flags, bench = parsed(__doc__, **SEEDS), Labels("digits")
    result = run(bench.root, bench.tasks(flags.seeds), flags) | collect(bench, flags.seeds)
    write_json(RESULTS / "icr_labels_digits.json", result)


if __name__ == "__main__":
    main()
