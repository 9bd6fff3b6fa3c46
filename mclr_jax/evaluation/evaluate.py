"""Measure a run: its samples, at each guidance scale and average of the weights, and real data.

Each row is stored in the run's directory when it is complete, under a hash of its settings: a
repeated call reads the stored rows and computes the others.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from mclr_jax import generate, images, latents, runs
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source, drawn, evenly
from mclr_jax.data.sources import Data
from mclr_jax.evaluation import metrics
from mclr_jax.evaluation.features import BATCH, Extractor, Features
from mclr_jax.evaluation.features import load as load_extractor
from mclr_jax.evaluation.metrics import copy_measures
from mclr_jax.files import digest, provenance, save_arrays, write_json
from mclr_jax.labels import warn_untrained
from mclr_jax.model import Model
from mclr_jax.samplers import Sampler
from mclr_jax.schema import look_up
from mclr_jax.training.beside import METRICS, Evaluate
from mclr_jax.training.devices import banner, exists, is_first

CACHE = "~/.cache/mclr_jax/references"  # folder of the statistics of real data
PICTURED = 20  # samples with the lowest ratios of distances, beside training images
KEPT = 10_000  # real examples whose features are kept, for neighbours and classes


@dataclasses.dataclass(frozen=True)
class RealStatistics:
    """Statistics of real data, with which samples are compared."""

    moments: metrics.Moments  # of the features of all examples
    kept: Features  # of at most KEPT examples, drawn by class
    digest: str  # hash of the extractor's weights and of the data


# The metrics, by their names on the command line, in tables and in files.
OF_REFERENCE = frozenset({"per_class_frechet", *METRICS[4:]})  # of its examples, not moments alone


def measure(
    fake: Features, real: RealStatistics, names: Sequence[str], judged: Features | None = None
) -> dict[str, float]:
    """The accuracy of samples, and the named metrics (see METRICS) against real data.

    The accuracy is the share of samples whose most probable class, according to the extractor of
    `judged` (default: `fake`), is their label. Extractors without classes give neither accuracy nor
    inception score. Kernels and neighbours use a random subset of the real features, at most as
    many as generated.
    """
    x, labels, kept = fake.features, fake.labels, real.kept
    some = kept.features[np.random.default_rng(0).permutation(len(kept.features))[: len(x)]]
    precision_recall = functools.cache(lambda: metrics.precision_recall(some, x))
    density_coverage = functools.cache(lambda: metrics.density_coverage(some, x))
    values: dict[str, Callable[[], Any]] = {
        "frechet": lambda: metrics.frechet_distance(metrics.moments(x), real.moments),
        "per_class_frechet": lambda: metrics.per_class_frechet(
            x, labels, kept.features, kept.labels
        ).mean(),
        "inter_class_frechet": lambda: metrics.inter_class_frechet(x, labels),
        "inception_score": lambda: metrics.inception_score(np.exp(fake.log_probs)),
        "kernel": lambda: metrics.kernel_distance(some, x),
        "precision": lambda: precision_recall()[0],
        "recall": lambda: precision_recall()[1],
        "density": lambda: density_coverage()[0],
        "coverage": lambda: density_coverage()[1],
    }
    judged, row = judged or fake, {}
    if judged.log_probs.size:
        row["accuracy"] = float((judged.log_probs.argmax(1) == judged.labels).mean())
    for name in names:
        look_up(values, name, "metric")
        if name == "inter_class_frechet" and len(np.unique(labels)) == 1:
            continue  # of an unconditional model
        if name != "inception_score" or fake.log_probs.size:
            row[name] = float(values[name]())
    return row


def flat(examples: np.ndarray) -> np.ndarray:
    """Examples (n, ...), uint8 or float, as vectors (n, d) of floats."""
    return np.asarray(to_float(jnp.asarray(examples))).reshape(len(examples), -1)


def copies(
    samples: np.ndarray, training: Source, flip: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`metrics.copy_ratios` (n,) of samples (n, ...), uint8 or in [-1, 1], by their pixels, and the
    two nearest training images (n, 2).

    With `flip`, where training shows mirrored images, too, a sample has the lower one of its own
    ratio and that of its mirror image.
    """
    shown = [samples, samples[:, :, ::-1]] if flip else [samples]
    real = (flat(training[rows][0]) for rows in batches(training))
    distances, nearest = metrics.two_nearest(real, np.concatenate([flat(x) for x in shown]))
    ratios = metrics.copy_ratios(distances).reshape(len(shown), -1)
    chosen = ratios.argmin(0), np.arange(len(samples))
    return ratios[chosen], nearest.reshape(len(shown), -1, 2)[chosen]


def memorized(samples: np.ndarray, training: Source, flip: bool = False) -> float:
    """Share of samples that copy a training image; the arguments are those of `copies`."""
    return copy_measures(copies(samples, training, flip)[0])["memorized"]


def copies_picture(
    pixels: np.ndarray, training: Source, ratios: np.ndarray, nearest: np.ndarray
) -> np.ndarray | None:
    """The PICTURED samples (n, h, w, c) in [-1, 1] with the lowest ratios, each beside its two
    nearest training images; None: they are no images."""
    order = np.argsort(ratios, kind="stable")[:PICTURED]
    real = [np.asarray(to_float(jnp.asarray(training[rows][0]))) for rows in nearest[order].T]
    if pixels.ndim != 4 or pixels.shape[-1] > 3:
        return None
    blocks = dict(zip(("sample", "nearest", "second"), (pixels[order], *real), strict=True))
    texts = [f"{ratio:.2f}" for ratio in ratios[order]]
    return images.side_by_side(blocks, np.arange(len(order)), 1, texts)


def judged(
    pixels: np.ndarray, labels: np.ndarray, extractor: Extractor, real: RealStatistics,
    names: Sequence[str], judge: Extractor | None = None,
) -> dict[str, float]:  # fmt: skip
    """The measures of images with these labels; the options are those of `evaluate`."""
    own, other = extractor(pixels, labels), judge(pixels, labels) if judge else None
    found = measure(own, real, names, other)
    known = (other or own).log_probs.shape[1]
    classes = 1 + np.concatenate([labels, real.kept.labels]).max()
    if known not in (0, classes):
        found.pop("accuracy", None)
        logging.warning("No accuracy: %s knows %d classes, the data have %d; name another --judge.",
                        (judge or extractor).name, known, classes)  # fmt: skip
    return found


def title(row: Mapping[str, Any]) -> str:
    """The settings that tell the rows of a run apart, or the place of other samples."""
    name = row.get("samples_from") or f"{row['average']} scale {row['guidance_scale']:g}"
    place = f" interpolation {row['interpolation']:g}" if "interpolation" in row else ""
    return name.strip() + place


def table(rows: Iterable[Mapping[str, Any]], floor: Mapping[str, Any] = {}) -> str:
    """The measures of rows, and of the floor, with a column for each that one of them has."""
    named = {"real, held out": floor} if floor else {}
    for row in rows:
        named[title(row)] = row
    names = ("accuracy", *METRICS, "memorized", "copy_ratio", "network_calls")
    width = max(map(len, named))
    columns = [name for name in names if any(name in row for row in named.values())]
    lines = [" ".join([" " * width, *(f"{name:>12s}" for name in columns)])]
    for name, row in named.items():
        cells = (f"{row[c]:.4g}" if c in row else "" for c in columns)
        sized = (f"{x:>{max(12, len(c))}s}" for x, c in zip(cells, columns, strict=True))
        lines.append(" ".join([f"{name:{width}s}", *sized]))
    return "\n".join(lines)


def remark(rows: Iterable[Mapping[str, Any]], floor: Mapping[str, Any] = {}) -> str:
    """Sentences on Frechet distances, which depend on the number of samples; none without any."""
    found = [row for row in rows if "samples" in row and any("frechet" in key for key in row)]
    if not found:
        return ""
    counts = ", ".join(f"{count:,}" for count in sorted({row["samples"] for row in found}))
    held = f", of the floor {floor['samples']:,}" if floor else ""
    text = f"Frechet distances depend on the number of samples, {counts}{held}: compare equal ones."
    sizes = {
        (one["samples"], row.get("feature_length", 0))
        for row in found
        for one in (row, floor or row)
    }
    for count, length in sorted(sizes):
        if count < 2 * length:
            text += (f" {count:,} samples are too few for {length:,} features: their bias is large "
                     f"below {2 * length:,}.")  # fmt: skip
    return text


def pictures(rows: Iterable[Mapping[str, Any]], workdir: str) -> list[str]:
    """A line for each row of a run that has a picture of `copies_picture`: its place."""
    folder, shown = pathlib.Path(workdir, "evaluation"), [row for row in rows if "picture" in row]
    return [f"Nearest training images, {title(x)}: {folder / x['picture']}\n" for x in shown]


def real_statistics(
    extractor: Extractor,
    source: Source,
    cache: pathlib.Path | None = None,
    progress: Callable[[int], Any] = lambda count: None,
) -> RealStatistics:
    """Statistics of a data set, read in batches and stored in the folder `cache`.

    The file is named by a hash of the extractor, all labels and 256 evenly spaced images.
    """
    key = _hash(extractor.digest + _content(source) + "drawn" * (len(source) > KEPT))
    path = cache / f"{key}.npz" if cache else None
    if path is not None and exists(path):
        with np.load(path) as file:
            moments = metrics.Moments(int(file["count"]), file["mean"], file["cov"])
            return RealStatistics(
                moments, Features(*(file[name] for name in Features._fields)), key
            )
    chosen, kept = np.isin(np.arange(len(source)), drawn(source, KEPT, by_class=True)), []

    def read(rows: np.ndarray) -> metrics.Moments:
        found = extractor(*source[rows], progress)
        kept.append([array[chosen[rows]] for array in found])
        return metrics.moments(found.features)

    total = functools.reduce(metrics.Moments.merge, map(read, batches(source)))
    some = Features(*(np.concatenate(arrays) for arrays in zip(*kept, strict=True)))
    if path is not None and is_first():
        save_arrays(path, count=total.count, mean=total.mean, cov=total.cov, **some._asdict())
    return RealStatistics(total, some, key)


def real_data(run: runs.Run) -> tuple[Source, Source | None]:
    """The images that a run has learnt from, and those held out; latents are decoded.

    None, with a warning, if none are held out and the training, of eval_examples=0, needed none.
    """
    decode = latents.decoder(run.data, run.model)
    train = latents.decoded(run.source("train"), decode)
    try:
        test = latents.decoded(run.source("test"), decode)
    except ValueError as error:
        if run.config.get("eval_examples", 1):
            raise
        logging.warning("No row of held-out images: %s", error)
        return train, None
    if isinstance(train, latents.Decoded) != isinstance(test, latents.Decoded):
        logging.warning("Some of the real examples are images, others decoded latents: the floor "
                        "has the error of the autoencoder, too.")  # fmt: skip
    return train, test


def floor(
    test: Source, extractor: Extractor, real: RealStatistics, *, num_samples: int, seed: int,
    training: Source | None = None, flip: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """The measures of held-out images, at most `num_samples`; the options are those of `judged`,
    `training` that of `evaluate` and `flip` that of `copies`."""
    held_out, labels = test[drawn(test, num_samples, seed, by_class=True)]
    found = {"samples": len(labels), **judged(held_out, labels, extractor, real, **options)}
    if training is not None:
        found |= copy_measures(copies(held_out, training, flip)[0])
    return found


def batches(source: Source) -> list[np.ndarray]:
    """Indices of all examples, a few thousand at a time."""
    return np.split(np.arange(len(source)), range(8 * BATCH, len(source), 8 * BATCH))


def _content(source: Source) -> str:
    seen, _ = source[evenly(source, 256)]
    return digest([np.array([len(source)]), source.labels, seen])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def evaluate(
    run: runs.Run,
    extractor: Extractor,
    real: RealStatistics,  # of the same extractor
    *,
    names: Sequence[str] = METRICS,
    judge: Extractor | None = None,  # that accuracy is judged by; default: `extractor`
    num_samples: int = 10_000,  # of each row, with equally many of each class
    seed: int = 0,
    guided: generate.Guidance = generate.NONE,
    guidance_scales: Iterable[float] = (1.0,),  # in place of that of `guided`
    averages: Iterable[str] = ("",),
    interpolations: Iterable[float] = (1.0,),
    training: Source | None = None,  # images, to find copies of them among the samples
    floor: Mapping[str, Any] = {},  # measures of held-out images, stored with each new row
    batch_size: int = 256,
    progress: Callable[[int], Any] = lambda count: None,  # called with the number of new samples
) -> list[dict[str, Any]]:
    """A row, with its settings, for each average of the weights, interpolation and guidance scale.

    Images, for a model of latents the decoded ones, are rounded to 8 bits. Rows stored in the run's
    directory are read, not computed again. With `training` a row has `copy_measures`, and `picture`
    names the file of `copies_picture` beside it.
    `runs.Run.weights` explains averages and interpolations, `generate.generate` the other options.
    """
    rows: list[dict[str, Any]] = []
    decode = latents.decoder(run.data, run.model)
    for name in names:  # before samples are drawn
        look_up(dict.fromkeys(METRICS), name, "metric")
    guidance_scales = [*guidance_scales]
    strongest = max(guidance_scales, key=lambda scale: abs(scale - 1))
    warn_untrained(run, [0], guided.at(strongest))
    made_by = {**provenance(), "device": banner()}
    labels = np.resize(np.arange(run.model.null_label), num_samples)
    fixed: dict[str, Any] = {
        **guided.settings(), "sampler": run.sampler.settings(), "seed": seed,
        "samples": num_samples, "rounding": "8 bits", "metrics": list(names),
        "features": extractor.name, "features_weights": extractor.digest,
        "judge": (judge or extractor).name, "judge_weights": (judge or extractor).digest,
        "reference": real.digest, "reference_examples": real.moments.count,
    }  # fmt: skip
    fixed |= {"autoencoder": decode.digest} if decode else {}
    fixed |= {"memorized_from": _content(training)} if training is not None else {}
    fixed |= {"memorized_mirrored": True} if training is not None and run.data.flip else {}
    for average, interpolation in itertools.product(averages, interpolations):
        params, step = run.weights(average, interpolation=interpolation)
        which = {"step": step, "average": average, "weights": digest(params)}
        which |= {"interpolation": float(interpolation)} if interpolation != 1 else {}
        for scale in guidance_scales:
            settings = {**which, "guidance_scale": float(scale), **fixed}
            name = f"{_hash(json.dumps(settings, sort_keys=True))}.json"
            path = run.workdir / "evaluation" / name
            if exists(path):
                rows.append(json.loads(path.read_text()))
                progress(num_samples)
                continue
            start, here = time.perf_counter(), guided.at(scale)
            samples = generate.generate(
                run.model, params, labels, run.sampler,
                guided=here, seed=seed, batch_size=batch_size, progress=progress,
            )  # fmt: skip
            cost: dict[str, Any] = {
                "network_calls": here.calls(run.model, run.sampler),
                "samples_per_second": num_samples / (time.perf_counter() - start),
                "feature_length": len(real.moments.mean),
            }
            pixels = latents.as_8_bits(samples, decode)
            found = judged(pixels, labels, extractor, real, names, judge)
            if training is not None:
                found |= copy_measures((near := copies(pixels, training, run.data.flip))[0])
                if (picture := copies_picture(pixels, training, *near)) is not None:
                    cost["picture"], shown = f"{path.stem}.png", picture
            rows.append({**settings, **found, **cost, **made_by})
            rows[-1] |= {"floor": dict(floor)} if floor else {}
            if is_first():
                if "picture" in cost:
                    images.save(path.with_suffix(".png"), shown)
                write_json(path, rows[-1])
    return rows


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """The reading (step, params) -> measures of samples, always from the same noise.

    `sample_accuracy` is the `accuracy` of `mclr evaluate`, a name that objectives have, too. Errors
    of the settings come before the first step; statistics of the training set when first needed.
    """

    options: Evaluate
    model: Model
    sampler: Sampler
    data: Data
    source: Source  # of training

    def __post_init__(self):
        least = 2 * self.model.null_label
        if self.options.num_samples < least:
            raise ValueError(
                f"config.evaluate.num_samples is {self.options.num_samples}; expected at least "
                f"{least}, two of each class."
            )
        _ = self.extractor, self.decode

    @functools.cached_property
    def extractor(self) -> Extractor:
        return load_extractor(self.options.features)

    @functools.cached_property
    def decode(self) -> latents.Decoder | None:
        return latents.decoder(self.data, self.model)

    @functools.cached_property
    def real(self) -> RealStatistics:
        cache = pathlib.Path(CACHE).expanduser()
        source = latents.decoded(self.source, self.decode)
        return real_statistics(self.extractor, source, cache)

    def __call__(self, step: int, params: Any) -> dict[str, float]:
        labels = np.resize(np.arange(self.model.null_label), self.options.num_samples)
        try:
            samples = generate.generate(self.model, params, labels, self.sampler)
            pixels = latents.as_8_bits(samples, self.decode)
            names = self.options.metrics
            found = judged(pixels, labels, self.extractor, self.real, names)
        except FloatingPointError as error:  # no reason to stop a run
            logging.warning("No measures of samples at step %d: %s", step, error)
            return {}
        accuracy = {"sample_accuracy": found.pop("accuracy")} if "accuracy" in found else {}
        return found | accuracy
