"""Folders of images against what their files and tables say, and zips against what was written."""

import json
import os
import zipfile

import numpy as np
import pytest
from pictures import everything, png, refused

from mclr_jax.data import folders, formats, protocol, sources
from mclr_jax.data.sources import Data, load

RNG = np.random.default_rng(0)


def grey(value, size=(4, 4)):
    return png(np.full((*size, 3), [value, 0, 0], np.uint8))


def write(folder, files):
    """Write {name: value of an image, or its content}; the source."""
    for name, content in files.items():
        (path := folder / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else grey(content))
    return f"folder:{folder}"


def values(source):
    """The red values of all images, and their labels."""
    images, labels = everything(source)
    return images[:, 0, 0, 0].tolist(), labels.tolist()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of decoded images, in place of the one in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "mclr_jax" / "data"


FILES = {"cat/2.png": 2, "ant/b/3.png": 3, "cat/1.png": 1}


def test_sub_folders_are_classes_with_names(tmp_path, caplog):
    odd = {".DS_Store": b"", "cat/._1.png": b"", "Thumbs.db": b"", ".git/0.png": b"", "a.txt": b""}
    source = load(write(tmp_path / "set", FILES | odd))
    assert values(source) == ([3, 1, 2], [0, 1, 1])
    assert (source.class_names, source.num_classes) == (("ant", "cat"), 2)
    assert "left out 5 files that are no images, such as .DS_Store" in caplog.text


def test_names_that_are_integers_are_ordered_by_value(tmp_path):
    source = load(write(tmp_path / "set", {f"{n}/0.png": n for n in (10, 9, 100)}))
    assert values(source) == ([10, 100, 9], [1, 2, 0])  # files are in the order of their names
    assert source.class_names == ("9", "10", "100")
    assert folders.numbered({"a": "b", "c": "10", "d": "9"})[1] == ("10", "9", "b")


@pytest.mark.parametrize("text", [
    "file,label\n1.png,dog\n\n2.png,cat\nb/3.png,dog\n",
    "1.png,dog\r\n./2.png,cat\r\nb\\3.png,dog\r\n",
    "\ufefffile;label;more\n1.png;dog;7\n 2.png ; cat;7\n\"b/3.png\";dog;7\n",
    "file\tlabel\n1.png\tdog\n2.png\tcat\nb/3.png\tdog\n",
    "1.png,dog\n2.png,cat\nb/3.png,dog\n1.png,dog",
])  # fmt: skip
def test_a_table_gives_the_labels(tmp_path, text, caplog):
    """Also where the folder has sub-folders or a dataset.json, which says something else."""
    name = write(tmp_path / "set", {"1.png": 1, "2.png": 2, "b/3.png": 3, "t.csv": text.encode()})
    (tmp_path / "set" / "dataset.json").write_text(json.dumps({"labels": [["1.png", 0]]}))
    source = load(name, labels=f"{tmp_path}/set/t.csv")
    assert values(source) == ([1, 2, 3], [1, 0, 1])
    assert source.class_names == ("cat", "dog")
    assert "left out" not in caplog.text  # the table is no foreign file


@pytest.mark.parametrize(("text", "message"), [
    ("1.png,a\n", "1 images have no label, such as 2.png"),
    ("1.png,a\n2.png,b\n3.png,c\n", "1 labels have no image, such as 3.png"),
    ("1.png,a\n2.png\n", r"t\.csv has no file or no label in row 2: \['2\.png'\]; complete it"),
    ("1.png,a\n,b\n", "no file or no label in row 2"),
    ("1.png,a\n2.png,b\n1.png,b\n", r"t\.csv: 1\.png has the labels a and b"),
    ("", "2 images and 0 labels"),
    (b"\xff\xfe1", r"t\.csv is no text in UTF-8"),
])  # fmt: skip
def test_tables_that_cannot_be_are_refused(tmp_path, text, message):
    content = text if isinstance(text, bytes) else text.encode()
    name = write(tmp_path / "set", {"1.png": 1, "2.png": 2, "t.csv": content})
    refused(message, name, labels=f"{tmp_path}/set/t.csv")
    refused("no file .*none.csv; check config.data.labels", name, labels="none.csv",
            error=FileNotFoundError)  # fmt: skip


def test_folders_of_splits_are_no_classes(tmp_path):
    name = write(tmp_path / "set", {"Train/a/1.png": 1, "val/a/1.png": 1})
    refused("has the folders Train, val, which are no classes; .*folder:.*/Train and", name)
    refused(r"2 images, but no dataset\.json; .*data\.labels.*data\.unconditional=True",
            write(tmp_path / "one", {"all/1.png": 1, "all/2.png": 1}))  # fmt: skip


def test_the_held_out_share_is_of_each_class_and_the_rest_is_for_training(tmp_path, caplog):
    counts = {"a": 40, "b": 10, "c": 3, "d": 1}
    files = {f"{c}/{i}.png": 41 * k + i for k, c in enumerate(counts) for i in range(counts[c])}
    data = Data(write(tmp_path / "set", files), held_out=0.2)
    caplog.set_level("INFO", logger="absl")
    train, test = (values(data.source(split, 0)) for split in ("train", "test"))
    assert np.bincount(test[1], minlength=4).tolist() == [8, 2, 1, 0]
    assert sorted(train[0] + test[0]) == sorted(files.values())
    assert "set: 11 of 54 examples are held out (config.data.held_out=0.2)." in caplog.text
    assert values(data.source("test", 7)) == test  # whatever the seed of the training
    assert data.source("test", 0).class_names == ("a", "b", "c", "d")
    assert data.source("test", 0).indices[7] > 7  # not the first of the class
    assert len(data.source("train", 0)) == 43
    other = Data(write(tmp_path / "set", {"b/a.png": 1}), held_out=0.2).source("test", 0)
    assert [v for v, label in zip(*values(other), strict=True) if label != 1] == [
        v for v, label in zip(*test, strict=True) if label != 1
    ]  # a new image of another class changes nothing


def test_what_is_not_divided(tmp_path):
    name = write(tmp_path / "set", {f"{c}/{i}.png": i for c in "ab" for i in range(10)})
    own = write(tmp_path / "own", {"a/0.png": 77, "b/0.png": 78})
    data = Data(name, test=own)
    assert (len(data.source("train", 0)), values(data.source("test", 0))[0]) == (20, [77, 78])
    assert len(Data("digits").source("train", 0)) == 1497
    assert len(Data(name, held_out=0.0).source("train", 0)) == 20
    with pytest.raises(ValueError, match=r"has no 'test' split; .*config\.data\.held_out"):
        Data(name, held_out=0.0).source("test", 0)
    one = write(tmp_path / "one", {"a/0.png": 0, "b/0.png": 1})
    with pytest.raises(ValueError, match="no class has two examples"):
        Data(one).source("train", 0)


def test_without_labels_all_is_one_class(tmp_path):
    mixed = write(tmp_path / "set", {"0.png": 0, "a/1.png": 1, "b/2.png": 2})
    for name in (mixed, "digits"):
        source = Data(name, unconditional=True).source("train", 0)
        assert (source.num_classes, {*everything(source)[1]}, {*source.labels}) == (1, {0}, {0})
        assert tuple(getattr(source, "class_names", ())) == ()


# ---- decoded images ------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The names of the images that were decoded."""
    names, decode = [], formats._decode
    monkeypatch.setattr(formats, "_decode", lambda *a: names.append(a[-1]) or decode(*a))
    return names


def test_the_second_start_decodes_nothing(tmp_path, decoded, cache):
    name = write(tmp_path / "set", {f"{c}/{i}.png": i for c in "ab" for i in range(150)})
    first = everything(load(name))
    assert {*decoded} >= {f"{c}/{i}.png in {tmp_path}/set" for c in "ab" for i in range(150)}
    decoded.clear()
    second = load(name)
    for got, expected in zip(everything(second), first, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert (second.class_names, second.in_memory, decoded) == (("a", "b"), True, [])
    assert isinstance(load(name, in_memory=False).images, np.memmap)
    assert [path.suffix for path in cache.iterdir()] == [".npy"]


def later(path):
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


@pytest.mark.parametrize(("change", "files"), [
    (lambda folder: (folder / "a" / "0.png").write_bytes(grey(200)), 1),
    (lambda folder: later(folder / "a" / "0.png"), 1),
    (lambda folder: (folder / "a" / "0.png").rename(folder / "a" / "9.png"), 1),
    (lambda folder: {"resolution": 2}, 2),
    (lambda folder: {"background": "black"}, 2),
])  # fmt: skip
def test_what_has_changed_is_decoded_again(tmp_path, decoded, cache, change, files):
    """And the file of an earlier state of the folder is removed."""
    name = write(tmp_path / "set", {f"{c}/{i}.png": i for c in "ab" for i in range(3)})
    load(name)
    decoded.clear()
    options = change(tmp_path / "set")
    options = options if isinstance(options, dict) else {}
    source = load(name, **options)
    assert len({*decoded}) == 6
    np.testing.assert_array_equal(source.images, load(name, cache="", **options).images)
    assert len([*cache.iterdir()]) == files


@pytest.mark.parametrize("damage", [
    lambda content: content[:-1], lambda content: b"", lambda content: b"\0" * 200,
    lambda content: content[:20] + b"((((" + content[24:],
    lambda content: content.replace(b"|u1", b"|i1"),
    lambda content: content.replace(b"(6, ", b"(5, "),
])  # fmt: skip
def test_a_damaged_file_is_made_again(tmp_path, decoded, cache, damage):
    name = write(tmp_path / "set", {f"{c}/{i}.png": i for c in "ab" for i in range(3)})
    expected = load(name).images
    (file,) = cache.iterdir()
    file.write_bytes(damage(intact := file.read_bytes()))
    np.testing.assert_array_equal(load(name).images, expected)
    assert file.read_bytes() == intact


def test_where_nothing_can_be_kept_images_are_decoded(
    tmp_path, decoded, cache, caplog, monkeypatch
):
    name = write(tmp_path / "set", {f"{c}/{i}.png": i for c in "ab" for i in range(3)})
    load(name, cache="")
    assert not cache.exists()
    monkeypatch.setattr(folders, "LARGEST", 6 * 48 - 1)
    assert len(load(name)) == 6
    assert "are not kept" in caplog.text
    assert not [*cache.iterdir()]
    monkeypatch.setattr(folders, "LARGEST", 6 * 48)
    (tmp_path / "file").touch()
    caplog.clear()
    assert len(load(name, cache=f"{tmp_path}/file")) == 6
    assert "file: " in caplog.text
    load(name)
    assert len([*cache.iterdir()]) == 1


def test_an_image_that_cannot_be_decoded_leaves_no_file(tmp_path, cache):
    name = write(tmp_path / "set", {"a/0.png": 0, "a/1.png": 1, "b/0.png": grey(3)[:45]})
    refused("b/0.png in .* cannot be decoded", name)
    refused("b/0.png in .* cannot be decoded", name)
    assert not [*cache.iterdir()]


# ---- names of classes ----------------------------------------------------------------------------


def test_held_out_images_of_other_classes_are_refused(tmp_path):
    """A held-out set without some class would have the labels of others."""
    train = load(write(tmp_path / "a", {"ant/0.png": 0, "bee/0.png": 1, "cat/0.png": 2}))
    fits = load(write(tmp_path / "b", {"ant/0.png": 0, "bee/0.png": 1}))
    shifted = load(write(tmp_path / "c", {"ant/0.png": 0, "cat/0.png": 1}))
    protocol.check_names(train, fits)
    protocol.check_names(train, load("digits"))
    with pytest.raises(ValueError, match="Label 1 is 'bee' in the training set and 'cat' in the"):
        protocol.check_names(train, shifted)


# ---- zips of one's own and what is found in a set ------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_a_written_zip_is_that_of_edm_and_comes_back(tmp_path, channels):
    images = RNG.integers(0, 256, (1001, 6, 4, channels), np.uint8)
    labels = RNG.integers(0, 3, 1001).astype(np.int32)
    source = protocol.Arrays(images, labels, 3, class_names=("ant", "bee", "cat"))
    counts = []
    folders.write(source, tmp_path / "deep" / "a.zip", counts.append)
    assert sum(counts) == 1001
    back = load(f"zip:{tmp_path}/deep/a.zip")
    for got, expected in zip(everything(back), (images, labels), strict=True):
        np.testing.assert_array_equal(got, expected)
    assert (back.class_names, back.num_classes) == (source.class_names, 3)
    with zipfile.ZipFile(tmp_path / "deep" / "a.zip") as archive:
        about, names = json.loads(archive.read("dataset.json")), archive.namelist()
    assert about["labels"][1000] == ["00001/img00001000.png", labels[1000]]
    assert names == [*(name for name, _ in about["labels"]), "dataset.json"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.zip"]


@pytest.mark.parametrize(("images", "message"), [
    (np.zeros((2, 4, 4, 3), np.float32), "examples are float32; a zip is for images of 8 bits"),
    (np.zeros((2, 4, 4, 4), np.uint8), r"have shape \(4, 4, 4\); a zip is for grey or colour"),
    (np.zeros((2, 4), np.uint8), r"have shape \(4,\)"),
])  # fmt: skip
def test_what_is_no_image_of_8_bits_is_not_written(tmp_path, images, message):
    source = protocol.Arrays(images, np.zeros(2, np.int32), 1)
    with pytest.raises(ValueError, match=message):
        folders.write(source, tmp_path / "out" / "a.zip")
    assert not [*tmp_path.iterdir()]


def test_what_is_found_in_a_set_is_said(tmp_path):
    """Sizes as files say them, counts of what training takes and holds out, sigma as defined."""
    files = {f"ant/{i}.png": grey(0, (4, 6)) for i in range(10)}
    name = write(tmp_path / "a", files | {f"bee/{i}.png": grey(255, (4, 6)) for i in range(30)})
    lines, some = sources.inspect(Data(name))
    red = np.repeat([-1.0, 1.0], [9, 27])
    sigma = np.stack([red, -np.ones(36), -np.ones(36)]).std()
    assert lines == [
        f"{name}: 40 examples of shape (4, 6, 3)", "files: 6 x 4 pixels (width x height)",
        f"sigma_data: {sigma:.4g}", "class  to train on     held out",
        "ant              9            1", "bee             27            3",
    ]  # fmt: skip
    assert values(some)[1] == [0] * 8 + [1] * 8
    write(tmp_path / "a", {"bee/x.png": grey(255, (20, 12))})
    lines, some = sources.inspect(Data(name), side=5)
    assert lines[1] == (
        "files: 6 x 4 to 12 x 20 pixels (width x height), shown at 5 x 5; to train, set "
        "config.data.resolution"
    )
    assert some.shape == (5, 5, 3)
    assert sources.inspect(Data(name, resolution=3))[1].shape == (3, 3, 3)
    bare = write(tmp_path / "b", {"0.png": 0, "1.png": 1})
    assert sources.inspect(Data(bare))[0][-1] == "0                1            1"
    assert sources.inspect(Data("digits"))[0][0] == "digits: 1497 examples of shape (8, 8, 1)"


def test_a_place_is_named_by_its_kind(tmp_path):
    (tmp_path / "a.zip").touch()
    (tmp_path / "a.npz").mkdir()
    places = [str(tmp_path), f"{tmp_path}/a.zip", f"{tmp_path}/a.npz", "digits", "zip:x", "b.zip"]
    kinds = [sources.at(place).removesuffix(place) for place in places]
    assert kinds == ["folder:", "zip:", "folder:", "", "", ""]
    moved = Data("folder:/old", resolution=8).moved(str(tmp_path))
    assert moved == Data(f"folder:{tmp_path}", resolution=8)
    assert Data("fashion_mnist").moved(str(tmp_path)).path == str(tmp_path)
