"""ICR and a linear probe where the network is told a label: MCLR and its rivals on digits.

  python benchmarks/icr_labels.py

Bases and fine-tunings are those of guidance_free.py, a base for each seed. The features are read
at the null label, at the class of each image, and at labels drawn without the image. A network
passes on the class that it is told: ICR counts the offset between classes as a property of the
image, and a probe reads it. The ratio within classes leaves the offset out, and at drawn labels a
probe has to read the image. Writes benchmarks/results/icr_labels_digits.json.
"""

import argparse
import functools
import math
import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np
from guidance_free import NEEDS, NOISE, ONCE, Comparison, place_of
from icr import flips
from image_bench import Model, done
from tasks import RESULTS, Task, add_flags, run

from mclr_jax import runs
from mclr_jax.data.protocol import Arrays, Source
from mclr_jax.files import write_json
from mclr_jax.representation import blocks, icr, perturb, sweep

SIGMAS = (0.06, 0.3, 1.09, 3.26, 20.0)  # at the last nothing is left of the image
CONTROL = "DSM control"
METHODS: dict[str, dict[str, Any]] = {
    CONTROL: {"objective.name": "dsm"},
    "mclr, beta 1": {},
    **{name: ONCE[name] for name in ("mclr null, beta 1", "model_guidance", "cca", "ddo", "dpo")},
}
READINGS = ("icr", "icr_within_classes", "probe_accuracy")


class Labels(Comparison):
    """The comparison of guidance_free.py, whose models are read in place of sampled."""

    def models(self) -> dict[str, Model]:
        return {name: Model("equal_dsm" if name == CONTROL else place_of(name), 0.0,
                            options | NOISE, needs=NEEDS.get(name, ()))
                for name, options in METHODS.items()}  # fmt: skip

    def tasks(self, seeds: tuple[int, ...]) -> list[Task]:
        """The readings, and the trainings that they need."""
        read = [
            Task(f"labels_{name}", functools.partial(self.readings, name), f"labels/{name}.json",
                 (done(name),))
            for name in (model.workdir(s) for s in seeds for model in self.models().values())
        ]  # fmt: skip
        return needed([*super().tasks(seeds), *read], {task.output for task in read})

    def readings(self, name: str) -> None:
        """The readings of a work directory at all noise levels, where it is told each label."""
        found, params = self.load(name)
        rows = [
            {"told": told, "sigma": sigma, **reading(found, params, sigma, told)}
            for told in ("null", "class", "drawn")
            for sigma in SIGMAS
        ]
        self.write(f"labels/{name}", rows, found.workdir)


def needed(tasks: Iterable[Task], outputs: set[str]) -> list[Task]:
    """Those of the tasks that make the outputs, or what these need."""
    tasks, wanted = [*tasks], set(outputs)
    while more := {n for t in tasks if t.output in wanted for n in t.needs} - wanted:
        wanted |= more
    return [task for task in tasks if task.output in wanted]


def drawn_labels(source: Source) -> Arrays:
    """The images with labels drawn uniformly, without regard to the image."""
    rng, rows = np.random.default_rng(len(source)), np.arange(len(source))
    labels = rng.integers(0, source.num_classes, len(source)).astype(np.int32)
    return Arrays(source[rows][0], labels, source.num_classes)


def within_classes(h: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Features (V, N, d) whose images vary about the mean of their class.

    Covariances divide by N - 1, and K class means are estimated: the deviations are lengthened by
    sqrt((N - 1) / (N - K)).
    """
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    mean = h.mean(0)
    sums = np.zeros((len(counts), h.shape[-1]))
    np.add.at(sums, classes, mean)
    factor = math.sqrt((len(labels) - 1) / (len(labels) - len(counts)))
    return h - mean + factor * (mean - (sums / counts[:, None])[classes])


def reading(found: runs.Run, params: Any, sigma: float, told: str) -> dict[str, float]:
    """ICR of the middle block's features, within classes too, and the accuracy of a linear probe.

    `told` is the label that the network is told: null, class or drawn; the probe's targets are
    always the classes. There is no ICR at drawn labels, which the views of an image share.
    """
    layers = blocks.choose(found.model)
    sources = [found.source(split) for split in ("train", "test")]

    def features(source: Source, **options: Any) -> np.ndarray:
        source = drawn_labels(source) if told == "drawn" else source
        batches = blocks.extract(
            found.model, params, source, np.arange(len(source)), sigma, layers=layers,
            at_labels=told != "null", **options,
        )  # fmt: skip
        return np.concatenate([batch[layers[0]] for batch in batches], axis=1).astype(np.float64)

    row = {}
    if told != "drawn":
        h = features(sources[0], augmentation=perturb.Augmentation(flip=flips(found.data)))
        inside = within_classes(h, sources[0].labels)
        for name, views in zip(READINGS, map(icr.views, (h, inside)), strict=False):
            row[name] = icr.ratio(views, bias_corrected=True)
    seen = [
        x for source in sources for x in (features(source, number_of_views=1)[0], source.labels)
    ]
    return row | {"probe_accuracy": sweep.probe_accuracy(*seen)}


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error; a single value has none."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def summary(rows: list[dict]) -> list[dict]:
    """Means over seeds with standard errors, and those of the differences from the control.

    A difference is that of the same seed: of the same base, images and perturbations.
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
    """All that was read."""
    rows, made_by = [], {}
    for seed in seeds:
        for method, model in bench.models().items():
            name = f"labels/{model.workdir(seed)}"
            if bench.there(name):
                key = {"method": method, "seed": seed}
                rows += [{**key, **row} for row in bench.read(name)]
                made_by[f"{method}, {seed}"] = bench.made_by(name)
    return {"noise": [*NOISE.values()], "summary": summary(rows), "rows": rows, "made_by": made_by}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2", help="of bases and fine-tuning")
    add_flags(parser)
    arguments = parser.parse_args()
    seeds = tuple(map(int, arguments.seeds.split(",")))
    bench = Labels("digits")
    result = run(bench.root, bench.tasks(seeds), arguments) | collect(bench, seeds)
    write_json(RESULTS / "icr_labels_digits.json", result)


if __name__ == "__main__":
    main()
