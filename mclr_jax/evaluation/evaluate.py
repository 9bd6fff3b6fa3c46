"""Measure a run: samples at each guidance strength and average of the weights, against real data.

Every row is stored under the run's directory as soon as it is there, by what it depends on, so that
the same call goes on where it was stopped.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mclr_jax import generate, images, runs
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source, evenly
from mclr_jax.evaluation import metrics
from mclr_jax.evaluation.features import BATCH, Extractor, Features, digest
from mclr_jax.files import provenance, save_arrays, write_json
from mclr_jax.model import Model
from mclr_jax.names import look_up
from mclr_jax.training.devices import banner

KEPT = 10_000  # examples of the reference whose features are kept, for neighbours and classes


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    moments: metrics.Moments  # of the features of all examples
    kept: Features  # of at most KEPT evenly spaced examples
    digest: str  # hash of the extractor's weights and of the data


# Columns of a row, by the name of the metric that gives them.
METRICS = {"fd": "frechet", "fd_class": "per_class_frechet", "fd_inter": "inter_class_frechet",
           "is": "inception_score", "kid": "kernel", "pr": "precision recall",
           "dc": "density coverage"}  # fmt: skip


def measure(
    fake: Features, real: Reference, names: Sequence[str], judged: Features | None = None
) -> dict[str, float]:
    """The accuracy of samples and the metrics of these names (see METRICS) against a reference.

    The accuracy is the share of samples that an extractor, the one of `judged` or else of `fake`,
    takes for the class they are meant to show. Without classes it is left out, and so is the
    inception score. Kernels and neighbours take as many real features as fake ones, if there are.
    """
    columns = [look_up(METRICS, name, "metric").split() for name in names]
    x, labels, kept = fake.features, fake.labels, real.kept
    some = np.random.default_rng(0).permutation(len(kept.features))[: len(x)]
    values: dict[str, Callable[[], Any]] = {
        "fd": lambda: metrics.frechet_distance(metrics.moments(x), real.moments),
        "fd_class": lambda: metrics.per_class_frechet(x, labels, kept.features, kept.labels).mean(),
        "fd_inter": lambda: metrics.inter_class_frechet(x, labels),
        "is": lambda: (
            metrics.inception_score(np.exp(fake.log_probs)) if fake.log_probs.size else ()
        ),
        "kid": lambda: metrics.kernel_distance(kept.features[some], x),
        "pr": lambda: metrics.precision_recall(kept.features[some], x),
        "dc": lambda: metrics.density_coverage(kept.features[some], x),
    }
    judged, row = judged or fake, {}
    if judged.log_probs.size:
        row["accuracy"] = float((judged.log_probs.argmax(1) == judged.labels).mean())
    for name, keys in zip(names, columns, strict=True):
        row |= zip(keys, np.atleast_1d(values[name]()).tolist(), strict=False)
    return row


def measure_images(
    pixels: np.ndarray,
    labels: np.ndarray,
    extractor: Extractor,
    judge: Extractor,
    real: Reference,
    names: Sequence[str],
    training: Source | None = None,
) -> dict[str, float]:
    """`measure` of images (n, ...), and `memorized` where there are training images."""
    judged = None if judge is extractor else judge(pixels, labels)
    row = measure(extractor(pixels, labels), real, names, judged)
    return row if training is None else row | {"memorized": memorized(pixels, training)}


def memorized(samples: np.ndarray, training: Source) -> float:
    """The share of samples (n, ...), uint8 or in [-1, 1], whose pixels copy a training image."""

    def flat(images: np.ndarray) -> np.ndarray:
        return np.asarray(to_float(jnp.asarray(images))).reshape(len(images), -1)

    real = (flat(training[rows][0]) for rows in _batches(training))
    return metrics.memorized_fraction(real, flat(samples))


def reference(
    extractor: Extractor,
    source: Source,
    cache: pathlib.Path | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> Reference:
    """Statistics of a data set, read in batches; kept in the folder `cache` by content.

    The content is judged by the number of examples, all labels and 256 evenly spaced images.
    """
    key = _hash(extractor.digest + _content(source))
    path = cache / f"{key}.npz" if cache else None
    if path is not None and path.exists():
        with np.load(path) as file:
            moments = metrics.Moments(int(file["count"]), file["mean"], file["cov"])
            return Reference(moments, Features(*(file[name] for name in Features._fields)), key)
    chosen, kept = np.isin(np.arange(len(source)), evenly(source, KEPT)), []

    def read(rows: np.ndarray) -> metrics.Moments:
        found = extractor(*source[rows], progress)
        kept.append([array[chosen[rows]] for array in found])
        return metrics.moments(found.features)

    total = functools.reduce(metrics.Moments.merge, map(read, _batches(source)))
    some = Features(*(np.concatenate(arrays) for arrays in zip(*kept, strict=True)))
    if path is not None:
        save_arrays(path, count=total.count, mean=total.mean, cov=total.cov, **some._asdict())
    return Reference(total, some, key)


def _batches(source: Source) -> list[np.ndarray]:
    """Indices of all examples, a few thousand at a time."""
    return np.split(np.arange(len(source)), range(8 * BATCH, len(source), 8 * BATCH))


def _content(source: Source) -> str:
    seen, _ = source[evenly(source, 256)]
    return digest([np.array([len(source)]), source.labels, seen])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def evaluate(
    workdir: str | pathlib.Path,
    extractor: Extractor,
    real: Reference,  # statistics of real data under the same extractor
    *,
    names: Sequence[str] = tuple(METRICS),
    judge: Extractor | None = None,  # says of what class samples look; None is the extractor
    num_samples: int = 10_000,  # of each row, classes taking turns
    seed: int = 0,
    guidance_scales: Iterable[float] = (1.0,),
    averages: Iterable[str] = ("",),
    interpolations: Iterable[float] = (1.0,),
    interval: tuple[float, float] | None = None,
    weak: tuple[Model, Any] | None = None,
    training: Source | None = None,  # images; with them rows have `memorized`
    batch_size: int = 256,
    progress: Callable[[str, int], Any] = lambda what, count: None,
) -> list[dict[str, Any]]:
    """A row for each average of the weights, interpolation and guidance scale, with what made it.

    Images are rounded to 8 bits. Rows that are stored in workdir/evaluation are not made again. For
    averages and interpolations see `runs.Run.weights`, for what is left `generate.generate`;
    `progress` is called with what is done and the number of images more.
    """
    run, rows = runs.load(workdir), []
    judge = judge or extractor
    made_by = {**provenance(), "device": banner()}
    labels = np.resize(np.arange(run.model.null_label), num_samples)
    fixed: dict[str, Any] = {
        "guidance_interval": interval, "sampler": dataclasses.asdict(run.sampler), "seed": seed,
        "samples": num_samples, "rounding": "8 bits", "metrics": list(names),
        "features": extractor.name, "features_weights": extractor.digest,
        "judge": judge.name, "judge_weights": judge.digest,
        "reference": real.digest, "reference_examples": real.moments.count,
    }  # fmt: skip
    fixed |= {"autoguidance": digest(weak[1])} if weak else {}  # other rows keep their keys
    fixed |= {"memorized_from": _content(training)} if training is not None else {}
    for average, place in itertools.product(averages, interpolations):
        params, step = run.weights(average, interpolation=place)
        which = {"step": step, "average": average, "weights": digest(params)}
        which |= {"interpolation": float(place)} if place != 1 else {}
        for scale in guidance_scales:
            settings = {**which, "guidance_scale": float(scale), **fixed}
            name = _hash(json.dumps(settings, sort_keys=True))
            path = run.workdir / "evaluation" / f"{name}.json"
            if path.exists():
                rows.append(json.loads(path.read_text()))
                progress("samples", num_samples)
                continue
            guided: dict[str, Any] = {"guidance_scale": scale, "interval": interval, "weak": weak}
            start = time.perf_counter()
            samples = generate.generate(
                run.model, params, labels, run.sampler, seed=seed, batch_size=batch_size,
                progress=functools.partial(progress, "samples"), **guided,
            )  # fmt: skip
            cost = {
                "network_calls": generate.network_calls(run.model, run.sampler, **guided),
                "samples_per_second": num_samples / (time.perf_counter() - start),
            }
            found = measure_images(
                images.as_8_bits(samples), labels, extractor, judge, real, names, training
            )
            rows.append({**settings, **found, **cost, **made_by})
            write_json(path, rows[-1])
    return rows
