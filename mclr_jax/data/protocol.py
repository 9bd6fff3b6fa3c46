"""Data sets: labelled examples by random access, with one shape and a number of classes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence, Sized
from typing import Protocol

import numpy as np
from absl import logging

UNITS = ("offset", "scale", "time_step")  # of the data; optional attributes of a source


class Source(Protocol):
    """Labelled examples by random access.

    `source[indices]`, with indices (n,) integers in [0, len(source)), gives images (n, *shape),
    uint8 (0..255) or float32 (used without scaling: in [-1, 1], or latents), and labels (n,) int32
    in [0, num_classes). It may be called from several threads at once. An optional attribute
    `class_names`, a tuple of texts, has the names of label 0, 1, ...
    """

    @property
    def shape(self) -> tuple[int, ...]: ...  # of one example, (H, W, C) or (d,)
    @property
    def num_classes(self) -> int: ...
    @property
    def in_memory(self) -> bool: ...  # indexing is so cheap that threads need not read ahead
    @property
    def labels(self) -> np.ndarray: ...  # of all examples, (N,) int32; may read the whole set
    def __len__(self) -> int: ...
    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A source in memory: images (N, *shape) uint8 or float32, labels (N,) int32."""

    images: np.ndarray
    labels: np.ndarray
    num_classes: int
    in_memory: bool = True
    class_names: tuple[str, ...] = ()
    latents: str = ""  # their kind, of `latents.KINDS`; empty: they are none

    def __post_init__(self):
        as_labels(self.labels, len(self.images), "the source", self.num_classes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A source that reads each example when it is indexed."""

    length: int
    shape: tuple[int, ...]
    num_classes: int
    read: Callable[[int], tuple[np.ndarray, int]]  # index -> image, label; thread-safe
    read_labels: Callable[[], np.ndarray]
    name: Callable[[int], str] = "image {}".format  # index -> what errors call it
    class_names: tuple[str, ...] = ()

    in_memory = False

    @functools.cached_property
    def labels(self) -> np.ndarray:
        return self.read_labels()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, values = zip(*(self.read(int(index)) for index in indices), strict=True)
        for index, image in zip(indices, images, strict=True):
            if image.shape != self.shape:
                raise ValueError(
                    f"{self.name(int(index))} has shape {image.shape}, expected {self.shape} as "
                    "the first; resize the images, or set config.data.resolution (tfds, zip)"
                )
        labels = as_labels(np.array(values), len(images), "the source", self.num_classes)
        return np.stack(images), labels


class Subset:
    """The examples `indices` (n,) of another source, in this order.

    Those of `one_class`, the data of an unconditional model, all have label 0.
    """

    def __init__(self, source: Source, indices: np.ndarray, one_class: bool = False):
        self.source, self.indices, self.one_class = source, indices, one_class
        self.shape, self.num_classes = source.shape, 1 if one_class else source.num_classes
        self.in_memory = source.in_memory
        for name in (*UNITS, "latents"):  # optional
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))
        self.class_names = () if one_class else names_of(source)
        if moments := getattr(source, "moments", None):
            self.moments = lambda indices: self._labelled(*moments(self.indices[indices]))

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32) if self.one_class else self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._labelled(*self.source[self.indices[indices]])

    def _labelled(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return images, np.zeros(len(labels), np.int32) if self.one_class else labels


class Derived:
    """Base of sources whose examples are made of those of another `source`, with their labels."""

    source: Source

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels

    def __len__(self) -> int:
        return len(self.source)


def for_training(source: Source, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels as a training takes them: of latents, what they are drawn from."""
    return getattr(source, "moments", source.__getitem__)(indices)


def evenly(source: Sized, count: int) -> np.ndarray:
    """The indices of at most `count` examples, evenly spaced from the first to the last."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64)


def drawn(source: Source, count: int, seed: int = 0, by_class: bool = False) -> np.ndarray:
    """The indices of at most `count` examples, drawn by `seed`: in whatever order a set is stored,
    they stand for all of it. If they suffice, all examples in their order.

    With `by_class`, which reads all labels, each class has its share in the set, to one example.
    """
    rows = np.arange(len(source))
    if count < len(rows):
        np.random.default_rng(seed).shuffle(rows)
        if by_class:
            rows = rows[np.argsort(source.labels[rows], kind="stable")]
    return rows[evenly(source, count)]


def sigma_data(source: Source) -> float:
    """Standard deviation of the data (uint8 as x / 127.5 - 1), over all pixels of at most 4096
    evenly spaced examples; `sigma_data` of Karras et al. 2022 (arXiv:2206.00364)."""
    images, _ = source[evenly(source, 4096)]
    return float(images.std(dtype=np.float64) / (127.5 if images.dtype == np.uint8 else 1))


def limit(source: Source, n: int, seed: int) -> Subset:
    """A random subset of n examples with equal shares of the classes, as far as these suffice; for
    the same seed, a larger subset contains a smaller one."""
    if not 1 <= n <= len(source):
        raise ValueError(f"got a limit of {n} examples, expected 1 to {len(source)}")
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(source))
    labels = source.labels[order]
    rank = np.zeros(len(source), np.int64)  # the number of earlier examples of the same class
    for label in range(source.num_classes):
        rank[labels == label] = np.arange((labels == label).sum())
    return Subset(source, np.sort(order[np.argsort(rank, kind="stable")[:n]]))


def as_images(images: np.ndarray, what: str) -> np.ndarray:
    """uint8 or float32; raises ValueError if the type is neither uint8 nor a float type."""
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{what} has images of {images.dtype}, expected uint8 or a float type")
    return images if images.dtype == np.uint8 else images.astype(np.float32)


def check_finite(images: np.ndarray, what: str) -> None:
    """Raise ValueError on images (n, ...) with an infinity or NaN."""
    if images.dtype != np.uint8 and not np.isfinite(images).all():
        bad = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))
        raise ValueError(f"{what} has {len(bad)} images that are not finite, {bad[0]} first")


def check_values(images: np.ndarray, what: str) -> None:
    """Raise ValueError on images (n, ...) that are not finite or, in grey or colour, not [-1, 1].

    Floats in [0, 1] may be meant; they cause a warning.
    """
    channels = images.shape[3] if images.ndim == 4 else 0
    if channels > 4 and images.shape[1] in (1, 3):
        raise ValueError(
            f"{what} has images of shape {images.shape[1:]}, which seem to be (C, H, W); expected "
            "(H, W, C): transpose them"
        )
    if images.dtype == np.uint8 or not images.size:
        return
    check_finite(images, what)
    low, high = images.min(), images.max()
    if channels == 8 and ("img-mean-std-" in what or images[..., 4:].min() > 0 > low):
        raise ValueError(
            f"{what} seems to hold latents: not images of 8 channels, but 4 means and 4 standard "
            "deviations for each pixel of 4 channels. In a zip, set config.data.latents to the "
            "convention by which they were made: edm2, or stable_diffusion (DiT, SiT, REPA)"
        )
    if channels in (1, 3) and high > 10:
        raise ValueError(
            f"{what} has float images from {low:g} to {high:g}; expected [-1, 1], or uint8: store "
            "them as uint8, or as x / 127.5 - 1"
        )
    if channels in (1, 3) and low >= 0 and 0 < high <= 1:
        logging.warning("%s has float images from %g to %g; expected [-1, 1].", what, low, high)


def names_of(source: Source) -> tuple[str, ...]:
    """The names of label 0, 1, ... in a source; empty: it has none."""
    return tuple(getattr(source, "class_names", ()))


def caption(label: int, class_names: Sequence[str] = ()) -> str:
    """A label as pictures and tables show it: the first of the names of its class, at most 20
    characters of it, or the number of a class without a name."""
    if label >= len(class_names):
        return str(label)
    name = class_names[label].partition(",")[0]
    return name if len(name) <= 20 else f"{name[:19]}\N{HORIZONTAL ELLIPSIS}"


def check_names(train: Source, test: Source) -> None:
    """Raise ValueError if both name their classes, and a label of both means two classes."""
    pairs = zip(names_of(train), names_of(test), strict=False)
    for label, (name, other) in enumerate(pairs):
        if name != other:
            raise ValueError(
                f"Label {label} is {name!r} in the training set and {other!r} in the held-out set; "
                "expected the same. Give both the same classes, or number them by dataset.json"
            )


def count_classes(labels: np.ndarray, what: str) -> int:
    """The largest of the labels plus 1; warns if a smaller label has no example."""
    classes = int(labels.max(initial=0)) + 1
    if absent := classes - len(np.unique(labels)):
        logging.warning(
            "%s: %d of %d classes have no example; renumber the labels from 0 without gaps, or "
            "give num_classes.", what, absent, classes,
        )  # fmt: skip
    return classes


def as_labels(labels: np.ndarray, count: int, what: str, num_classes: float = np.inf) -> np.ndarray:
    """int32; raises ValueError unless `labels` are `count` integers in [0, num_classes)."""
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{what} has labels of shape {labels.shape} and {labels.dtype}, expected one integer "
            f"for each of {count} images"
        )
    num_classes = min(num_classes, 2**31)  # int32
    if count and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"{what} has labels from {labels.min()} to {labels.max()}, expected 0 to "
            f"{num_classes - 1}; correct the labels or config.data.num_classes"
        )
    return labels.astype(np.int32)
