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

from mclr_jax import generate, images, run
from mclr_jax.data import pipeline
from mclr_jax.data.sources import Source, evenly
from mclr_jax.evaluation import metrics
from mclr_jax.evaluation.features import BATCH, Extractor, Features, digest
from mclr_jax.experiment import Experiment
from mclr_jax.names import look_up
from mclr_jax.training.devices import banner

KEPT = 10_000  # examples of the reference whose features are kept, for neighbours and classes


@dataclasses.dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Attributes:
      moments: of the features of all examples.
      kept: features of at most KEPT evenly spaced examples.
      digest: hash of the extractor's weights and of the data.
    """

    moments: metrics.Moments
    kept: Features
    digest: str


def _frechet(fake: Features, real: Reference) -> dict[str, float]:
    value = metrics.frechet_distance(metrics.moments(fake.features), real.moments)
    return {"frechet": value}


def _per_class(fake: Features, real: Reference) -> dict[str, float]:
    values = metrics.per_class_frechet(
        fake.features, fake.labels, real.kept.features, real.kept.labels
    )
    return {"per_class_frechet": float(values.mean())}


def _precision_recall(fake: Features, real: Reference) -> dict[str, float]:
    values = metrics.precision_recall(_as_many(real, fake), fake.features)
    return dict(zip(("precision", "recall"), values, strict=True))


def _density_coverage(fake: Features, real: Reference) -> dict[str, float]:
    values = metrics.density_coverage(_as_many(real, fake), fake.features)
    return dict(zip(("density", "coverage"), values, strict=True))


def _inception_score(fake: Features, real: Reference) -> dict[str, float]:
    if not fake.log_probs.shape[1]:
        return {}
    return {"inception_score": metrics.inception_score(np.exp(fake.log_probs))}


def _kernel(fake: Features, real: Reference) -> dict[str, float]:
    return {"kernel": metrics.kernel_distance(_as_many(real, fake), fake.features)}


def _as_many(real: Reference, fake: Features) -> np.ndarray:
    """As many real features as there are fake ones, where there are so many."""
    order = np.random.default_rng(0).permutation(len(real.kept.features))
    return real.kept.features[order[: len(fake.features)]]


METRICS: dict[str, Callable[[Features, Reference], dict[str, float]]] = {
    "fd": _frechet,
    "fd_class": _per_class,
    "fd_inter": lambda fake, real: {
        "inter_class_frechet": metrics.inter_class_frechet(fake.features, fake.labels)
    },
    "is": _inception_score,
    "kid": _kernel,
    "pr": _precision_recall,
    "dc": _density_coverage,
}


def measure(
    fake: Features, real: Reference, names: Sequence[str], judged: Features | None = None
) -> dict[str, float]:
    """The accuracy of samples and the metrics of these names (see METRICS) against a reference.

    The accuracy is the share of samples that an extractor, the one of `judged` or else of `fake`,
    takes for the class they are meant to show. Without classes it is left out, and so is the
    inception score.
    """
    functions = [look_up(METRICS, name, "metric") for name in names]
    judged = judged or fake
    row: dict[str, float] = {}
    if judged.log_probs.shape[1]:
        row["accuracy"] = float((judged.log_probs.argmax(1) == judged.labels).mean())
    return functools.reduce(lambda row, f: row | f(fake, real), functions, row)


def memorized(samples: np.ndarray, training: Source) -> float:
    """The share of samples (n, ...), uint8 or in [-1, 1], whose pixels copy a training image."""
    real = (_pixels(training[rows][0]) for rows in _batches(training))
    return metrics.memorized_fraction(real, _pixels(samples))


def _pixels(images: np.ndarray) -> np.ndarray:
    return np.asarray(pipeline.to_float(jnp.asarray(images))).reshape(len(images), -1)


def reference(
    extractor: Extractor,
    source: Source,
    cache: pathlib.Path | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> Reference:
    """Statistics of a data set, read in batches; kept in the folder `cache` by content.

    The content is judged by the number of examples, all labels and 256 evenly spaced images.
    """
    key = hashlib.sha256((extractor.digest + _content(source)).encode()).hexdigest()[:16]
    path = cache / f"{key}.npz" if cache else None
    if path is not None and path.exists():
        with np.load(path) as file:
            moments = metrics.Moments(int(file["count"]), file["mean"], file["cov"])
            kept = Features(*(file[name] for name in Features._fields))
        return Reference(moments, kept, key)
    chosen = np.zeros(len(source), bool)
    chosen[evenly(source, KEPT)] = True
    total, parts = None, []
    for rows in _batches(source):
        features = extractor(*source[rows], progress)
        moments = metrics.moments(features.features)
        total = total.merge(moments) if total else moments
        parts.append(features.take(chosen[rows]))
    assert total is not None
    kept = Features(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    if path is not None:
        run.save_arrays(path, count=total.count, mean=total.mean, cov=total.cov, **kept._asdict())
    return Reference(total, kept, key)


def _batches(source: Source) -> list[np.ndarray]:
    """Indices of all examples, a few thousand at a time."""
    return np.split(np.arange(len(source)), range(8 * BATCH, len(source), 8 * BATCH))


def _content(source: Source) -> str:
    seen, _ = source[evenly(source, 256)]
    return digest([np.array([len(source)]), source.labels, seen])


def evaluate(
    workdir: str | pathlib.Path,
    extractor: Extractor,
    real: Reference,
    *,
    names: Sequence[str] = tuple(METRICS),
    judge: Extractor | None = None,
    num_samples: int = 10_000,
    seed: int = 0,
    guidance_scales: Iterable[float] = (1.0,),
    averages: Iterable[str] = ("",),
    strengths: Iterable[float] = (1.0,),
    interval: tuple[float, float] | None = None,
    weak: tuple[Experiment, Any] | None = None,
    training: Source | None = None,
    batch_size: int = 256,
    progress: Callable[[str, int], Any] = lambda what, count: None,
) -> list[dict[str, Any]]:
    """A row of settings and metrics for each average of the weights, strength and guidance scale.

    Images are rounded to 8 bits. Rows that are stored in workdir/evaluation are not made again.

    Args:
      workdir: of the run.
      extractor: of features.
      real: statistics of real data under the same extractor.
      names: of metrics.
      judge: classifier that says of what class samples look; None is the extractor.
      num_samples: of each row, classes taking turns.
      seed: sample i starts from the noise of key fold_in(seed, i).
      guidance_scales: see `generate.generate`.
      averages, strengths: see `run.load_weights`.
      interval: of guidance.
      weak: (experiment, params) of autoguidance's weak model; see `generate.generate`.
      training: images; with them rows have the share of samples that copy one, `memorized`.
      batch_size: samples at a time.
      progress: called with what is done and the number of images more.
    """
    experiment, rows = run.load_experiment(workdir), []
    judge = judge or extractor
    labels = np.resize(np.arange(experiment.null_label), num_samples)
    more = {"autoguidance": digest(weak[1])} if weak else {}  # other rows keep their keys
    more |= {"memorized_from": _content(training)} if training is not None else {}
    for average, strength in itertools.product(averages, strengths):
        params, step = run.load_weights(workdir, average, strength=strength)
        share = {"strength": float(strength)} if strength != 1 else {}
        for scale in guidance_scales:
            settings = {
                "step": step,
                "average": average,
                "weights": digest(params),
                "guidance_scale": float(scale),
                "guidance_interval": interval,
                "sampler": experiment.config.sampler.to_dict(),
                "seed": seed,
                "samples": num_samples,
                "rounding": "8 bits",
                "metrics": list(names),
                "features": extractor.name,
                "features_weights": extractor.digest,
                "judge": judge.name,
                "judge_weights": judge.digest,
                "reference": real.digest,
                "reference_examples": real.moments.count,
                **more,
                **share,
            }
            key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
            path = pathlib.Path(workdir) / "evaluation" / f"{key}.json"
            if path.exists():
                rows.append(json.loads(path.read_text()))
                progress("samples", num_samples)
                continue
            start = time.perf_counter()
            samples = generate.generate(
                experiment,
                params,
                labels,
                seed=seed,
                guidance_scale=scale,
                interval=interval,
                weak=weak,
                batch_size=batch_size,
                progress=functools.partial(progress, "samples"),
            )
            seconds = time.perf_counter() - start
            rounded = images.as_8_bits(samples)
            features = extractor(rounded, labels)
            judged = None if judge is extractor else judge(rounded, labels)
            calls = generate.network_calls(
                experiment, guidance_scale=scale, interval=interval, weak=weak
            )
            row = {
                **settings,
                **measure(features, real, names, judged),
                **({"memorized": memorized(rounded, training)} if training is not None else {}),
                "network_calls": calls,
                "samples_per_second": num_samples / seconds,
                "device": banner(),
            }
            path.parent.mkdir(exist_ok=True)
            run.write_atomically(path, json.dumps(row, indent=1) + "\n")
            rows.append(row)
    return rows
