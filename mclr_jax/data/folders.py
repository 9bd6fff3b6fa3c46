"""Images in a folder or a zip: which files are examples, their classes, and the held-out share.

Decoded images of a folder are kept in a file, so that the next start need not decode them again.
"""

import concurrent.futures
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import posixpath
import re
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
from absl import logging
from PIL import Image

from mclr_jax.data.protocol import Source, names_of
from mclr_jax.files import made, named

T = TypeVar("T")
CACHE = "~/.cache/mclr_jax/data"
LARGEST = 4 * 2**30  # bytes of decoded images that are kept
PART = 64  # images that a thread decodes at a time
HIDDEN = re.compile(r"(^|/)\.[^./]")  # a path with a name such as .DS_Store or ._0.png
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # are no classes


@functools.cache
def say_once(text: str, log: Callable[..., None] = logging.warning) -> None:
    """Log a text, once in this process: a set is read for training and for what is held out."""
    log("%s", text)


class Folder:
    """A folder, read like a zip file."""

    def __init__(self, path: str):
        self.path = pathlib.Path(path)

    def namelist(self) -> list[str]:
        found = []  # by os: of many files pathlib takes seconds
        for place, _, files in os.walk(self.path):
            inside = os.path.relpath(place, self.path).replace(os.sep, "/")
            found += [f"{inside}/{file}".removeprefix("./") for file in files]
        return sorted(found)

    def open(self, name: str) -> IO[bytes]:
        return (self.path / name).open("rb")

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class Examples(NamedTuple):
    """The files that are examples, in the order of their names."""

    files: list[str]
    labels: np.ndarray  # (n,) integers
    class_names: tuple[str, ...] = ()  # of label 0, 1, ...; empty: the labels have no names
    kind: str = ""  # of latents, if dataset.json says so


def plain(name: str) -> str:
    """A path in one form of Unicode, with slashes, and without "./" and "..", where possible."""
    return posixpath.normpath(unicodedata.normalize("NFC", name.replace("\\", "/")))


def numbered(classes: Mapping[str, str]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Place -> label, and the names of the labels: the classes sorted, integers by their value."""
    names = {*classes.values()}
    integers = all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in names)
    ordered = sorted(names, key=lambda name: (int(name) if integers else 0, name))
    label = {name: number for number, name in enumerate(ordered)}
    return {place: label[name] for place, name in classes.items()}, tuple(ordered)


def examples(
    archive: Any, path: str, unlabelled: bool | None = False, skip: bool = False, table: str = ""
) -> Examples:
    """The examples of a zip or a `Folder`, whose classes are, first of all, those of the CSV file
    `table`, else those of dataset.json, else, in a folder, its sub-folders.

    Names in dataset.json may have backslashes, "./" or accents in another form of Unicode, and
    dataset.json may lie with the images in a folder. Hidden files, as of macOS, are no images.
    With `unlabelled` all images are of one class; None: if they have no labels.
    """

    def key(name: str) -> str:
        return plain(name).removeprefix(f"{folder}/")

    names = [name for name in archive.namelist() if not name.endswith("/")]
    told = [n for n in names if posixpath.basename(plain(n)) == "dataset.json"]
    told = sorted((n for n in told if not HIDDEN.search(plain(n))), key=len)[:1]
    folder = posixpath.dirname(plain(told[0])) if told else ""
    by_key: dict[str, str] = {}
    for name in names:
        if key(name) in by_key:
            raise ValueError(f"{path} has two files {by_key[key(name)]}; write it again with one")
        by_key[key(name)] = name
    with named(f"{path} has a broken dataset.json; mend it, or get the zip again"):
        about = json.loads(archive.read(told[0])) if told else {}
        labels = _labels(about.get("labels"), key)
        class_names = tuple(map(str, about.get("class_names", ())))
    if table:
        labels, class_names = numbered(_table(table, key, by_key))
    suffixes = {".npy", *(k for k, v in Image.registered_extensions().items() if v in Image.OPEN)}

    def is_image(place: str) -> bool:
        return posixpath.splitext(place)[1].lower() in suffixes and not HIDDEN.search(place)

    files = {place: n for place, n in by_key.items() if place in (labels or ()) or is_image(place)}
    others = {*names} - {*files.values(), *told}
    if isinstance(archive, Folder):  # the table may lie there
        others -= {n for n in others if table and (archive.path / n).samefile(table)}
    if others:
        say_once(f"{path}: left out {len(others)} files that are no images, such as {min(others)}.")
    if labels is None and isinstance(archive, Folder) and not unlabelled:
        labels, class_names = _sub_folders(files, path)
    if unlabelled or (unlabelled is None and labels is None):
        labels, class_names = dict.fromkeys(files, 0), ()
    if labels is None and files:
        raise ValueError(
            f"{path} has {len(files)} images, but no {'labels in ' * len(told)}dataset.json; write "
            f'there {{"labels": [["{min(files)}", 0], ...]}}, name a CSV file of file names and '
            "labels by config.data.labels, or for one class set config.data.unconditional=True"
        )
    labels = labels or {}
    _compare(files, labels, path, skip)
    chosen = sorted((name, labels[place]) for place, name in files.items() if place in labels)
    found = np.array([label for _, label in chosen])
    return Examples([n for n, _ in chosen], found, class_names, about.get("latents", ""))


def _labels(pairs: Any, key: Callable[[str], str]) -> dict[str, int] | None:
    """The labels in dataset.json, by the keys of the files; None: it has none."""
    labels: dict[str, int] = {}
    for name, label in pairs.items() if isinstance(pairs, dict) else pairs or ():
        if type(label) is not int or label < 0:
            raise ValueError(f"{name} has the label {label!r}, expected an integer from 0")
        if labels.setdefault(key(name), label) != label:
            raise ValueError(f"{name} has the labels {labels[key(name)]} and {label}")
    return None if pairs is None else labels


def _table(table: str, key: Callable[[str], str], known: Mapping[str, str]) -> dict[str, str]:
    """The classes in a CSV file, whose first two columns are file names and classes.

    A first row that names no file is the head of the columns. They may be separated by ; or tabs.
    """
    if not pathlib.Path(table).is_file():
        raise FileNotFoundError(f"found no file {table}; check config.data.labels")
    with named(f"{table} is no text in UTF-8; write it again as CSV"):
        text = pathlib.Path(table).read_text(encoding="utf-8-sig")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    found: dict[str, str] = {}
    for number, row in enumerate(csv.reader(io.StringIO(text), delimiter=separator), 1):
        if not row or (number == 1 and key(row[0].strip()) not in known):
            continue
        file, label, *_ = [*map(str.strip, row), "", ""]
        if not file or not label:
            raise ValueError(f"{table} has no file or no label in row {number}: {row}; complete it")
        if found.setdefault(key(file), label) != label:
            raise ValueError(f"{table}: {file} has the labels {found[key(file)]} and {label}")
    return found


def _sub_folders(files: Mapping[str, str], path: str) -> Any:
    """The labels and class names that sub-folders give; None and () unless there are several."""
    tops = {place: place.partition("/")[0] for place in files if "/" in place}
    if (classes := {*tops.values()}) and {name.lower() for name in classes} <= PARTS:
        raise ValueError(
            f"{path} has the folders {', '.join(sorted(classes))}, which are no classes; set "
            f"config.data.name=folder:{path}/{max(classes, key=lambda c: 'train' in c.lower())} "
            "and config.data.test to the folder of the test set, as folder:PATH"
        )
    if len(classes) < 2:
        return None, ()
    say_once(f"{path}: {len(classes)} classes, the folders in it.", logging.info)
    return numbered(tops)


def _compare(files: Mapping[str, str], labels: Mapping[str, int], path: str, skip: bool) -> None:
    """ValueError, or with `skip` a warning, of files without a label and labels without a file."""
    bare, lost = sorted(files.keys() - labels), sorted(labels.keys() - files)
    text = f"{path} has {len(files)} images and {len(labels)} labels"
    text += f"; {len(bare)} images have no label, such as {bare[0]}" if bare else ""
    text += f"; {len(lost)} labels have no image, such as {lost[0]}" if lost else ""
    if len(bare) == len(files) or ((bare or lost) and not skip):
        raise ValueError(
            f"{text}. Complete the set or correct the names and labels; to leave out what has "
            "no partner put data.skip = True in the config file"
        )
    if bare or lost:
        logging.warning("%s; these are left out.", text)


def divided(labels: np.ndarray, share: float) -> dict[str, np.ndarray]:
    """The rows of the splits "train" and "test", which has a random share of each class.

    A class has at least one held-out example if it has two. What is drawn of a class depends on
    its own examples alone. ValueError: no class has two.
    """
    test = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        count = min(max(round(share * len(rows)), 1), len(rows) - 1)
        test += np.random.default_rng([0, label]).permutation(rows)[:count].tolist()
    if not test:
        raise ValueError("no class has two examples, of which one could be held out; set data.test")
    return {"train": np.setdiff1d(np.arange(len(labels)), test), "test": np.sort(test)}


# ---- decoded images ------------------------------------------------------------------------------


def in_threads(function: Callable[[np.ndarray], T], count: int) -> Iterator[T]:
    """The values of a function of rows, for all rows in parts, by a thread for each core."""
    rows = np.array_split(np.arange(count), math.ceil(count / PART))
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(function, rows)


class Kept:
    """The file with the decoded images of a folder, (count, H, W, C) uint8, in the folder `cache`.

    Of another state of the image files, or with other options of decoding, it has another name.
    """

    def __init__(self, cache: str, archive: Folder, files: list[str], *options: Any):
        found = ((name, os.stat(os.path.join(archive.path, name))) for name in files)
        stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in found]
        texts = ([os.path.abspath(archive.path), *options], stamps)
        self.name, state = (hashlib.sha256(json.dumps(t).encode()).hexdigest()[:16] for t in texts)
        self.folder, self.count = pathlib.Path(cache).expanduser(), len(files)
        self.file = self.folder / f"{self.name}-{state}.npy"

    def read(self) -> np.ndarray | None:
        """The images, mapped into memory; None: there is no such file, or it is damaged."""
        try:
            images = np.load(self.file, mmap_mode="r")
        except Exception:  # a damaged header causes errors of many types
            return None
        fits = images.dtype == np.uint8 and images.ndim == 4 and len(images) == self.count
        return images if fits else None

    def write(self, source: Source) -> np.ndarray | None:
        """The images of a source, written in place of those of an earlier state of the folder.

        None, and a warning, if they are too many or cannot be written.
        """
        size = len(source) * math.prod(source.shape)
        temporary = self.file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if size > min(LARGEST, shutil.disk_usage(self.folder).free / 2):
                raise OSError(f"{size / 2**30:.1f} GiB are too much")
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(source), *source.shape)}
            with temporary.open("wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for images, _ in in_threads(source.__getitem__, len(source)):
                    file.write(images.tobytes())
            os.replace(temporary, self.file)
            for path in self.folder.glob(f"{self.name}-*.npy"):
                if path != self.file:
                    path.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("Decoded images are not kept in %s: %s.", self.folder, error)
            return None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        logging.info("%d decoded images are kept in %s.", len(source), self.file)
        return self.read()


# ---- zips of one's own ---------------------------------------------------------------------------


@contextlib.contextmanager
def archive(out: pathlib.Path, source: Source, names: list[str], **about: Any) -> Iterator[Any]:
    """A zip to write files `names` to, one for each example of a source, whose dataset.json has
    their labels, the names of the classes and `about`. An error leaves no new file."""
    if class_names := names_of(source):
        about = {"class_names": class_names, **about}
    about = {"labels": list(zip(names, source.labels.tolist(), strict=True)), **about}
    temporary = out.with_name(f"{out.name}.tmp")
    with made(out.parent):
        try:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as file:
                yield file
                file.writestr("dataset.json", json.dumps(about))
            os.replace(temporary, out)
        finally:
            temporary.unlink(missing_ok=True)


def write(
    source: Source, out: pathlib.Path, progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Write a source of 8-bit images as a zip in the format of EDM, which names its classes, too.

    ValueError: it has other examples.
    """
    if len(source.shape) != 3 or source.shape[-1] not in (1, 3):
        raise ValueError(f"examples have shape {source.shape}; a zip is for grey or colour images")

    def encoded(rows: np.ndarray) -> list[tuple[int, bytes]]:
        images, files = source[rows][0], []
        if images.dtype != np.uint8:
            raise ValueError(f"examples are {images.dtype}; a zip is for images of 8 bits")
        for row, image in zip(rows, images, strict=True):
            image = image[..., 0] if image.shape[-1] == 1 else image
            Image.fromarray(image).save(file := io.BytesIO(), "PNG")
            files.append((row, file.getvalue()))
        return files

    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(source))]
    with archive(out, source, names) as file:
        for part in in_threads(encoded, len(source)):
            for row, content in part:
                file.writestr(names[row], content)
            progress(len(part))
