"""The formats that data sets come in: a function for each name that `sources.load` knows.

Their keyword-only arguments are its options.
"""

import functools
import gzip
import io
import json
import pathlib
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable

import jax
import numpy as np
from PIL import Image, UnidentifiedImageError

from mclr_jax import mixture
from mclr_jax.data.protocol import Arrays, Lazy, Source, as_images, as_labels, check_labels, limit

IN_MEMORY_BYTES = 2**30
FASHION_MNIST_PATH = "/usr/share/datasets/fashion-mnist"


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
    if magic != 2048 + dimensions:
        raise ValueError(f"{files[0]} has magic number {magic:#x}, expected {2048 + dimensions:#x}")
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
        raise ValueError(f"TFDS has no {argument!r} ({first}); check name and `path`") from error
    if not builder.is_prepared() or builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        # `tfds.data_source` would start a download here.
        raise FileNotFoundError(
            f"TFDS set {argument!r} is not prepared as array_record in {builder.data_path}; "
            f"run `tfds build {argument} --file_format=array_record --data_dir=DIR` "
            "(in an environment that has TensorFlow) and give DIR by option `path`"
        )
    features, splits = builder.info.features, builder.info.splits
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
        raise ValueError(
            f"TFDS set {argument!r} has features {sorted(features)}, expected an 'image' and a "
            "'label' of classes"
        )
    if split not in splits:
        raise ValueError(f"TFDS set {argument!r} has splits {sorted(splits)}, got {split!r}")
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

    labels = lambda: np.array([record["label"] for record in records], np.int32)  # noqa: E731
    return _source(len(records), features["label"].num_classes, read, labels, in_memory)


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
    if split != "train":
        raise ValueError(
            f"a zip file has no {split!r} split; give the test set's own file with split='train'"
        )
    archive, lock = _open(argument, zipfile.ZipFile), threading.Lock()
    files = sorted(n for n in archive.namelist() if n.lower().endswith((".png", ".npy")))
    if not files:
        raise ValueError(f"{argument} holds no .png or .npy files, so it is no EDM data set")
    described = "dataset.json" in archive.namelist()
    pairs = json.loads(archive.read("dataset.json")).get("labels") if described else None
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
    labels = as_labels(np.array([by_file[file] for file in files]), len(files), argument)

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
            image = as_images(np.moveaxis(array, 0, -1), f"{files[index]} in {argument}")
        return image, int(labels[index])

    num_classes = num_classes or int(labels.max()) + 1
    check_labels(labels, num_classes)
    return _source(len(files), num_classes, read, lambda: labels, in_memory)


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
    images = as_images(images[..., None] if images.ndim == 3 else images, argument)
    labels = as_labels(labels, len(images), argument)
    return Arrays(images, labels, num_classes or int(labels.max(initial=0)) + 1)


def _mixture(argument: str, split: str) -> Arrays:
    """Draws from `mixture.toy()`: 65,536 points to train on, 8,192 others to test."""
    seed, size = {"train": (0, 65_536), "test": (1, 8192)}[split]
    points, labels = mixture.toy().sample(jax.random.key(seed), size)
    return Arrays(np.asarray(points), np.asarray(labels), 3)


# The function of each name, and what follows the name's colon, if anything.
FORMATS: dict[str, tuple[Callable[..., Source], str]] = {
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


def _source(
    length: int, num_classes: int, read: Callable, read_labels: Callable, in_memory: bool | None
) -> Source:
    first, _ = read(0)
    if in_memory is None:
        in_memory = length * first.nbytes < IN_MEMORY_BYTES
    lazy = Lazy(length, first.shape, num_classes, read, read_labels)
    return Arrays(*lazy[np.arange(length)], num_classes) if in_memory else lazy


def _open(path: str, opener: Callable):
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"found no file {path}; check the path after the colon")
    try:
        return opener(path)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no intact file of its kind ({error}); get it again") from error
