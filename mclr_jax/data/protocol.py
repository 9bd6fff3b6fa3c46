"""Data sets: labelled examples by random access, with one shape and a number of classes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Protocol

import numpy as np


class Source(Protocol):
    """Labelled examples by random access.

    `source[indices]`, with indices (n,) integers in [0, len(source)), gives images (n, *shape),
    uint8 (0..255) or float32 (used without scaling: in [-1, 1], or latents), and labels (n,) int32
    in [0, num_classes). It may be called from several threads at once.
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
    in_memory: bool = False

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
                    f"got image {index} of shape {image.shape}, expected {self.shape} as of the "
                    "first; resize the images, or use a source with option `resolution`"
                )
        labels = as_labels(np.array(values), len(images), "the source", self.num_classes)
        return np.stack(images), labels


class Subset:
    """The examples `indices` (n,) of another source, in this order."""

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices
        self.shape, self.num_classes = source.shape, source.num_classes
        self.in_memory = source.in_memory

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.source[self.indices[indices]]


def evenly(source: Source, count: int) -> np.ndarray:
    """The indices of at most `count` examples, evenly spaced: the same for each call."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64)


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


def as_labels(labels: np.ndarray, count: int, what: str, num_classes: float = np.inf) -> np.ndarray:
    """int32; raises ValueError unless `labels` are `count` integers in [0, num_classes)."""
    if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{what} has labels of shape {labels.shape} and {labels.dtype}, expected one integer "
            f"for each of {count} images"
        )
    if count and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"{what} has labels from {labels.min()} to {labels.max()}, expected 0 to "
            f"{num_classes - 1}; correct the labels or option `num_classes`"
        )
    return labels.astype(np.int32)
