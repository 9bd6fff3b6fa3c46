"""The formats of data sets: one function for each name that `sources.load` knows.

The keyword-only arguments of a function are the options of its format.
"""

import contextlib
import functools
import gzip
import io
import pathlib
import re
import threading
import zipfile
from collections.abc import Callable
from typing import IO, Any

import jax
import numpy as np
from PIL import Image, ImageColor, ImageOps, UnidentifiedImageError

from mclr_jax import mixture
from mclr_jax.data import folders, protocol, recorded
from mclr_jax.data.latents import Latents, check_moments
from mclr_jax.data.protocol import Arrays, Lazy, Source
from mclr_jax.files import named

IN_MEMORY_BYTES = 2**30
UNREADABLE = "cannot be decoded; mend it or get it again"
# How Pillow is to decode an image of which it would leave out the lower bits (BGR;16 has 5 to 6).
DEEP = re.compile(r"(?<!BGR);16|'ppm'.*, \d{4,}\)")
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
    name: str, split: str, *, path: str = "", resolution: int = 0, background: str = "white",
    in_memory: bool | None = None,
) -> Source:  # fmt: skip
    """A TensorFlow Datasets set prepared as array_record, read without TensorFlow.

    Images are center-cropped and resized to `resolution`, required if their sizes differ, and
    transparent pixels show the `background`. `path` is TFDS's data_dir; `in_memory` decodes all
    images now (default: if they take less than 1 GiB).
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
    if encoded and (dtype := np.dtype(features["image"].np_dtype)) != np.uint8:
        raise ValueError(f"TFDS set {name!r} has images of {dtype}, expected uint8; convert them")
    where = f"TFDS set {name!r}"
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    records = builder.as_data_source(split=split, decoders=decoders)

    def record(index: int) -> Any:
        with named(f"{what(index)} in {builder.data_path} is corrupt; prepare the set again"):
            return records[index]

    def read(index: int) -> tuple[np.ndarray, int]:
        found = record(index)
        image = found["image"]
        if encoded or resolution:
            image = _decode(where, mode, resolution, background, image, what(index))
        return protocol.as_images(image, what(index)), int(found["label"])

    what = f"image {{}} of {where}".format
    labels = lambda: np.array([record(i)["label"] for i in range(len(records))])  # noqa: E731
    names = tuple(features["label"].names)
    return _source(len(records), num_classes, read, labels, in_memory, what, class_names=names)


def _zip(
    path: str, split: str, *, num_classes: int = 0, resolution: int = 0,
    unlabelled: bool | None = False, skip: bool = False, background: str = "white",
    latents: str = "", labels: str = "", cache: str = folders.CACHE, in_memory: bool | None = None,
) -> Source:  # fmt: skip
    """The data set format of EDM and EDM2: a zip of images or .npy (C, H, W) and dataset.json; or
    a folder of them, whose sub-folders may be the classes.

    Images are those that Pillow reads, in grey if all are grey. `num_classes` is by default the
    largest label plus 1; with `unlabelled`, a set has one class (None: if it has no labels);
    `skip` leaves out images without a label and labels without an image; `labels` is a CSV file of
    file names and classes; `cache` is where the decoded images of a folder are kept, empty for
    nowhere; arrays are `latents` of a kind of `latents.KINDS`; the other options are those of
    `_tfds`.
    """
    if split != "train":
        raise ValueError(
            f"{path} has no {split!r} split; set config.data.test to the zip or folder of the test "
            "set, or of a folder config.data.held_out to the share that is held out; training does "
            "without with config.eval_examples=0"
        )
    archive, lock = _open(path), threading.Lock()
    files, found, names, kind = folders.examples(archive, path, unlabelled, skip, labels)
    rows = protocol.as_labels(found, len(files), path, num_classes or np.inf)
    pictures = [file for file in files if not file.lower().endswith(".npy")]
    arrays = not pictures
    if arrays and kind not in ("", latents):
        raise ValueError(
            f"{path} holds latents of the kind {kind!r}, and config.data.latents is {latents!r}: "
            f"set it to {kind}"
        )
    check = check_moments if arrays and latents else protocol.check_values

    def content(file: str) -> bytes:
        with named(f"{path} is corrupt at {file}; get it again"), lock:
            return archive.read(file)

    def read(index: int) -> tuple[np.ndarray, int]:
        file, label = files[index], int(rows[index])
        if not file.lower().endswith(".npy"):
            data = content(file)
            return _decode(path, mode(), resolution, background, data, name(index)), label
        with named(f"{path} is corrupt at {file}; get it again"):
            array = np.moveaxis(np.load(io.BytesIO(content(file))), 0, -1)
        if resolution:
            raise ValueError(f"{name(index)} is an array; config.data.resolution is for images")
        array = protocol.as_images(array, name(index))
        protocol.check_finite(array[None], name(index))
        return array, label

    def is_grey(file: str) -> bool:
        with named(f"{file} in {path} {UNREADABLE}"), archive.open(file) as stream:
            return _is_grey(_picture(stream))  # of most formats it reads no more than the header

    name = lambda index: f"{files[index]} in {path}"  # noqa: E731

    @functools.cache
    def mode() -> str:  # not asked for if the images are in the cache
        return "L" if all(map(is_grey, pictures)) else "RGB"

    kept = None
    if isinstance(archive, folders.Folder) and cache and len(pictures) == len(files):
        kept = folders.Kept(cache, archive, files, resolution, background)
    num_classes = num_classes or len(names) or protocol.count_classes(rows, path)
    source = _source(len(files), num_classes, read, lambda: rows, in_memory, name, check, names,
                     kept)  # fmt: skip
    return Latents(source, latents) if arrays and latents else source


def sizes(path: str) -> np.ndarray:
    """Width and height of each image in a zip or a folder, (n, 2), as their files say."""
    archive, found = _open(path), []
    for file in folders.examples(archive, path, unlabelled=True).files:
        if not file.lower().endswith(".npy"):
            with named(f"{file} in {path} {UNREADABLE}"), archive.open(file) as stream:
                found.append(_picture(stream).size)
    return np.array(found).reshape(-1, 2)


def _npz(path: str, split: str, *, num_classes: int = 0, latents: str = "") -> Arrays:
    """Arrays `images` (N, H, W, C), (N, H, W) or (N, d), and `labels` (N,), as in this project's
    sample files; `test_images` and `test_labels` are the test split. With a kind of `latents` the
    images are the array `latents`, as in sample files of a model of these."""
    archive = _open(path, np.load)
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise ValueError(f"{path} holds one array; expected an npz file with `images` and `labels`")
    found = "latents" if latents and "latents" in archive else "images"
    names = [{"train": "", "test": "test_"}[split] + name for name in (found, "labels")]
    if absent := [name for name in names if name not in archive]:
        raise ValueError(
            f"{path} has no {absent} for split={split!r}, only {sorted(archive)}; add them, name a "
            "file of test images in config.data.test, or train with config.eval_examples=0"
        )
    with named(f"{path} is corrupt; write it again"):
        images, labels = (archive[name] for name in names)
        if images.ndim < 2:
            raise ValueError(f"`{names[0]}` has shape {images.shape}, expected an axis of examples")
    images = protocol.as_images(images[..., None] if images.ndim == 3 else images, path)
    protocol.check_values(images, path)
    labels = protocol.as_labels(labels, len(images), path)
    num_classes = num_classes or protocol.count_classes(labels, path)
    return Arrays(images, labels, num_classes, latents=latents if found == "latents" else "")


def _mixture(_: str, split: str) -> Arrays:
    """Draws from `mixture.toy()`: 65,536 points for training, 8,192 other points for testing."""
    seed, size = {"train": (0, 65_536), "test": (1, 8192)}[split]
    points, labels = map(np.asarray, mixture.toy().sample(jax.random.key(seed), size))
    return Arrays(points, labels, 3)


# The function of each format, and the argument after the colon, if the format takes one.
FORMATS: dict[str, tuple[Callable[..., Source], str]] = {
    "digits": (_digits, ""), "fashion_mnist": (_fashion_mnist, ""), "mixture": (_mixture, ""),
    "tfds": (_tfds, "NAME"), "zip": (_zip, "PATH"), "folder": (_zip, "PATH"),
    "npz": (_npz, "PATH"),
    **dict.fromkeys(("npy", "nc", "zarr"), (recorded.load, "PATH")),
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


def _picture(file: IO[bytes]) -> Any:
    """An image whose header is read; ValueError: it is none, or has more than 8 bits a channel."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise ValueError("it is no image that Pillow reads") from None
    if image.mode[0] in "IF" or DEEP.search(str(image.tile)):
        raise ValueError("it has more than 8 bits a channel; convert it to 8 bits")
    return image


def _is_grey(image: Image.Image) -> bool:
    if image.mode[0] != "P":
        return image.mode in ("1", "L", "LA", "La")
    pixels = np.asarray(image.convert("RGBA"))
    seen = pixels[pixels[..., 3] > 0, :3]
    return bool((seen == seen[:, :1]).all())


def _decode(
    where: str, mode: str, resolution: int, background: str, data: bytes | np.ndarray, what: str
) -> np.ndarray:
    """The bytes of an image, or a uint8 array (H, W, C), -> (H, W, C) uint8, shown upright:
    turned as its Exif mark says, and over the background. `where` is its set, for warnings."""
    with named(f"data.background={background!r}; expected the name of a colour, or #rrggbb"):
        ground = ImageColor.getcolor(background, "RGBA")
    with named(f"{what} {UNREADABLE}"):
        if isinstance(data, bytes):
            image = _picture(io.BytesIO(data))
            if getattr(image, "is_animated", False) and image.format != "MPO":
                folders.say_once(
                    f"{where} has images of several frames, of which the first are used."
                )
            image.load()
            with contextlib.suppress(SyntaxError):  # a mark that is no Exif
                ImageOps.exif_transpose(image, in_place=True)
        else:
            image = Image.fromarray(data[..., 0] if data.shape[-1] == 1 else data)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if np.asarray(image)[..., 3].min() < 255:
                folders.say_once(
                    f"{where} has images with transparent pixels, which are shown over "
                    f"{background}; data.background is another colour."
                )
            image = Image.alpha_composite(Image.new("RGBA", image.size, ground), image)
        image = image.convert(mode)
    array = np.asarray(center_crop(image, resolution) if resolution else image)
    return array[..., None] if array.ndim == 2 else array


def _source(
    size: int, num_classes: int, read: Callable, labels: Callable, in_memory: bool | None,
    name: Callable[[int], str], check: Callable[[np.ndarray, str], None] = protocol.check_values,
    class_names: tuple[str, ...] = (), kept: folders.Kept | None = None,
) -> Source:  # fmt: skip
    images = kept.read() if kept else None
    if images is None:
        first, _ = read(0)
        lazy = Lazy(size, first.shape, num_classes, read, labels, name, class_names)
        images = kept.write(lazy) if kept else None
    if images is not None:
        in_memory = images.nbytes < IN_MEMORY_BYTES if in_memory is None else in_memory
        images = np.array(images) if in_memory else images
        return Arrays(images, labels(), num_classes, in_memory, class_names)
    in_memory = size * first.nbytes < IN_MEMORY_BYTES if in_memory is None else in_memory
    source: Source = lazy
    if in_memory:
        images, found = map(
            np.concatenate, zip(*folders.in_threads(lazy.__getitem__, size), strict=True)
        )
        source = Arrays(images, found, num_classes, class_names=class_names)
    check(source.images if isinstance(source, Arrays) else first[None], name(0))
    return source


def _open(path: str, opener: Callable = zipfile.ZipFile) -> Any:
    """The zip, the folder in its place, or what another opener gives of a file."""
    if opener is zipfile.ZipFile and pathlib.Path(path).is_dir():
        return folders.Folder(path)
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"found no file {path}; check the path after the colon")
    with named(f"{path} is no intact file of its format; get it again"):
        return opener(path)
