"""The representation of a model at several noise levels, and ICR during training."""

import dataclasses
import io
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mclr_jax import extras, generate, images
from mclr_jax.config import ICR
from mclr_jax.data.protocol import Source, drawn
from mclr_jax.evaluation import evaluate
from mclr_jax.files import named
from mclr_jax.model import Model
from mclr_jax.representation import blocks, icr, perturb
from mclr_jax.samplers import Sampler

SIGMAS = (0.01, 0.02, 0.06, 0.14, 0.3, 0.59, 1.09, 1.92, 3.26)  # of the paper's sweep


def accumulate(
    model: Model,
    params: Any,
    source: Source,
    rows: np.ndarray,
    sigma: float,
    layers: tuple[str, ...],
    augmentation: perturb.Augmentation,
    **options: Any,
) -> dict[str, icr.Views]:
    """Statistics of views of the images `rows` by layer; options of `blocks.extract`."""
    for layer in layers:
        icr.check_size(len(rows), blocks.sizes(model)[layer])
    batches = blocks.extract(
        model, params, source, rows, sigma, layers=layers, augmentation=augmentation, **options
    )
    labels, found = source.labels[rows], dict[str, icr.Views]()
    for batch in batches:
        told, labels = np.split(labels, [batch[layers[0]].shape[1]])
        for name, h in batch.items():
            seen = icr.views(h, told, source.num_classes)
            found[name] = found[name].merge(seen) if name in found else seen
    return found


def probe_accuracy(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Accuracy, on test images, of logistic regression on features (n, d)."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(probe.fit(features, labels).score(test_features, test_labels))


def _noisy(model, params, source, count, sigma, layers, **options) -> dict[str, tuple]:
    """Features (n, d), by layer, of images with noise alone; and their labels (n,)."""
    rows, options = drawn(source, count), options | {"number_of_views": 1}
    batches = list(blocks.extract(model, params, source, rows, sigma, layers=layers, **options))
    features = {name: np.concatenate([h[name][0] for h in batches]) for name in layers}
    return {name: (h, source.labels[rows]) for name, h in features.items()}


def sweep(
    model: Model,
    params: Any,
    train: Source,  # images for ICR and for training the probe
    test: Source | None = None,  # images for testing the probe of several classes; None: no probe
    *,
    augmentation: perturb.Augmentation,  # of the views for ICR; flip if training flipped
    sigmas: Sequence[float] = SIGMAS,
    layers: Sequence[str] = (),  # names of blocks; default: the middle one
    num_images: int = 4096,  # at most, of each source, drawn at random
    **options: Any,
) -> list[dict[str, Any]]:
    """A row for each noise level and layer, all with the same perturbations.

    Its columns: layer, sigma, icr (bias-corrected), icr_plain, those of `icr.traces`,
    effective_rank, with several classes icr_within_classes (`icr.Views.within_classes`) and, with
    `test`, probe_accuracy. Options: see `blocks.extract`.
    """
    chosen, rows = blocks.choose(model, layers), drawn(train, num_images)
    table, sources = [], [] if test is None or model.null_label < 2 else [train, test]
    for sigma in sigmas:
        found = accumulate(model, params, train, rows, sigma, chosen, augmentation, **options)
        probed = [_noisy(model, params, x, num_images, sigma, chosen, **options) for x in sources]
        for name, seen in found.items():
            row = {
                "layer": name, "sigma": float(sigma),
                "icr": icr.ratio(seen, bias_corrected=True), "icr_plain": icr.ratio(seen),
                **icr.traces(seen),
                "effective_rank": icr.effective_rank(seen.invariant + seen.residual),
            }  # fmt: skip
            if 1 < train.num_classes <= len(rows) / 2:
                row["icr_within_classes"] = icr.ratio(seen.within_classes, bias_corrected=True)
            if probed:
                row["probe_accuracy"] = probe_accuracy(*probed[0][name], *probed[1][name])
            table.append(row)
    return table


def by_layer(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each layer."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["layer"], []).append(row)
    return found


def compared(path: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
    """The curves in a file of mclr icr, under its name; ValueError: it is none."""
    with named(f"--compare={path} is no file of mclr icr"):
        rows = json.loads(path.read_text())["rows"]
        return {f"{path.stem}: {layer}": x for layer, x in by_layer(rows).items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `sweep` as text, in columns."""
    names = [name for name in rows[0] if name != "layer"]
    lines = [" ".join([f"{'':20s}", *(f"{name:>14s}" for name in names)])]
    for row in rows:
        values = (f"{row[name]:{max(len(name), 14)}.4g}" for name in names)
        lines.append(" ".join([f"{row['layer'][:20]:20s}", *values]))
    return "\n".join(lines)


def figure(curves: dict[str, list[dict[str, Any]]]) -> bytes:
    """A PNG of ICR and probe accuracy against sigma, with a curve for each name."""
    make = extras.needed("matplotlib.figure", "figures").Figure
    columns = set.intersection(*(set(row) for rows in curves.values() for row in rows))
    names = {"icr": "ICR", "probe_accuracy": "probe accuracy"}
    keys = [key for key in names if key in columns]
    drawing, buffer = make(figsize=(5 * len(keys), 4), layout="constrained"), io.BytesIO()
    for panel, key in zip(drawing.subplots(1, len(keys), squeeze=False)[0], keys, strict=True):
        panel.set(xlabel="sigma", ylabel=names[key])
        for label, rows in curves.items():
            sigmas, values = [row["sigma"] for row in rows], [row[key] for row in rows]
            panel.semilogx(sigmas, values, "o-", markersize=4, label=label)
    drawing.axes[0].legend(fontsize=8)
    drawing.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


@dataclasses.dataclass(frozen=True, eq=False)
class Monitor:
    """(step, params) -> a reading, with the options of config.icr.

    A reading has icr (bias-corrected), icr_NAME for `icr.traces` and, if options.samples > 0,
    icr_memorized: the share of copies among that number of unguided samples. It is empty if the
    features do not vary in some direction, as in some untrained networks. All readings use the
    same images and perturbations. ValueError: no such layer, or too few images for it.
    """

    options: ICR
    model: Model
    sampler: Sampler
    source: Source
    flip: bool  # whether training shows mirrored images

    def __post_init__(self):
        icr.check_size(len(self.rows), blocks.sizes(self.model)[self.layer])

    @property
    def layer(self) -> str:
        return blocks.choose(self.model, [self.options.layer] if self.options.layer else [])[0]

    @property
    def rows(self) -> np.ndarray:
        return drawn(self.source, self.options.num_images)

    def __call__(self, step: int, params: Any) -> dict[str, float]:
        options, model, shown = self.options, self.model, perturb.Augmentation(flip=self.flip)
        views = accumulate(
            model, params, self.source, self.rows, options.sigma, (self.layer,), shown
        )[self.layer]
        try:
            values = {"icr": icr.ratio(views, bias_corrected=True)}
        except ValueError as error:
            logging.warning("No reading of ICR at step %d: %s", step, error)
            return {}
        values |= {f"icr_{name}": value for name, value in icr.traces(views).items()}
        if options.samples:
            labels = np.resize(np.arange(model.null_label), options.samples)
            samples = generate.generate(model, params, labels, self.sampler)
            pixels = images.clip(samples)
            values["icr_memorized"] = evaluate.memorized(pixels, self.source, self.flip)
        return values
