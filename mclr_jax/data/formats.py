"""The formats of data sets: one function for each name that `sources.load` knows.

The keyword-only arguments of a function are the options of its format.
"""

import gzip
import io
import json
import pathlib
import threading
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from PIL import Image

from mclr_jax import mixture
from mclr_jax.data import protocol
from mclr_jax.data.protocol import Arrays, Lazy, Source
from mclr_jax.files import named

IN_MEMORY_BYTES = 2**30
FASHION_MNIST_PATH = "/usr/share/datasets/fashion-mnist"


def _digits(_: str, split: str) -> Arrays:
    """scikit-learn's 1,797 digits of 8x8; train: 1,497 in equal shares; test: the other 300."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[..., None]
    everything, rows = Arrays(images, data.target.astype(np.int32), 10), np.arange(len(images))
    train = protocol.limit(everything, 1497, seed=0).indices
    chosen = {"train": train, "test": np.setdiff1d(rows, train), "all": rows}[split]
    return Arrays(*everything[chosen], 10)


def _fashion_mnist(_: str, split: str, *, path: str = FASHION_MNIST_PATH) -> Arrays:
    """IDX files, gzipped or not, in the folder `path`; MNIST's files have the same names."""
    prefix = pathlib.Path(path) / {"train": "train", "test": "t10k"}[split]
    images = _read_idx(f"{prefix}-images-idx3-ubyte", dimensions=3)
    labels = _read_idx(f"{prefix}-labels-idx1-ubyte", dimensions=1)
    return Arrays(images[..., None], labels.astype(np.int32), 10)


def _read_idx(name: str, dimensions: int) -> np.ndarray:
    file = pathlib.Path(name if pathlib.Path(name).is_file() else f"{name}.gz")
    if not file.is_file():
        raise FileNotFoundError(
            f"found no {name}[.gz]; on Debian `apt-get install dataset-fashion-mnist` writes it to "
            f"{FASHION_MNIST_PATH}; give another folder by config.data.path"
        )
    with named(f"{file} is no intact IDX file; get it again"):
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix == ".gz" else content
        magic, *shape = np.frombuffer(content, ">u4", 1 + dimensions).tolist()
        if magic != 2048 + dimensions:
            raise ValueError(f"its magic number is {magic:#x}, expected {2048 + dimensions:#x}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _tfds(
    name: str, split: str, *, path: str = "", resolution: int = 0, in_memory: bool | None = None
) -> Source:
    """A TensorFlow Datasets set prepared as array_record, read without TensorFlow.

    Images are center-cropped and resized to `resolution`, required if their sizes differ. `path` is
    TFDS's data_dir; `in_memory` decodes all images now (default: if they take less than 1 GiB).
    """
    import tensorflow_datasets as tfds

    with named(f"TFDS has no {name!r}; check the name and config.data.path"):
        builder = tfds.builder(name, data_dir=path or None)
    if not builder.is_prepared() or builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise FileNotFoundError(
            f"TFDS set {name!r} is not prepared as array_record in {builder.data_path}; run "
            f'`python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}, '
            "data_dir='DIR', file_format='array_record').download_and_prepare()\"` (some sets need "
            "an environment with TensorFlow) and give DIR by config.data.path"
        )
    features, splits = builder.info.features, builder.info.splits
    if not {"image", "label"} <= set(features) or not hasattr(features["label"], "num_classes"):
        raise ValueError(
            f"TFDS set {name!r} has features {sorted(features)}, expected an 'image' and a 'label' "
            "of type ClassLabel; choose another set"
        )
    if split not in splits:
        raise ValueError(f"TFDS set {name!r} has splits {sorted(splits)}, got {split!r}")
    shape, num_classes = features["image"].shape, features["label"].num_classes
    if None in shape and not resolution:
        raise ValueError(
            f"TFDS set {name!r} has images of unequal size; set config.data.resolution, to "
            "which they are center-cropped and resized"
        )
    mode = "L" if shape[-1] == 1 else "RGB"
    encoded = isinstance(features["image"], tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    records = builder.as_data_source(split=split, decoders=decoders)

    def read(index: int) -> tuple[np.ndarray, int]:
        record = records[index]
        image = record["image"]
        if encoded or resolution:
            image = _decode(image, f"image {index} of {name!r}", mode, resolution)
        return image, int(record["label"])

    labels = lambda: np.array([record["label"] for record in records], np.int32)  # noqa: E731
    return _source(len(records), num_classes, read, labels, in_memory)


def _zip(
    path: str, split: str, *, num_classes: int = 0, unlabelled: bool = False, in_memory: Any = None
) -> Source:
    """The data set format of EDM and EDM2: a zip of .png or .npy (C, H, W) and dataset.json.

    `num_classes` is by default the largest label plus 1; with `unlabelled`, a set without labels
    has one class; `in_memory` is as in `_tfds`.
    """
    if split != "train":
        raise ValueError(
            f"a zip file has no {split!r} split; set config.data.test to the zip of the test set"
        )
    archive, lock = _open(path, zipfile.ZipFile), threading.Lock()
    files = sorted(n for n in archive.namelist() if n.lower().endswith((".png", ".npy")))
    if not files:
        raise ValueError(f"{path} has no .png or .npy files, so it is no EDM data set")
    described = "dataset.json" in archive.namelist()
    with named(f"{path} has a broken dataset.json; get it again"):
        pairs = json.loads(archive.read("dataset.json")).get("labels") if described else None
        by_file = dict.fromkeys(files, 0) if pairs is None and unlabelled else dict(pairs or ())
        found = np.array([by_file[file] for file in files if file in by_file])
    if missing := [file for file in files if file not in by_file]:
        raise ValueError(
            f"{path} has {len(files)} images of which {len(missing)} have no label in dataset.json,"
            f" such as {missing[0]}; add labels, or for a set without labels put data.unlabelled = "
            "True in the config file"
        )
    labels = protocol.as_labels(found, len(files), path, num_classes or np.inf)

    def read(index: int) -> tuple[np.ndarray, int]:
        file, label = files[index], int(labels[index])
        with named(f"{path} is corrupt at {file}; get it again"), lock:
            content = archive.read(file)
        if file.lower().endswith(".png"):
            return _decode(content, f"{file} in {path}"), label
        with named(f"{path} is corrupt at {file}; get it again"):
            array = np.moveaxis(np.load(io.BytesIO(content)), 0, -1)
        return protocol.as_images(array, f"{file} in {path}"), label

    num_classes = num_classes or protocol.count_classes(labels, path)
    return _source(len(files), num_classes, read, lambda: labels, in_memory)


def _npz(path: str, split: str, *, num_classes: int = 0) -> Arrays:
    """Arrays `images` (N, H, W, C), (N, H, W) or (N, d), and `labels` (N,), as in this project's
    sample files; `test_images` and `test_labels` are the test split."""
    archive = _open(path, np.load)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} holds one array; expected an npz file with `images` and `labels`")
    names = [{"train": "", "test": "test_"}[split] + name for name in ("images", "labels")]
    if absent := [name for name in names if name not in archive]:
        raise ValueError(
            f"{path} has no {absent} for split={split!r}, only {sorted(archive)}; add them, or "
            "choose another split or file"
        )
    with named(f"{path} is corrupt; write it again"):
        images, labels = (archive[name] for name in names)
        if images.ndim < 2:
            raise ValueError(f"`{names[0]}` has shape {images.shape}, expected an axis of examples")
    images = protocol.as_images(images[..., None] if images.ndim == 3 else images, path)
    protocol.check_values(images, path)
    labels = protocol.as_labels(labels, len(images), path)
    return Arrays(images, labels, num_classes or protocol.count_classes(labels, path))


def _mixture(_: str, split: str) -> Arrays:
    """Draws from `mixture.toy()`: 65,536 points for training, 8,192 other points for testing."""
    seed, size = {"train": (0, 65_536), "test": (1, 8192)}[split]
    points, labels = map(np.asarray, mixture.toy().sample(jax.random.key(seed), size))
    return Arrays(points, labels, 3)


# The function of each format, and the argument after the colon, if the format takes one.
FORMATS: dict[str, tuple[Callable[..., Source], str]] = {
    "digits": (_digits, ""), "fashion_mnist": (_fashion_mnist, ""), "mixture": (_mixture, ""),
    "tfds": (_tfds, "NAME"), "zip": (_zip, "PATH"), "npz": (_npz, "PATH"),
}  # fmt: skip


def center_crop(image: Image.Image, resolution: int) -> Image.Image:
    """The largest central square, resized as in ADM, EDM and DiT: halved by a box filter while at
    least twice too large, then resized by a bicubic filter, then cropped."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _decode(data: bytes | np.ndarray, what: str, mode: str = "", resolution: int = 0) -> np.ndarray:
    """PNG or JPEG bytes, or a uint8 array (H, W, C), -> (H, W, C) uint8, cropped and resized."""
    with named(f"{what} cannot be decoded; get it again"):
        if isinstance(data, bytes):
            image: Image.Image = Image.open(io.BytesIO(data))
            if image.mode[0] in "IF":
                raise ValueError(f"it has mode {image.mode}; expected 8 bits a channel")
        else:
            image = Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data)
        image = image.convert(mode or ("L" if image.mode == "L" else "RGB"))
    array = np.asarray(center_crop(image, resolution) if resolution else image)
    return array[..., None] if array.ndim == 2 else array


def _source(size: int, num_classes: int, read: Callable, labels: Callable, in_memory: Any):
    first, _ = read(0)
    lazy = Lazy(size, first.shape, num_classes, read, labels)
    in_memory = size * first.nbytes < IN_MEMORY_BYTES if in_memory is None else in_memory
    return Arrays(*lazy[np.arange(size)], num_classes) if in_memory else lazy


def _open(path: str, opener: Callable) -> Any:
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"found no file {path}; check the path after the colon")
    with named(f"{path} is no intact file of its format; get it again"):
        return opener(path)
