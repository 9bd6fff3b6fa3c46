"""Data sets by random access: examples are asked for by index, and say their shape and classes."""

import dataclasses
import functools
import gzip
import inspect
import io
import json
import math
import pathlib
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable
from typing import Protocol

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError

from mclr_jax import mixture
from mclr_jax.names import look_up, nearest

IN_MEMORY_BYTES = 2**30
FASHION_MNIST_PATH = "/usr/share/datasets/fashion-mnist"


class Source(Protocol):
    """Labelled examples by random access.

    `source[indices]`, with indices (n,) integers in [0, len(source)), gives images (n, *shape),
    uint8 (0..255) or float32 (taken as they are: in [-1, 1], or latents), and labels (n,) int32 in
    [0, num_classes). It may be called from several threads at once.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example: (H, W, C) or (d,)."""

    @property
    def num_classes(self) -> int: ...

    @property
    def in_memory(self) -> bool:
        """Whether indexing is cheap, so that reading ahead in threads would not pay."""

    @property
    def labels(self) -> np.ndarray:
        """Of all examples, (N,) int32. The first use may read the whole set."""

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
        if len(self.images) != len(self.labels):
            raise ValueError(
                f"got {len(self.images)} images and {len(self.labels)} labels; expected as many"
            )
        _check_labels(self.labels, self.num_classes)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.images[indices], self.labels[indices]


@dataclasses.dataclass(frozen=True, eq=False)
class Lazy:
    """A source that reads each example when it is asked for.

    read(i) -> (image of `shape`, label) must be safe to call from several threads.
    """

    length: int
    shape: tuple[int, ...]
    num_classes: int
    read: Callable[[int], tuple[np.ndarray, int]]
    read_labels: Callable[[], np.ndarray]
    in_memory: bool = False

    def __post_init__(self):
        # Dataclasses generate no cached properties; this is one, bound to the instance.
        object.__setattr__(self, "read_labels", functools.cache(self.read_labels))

    @property
    def labels(self) -> np.ndarray:
        return self.read_labels()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images, labels = zip(*(self.read(int(index)) for index in indices), strict=True)
        for index, image in zip(indices, images, strict=True):
            if image.shape != self.shape:
                raise ValueError(
                    f"got image {index} of shape {image.shape} where the first has {self.shape}; "
                    "images must be of one size: resize them, or use a source with `resolution`"
                )
        _check_labels(np.array(labels), self.num_classes)
        return np.stack(images), np.array(labels, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Subset:
    """The examples `indices` (n,) of another source, in that order."""

    source: Source
    indices: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def num_classes(self) -> int:
        return self.source.num_classes

    @property
    def in_memory(self) -> bool:
        return self.source.in_memory

    @property
    def labels(self) -> np.ndarray:
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.source[self.indices[indices]]


def load(name: str, split: str = "train", **options) -> Source:
    """Opens a data set.

    Args:
      name: 'digits', 'fashion_mnist', 'mixture', 'tfds:NAME', 'zip:PATH' or 'npz:PATH'.
      split: 'train' or 'test' ('digits' also has 'all').
      options: keyword arguments of the function for that name, below.

    Raises:
      ValueError, FileNotFoundError: an unknown name, split or option, a missing or corrupt file,
        labels out of range, lengths that differ. Each message says what to do.
    """
    kind, _, argument = name.partition(":")
    loader, needs_argument = look_up(_LOADERS, kind, "data source")
    if bool(needs_argument) != bool(argument):
        expected = f"'{kind}:{needs_argument}'" if needs_argument else f"'{kind}'"
        raise ValueError(f"got data source {name!r}, expected {expected}")
    splits = ["train", "test", "all"] if kind == "digits" else ["train", "test"]
    if split not in splits:
        raise ValueError(f"got split={split!r} for {name!r}, expected one of {splits}")
    known = [
        key for key in inspect.signature(loader).parameters if key not in ("argument", "split")
    ]
    for option in options:
        if option not in known:
            raise ValueError(f"got option {option!r} for {name!r}; {nearest(option, known)}")
    return loader(argument, split, **options)


def evenly(source: Source, count: int) -> np.ndarray:
    """At most `count` rows of a source, evenly spaced: the same each time."""
    return np.linspace(0, len(source) - 1, min(count, len(source))).astype(np.int64)


def sigma_data(source: Source) -> float:
    """Standard deviation of the data as the network sees it (uint8 as x / 127.5 - 1).

    Over all pixels of at most 4096 evenly spaced examples; `sigma_data` in Karras et al. 2022.
    """
    images, _ = source[evenly(source, 4096)]
    scale = 127.5 if images.dtype == np.uint8 else 1.0
    return float(images.std(dtype=np.float64) / scale)


def limit(source: Source, n: int, seed: int) -> Subset:
    """A random subset of n examples, as many of each class as there are to be had.

    With one seed, a smaller subset is contained in a larger one.
    """
    if not 1 <= n <= len(source):
        raise ValueError(f"got a limit of {n} examples, expected 1 to {len(source)}")
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(source))
    labels = source.labels[order]
    rank = np.zeros(len(source), np.int64)  # how many of its class come before it
    for label in range(source.num_classes):
        rank[labels == label] = np.arange((labels == label).sum())
    return Subset(source, np.sort(order[np.argsort(rank, kind="stable")[:n]]))


# One function for each name. Keyword-only arguments are the options of `load`.


def _digits(argument: str, split: str) -> Arrays:
    """scikit-learn's 1,797 digits of 8x8; train: 1,497 in equal shares, test: the other 300."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    everything = Arrays(images, data.target.astype(np.int32), 10)
    train = limit(everything, 1497, seed=0).indices
    test = np.setdiff1d(np.arange(len(everything)), train)
    indices = {"train": train, "test": test, "all": np.arange(len(everything))}[split]
    return Arrays(*everything[indices], 10)


def _fashion_mnist(argument: str, split: str, *, path: str = FASHION_MNIST_PATH) -> Arrays:
    """IDX files, gzipped or not, in the folder `path`; MNIST's own files have the same names."""
    prefix = {"train": "train", "test": "t10k"}[split]
    images = _read_idx(pathlib.Path(path), f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(pathlib.Path(path), f"{prefix}-labels-idx1-ubyte", dimensions=1)
    return Arrays(images[..., None], labels.astype(np.int32), 10)


def _read_idx(folder: pathlib.Path, name: str, dimensions: int) -> np.ndarray:
    files = [file for file in (folder / name, folder / f"{name}.gz") if file.is_file()]
    if not files:
        raise FileNotFoundError(
            f"found no {name}[.gz] in {folder}; on Debian `apt-get install dataset-fashion-mnist` "
            f"puts it into {FASHION_MNIST_PATH}, elsewhere give the folder by option `path`"
        )
    try:
        content = files[0].read_bytes()
        content = gzip.decompress(content) if files[0].suffix == ".gz" else content
        magic, *shape = struct.unpack_from(f">{1 + dimensions}I", content)
        array = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise ValueError(f"{files[0]} is no intact IDX file ({error}); get it again") from error
    if magic != 0x0800 + dimensions:
        raise ValueError(
            f"{files[0]} has magic number {magic:#x}, expected {0x0800 + dimensions:#x}"
        )
    return array


def _tfds(
    argument: str,
    split: str,
    *,
    path: str | None = None,
    resolution: int | None = None,
    in_memory: bool | None = None,
) -> Source:
    """A TensorFlow Datasets set prepared as array_record, read without TensorFlow.

    Args:
      path: TFDS's data_dir (default: TFDS's own, ~/tensorflow_datasets).
      resolution: center-crop and resize to this; needed where images are of unequal size.
      in_memory: decode everything now (default: if that takes less than 1 GiB).
    """
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(argument, data_dir=path)
    except ValueError as error:  # DatasetNotFoundError; its message lists all of some 1,300 names
        first = str(error).splitlines()[0]
        raise ValueError(
            f"TFDS has no {argument!r} ({first}); check the name and `path`"
        ) from error
    if not builder.is_prepared() or builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        # `tfds.data_source` would start a download here.
        raise FileNotFoundError(
            f"TFDS set {argument!r} is not prepared as array_record in {builder.data_path}; "
            f"run `tfds build {argument} --file_format=array_record --data_dir=DIR` "
            "(in an environment that has TensorFlow) and give DIR by option `path`"
        )
    features = builder.info.features
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
        raise ValueError(
            f"TFDS set {argument!r} has features {sorted(features)}, expected an 'image' and a "
            "'label' of classes"
        )
    if split not in builder.info.splits:
        raise ValueError(
            f"TFDS set {argument!r} has splits {sorted(builder.info.splits)}, got {split!r}"
        )
    if None in features["image"].shape and resolution is None:
        raise ValueError(
            f"TFDS set {argument!r} has images of unequal size; give option `resolution`, to which "
            "they are center-cropped and resized"
        )
    mode = "L" if features["image"].shape[-1] == 1 else "RGB"
    encoded = isinstance(features["image"], tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    records = builder.as_data_source(split=split, decoders=decoders)

    def read(index: int) -> tuple[np.ndarray, int]:
        record = records[index]
        image = record["image"]
        if isinstance(image, bytes) or resolution is not None:
            image = _decode(image, mode, f"image {index} of {argument!r}", resolution)
        return image, int(record["label"])

    def read_labels() -> np.ndarray:
        return np.array([record["label"] for record in records], np.int32)

    shape = read(0)[0].shape
    num_classes = features["label"].num_classes
    return _settle(Lazy(len(records), shape, num_classes, read, read_labels), in_memory)


def _zip(
    argument: str,
    split: str,
    *,
    num_classes: int | None = None,
    unlabelled: bool = False,
    in_memory: bool | None = None,
) -> Source:
    """The data set format of EDM and EDM2: images or .npy (C, H, W) and a dataset.json, zipped.

    Args:
      num_classes: default: the largest label + 1.
      unlabelled: accept a set without labels as one of a single class.
      in_memory: decode everything now (default: if that takes less than 1 GiB).
    """
    _only_train("zip", split)
    archive, lock = _open(argument, zipfile.ZipFile), threading.Lock()
    files = sorted(n for n in archive.namelist() if n.lower().endswith((".png", ".npy")))
    if not files:
        raise ValueError(f"{argument} holds no .png or .npy files, so it is no EDM data set")
    if "dataset.json" in archive.namelist():
        pairs = json.loads(archive.read("dataset.json")).get("labels")
    else:
        pairs = None
    if pairs is None and not unlabelled:
        raise ValueError(
            f"{argument} has no labels in dataset.json; give option unlabelled=True to take it as "
            "a set of a single class"
        )
    by_file = dict.fromkeys(files, 0) if pairs is None else dict(pairs)
    missing = [file for file in files if file not in by_file]
    if missing:
        raise ValueError(
            f"{argument} has {len(files)} images of which {len(missing)} have no label in "
            f"dataset.json, {missing[0]} for one; add their labels"
        )
    labels = _as_labels(np.array([by_file[file] for file in files]), argument)

    def read(index: int) -> tuple[np.ndarray, int]:
        try:
            with lock:
                content = archive.read(files[index])
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{argument} is corrupt at {files[index]} ({error})") from error
        if files[index].lower().endswith(".png"):
            image = _decode(content, None, f"{files[index]} in {argument}")
        else:
            array = np.load(io.BytesIO(content), allow_pickle=False)
            image = _as_images(np.moveaxis(array, 0, -1), f"{files[index]} in {argument}")
        return image, int(labels[index])

    num_classes = num_classes or int(labels.max()) + 1
    _check_labels(labels, num_classes)
    source = Lazy(len(files), read(0)[0].shape, num_classes, read, lambda: labels)
    return _settle(source, in_memory)


def _npz(argument: str, split: str, *, num_classes: int | None = None) -> Arrays:
    """Arrays `images` (N, H, W, C), (N, H, W) or (N, d), and `labels` (N,), as sample files of this
    project have them; `test_images` and `test_labels` are the test split."""
    prefix = {"train": "", "test": "test_"}[split]
    archive = _open(argument, functools.partial(np.load, allow_pickle=False))
    absent = [n for n in (f"{prefix}images", f"{prefix}labels") if n not in archive]
    if absent:
        raise ValueError(
            f"{argument} has no {absent} for split={split!r}, only {sorted(archive)}; add them, or "
            "choose another split or file"
        )
    try:
        images, labels = archive[f"{prefix}images"], archive[f"{prefix}labels"]
    except (ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{argument} is corrupt ({error}); write it again") from error
    images = _as_images(images[..., None] if images.ndim == 3 else images, argument)
    labels = _as_labels(labels, argument)
    return Arrays(images, labels, num_classes or int(labels.max(initial=0)) + 1)


def _mixture(argument: str, split: str) -> Arrays:
    """Draws from `mixture.toy()`: 65,536 points to train on, 8,192 others to test."""
    seed, size = {"train": (0, 65_536), "test": (1, 8192)}[split]
    points, labels = mixture.toy().sample(jax.random.key(seed), size)
    return Arrays(np.asarray(points), np.asarray(labels), 3)


# The loader of each name, and what follows its colon, if anything.
_LOADERS: dict[str, tuple[Callable[..., Source], str]] = {
    "digits": (_digits, ""),
    "fashion_mnist": (_fashion_mnist, ""),
    "mixture": (_mixture, ""),
    "tfds": (_tfds, "NAME"),
    "zip": (_zip, "PATH"),
    "npz": (_npz, "PATH"),
}


# What they share.


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The largest central square, resized as in ADM, EDM and DiT.

    Halved by box filter while at least twice too large, then bicubic, then cropped.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - resolution) // 2, (size[1] - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _decode(
    data: bytes | np.ndarray, mode: str | None, what: str, resolution: int | None = None
) -> np.ndarray:
    """PNG or JPEG bytes, or a uint8 array (H, W, C), -> (H, W, C) uint8, cropped and resized."""
    try:
        if isinstance(data, bytes):
            image: Image.Image = Image.open(io.BytesIO(data))
            image.load()
        else:
            image = Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data)
    except (UnidentifiedImageError, OSError, SyntaxError, TypeError) as error:
        raise ValueError(f"{what} cannot be decoded ({error})") from error
    image = image.convert(mode or ("L" if image.mode == "L" else "RGB"))
    array = np.asarray(image if resolution is None else center_crop(image, resolution))
    return array[..., None] if array.ndim == 2 else array


def _settle(source: Lazy, in_memory: bool | None) -> Source:
    if in_memory is None:
        itemsize = source.read(0)[0].dtype.itemsize
        in_memory = len(source) * math.prod(source.shape) * itemsize < IN_MEMORY_BYTES
    if not in_memory:
        return source
    return Arrays(*source[np.arange(len(source))], source.num_classes)


def _open(path: str, opener: Callable):
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"found no file {path}; check the path after the colon")
    try:
        return opener(path)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no intact file of its kind ({error}); get it again") from error


def _as_images(images: np.ndarray, what: str) -> np.ndarray:
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{what} has images of {images.dtype}, expected uint8 or a float type")
    return images if images.dtype == np.uint8 else images.astype(np.float32)


def _as_labels(labels: np.ndarray, what: str) -> np.ndarray:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{what} has labels of shape {labels.shape} and {labels.dtype}, expected one integer "
            "for each image"
        )
    return labels.astype(np.int32)


def _check_labels(labels: np.ndarray, num_classes: int) -> None:
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        raise ValueError(
            f"got labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}; "
            "correct the labels or option `num_classes`"
        )


def _only_train(kind: str, split: str) -> None:
    if split != "train":
        raise ValueError(
            f"a {kind} file has no {split!r} split; give the test set's own file with split='train'"
        )
