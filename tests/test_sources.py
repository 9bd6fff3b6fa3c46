"""Data sets by their names: those of one's own, from a config, and names that are wrong."""

import dataclasses
import zipfile

import numpy as np
import pytest

from mclr_jax.data.protocol import Arrays, limit
from mclr_jax.data.sources import Data, load
from mclr_jax.images import png
from mclr_jax.schema import read

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class Walks:
    """Images of value i with label i % 3; its labels are not to be read at the start."""

    split: str
    path: str = "default"
    length: int = 7
    classes: int = 3
    shift: float = 0.5
    in_memory: bool = False
    num_classes: int = dataclasses.field(init=False, default=3)

    shape = (2, 1)

    @property
    def labels(self):
        raise RuntimeError("slow")

    def __len__(self):
        return self.length

    def __getitem__(self, indices):
        return np.full((len(indices), 2, 1), indices[:, None, None] + self.shift), indices % 3


def function(split, **options):
    images = np.zeros((4, 2), np.uint8)
    return Arrays(images, np.arange(4, dtype=np.int32), options["num_classes"])


def mistaken(split):
    return len(3)


class Wrapper:
    """Hands on whatever it does not have."""

    def __init__(self, split):
        self._source = function(split, num_classes=4)

    def __getattr__(self, name):
        return getattr(self.__dict__["_source"], name)

    def __len__(self):
        return len(self._source)

    def __getitem__(self, indices):
        return self._source[indices]


class Broken:
    """A source as it should be, but for what `options` replace."""

    def __init__(self, split, without=(), **options):
        values = {"shape": (2,), "num_classes": 3, "in_memory": True, "count": 4}
        values |= {"labels": np.array([0, 1, 2, 2]), "images": np.zeros((4, 2), np.float32)}
        values |= {"get": lambda indices: (self.images[indices], self.labels[indices])} | options
        self.__dict__.update({k: v for k, v in values.items() if k not in without})

    def __len__(self):
        return self.count

    def __getitem__(self, indices):
        return self.get(indices)


def test_a_dataclass_of_ones_own():
    source = load(f"{__name__}:Walks", "test", length=5, shift=1.0)
    assert (source.split, source.path, len(source), source.shift) == ("test", "default", 5, 1.0)
    images, labels = source[np.array([4, 1])]
    np.testing.assert_array_equal(images[:, 0, 0], [5, 2])
    np.testing.assert_array_equal(labels, [1, 1])


@pytest.mark.parametrize(("name", "options", "message"), [
    (f"{__name__}:Walks", {"lenght": 3}, r"option 'lenght' .*Did you mean 'length'"),
    (f"{__name__}:Walks", {"num_classes": 3}, r"option 'num_classes' .*Known: classes, in_mem"),
    (f"{__name__}:Arrays", {"images": 0}, r"option 'split' for '.*:Arrays'"),
    (f"{__name__}:Wlaks", {}, r"no 'Wlaks'.*Did you mean 'Walks'"),
    ("tfd:mnist", {}, r"no module 'tfd'.*Did you mean 'tfds'"),
    ("json:dumps", {}, r"'json:dumps' cannot be called with split \(.*missing.*keyword argum"),
    ("zpi:/data/a.zip", {}, r"Unknown data source 'zpi'.*Did you mean 'zip'"),
])  # fmt: skip
def test_wrong_names_and_options_of_ones_own(name, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, **options)


def test_a_function_and_a_wrapper_of_ones_own():
    assert load(f"{__name__}:function", num_classes=5).num_classes == 5
    with pytest.raises(KeyError):  # a mistake of its own comes through as it is
        load(f"{__name__}:function")
    with pytest.raises(TypeError, match="'int' has no len"):
        load(f"{__name__}:mistaken")
    assert load(f"{__name__}:Wrapper").num_classes == 4


def test_sound_sources_of_ones_own_are_accepted():
    load(f"{__name__}:Broken")
    load(f"{__name__}:Broken", images=np.zeros((4, 2)))
    load(f"{__name__}:Broken", images=np.zeros((4, 2), np.uint8), labels=np.zeros(4, np.uint8))
    load(f"{__name__}:Broken", count=1, labels=np.array([2]), images=np.zeros((1, 2), np.float32),
         get=lambda indices: (np.zeros((2, 2), np.float32), np.array([2, 2])))  # fmt: skip


@pytest.mark.parametrize(("options", "message"), [
    ({"without": ["shape", "labels"]}, r"'.*:Broken' lacks shape, labels, expected all"),
    ({"shape": [2]}, r"got .* shape \[2\] .* expected .* a tuple of int"),
    ({"shape": (2.0,)}, r"got .* shape \(2\.0,\)"),
    ({"num_classes": np.int64(3)}, r"got .* num_classes=np\.int64\(3\).* expected .* an int"),
    ({"count": 0}, "got 0 examples .* expected at least one"),
    ({"get": lambda indices: [0, 1, 2, 3][indices]}, r"two examples \(only integer"),
    ({"get": lambda indices: np.zeros((1, 2))}, r"two examples \(not enough"),
    ({"shape": (3,)}, r"images of shape \(2, 2\), expected \(2, 3\)"),
    ({"images": np.zeros((4, 2), np.int32)}, "images of int32, expected uint8 or a float type"),
    ({"labels": np.array([0, 1, 2, 2.0])}, "float64, expected one integer for each of 2"),
    ({"labels": np.array([0, 1, 2, 3])}, "labels from 0 to 3, expected 0 to 2"),
    ({"labels": np.array([0, -1, 2, 2])}, "labels from -1 to 2"),  # not of the first or last
    ({"count": 3}, r"shape \(4,\) .* one integer for each of 3"),
])  # fmt: skip
def test_what_is_wrong_with_ones_own_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        load(f"{__name__}:Broken", **options)


def data(**changes):
    return read(Data, {"name": "digits"} | changes, Data.where)


def test_config_of_ours(tmp_path):
    assert len(data(flip=True, generated="npz:a").source("train", 0)) == 1497
    assert len(data().source("test", 0)) == 300
    np.savez(tmp_path / "a.npz", images=PIXELS, labels=np.arange(6))
    name = f"npz:{tmp_path / 'a.npz'}"
    assert data(name=name, num_classes=9).source("train", 0).num_classes == 9
    with pytest.raises(ValueError, match=r"option 'resolution' .* Known: latents, num_classes"):
        data(name=name, resolution=9).source("train", 0)
    other = data(test=name, limit=5, num_classes=3).source("test", 0)
    assert (len(other), other.num_classes) == (6, 6)  # the file's train split, with no option
    assert len(data(test=name).source("train", 0)) == 1497


def test_held_out_images_are_shown_like_those_of_training(tmp_path):
    """Cropped, and over the same background, where the format of the held-out set can do so."""
    for name, size in (("train", 8), ("test", 6)):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w") as archive:
            archive.writestr("0.png", png(np.full((size, 9, 4), [200, 200, 200, 0], np.uint8)))
            archive.writestr("dataset.json", '{"labels": [["0.png", 0]]}')
    train, test = (f"zip:{tmp_path / name}.zip" for name in ("train", "test"))
    both = data(name=train, test=test, resolution=4, background="black")
    for split in ("train", "test"):
        images, _ = both.source(split, 0)[np.arange(1)]
        np.testing.assert_array_equal(images, np.zeros((1, 4, 4, 3)))
    assert len(data(name=train, test="digits", background="black").source("test", 0)) == 1497


def test_config_limits_training_examples_by_its_seed():
    subset = data(limit=50).source("train", 3)
    np.testing.assert_array_equal(subset.indices, limit(load("digits"), 50, 3).indices)
    assert len(data(limit=50).source("test", 3)) == 300


def test_config_of_ones_own():
    """Keys beyond ours are its options, zeros among them; ours only where they are set."""
    walks = f"{__name__}:Walks"
    source = data(name=walks, shift=0.0, length=9, limit=0).source("test", 0)
    assert (source.split, source.path, source.length, source.shift) == ("test", "default", 9, 0.0)
    assert data(name=walks, path="here").source("train", 0).path == "here"
    with pytest.raises(ValueError, match="option 'resolution'"):
        data(name=walks, resolution=8).source("train", 0)
    assert data(name=walks, classes=2).source("train", 0).classes == 2


@pytest.mark.parametrize(("name", "split", "options", "message"), [
    ("digit", "train", {}, "Did you mean 'digits'"),
    ("fashion-mnist", "train", {}, "Did you mean 'fashion_mnist'"),
    ("qqq", "train", {}, "Known: digits, fashion_mnist, folder, mixture, nc, npy, npz, tfds, z"),
    ("zip", "train", {}, "expected 'zip:PATH'"),
    ("digits:8", "train", {}, "expected 'digits'"),
    ("digits", "valid", {}, r"expected one of \['train', 'test', 'all'\]"),
    ("zip:a", "all", {}, r"expected one of \['train', 'test'\]"),
    ("tfds:mnist", "train", {"resoluton": 8}, "Did you mean 'resolution'"),
    ("digits", "train", {"path": "a"}, "Known: none"),
])  # fmt: skip
def test_wrong_names(name, split, options, message):
    with pytest.raises(ValueError, match=message):
        load(name, split, **options)
