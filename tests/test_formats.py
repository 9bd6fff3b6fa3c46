"""Formats against files that the tests write byte by byte, or by other libraries."""

import gzip
import io
import json
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mclr_jax.data import formats
from mclr_jax.data.sources import load

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)


def everything(source):
    return source[np.arange(len(source))]


def png(array, image_format="PNG"):
    file = io.BytesIO()
    Image.fromarray(array).save(file, image_format)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_idx(folder, prefix, images, labels, suffix=""):
    opener = gzip.open if suffix else open
    with opener(folder / f"{prefix}-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    with opener(folder / f"{prefix}-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def write_zip(path, files, labels):
    """`files` {name: bytes}; `labels` whatever dataset.json shall say, or ... for no such file."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if labels is not ...:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return f"zip:{path}"


# digits


def test_digits_are_scikit_learns_split_in_equal_shares():
    from sklearn.datasets import load_digits

    data = load_digits()
    whole, train, test = (load("digits", split) for split in ("all", "train", "test"))
    np.testing.assert_array_equal(
        everything(whole)[0][..., 0], np.rint(data.data * 15.9375).reshape(-1, 8, 8)
    )
    np.testing.assert_array_equal(everything(whole)[1], data.target)
    assert (len(train), len(test), train.shape, train.num_classes) == (1497, 300, (8, 8, 1), 10)
    assert set(np.bincount(train.labels)) == {149, 150}
    both = np.concatenate([train.images, test.images]).reshape(1797, -1)
    everyone = whole.images.reshape(1797, -1)
    np.testing.assert_array_equal(
        both[np.lexsort(both.T)], everyone[np.lexsort(everyone.T)]
    )  # each example is in exactly one


# mixture


def test_the_mixture_is_held_out_from_other_draws():
    """Both splits have the moments of the mixture by its definition, and no point in common."""
    from mclr_jax.mixture import toy

    train, test = load("mixture"), load("mixture", "test")
    assert (len(train), len(test), train.shape, train.num_classes) == (65_536, 8192, (2,), 3)
    assert not {*map(bytes, train.images)} & {*map(bytes, test.images)}
    with pytest.raises(ValueError, match="expected one of"):
        load("mixture", "all")
    for source in (train, test):
        for c, means in enumerate(np.asarray(toy().means)):
            points = source.images[source.labels == c]
            assert len(points) / len(source) == pytest.approx(1 / 3, abs=0.02)
            spread = (means**2).mean(0) + 0.45**2 - means.mean(0) ** 2
            np.testing.assert_allclose(points.mean(0), means.mean(0), atol=0.12)
            np.testing.assert_allclose(points.var(0), spread, rtol=0.05)


# fashion_mnist


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_idx_files(tmp_path, suffix):
    train, test = PIXELS[..., 0], PIXELS[:2, ..., 1]
    write_idx(tmp_path, "train", train, [9, 0, 3, 3, 1, 2], suffix)
    write_idx(tmp_path, "t10k", test, [7, 5], suffix)
    for split, images, labels in [("train", train, [9, 0, 3, 3, 1, 2]), ("test", test, [7, 5])]:
        source = load("fashion_mnist", split, path=str(tmp_path))
        got, got_labels = everything(source)
        np.testing.assert_array_equal(got, images[..., None])
        np.testing.assert_array_equal(got_labels, labels)
        assert (got.dtype, got_labels.dtype) == (np.uint8, np.int32)
        assert (source.shape, source.num_classes, source.in_memory) == ((5, 4, 1), 10, True)
    np.testing.assert_array_equal(source[np.array([1, 0, 1])][1], [5, 7, 5])


def test_idx_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        load("fashion_mnist", path=str(tmp_path / "nowhere"))
    write_idx(tmp_path, "train", PIXELS[..., 0], [0] * 5)
    with pytest.raises(ValueError, match=r"labels of shape \(5,\) .* each of 6 images"):
        load("fashion_mnist", path=str(tmp_path))
    write_idx(tmp_path, "train", PIXELS[..., 0], [0, 0, 0, 0, 0, 10])
    with pytest.raises(ValueError, match="labels from 0 to 10, expected 0 to 9"):
        load("fashion_mnist", path=str(tmp_path))
    file = tmp_path / "train-images-idx3-ubyte"
    content = file.read_bytes()
    for broken in (content[:-1], content[:9], b""):
        file.write_bytes(broken)
        with pytest.raises(ValueError, match="no intact IDX"):
            load("fashion_mnist", path=str(tmp_path))
    file.write_bytes(b"\0\0\x0d\x03" + content[4:])
    with pytest.raises(ValueError, match="0xd03, expected 0x803"):
        load("fashion_mnist", path=str(tmp_path))
    file.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content)[:-20])
    with pytest.raises(ValueError, match="no intact IDX"):
        load("fashion_mnist", path=str(tmp_path))


# tfds


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Sets made without TensorFlow: of equal size (PNG), grey, and unequal (JPEG among PNG)."""
    folder = tmp_path_factory.mktemp("tfds")

    def prepare(set_name, shape, **splits):
        class Builder(tfds.core.GeneratorBasedBuilder):
            name = set_name
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {"image": tfds.features.Image(shape=shape), "id": np.int64}
                features["label"] = tfds.features.ClassLabel(num_classes=4)
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {name: self._generate_examples(each) for name, each in splits.items()}

            def _generate_examples(self, examples):
                for i, image in enumerate(examples):
                    yield i, {"image": io.BytesIO(image), "label": i % 4, "id": i}

        Builder(data_dir=folder, file_format="array_record").download_and_prepare()

    prepare("mclr_equal", (5, 4, 3), train=[png(image) for image in PIXELS])
    grey, other = ([png(image[..., channel]) for image in PIXELS] for channel in (0, 1))
    prepare("mclr_grey", (5, 4, 1), train=grey, test=other[:4])
    wide = np.zeros((16, 40, 3), np.uint8)
    wide[:, 12:28] = [200, 100, 50]
    unequal = [png(wide), png(wide[:, ::2].copy(), "JPEG")]
    prepare("mclr_unequal", (None, None, 3), train=unequal)
    return str(folder)


@pytest.mark.parametrize("in_memory", [True, False])
def test_tfds(tfds_dir, in_memory):
    source = load(
        "tfds:mclr_equal:1.0.0" if in_memory else "tfds:mclr_equal",
        path=tfds_dir,
        in_memory=in_memory,
    )
    images, labels = everything(source)
    order = [int(np.flatnonzero((PIXELS == image).all((1, 2, 3)))[0]) for image in images]
    assert sorted(order) == list(range(6))  # TFDS permutes by a hash of the key
    np.testing.assert_array_equal(labels, np.array(order) % 4)
    np.testing.assert_array_equal(source.labels, labels)
    assert (source.shape, source.num_classes, source.in_memory) == ((5, 4, 3), 4, in_memory)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_tfds_of_grey_images_has_one_channel_in_each_split(tfds_dir):
    for split, expected in [("train", PIXELS[..., :1]), ("test", PIXELS[:4, ..., 1:2])]:
        images, _ = everything(load("tfds:mclr_grey", split, path=tfds_dir))
        assert sorted(map(bytes, images)) == sorted(map(bytes, expected.copy()))
    assert load("tfds:mclr_grey", path=tfds_dir).shape == images.shape[1:] == (5, 4, 1)


def test_tfds_unequal_sizes_are_cropped_and_resized(tfds_dir):
    with pytest.raises(ValueError, match=r"config\.data\.resolution"):
        load("tfds:mclr_unequal", path=tfds_dir)
    images, _ = everything(load("tfds:mclr_unequal", path=tfds_dir, resolution=8))
    assert images.shape == (2, 8, 8, 3)
    by_brightness = images[np.argsort(images.mean((1, 2, 3)))]
    # The central square of the wide image is of one colour, and the other's is not.
    np.testing.assert_array_equal(by_brightness[1], np.broadcast_to([200, 100, 50], (8, 8, 3)))
    assert by_brightness[0][:, 3:5].mean() > 80
    assert by_brightness[0][:, 0].mean() < 20


def test_tfds_errors(tfds_dir):
    with pytest.raises(
        FileNotFoundError, match=r"tfds\.builder\('mnist', data_dir='DIR', file_format"
    ):
        load("tfds:mnist", path=tfds_dir)
    with pytest.raises(ValueError, match="no 'no_such_set'") as error:
        load("tfds:no_such_set", path=tfds_dir)
    assert len(str(error.value)) < 300
    with pytest.raises(ValueError, match=r"splits \['train'\], got 'test'"):
        load("tfds:mclr_equal", "test", path=tfds_dir)


# zip


@pytest.mark.parametrize("in_memory", [True, False])
def test_zip_of_png(tmp_path, in_memory):
    """In the order of the file names, whatever the order in the archive and in dataset.json."""
    names = [f"0000{i % 2}/img{i:08d}.png" for i in range(6)]
    files = {name: png(image) for name, image in zip(names, PIXELS, strict=True)}
    labels = [[name, i] for i, name in enumerate(names)]
    source = load(write_zip(tmp_path / "a.zip", files, labels[::-1]), in_memory=in_memory)
    order = [0, 2, 4, 1, 3, 5]
    images, got = everything(source)
    np.testing.assert_array_equal(images, PIXELS[order])
    np.testing.assert_array_equal(got, order)
    np.testing.assert_array_equal(source.labels, order)
    assert (source.shape, source.num_classes, source.in_memory) == ((5, 4, 3), 6, in_memory)
    assert (images.dtype, got.dtype) == (np.uint8, np.int32)
    assert load(write_zip(tmp_path / "b.zip", files, labels), num_classes=9).num_classes == 9


def test_zip_of_grey_png(tmp_path):
    name = write_zip(tmp_path / "a.zip", {"0.png": png(PIXELS[0, ..., 0])}, [["0.png", 1]])
    np.testing.assert_array_equal(everything(load(name))[0], PIXELS[:1, ..., :1])


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_zip_of_npy_is_channels_first(tmp_path, dtype):
    array = (RNG.normal(size=(8, 3, 2)) * 100).astype(dtype)
    name = write_zip(tmp_path / "a.zip", {"0.npy": npy(array)}, [["0.npy", 0]])
    images, _ = everything(load(name, in_memory=False))
    np.testing.assert_allclose(images[0], array.transpose(1, 2, 0), rtol=1e-6)
    assert images.dtype == (np.uint8 if dtype == np.uint8 else np.float32)


def test_zip_is_read_by_threads(tmp_path):
    large = RNG.integers(0, 256, (40, 64, 64, 3), np.uint8)
    files = {f"{i:02d}.png": png(image) for i, image in enumerate(large)}
    name = write_zip(tmp_path / "a.zip", files, [[file, 0] for file in files])
    source, errors = load(name, in_memory=False), []

    def work(seed):
        try:
            indices = np.random.default_rng(seed).permutation(40)
            np.testing.assert_array_equal(source[indices][0], large[indices])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_zip_labels(tmp_path):
    files = {"0.png": png(PIXELS[0]), "1.png": png(PIXELS[1])}
    for labels in (None, ...):
        name = write_zip(tmp_path / "a.zip", files, labels)
        with pytest.raises(ValueError, match=r"data\.unlabelled = True"):
            load(name)
        source = load(name, unlabelled=True)
        assert (source.num_classes, list(source.labels)) == (1, [0, 0])
    for labels, options, message in [
        ([["0.png", 0]], {}, "2 images of which 1 have no label"),
        ([["0.png", 0], ["1.png", -1]], {}, "labels from -1 to 0"),
        ([["0.png", 0], ["1.png", 3]], {"num_classes": 3}, "labels from 0 to 3, expected 0 to 2"),
        ([["0.png", 0.5], ["1.png", 1]], {}, "float64, expected one integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(write_zip(tmp_path / "a.zip", files, labels), in_memory=False, **options)


def test_zip_errors(tmp_path):
    labels = [["0.png", 0], ["1.png", 0]]
    unequal = {"0.png": png(PIXELS[0]), "1.png": png(PIXELS[1, :3])}
    with pytest.raises(ValueError, match=r"image 1 of shape \(3, 4, 3\)"):
        load(write_zip(tmp_path / "a.zip", unequal, labels))
    broken = {"0.png": png(PIXELS[0]), "1.png": png(PIXELS[1])[:60]}
    with pytest.raises(ValueError, match=r"1\.png in .* cannot be decoded"):
        load(write_zip(tmp_path / "a.zip", broken, labels))
    for content in (b"no array", npy(np.float32(3))):
        with pytest.raises(ValueError, match=r"corrupt at 0\.npy"):
            load(write_zip(tmp_path / "a.zip", {"0.npy": content}, [["0.npy", 0]]))
    with pytest.raises(ValueError, match=r"a\.zip has a broken dataset\.json"):
        load(write_zip(tmp_path / "a.zip", {"0.png": b"", "dataset.json": b"{"}, ...))
    for text in (
        b"[]",
        b"[" * 100_000,
        b"3",
        b'{"labels": 3}',
        b'{"labels": [[["a"], 0]]}',
        b"\xff\xfe",
    ):
        with pytest.raises(ValueError, match=r"a\.zip has a broken dataset\.json"):
            load(write_zip(tmp_path / "a.zip", {"0.png": b"", "dataset.json": text}, ...))
    ragged = [["0.png", 0], ["1.png", [1, 2]]]
    with pytest.raises(ValueError, match=r"a\.zip has a broken dataset\.json"):
        load(write_zip(tmp_path / "a.zip", unequal, ragged))
    small = png(PIXELS[0])
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + small[24:29]
    bomb = {"0.png": small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]}
    with pytest.raises(ValueError, match=r"0\.png in .* cannot be decoded.*exceeds limit"):
        load(write_zip(tmp_path / "a.zip", bomb, [["0.png", 0]]))
    with pytest.raises(ValueError, match=r"no \.png or \.npy"):
        load(write_zip(tmp_path / "a.zip", {"a.txt": b""}, []))
    intact = tmp_path / "b.zip"
    write_zip(intact, {"0.png": png(PIXELS[0])}, [["0.png", 0]])
    content = intact.read_bytes()
    middle = content.index(b"IDAT") + 6
    intact.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    with pytest.raises(ValueError, match="corrupt at 0"):
        load(f"zip:{intact}")
    intact.write_bytes(content[:-30])
    with pytest.raises(ValueError, match="no intact file"):
        load(f"zip:{intact}")
    with pytest.raises(FileNotFoundError, match=r"found no file .*none\.zip"):
        load(f"zip:{tmp_path}/none.zip")
    with pytest.raises(ValueError, match="no 'test' split"):
        load(f"zip:{intact}", "test")


# npz


@pytest.mark.parametrize("shape", [(3, 4, 5, 2), (3, 4, 5), (3, 7)])
def test_npz(tmp_path, shape):
    path = tmp_path / "a.npz"
    floats, test = RNG.normal(size=shape).astype(np.float32), RNG.integers(0, 256, shape, np.uint8)
    np.savez(path, images=floats, labels=[0, 4, 1])
    channels = (*shape, 1) if len(shape) == 3 else shape
    source = load(f"npz:{path}")
    images, labels = everything(source)
    np.testing.assert_array_equal(images, floats.reshape(channels))
    np.testing.assert_array_equal(labels, [0, 4, 1])
    assert (source.shape, source.num_classes, images.dtype) == (channels[1:], 5, np.float32)
    with pytest.raises(ValueError, match=r"no \['test_images', 'test_labels'\]"):
        load(f"npz:{path}", "test")
    np.savez(path, images=floats, labels=[0, 4, 1], test_images=test, test_labels=[2, 2, 0])
    images, labels = everything(load(f"npz:{path}", "test", num_classes=5))
    np.testing.assert_array_equal(images, test.reshape(channels))
    np.testing.assert_array_equal(labels, [2, 2, 0])


@pytest.mark.parametrize(("images", "message"), [
    (np.full((3, 4, 4, 1), np.nan), "3 images that are not finite, 0 first"),
    (np.array([0.5, np.inf])[:, None], "1 images that are not finite, 1 first"),
    (np.linspace(0, 255, 48).reshape(1, 4, 4, 3), r"from 0 to 255; expected \[-1, 1\], or uint8"),
    (np.zeros((2, 3, 8, 8)), r"shape \(3, 8, 8\), which seem to be \(C, H, W\)"),
    (np.zeros((2, 1, 8, 8), np.uint8), r"shape \(1, 8, 8\), which seem"),
])  # fmt: skip
def test_images_that_are_not_what_they_should_be_are_refused(tmp_path, images, message):
    np.savez(tmp_path / "a.npz", images=images, labels=np.zeros(len(images), np.int64))
    with pytest.raises(ValueError, match=message):
        load(f"npz:{tmp_path / 'a.npz'}")


def test_what_may_be_meant_is_warned_of(tmp_path, caplog):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.linspace(0, 1, 48).reshape(1, 4, 4, 3), labels=[0])
    load(f"npz:{path}")
    assert "float images from 0 to 1; expected [-1, 1]" in caplog.text
    caplog.clear()
    np.savez(path, images=PIXELS[:3], labels=[0, 10, 20])
    assert load(f"npz:{path}").num_classes == 21
    assert "18 of 21 classes have no example" in caplog.text
    caplog.clear()
    np.savez(path, images=RNG.normal(size=(3, 4, 4, 8)), labels=[0, 1, 2])  # latents
    load(f"npz:{path}")
    assert not caplog.text


def test_labels_beyond_32_bits_do_not_wrap(tmp_path):
    np.savez(tmp_path / "a.npz", images=PIXELS[:2], labels=[0, 2**32 + 1])
    with pytest.raises(ValueError, match="labels from 0 to 4294967297, expected 0 to 2147483647"):
        load(f"npz:{tmp_path / 'a.npz'}")


def test_images_of_16_bits_are_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(buffer, "PNG")
    with pytest.raises(ValueError, match=r"cannot be decoded.*mode I.*expected 8 bits"):
        load(write_zip(tmp_path / "a.zip", {"0.png": buffer.getvalue()}, [["0.png", 0]]))


def test_npz_errors(tmp_path):
    path = tmp_path / "a.npz"
    with path.open("wb") as file:
        np.save(file, PIXELS)
    np.savez(path.with_name("b.npz"), images=PIXELS[0, 0, 0, 0], labels=[0])
    with pytest.raises(ValueError, match=r"`images` has shape \(\), expected an axis"):
        load(f"npz:{path.with_name('b.npz')}")
    with pytest.raises(ValueError, match=r"a\.npz holds one array; expected an npz file"):
        load(f"npz:{path}")
    for labels, message in [
        ([0, 1], r"labels of shape \(2,\) .* each of 6 images"),
        ([0, 1, 2, 3, 4, -1], "labels from -1 to 4"),
        ([0.0] * 6, "float64, expected one integer"),
        (0, r"shape \(\)"),
        (np.eye(6, dtype=np.int32), r"shape \(6, 6\)"),
    ]:
        np.savez(path, images=PIXELS, labels=labels)
        with pytest.raises(ValueError, match=message):
            load(f"npz:{path}")
    np.savez(path, images=PIXELS, labels=np.arange(6))
    with pytest.raises(ValueError, match="expected 0 to 4"):
        load(f"npz:{path}", num_classes=5)
    content = path.read_bytes()
    for broken in (content[:-30], b"", b"no zip", content[:300] + b"?" + content[301:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"no intact file|corrupt"):
            load(f"npz:{path}")
    np.savez(path, images=PIXELS.astype(np.int64), labels=np.arange(6))
    with pytest.raises(ValueError, match="images of int64"):
        load(f"npz:{path}")
    np.savez(path, images=PIXELS)
    with pytest.raises(ValueError, match=r"no \['labels'\]"):
        load(f"npz:{path}")


# images


def test_center_crop_takes_the_middle():
    """Against a box mean by hand, where only halving is needed."""
    array = RNG.integers(0, 256, (16, 24), np.uint8)
    got = np.asarray(formats.center_crop(Image.fromarray(array), 4), np.float64)
    expected = array[:, 4:20].reshape(4, 4, 4, 4).mean((1, 3))
    np.testing.assert_allclose(got, expected, atol=2)  # halving rounds up


@pytest.mark.parametrize("size", [(24, 16), (16, 25), (5, 4), (4, 4)])
def test_center_crop_is_centred_whichever_side_is_longer(size):
    """A step in the middle of the image stays in the middle; (height, width)."""
    for axis in (0, 1):
        array = np.zeros(size, np.uint8)
        array[np.s_[: size[0] // 2] if axis == 0 else np.s_[:, : size[1] // 2]] = 200
        got = np.asarray(formats.center_crop(Image.fromarray(array), 4), np.float64)
        assert got.shape == (4, 4)
        line = got.mean(1 - axis)
        shift = 50 * (size[axis] % 2)  # an odd side has its middle half a pixel later
        np.testing.assert_allclose(line, [200, 200 - shift, 0, 0], atol=60)
        assert np.ptp(got, axis=1 - axis).max() <= 2  # nothing along the other side


def test_what_is_small_is_in_memory(tmp_path, monkeypatch):
    """Of 2 images of 60 bytes the limit is above 120 bytes."""
    files = {f"{i}.png": png(PIXELS[i]) for i in range(2)}
    name = write_zip(tmp_path / "a.zip", files, [[file, 0] for file in files])
    assert load(name).in_memory
    for limit, expected in [(121, True), (120, False), (60, False)]:
        monkeypatch.setattr(formats, "IN_MEMORY_BYTES", limit)
        assert load(name).in_memory == expected


def test_images_with_a_palette_or_transparency_become_colour(tmp_path):
    """The palette has PIXELS' first 20 colours; transparency is left out."""
    image = Image.fromarray(np.arange(20, dtype=np.uint8).reshape(5, 4), "P")
    image.putpalette(PIXELS[0].ravel().tolist())
    clear = np.dstack([PIXELS[0], np.full((5, 4), 7, np.uint8)])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    files = {"0.png": buffer.getvalue(), "1.png": png(clear)}
    images, _ = everything(load(write_zip(tmp_path / "a.zip", files, [[f, 0] for f in files])))
    np.testing.assert_array_equal(images, [PIXELS[0], PIXELS[0]])
