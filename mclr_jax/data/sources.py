"""Data sets by name, as in config.data."""

import dataclasses
import pathlib
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np
from absl import logging

from mclr_jax.data import protocol
from mclr_jax.data.folders import divided
from mclr_jax.data.formats import FORMATS, sizes
from mclr_jax.data.latents import KINDS
from mclr_jax.data.protocol import Source, Subset, caption, limit
from mclr_jax.files import named
from mclr_jax.schema import Keys, fields, key, look_up, nearest, resolve, rest


def load(name: str, split: str = "train", **options) -> Source:
    """The data set 'digits', 'fashion_mnist', 'mixture', 'tfds:NAME', 'zip:PATH', 'folder:PATH',
    'npz:PATH'; trajectories in 'npy:PATH', 'nc:PATH' or 'zarr:PATH'.

    'package.module:Name' is the user's own Source, Name(split=split, **options). The split is
    'train' or 'test' ('digits' also has 'all'); the options are keyword arguments of the format's
    function in `formats`. ValueError, FileNotFoundError: an unknown name, split or option, a
    missing or corrupt file, labels out of range, or unequal numbers of images and labels.
    """
    kind, _, argument = name.partition(":")
    if kind not in FORMATS and argument.isidentifier():
        make = resolve(FORMATS, name, "data source")
        if dataclasses.is_dataclass(make):
            _check_options(name, {"split": split, **options}, fields(make))
        try:
            source = make(split=split, **options)
        except TypeError as error:
            if error.__traceback__ and error.__traceback__.tb_next:  # raised inside
                raise
            given = ", ".join(["split", *options])
            raise ValueError(
                f"data source {name!r} cannot be called with {given} ({error}); expected a class "
                "or function with these keyword arguments"
            ) from error
        return _checked(source, f"data source {name!r}")
    loader, needs_argument = look_up(FORMATS, kind, "data source")
    if bool(needs_argument) != bool(argument):
        expected = f"{kind}:{needs_argument}".strip(":")
        raise ValueError(f"got data source {name!r}, expected {expected!r}")
    splits = ["train", "test", *["all"] * (kind == "digits")]
    if split not in splits:
        raise ValueError(f"got split={split!r} for {name!r}, expected one of {splits}")
    _check_options(name, options, loader.__kwdefaults__ or ())
    return loader(argument, split, **options)


def options_of(name: str) -> Collection[str]:
    """The options of the format of a source; none of a source of the user's own."""
    loader, _ = FORMATS.get(name.partition(":")[0], (None, ""))
    return getattr(loader, "__kwdefaults__", None) or ()


def place_of(name: str) -> str:
    """The path in the name of a source; empty: it has none."""
    kind, _, path = name.partition(":")
    return path if FORMATS.get(kind, (None, ""))[1] == "PATH" else ""


def at(place: str) -> str:
    """The name of the source in a folder, a zip or an npz file; other names stay."""
    path = pathlib.Path(place)
    kind = path.suffix[1:].lower()
    kind = "folder" if path.is_dir() and kind != "zarr" else kind
    return f"{kind}:{place}" if kind in FORMATS and path.exists() else place


def _check_options(name: str, options: Iterable[str], known: Collection[str]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(f"got option {option!r} for {name!r}; {nearest(option, known)}")


@dataclasses.dataclass(frozen=True)
class Data(Keys, where="config.data"):
    """The keys of config.data: a data set and what training takes of it."""

    name: str = key("digits", says="digits, fashion_mnist, mixture, tfds:NAME, zip:PATH, "
                    "folder:PATH, npz:PATH; trajectories in npy:PATH, nc:PATH or zarr:PATH; or "
                    "package.module:Name, one of your own")  # fmt: skip
    path: str = key("", says="folder of the files (fashion_mnist, tfds); empty for the default")
    test: str = key("", says="source of held-out examples; empty for the test split of the name")
    labels: str = key("", says="CSV file of file names and classes (folder, zip); empty: "
                      "dataset.json, or the sub-folders")  # fmt: skip
    unconditional: bool = key(False, says="leave the labels aside: all examples are of one class")
    held_out: float = key(0.1, 0.0, 1.0, ")", says="share that is held out, of each class of a "
                          "folder or of trajectories, without config.data.test")  # fmt: skip
    num_classes: int = key(0, 0, says="0 counts them in the labels (zip, folder, npz)")
    resolution: int = key(0, 0, says="crop and resize to this size (tfds, zip, folder); 0: as they "
                          "are")  # fmt: skip
    background: str = key("white", says="colour behind transparent pixels (tfds, zip, folder), "
                          "as black or #rrggbb")  # fmt: skip
    latents: str = key("", words=("", *KINDS), says="how those of a zip were made: edm2 (pixels in "
                       "[0, 1]), or stable_diffusion (DiT, SiT, REPA: [-1, 1])")  # fmt: skip
    autoencoder: str = key("", says="folder of diffusers with the autoencoder of the latents, by "
                           "which they are shown and measured")  # fmt: skip
    generated: str = key("", says="source with samples of the run in init_from (objective ddo)")
    limit: int = key(0, 0, says="train on a random subset of this size; 0 for all")
    flip: bool = key(False, says="random horizontal flips")
    augment: float = key(0.0, 0.0, 1.0, says="probability of EDM's non-leaking augmentations")
    options: dict = rest("options of the format, or of a source of your own")

    @property
    def mirrored(self) -> bool:
        """True if training shows mirrored images; with `augment` the network is told of them."""
        return self.flip or self.augment > 0

    def source(self, split: str, seed: int, units: Any = None) -> Source:
        """The data set, in training a subset of `limit` examples drawn by `seed`.

        What is held out of a folder does not depend on `seed`: a run that starts from another one
        has the same split. Trajectories have the `units` of a `DataInfo`, by default those of the
        training frames, which are read for them.
        """
        background = "" if self.background == "white" else self.background
        shown = {"resolution": self.resolution, "background": background}
        if split == "test" and self.test:  # its images are shown like those of training
            known = options_of(self.test)
            shown = {k: v for k, v in shown.items() if v and k in known}
            if "units" in known:  # trajectories
                units = units or self.source("train", seed)
                shown |= {**self.options, "held_out": 0.0, "units": units}
            source = load(self.test, "train", **shown, **self._common(self.test))
        else:
            given = {"path": self.path, "labels": self.labels, "num_classes": self.num_classes,
                     **shown}  # fmt: skip
            given = {name: value for name, value in given.items() if value}
            given |= self._common(self.name) | self.options
            if "held_out" in options_of(self.name):
                given["held_out"] = 0.0 if self.test else self.held_out
            if "units" in options_of(self.name):
                given["units"] = units
            shared = self.name.startswith("folder:") and not self.test and self.held_out
            source = load(self.name, "train" if shared else split, **given)
            if shared:
                rows = divided(source.labels, self.held_out)
                if split == "train":
                    text = "%s: %d of %d examples are held out (config.data.held_out=%g)."
                    logging.info(text, self.name, len(rows["test"]), len(source), self.held_out)
                source = Subset(source, rows[split])
        if self.unconditional and source.num_classes > 1:
            source = Subset(source, np.arange(len(source)), one_class=True)
        return limit(source, self.limit, seed) if self.limit and split == "train" else source

    def generated_source(self) -> Source:
        """The samples in `generated`."""
        return load(self.generated, **self._common(self.generated))

    def _common(self, name: str) -> dict[str, Any]:
        """The options of all sources here that `name` has: images have no `latents`, see `mclr
        evaluate`."""
        common = {"latents": self.latents, "unlabelled": self.unconditional}
        return {k: value for k, value in common.items() if value and k in options_of(name)}

    def moved(self, place: str) -> "Data":
        """The same data at another place: a source, see `load`, or the folder `path`."""
        if place_of(self.name):
            place = at(place)
        _, argument = FORMATS.get(place, (None, "PATH"))
        if ":" in place or not argument:
            return dataclasses.replace(self, name=place, path="")
        return dataclasses.replace(self, path=place)


def inspect(data: Data, side: int = 64) -> tuple[list[str], Source]:
    """Facts about a set, in lines, and some examples of each of the first 20 classes.

    Without `resolution`, image files of several sizes are cropped and resized to `side`.
    """
    lines, (kind, _, path) = [], data.name.partition(":")
    if kind in ("folder", "zip") and len(found := np.unique(sizes(path), axis=0)):
        first, *_, last = 2 * sorted(found.tolist(), key=np.prod)
        text = " to ".join("{} x {}".format(*size) for size in (first, last)[: len(found)])
        lines.append(f"files: {text} pixels (width x height)")
        if len(found) > 1 and not data.resolution:
            lines[-1] += f", shown at {side} x {side}; to train, set config.data.resolution"
            data = dataclasses.replace(data, resolution=side)
    if "unlabelled" in options_of(data.name):
        data = dataclasses.replace(data, options={"unlabelled": None, **data.options})
    train = data.source("train", 0)
    test = data.source("test", 0) if kind == "folder" else Subset(train, np.arange(0))
    number = {"to train on": train, "held out": test}
    counts = {k: np.bincount(x.labels, minlength=train.num_classes) for k, x in number.items()}
    names = [caption(label, protocol.names_of(train)) for label in range(train.num_classes)]
    width = max(map(len, ["class", *names]))
    lines = [
        f"{data.name}: {len(train) + len(test)} examples of shape {train.shape}",
        *lines,
        f"sigma_data: {protocol.sigma_data(train):.4g}",
        "  ".join([f"{'class':{width}s}", *(f"{k:>11s}" for k in counts)]),
        *("  ".join([f"{name:{width}s}", *(f"{n[label]:11d}" for n in counts.values())])
          for label, name in enumerate(names)),
    ]  # fmt: skip
    rng, labels = np.random.default_rng(0), train.labels
    some = [rng.permutation(np.flatnonzero(labels == c))[:8] for c in range(20)]
    return lines, Subset(train, np.concatenate(some))


def _checked(source: Any, what: str) -> Source:
    """The source, after checks of its attributes, first and last example against `Source`."""
    parts = ("shape", "num_classes", "in_memory", "labels", "__len__", "__getitem__")
    members = dir(source)  # tested before hasattr, which would read all labels
    if absent := [part for part in parts if part not in members and not hasattr(source, part)]:
        raise ValueError(f"{what} lacks {', '.join(absent)}, expected all of protocol.Source")
    shape, num_classes, count = source.shape, source.num_classes, len(source)
    if not isinstance(shape, tuple) or {*map(type, (*shape, num_classes))} != {int} or not count:
        raise ValueError(
            f"{what}: got {count} examples of shape {shape!r} and num_classes={num_classes!r}; "
            "expected at least one, a tuple of int, and an int"
        )
    ends = np.array([0, count - 1])
    with named(f"{what}: source[{ends!r}] failed, expected images and labels of two examples"):
        images, labels = map(np.asarray, source[ends])
    if images.shape != (2, *shape):
        raise ValueError(f"{what}: got images of shape {images.shape}, expected {(2, *shape)}")
    protocol.check_values(protocol.as_images(images, what), what)
    protocol.as_labels(labels, 2, what, num_classes)
    if source.in_memory:
        protocol.as_labels(np.asarray(source.labels), count, what, num_classes)
    return source
