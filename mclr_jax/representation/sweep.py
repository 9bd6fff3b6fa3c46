"""The representation of a model at several noise levels: ICR, its parts and a linear probe."""

import functools
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mclr_jax.data.protocol import Source, evenly
from mclr_jax.model import Model
from mclr_jax.representation import blocks, icr, perturb

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
    """Moments of perturbed views of these images by layer; options as `blocks.extract` has them.

    Raises:
      ValueError: fewer images than twice the length of the features.
    """
    known = blocks.sizes(model)
    for layer in layers:
        icr.check_size(len(rows), known[layer])
    batches = blocks.extract(
        model, params, source, rows, sigma, layers=layers, augmentation=augmentation, **options
    )
    parts = ({name: icr.views(h) for name, h in batch.items()} for batch in batches)
    return functools.reduce(lambda a, b: {name: a[name].merge(b[name]) for name in a}, parts)


def probe_accuracy(
    features: np.ndarray, labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Share of test images that logistic regression on features (n, d) puts into their class."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return float(probe.fit(features, labels).score(test_features, test_labels))


def _probes(model, params, train, test, count, sigma, layers, **options) -> dict[str, float]:
    """Probe accuracy by layer, from noisy but otherwise unchanged images."""
    sets = []
    for source in (train, test):
        chosen = evenly(source, count)
        batches = list(
            blocks.extract(
                model, params, source, chosen, sigma,
                layers=layers, number_of_views=1, **options,
            )
        )  # fmt: skip
        features = {name: np.concatenate([b[name][0] for b in batches]) for name in layers}
        sets.append((features, source.labels[chosen]))
    (train_h, train_y), (test_h, test_y) = sets
    return {name: probe_accuracy(train_h[name], train_y, test_h[name], test_y) for name in layers}


def sweep(
    model: Model,
    params: Any,
    train: Source,
    test: Source | None = None,
    *,
    augmentation: perturb.Augmentation,
    sigmas: Sequence[float] = SIGMAS,
    layers: Sequence[str] = (),
    num_images: int = 4096,
    seed: int = 0,
    number_of_views: int = 2,
    batch_size: int = blocks.BATCH,
    progress: Callable[[int], Any] = lambda count: None,
) -> list[dict[str, Any]]:
    """A row for each layer and noise level.

    Args:
      model, params: what is measured.
      train: images for ICR, and for the probe to learn from.
      test: images to test the probe with; None for no probe.
      augmentation: of the views for ICR; flip where training did, for digits and shoes have a side.
      sigmas: noise levels, above 0.
      layers: names of blocks; the middle one where empty.
      num_images: of each, evenly spaced; all where there are fewer.
      seed: of the perturbations, which are the same at every noise level.
      number_of_views: of each image.
      batch_size: images at a time.
      progress: called with the number of new images.

    Returns:
      rows of layer, sigma, icr (bias-corrected), icr_plain, invariance, residual, expansion (see
      `icr.traces`), effective_rank and, with `test`, probe_accuracy.
    """
    chosen, rows = blocks.choose(model, layers), evenly(train, num_images)
    options: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    table = []
    for sigma in sigmas:
        found = accumulate(
            model, params, train, rows, sigma, chosen, augmentation,
            number_of_views=number_of_views, **options,
        )  # fmt: skip
        accuracy = (
            {} if test is None
            else _probes(model, params, train, test, num_images, sigma, chosen, **options)
        )  # fmt: skip
        for name, seen in found.items():
            row = {
                "layer": name,
                "sigma": float(sigma),
                "icr": icr.ratio(seen, bias_corrected=True),
                "icr_plain": icr.ratio(seen),
                **icr.traces(seen),
                "effective_rank": icr.effective_rank(seen.invariant + seen.residual),
            }
            table.append(row | ({"probe_accuracy": accuracy[name]} if accuracy else {}))
    return table


def figure(curves: dict[str, list[dict[str, Any]]]) -> bytes:
    """ICR and probe accuracy against sigma, a curve for each name, as the content of a PNG.

    Raises:
      ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    keys = {"icr": "ICR", "probe_accuracy": "probe accuracy"}
    keys = {k: v for k, v in keys.items() if all(k in row for c in curves.values() for row in c)}
    drawing = Figure(figsize=(5 * len(keys), 4), layout="constrained")
    for panel, (key, name) in zip(
        drawing.subplots(1, len(keys), squeeze=False)[0], keys.items(), strict=True
    ):
        for label, rows in curves.items():
            points = [(row["sigma"], row[key]) for row in rows]
            panel.semilogx(*zip(*points, strict=True), "o-", markersize=4, label=label)
        panel.set_xlabel("sigma")
        panel.set_ylabel(name)
    drawing.axes[0].legend(fontsize=8)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
