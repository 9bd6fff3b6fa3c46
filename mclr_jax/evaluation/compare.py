"""Any images against any others, or against statistics of them, without a run.

Statistics are npz files with `mu` (d,) and `sigma` (d, d), as those of EDM, guided-diffusion and
clean-fid, or the pickles of EDM2, which have such a pair for each extractor.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from mclr_jax import images
from mclr_jax.data import protocol, sources
from mclr_jax.data.formats import FORMATS
from mclr_jax.data.protocol import Arrays, Source
from mclr_jax.evaluation import evaluate
from mclr_jax.evaluation.evaluate import OF_REFERENCE, RealStatistics
from mclr_jax.evaluation.features import Extractor, Features
from mclr_jax.evaluation.metrics import Moments
from mclr_jax.files import digest, named, provenance, save_arrays
from mclr_jax.pretrained import tensors
from mclr_jax.training.devices import banner

Progress = Callable[[int], Any]
PAIR = {"mu", "sigma"}
IMAGES, LABELS = ("images", "arr_0"), ("labels", "arr_1")  # in npz files


def source(place: str, resolution: int = 0, content: Mapping[str, Any] = {}) -> Source:
    """The images in a folder, a zip or an npz file, or those of a data source, see `sources.load`.

    Folders and zips need no labels. An npz file, whose `content` may have been read, has `images`
    or `arr_0`, and may have `labels` or `arr_1`; floats are rounded to 8 bits. With a `resolution`,
    files of images are cropped and resized. FileNotFoundError: there is nothing at this place.
    """
    path, kind = pathlib.Path(place), place.partition(":")[0]
    if path.suffix == ".npz" and (content := content or _content(path)):
        return _arrays(content, place)
    if path.exists():
        place = f"{'folder' if path.is_dir() else 'zip'}:{place}"
    elif kind not in FORMATS and ":" not in place:
        known = f"or a data source: {', '.join(FORMATS)}"
        raise FileNotFoundError(f"Found no folder or file {place}; expected one, {known}.")
    given: dict[str, Any] = {"unlabelled": None, "resolution": resolution}
    options = {key: x for key, x in given.items() if x != 0 and key in sources.options_of(place)}
    return sources.load(place, "train", **options)


def _content(path: pathlib.Path) -> dict[str, Any]:
    """The content of a pickle, or the names in an npz file with the arrays that are read here."""
    if path.suffix not in (".npz", ".pkl") or not path.is_file():
        return {}
    if path.suffix == ".pkl":
        return tensors.load(path)
    read = {*PAIR, "count", *IMAGES, *LABELS}
    with named(f"{path} is no intact npz file"), np.load(path) as file:
        return {name: file[name] if name in read else None for name in file}


def _arrays(content: Mapping[str, Any], place: str) -> Source:
    pixels, labels = (
        next((content[name] for name in names if name in content), None)
        for names in (IMAGES, LABELS)
    )
    if pixels is None:
        raise ValueError(f"{place}: it has {sorted(content)}; expected `images` or `arr_0`.")
    pixels = protocol.as_images(pixels[..., None] if pixels.ndim == 3 else pixels, place)
    protocol.check_values(pixels, place)
    if pixels.ndim == 4 and pixels.shape[-1] in (1, 3) and pixels.dtype != np.uint8:
        pixels = images.to_uint8(pixels)
    labels = np.zeros(len(pixels), np.int32) if labels is None else labels
    labels = labels.argmax(1) if labels.ndim == 2 else labels  # one-hot, as EDM writes them
    labels = protocol.as_labels(labels, len(pixels), place)
    return Arrays(pixels, labels, 1 + int(labels.max()))


def _moments(content: Mapping[str, Any], place: str, extractor: Extractor) -> Moments | None:
    """The statistics in the content of a file, of the features of an extractor; None: it has none.

    Only the files of `write_statistics` say how many images they are of; otherwise count is 0.
    ValueError: the file has statistics of another number of features alone.
    """
    found = [x for x in (content, *content.values()) if isinstance(x, Mapping) and x.keys() >= PAIR]
    pairs = [[np.asarray(one[name], np.float64) for name in ("mu", "sigma")] for one in found]
    for mu, sigma in pairs:
        if mu.ndim != 1 or sigma.shape != mu.shape * 2:
            shapes = f"mu of shape {mu.shape} and sigma of shape {sigma.shape}"
            raise ValueError(f"{place} has {shapes}; expected (d,) and (d, d). Get the file again.")
        if len(mu) == extractor.length:
            return Moments(int(content.get("count", 0)), mu, sigma)
    if pairs:
        raise ValueError(
            f"{place} has statistics of {' and '.join(str(len(mu)) for mu, _ in pairs)} features; "
            f"{extractor.name} has {extractor.length}. Name by --features the extractor that they "
            "were made with."
        )
    return None


def write_statistics(path: str | pathlib.Path, moments: Moments) -> None:
    """Write moments as EDM, guided-diffusion and clean-fid read them, and their count."""
    save_arrays(path, mu=moments.mean, sigma=moments.cov, count=moments.count)


def reference(
    place: str | Source,
    extractor: Extractor,
    resolution: int = 0,
    cache: pathlib.Path | None = None,
    progress: Progress = lambda count: None,
) -> RealStatistics:
    """Statistics of a source, or of the images at a place, see `source`, or those in a file.

    A file of guided-diffusion may have both: moments, and images for the other metrics.
    """
    if not isinstance(place, str):
        return evaluate.real_statistics(extractor, place, cache, progress)
    content = _content(pathlib.Path(place))
    if (told := _moments(content, place, extractor)) and not {*IMAGES} & content.keys():
        size = len(told.mean)
        kept = Features(np.zeros((0, size)), np.zeros((0, 0)), np.zeros(0, np.int32))
    else:
        examples = source(place, resolution, content)
        found = evaluate.real_statistics(extractor, examples, cache, progress)
        if told is None:
            return found
        kept = found.kept
    return RealStatistics(told, kept, digest([told.mean, told.cov]))


def lacking(fake: Features | None, real: RealStatistics) -> dict[str, str]:
    """The metrics that these examples do not permit, each with the reason."""
    found = {}
    if fake is not None:
        if not (ours := _classes(fake.labels)):
            found["inter_class_frechet"] = "the samples have no classes of two or more examples"
        if not ours or ours != _classes(real.kept.labels):
            found["per_class_frechet"] = "the classes are not the same, of two or more examples"
        if not fake.log_probs.size:
            found["inception_score"] = "the extractor has no classes"
    if not len(real.kept.labels):
        found |= dict.fromkeys(OF_REFERENCE, "the reference has statistics, no images")
    return found


def permitted(names: Sequence[str], real: RealStatistics) -> list[str]:
    """The metrics of samples that this reference permits."""
    absent = lacking(None, real)
    return [name for name in names if name not in absent]


def _classes(labels: np.ndarray) -> set[int]:
    """The classes, if there are several, each of two or more examples; otherwise none."""
    found, counts = np.unique(labels, return_counts=True)
    return {*found.tolist()} if len(found) > 1 and counts.min() > 1 else set()


def compare(
    samples: Source,
    extractor: Extractor,
    real: RealStatistics,  # of the same extractor
    names: Sequence[str] = evaluate.METRICS,
    num_samples: int = 0,  # a random subset, each class with its share; 0: all
    seed: int = 0,
    progress: Progress = lambda count: None,
) -> dict[str, Any]:
    """A row of measures, with its settings; metrics that need what is not there are left out.

    Accuracy is among them if the extractor knows as many classes as the samples have.
    """
    count = min(num_samples or len(samples), len(samples))
    chosen = protocol.Subset(samples, protocol.drawn(samples, count, seed, by_class=True))
    parts = [extractor(*chosen[rows], progress) for rows in evaluate.batches(chosen)]
    fake = Features(*map(np.concatenate, zip(*parts, strict=True)))
    absent = lacking(fake, real)
    for name in (name for name in names if name in absent):
        logging.warning("No %s: %s.", name, absent[name])
    found = evaluate.measure(fake, real, [name for name in names if name not in absent])
    if samples.num_classes < 2 or fake.log_probs.shape[1] != samples.num_classes:
        found.pop("accuracy", None)
    return {
        "samples": count, "seed": seed, "rounding": "8 bits", "features": extractor.name,
        "features_weights": extractor.digest, "feature_length": extractor.length,
        "reference": real.digest, "reference_examples": real.moments.count, **found,
        **provenance(), "device": banner(),
    }  # fmt: skip


def described(row: Mapping[str, Any]) -> str:
    """A sentence on the images of a row of `compare`, with the places that they are from."""
    known = row["reference_examples"]
    of = f"{known:,} images" if known else "statistics of unknown images"
    return (f"{row['samples']:,} images of {row['samples_from']}; reference: {of}, "
            f"{row['reference_from']}.")  # fmt: skip
