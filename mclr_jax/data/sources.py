"""Data sets by name, as in config.data."""

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import numpy as np

from mclr_jax.data.formats import FORMATS
from mclr_jax.data.protocol import Source, as_images, as_labels, check_values, limit
from mclr_jax.files import named
from mclr_jax.names import fields, look_up, nearest, resolve


def load(name: str, split: str = "train", **options) -> Source:
    """The data set 'digits', 'fashion_mnist', 'mixture', 'tfds:NAME', 'zip:PATH' or 'npz:PATH'.

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


def _check_options(name: str, options: Iterable[str], known: Collection[str]) -> None:
    for option in options:
        if option not in known:
            raise ValueError(f"got option {option!r} for {name!r}; {nearest(option, known)}")


def from_config(data: Any, split: str, seed: int) -> Source:
    """The data set of `config.data`; for split 'train', a subset of `data.limit` drawn by `seed`.

    Options of `load` are path, resolution and num_classes, unless empty or 0, and all keys that
    configs/base.py does not have.
    """
    if split == "test" and data.get("test"):
        return load(data.test)
    unset = [key for key in ("path", "resolution", "num_classes") if not data.get(key)]
    others = ["name", "test", "generated", "limit", "flip", "augment", *unset]
    source = load(data.name, split, **{k: v for k, v in data.items() if k not in others})
    return limit(source, data.limit, seed) if data.get("limit") and split == "train" else source


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
    check_values(as_images(images, what), what)
    as_labels(labels, 2, what, num_classes)
    if source.in_memory:
        as_labels(np.asarray(source.labels), count, what, num_classes)
    return source
