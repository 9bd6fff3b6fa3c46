"""The representation of a model at several noise levels: ICR, its parts and a linear probe."""

import functools
import io
from collections.abc import Sequence
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
    """Moments of views of these images by layer, with more options of `blocks.extract`."""
    for layer in layers:
        icr.check_size(len(rows), blocks.sizes(model)[layer])
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


def _noisy(model, params, source, count, sigma, layers, **options) -> dict[str, tuple]:
    """Features (n, d) by layer of noisy but otherwise unchanged images, with labels (n,)."""
    rows = evenly(source, count)
    batches = list(blocks.extract(model, params, source, rows, sigma, layers=layers, **options))
    features = {name: np.concatenate([h[name][0] for h in batches]) for name in layers}
    return {name: (h, source.labels[rows]) for name, h in features.items()}


def sweep(
    model: Model,
    params: Any,
    train: Source,  # images for ICR, and for the probe to learn from
    test: Source | None = None,  # images to test the probe with; None for no probe
    *,
    augmentation: perturb.Augmentation,  # of the views for ICR; flip where training did
    sigmas: Sequence[float] = SIGMAS,
    layers: Sequence[str] = (),  # names of blocks; the middle one where empty
    num_images: int = 4096,  # of each source, evenly spaced; all where there are fewer
    **options: Any,
) -> list[dict[str, Any]]:
    """A row for each layer and noise level, all with the same perturbations.

    It has layer, sigma, icr (bias-corrected), icr_plain, invariance, residual, expansion (see
    `icr.traces`), effective_rank and, with `test`, probe_accuracy. Options: seed, number_of_views,
    batch_size and progress of `blocks.extract`.
    """
    chosen, rows = blocks.choose(model, layers), evenly(train, num_images)
    table, sources = [], [train, test] if test is not None else []
    single = options | {"number_of_views": 1}
    for sigma in sigmas:
        found = accumulate(model, params, train, rows, sigma, chosen, augmentation, **options)
        probed = [_noisy(model, params, x, num_images, sigma, chosen, **single) for x in sources]
        for name, seen in found.items():
            row = {
                "layer": name,
                "sigma": float(sigma),
                "icr": icr.ratio(seen, bias_corrected=True),
                "icr_plain": icr.ratio(seen),
                **icr.traces(seen),
                "effective_rank": icr.effective_rank(seen.invariant + seen.residual),
            }
            if probed:
                row["probe_accuracy"] = probe_accuracy(*probed[0][name], *probed[1][name])
            table.append(row)
    return table


def figure(curves: dict[str, list[dict[str, Any]]]) -> bytes:
    """ICR and probe accuracy against sigma, a curve for each name, as the content of a PNG."""
    from matplotlib.figure import Figure

    keys = {"icr": "ICR", "probe_accuracy": "probe accuracy"}
    keys = {k: v for k, v in keys.items() if all(k in row for c in curves.values() for row in c)}
    drawing, buffer = Figure(figsize=(5 * len(keys), 4), layout="constrained"), io.BytesIO()
    for place, (key, name) in enumerate(keys.items(), 1):
        panel = drawing.add_subplot(1, len(keys), place, xlabel="sigma", ylabel=name)
        for label, rows in curves.items():
            points = [(row["sigma"], row[key]) for row in rows]
            panel.semilogx(*zip(*points, strict=True), "o-", markersize=4, label=label)
    drawing.axes[0].legend(fontsize=8)
    drawing.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
