"""Formats against files that the tests write byte by byte, or by other libraries."""

import concurrent.futures
import gzip
import json
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from pictures import (
    BEST,
    PIXELS,
    RNG,
    SHOWN,
    TURNED,
    everything,
    hidden,
    mark,
    npy,
    over,
    png,
    refused,
    write_zip,
)
from PIL import Image

from mclr_jax.data import formats
from mclr_jax.data.sources import load


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png16(colour_type, channels):
    """A PNG of 16 bits a channel, of which 12 are in use, as by a camera."""
    rows = RNG.integers(0, 4096, (4, 4 * channels)).astype(">u2")
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


SMALL = png(PIXELS[0])
BOMB = chunk(b"IHDR", struct.pack(">II", 60_000, 60_000) + SMALL[24:29])
LATENTS = np.concatenate([RNG.normal(size=(4, 8, 8)), np.exp(RNG.normal(size=(4, 8, 8)) - 4)])


def write_idx(folder, prefix, images, labels, suffix=""):
    opener = gzip.open if suffix else open
    with opener(folder / f"{prefix}-images-idx3-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
    with opener(folder / f"{prefix}-labels-idx1-ubyte{suffix}", "wb") as file:
        file.write(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def test_digits_are_scikit_learns_split_in_equal_shares():
    from sklearn.datasets import load_digits

    data = load_digits()
    whole, train, test = (load("digits", split) for split in ("all", "train", "test"))
    expected = np.rint(data.data * 15.9375).reshape(-1, 8, 8, 1)
    np.testing.assert_array_equal(everything(whole)[0], expected)
    np.testing.assert_array_equal(everything(whole)[1], data.target)
    assert (len(train), len(test), train.shape, train.num_classes) == (1497, 300, (8, 8, 1), 10)
    assert set(np.bincount(train.labels)) == {149, 150}
    both = np.concatenate([train.images, test.images]).reshape(1797, -1)
    everyone = whole.images.reshape(1797, -1)
    ordered = [rows[np.lexsort(rows.T)] for rows in (both, everyone)]
    np.testing.assert_array_equal(*ordered)  # each example is in exactly one


def test_the_mixture_is_held_out_from_other_draws():
    """Both splits have the moments of the mixture by its definition, and no point in common."""
    from mclr_jax.mixture import toy

    train, test = load("mixture"), load("mixture", "test")
    assert (len(train), len(test), train.shape, train.num_classes) == (65_536, 8192, (2,), 3)
    assert not {*map(bytes, train.images)} & {*map(bytes, test.images)}
    refused("expected one of", "mixture", "all")
    for source in (train, test):
        for c, means in enumerate(np.asarray(toy().means)):
            points = source.images[source.labels == c]
            assert len(points) / len(source) == pytest.approx(1 / 3, abs=0.02)
            spread = (means**2).mean(0) + 0.45**2 - means.mean(0) ** 2
            np.testing.assert_allclose(points.mean(0), means.mean(0), atol=0.12)
            np.testing.assert_allclose(points.var(0), spread, rtol=0.05)


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
    file, path = tmp_path / "train-images-idx3-ubyte", str(tmp_path)
    refused("apt-get install dataset-f", "fashion_mnist", error=FileNotFoundError, path=path)
    write_idx(tmp_path, "train", PIXELS[..., 0], [0] * 5)
    refused(r"labels of shape \(5,\) .* each of 6 images", "fashion_mnist", path=path)
    write_idx(tmp_path, "train", PIXELS[..., 0], [0, 0, 0, 0, 0, 10])
    refused("labels from 0 to 10, expected 0 to 9", "fashion_mnist", path=path)
    content = file.read_bytes()
    for broken in (content[:-1], content[:9], b""):
        file.write_bytes(broken)
        refused("no intact IDX", "fashion_mnist", path=path)
    file.write_bytes(b"\0\0\x0d\x03" + content[4:])
    refused("0xd03, expected 0x803", "fashion_mnist", path=path)
    file.unlink()
    file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(content)[:-20])
    refused("no intact IDX", "fashion_mnist", path=path)


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


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_zip_of_npy_is_channels_first(tmp_path, dtype):
    array = (RNG.normal(size=(8, 5, 2)) * 100).astype(dtype)
    name = write_zip(tmp_path / "a.zip", {"0.npy": npy(array)}, [["0.npy", 0]])
    images, _ = everything(load(name, in_memory=False))
    np.testing.assert_allclose(images[0], array.transpose(1, 2, 0), rtol=1e-6)
    assert images.dtype == (np.uint8 if dtype == np.uint8 else np.float32)


def test_zip_is_read_by_threads(tmp_path):
    large = RNG.integers(0, 256, (40, 64, 64, 3), np.uint8)
    files = {f"{i:02d}.png": png(image) for i, image in enumerate(large)}
    source = load(write_zip(tmp_path / "a.zip", files), in_memory=False)

    def work(seed):
        indices = np.random.default_rng(seed).permutation(40)
        np.testing.assert_array_equal(source[indices][0], large[indices])

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert len(list(threads.map(work, range(8)))) == 8


A, B = {"0.png": SMALL}, {"1.png": png(PIXELS[1])}
PAIRS = [["0.png", 1], ["1.png", 0]]
ACCENT = unicodedata.normalize("NFC", "B\u00e4r/")


@pytest.mark.parametrize(("names", "labels", "place"), [
    (["0.png", "1.png"], PAIRS[::-1], "dataset.json"),
    (["0.png", "1.png"], dict(PAIRS), "dataset.json"),
    (["0.png", "1.png"], PAIRS * 2, "dataset.json"),
    (["mine/0.png", "mine/1.png"], PAIRS, "mine/dataset.json"),
    (["mine/0.png", "mine/1.png"], [["mine/0.png", 1], ["mine/1.png", 0]], "mine/dataset.json"),
    (["a/0.png", "a/1.png"], [["a\\0.png", 1], ["a\\1.png", 0]], "dataset.json"),
    (["a\\0.png", "a\\1.png"], [["a/0.png", 1], ["a/1.png", 0]], "dataset.json"),
    (["0.png", "1.png"], [["./0.png", 1], ["/1.png", 0]], "dataset.json"),
    ([unicodedata.normalize("NFD", ACCENT) + name for name in ("0.png", "1.png")],
     [[ACCENT + "0.png", 1], [ACCENT + "1.png", 0]], "dataset.json"),
    (["0.PNG", "no_suffix"], [["0.PNG", 1], ["no_suffix", 0]], "dataset.json"),
    ([".hidden/0.png", "../1.png"], [[".hidden/0.png", 1], ["../1.png", 0]], "./dataset.json"),
])  # fmt: skip
def test_zip_labels_are_found_under_every_name(tmp_path, names, labels, place):
    files = dict(zip(names, [*A.values(), *B.values()], strict=True))
    source = load(write_zip(tmp_path / "a.zip", files, labels, place))
    for images, label in zip(*everything(source), strict=True):
        np.testing.assert_array_equal(images, PIXELS[1 - label])
    assert sorted(source.labels) == [0, 1]


@pytest.mark.parametrize(("labels", "options", "message"), [
    (..., {}, r"2 images, but no dataset\.json; .*\[\[\"0\.png\", 0\].*unconditional=True"),
    (None, {}, r"2 images, but no labels in dataset\.json; .*unconditional=True"),
    (PAIRS[:1], {}, r"2 images and 1 labels; 1 images have no label, such as 1\.png.*skip = True"),
    ([*PAIRS, ["2.png", 0]], {}, r"3 labels; 1 labels have no image, such as 2\.png\. Complete"),
    ([["0.jpg", 1], ["1.jpg", 0]], {}, r"such as 0\.png; 2 labels have no image, such as 0\.jpg"),
    ([["0.jpg", 1]], {"skip": True}, r"2 images have no label, such as 0\.png"),
    (PAIRS, {"num_classes": 1}, "labels from 0 to 1, expected 0 to 0"),
    *[([["0.png", odd], ["1.png", 1]], {}, f"broken dataset.json.*0.png has the label {odd}")
      for odd in (-1, 0.5, None, "", True)],
    ([*PAIRS, ["./0.png", 0]], {}, r"broken dataset\.json.*\./0\.png has the labels 1 and 0"),
    *[(odd, {}, r"broken dataset\.json") for odd in (3, [3], "ab", [["0.png"]], [[["a"], 0]])],
])  # fmt: skip
def test_zip_labels_that_cannot_be_are_refused(tmp_path, labels, options, message):
    name = write_zip(tmp_path / "a.zip", A | B, labels)
    refused(rf"a\.zip has .*{message}", name, in_memory=False, **options)


def test_what_a_zip_leaves_out_is_said(tmp_path, caplog):
    more = {"__MACOSX/._0.png": b"\0\5\x16\7", ".DS_Store": b"", "Thumbs.db": b"", "notes.txt": b""}
    assert len(load(write_zip(tmp_path / "a.zip", A | B | more, PAIRS))) == 2
    assert "a.zip: left out 4 files that are no images, such as .DS_Store." in caplog.text
    name = write_zip(tmp_path / "b.zip", A | B, [["0.png", 3], ["2.png", 0]])
    images, labels = everything(load(name, skip=True))
    np.testing.assert_array_equal(images, PIXELS[:1])
    assert labels.tolist() == [3]
    assert "1 images have no label, such as 1.png; 1 labels have no image, such as 2" in caplog.text
    for labels in (None, ...):
        source = load(write_zip(tmp_path / "c.zip", A | B, labels), unlabelled=True)
        assert (source.num_classes, list(source.labels)) == (1, [0, 0])


@pytest.mark.parametrize(("name", "content", "message"), [
    ("0.png", SMALL[:60], "cannot be decoded; mend it or get it again"),
    ("0.jpg", png(PIXELS[0], "JPEG")[:-200], "cannot be decoded; mend it or get it.*[Tt]runcated"),
    ("0.png", b"", r"cannot be decoded; mend it or get it again \(it is no image that Pillow"),
    ("0.webp", b"text", "cannot be decoded.*no image that Pillow reads"),
    ("0.png", SMALL[:8] + BOMB + SMALL[33:], "cannot be decoded.*exceeds limit"),
    ("0.png", png16(0, 1), "more than 8 bits a channel; convert it"),
    ("0.png", png16(2, 3), "more than 8 bits a channel; convert it"),
    ("0.png", png16(4, 2), "more than 8 bits a channel; convert it"),
    ("0.png", png16(6, 4), "more than 8 bits a channel; convert it"),
    ("0.ppm", b"P6 1 1 4095\n" + bytes(6), "more than 8 bits a channel"),
    ("0.tif", png(np.zeros((4, 4), np.float32), "TIFF"), "more than 8 bits a channel"),
    ("5.png", png(PIXELS[1, :3]), r"has shape \(3, 4, 3\), expected \(5, .*data\.resolution"),
    ("0.npy", b"no array", "Cannot load|[Pp]ickle"),
    ("0.npy", npy(np.float32(3)), "axis"),
    ("0.npy", npy(np.array([{}])), "Object|allow_pickle"),
    ("0.npy", npy(np.full((3, 5, 4), np.nan)), "has 1 images that are not finite"),
    ("0.npy", npy(np.zeros((3, 5, 4), np.uint16)), "has images of uint16"),
    ("0.npy", npy(np.full((3, 5, 4), 255.0)), "has float images from 255 to 255"),
    ("5.npy", npy(LATENTS[:4, :7]), r"has shape \(7, 8, 4\), expected \(5, 4, 3\)"),
    ("0.npy", npy(LATENTS), "seems to hold latents: .* 4 standard deviations"),
    ("img-mean-std-0.npy", npy(np.abs(LATENTS)), "seems to hold latents"),
])  # fmt: skip
@pytest.mark.parametrize("in_memory", [True, False])
def test_files_that_are_no_images_are_refused_by_name(tmp_path, in_memory, name, content, message):
    files = {name: content} if name[0] != "5" else {"2.png": SMALL, name: content}
    message = rf"(a\.zip is corrupt at {name}|{name} in .*a\.zip).*({message})"
    refused(message, write_zip(tmp_path / "a.zip", files), in_memory=in_memory)


def test_a_folder_is_read_like_a_zip_and_its_folders_may_be_the_classes(tmp_path):
    for number, name in enumerate(["cat/1.png", "ant/b/2.png", "cat/0.png"]):
        (path := tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(PIXELS[number]))
    images, labels = everything(source := load(f"folder:{tmp_path}/set", cache=""))
    np.testing.assert_array_equal(images, PIXELS[[1, 2, 0]])
    assert (labels.tolist(), source.num_classes) == ([0, 1, 1], 2)
    about = {"labels": [["cat/1.png", 2], ["ant/b/2.png", 0], ["cat/0.png", 1]]}
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(about))
    np.testing.assert_array_equal(
        everything(load(f"folder:{tmp_path}/set", cache=""))[1], [0, 1, 2]
    )
    (tmp_path / "set" / "3.png").write_bytes(SMALL)
    refused("1 images have no label, such as 3.png", f"folder:{tmp_path}/set", cache="")
    refused("found no file", f"folder:{tmp_path}/none", error=FileNotFoundError)


def test_zip_errors(tmp_path):
    path = tmp_path / "a.zip"
    for text in (b"{", b"[]", b"[" * 100_000, b"3", b"\xff\xfe"):
        name = write_zip(path, A | {"dataset.json": text}, ...)
        refused(r"a\.zip has a broken dataset\.json", name)
    refused(r"a\.zip has 0 images and 0 labels", write_zip(path, {"a.txt": b""}, []))
    twice = write_zip(path, {"x/0.png": SMALL, "x\\0.png": SMALL})
    refused(r"a\.zip has two files x/0\.png; write it again with one", twice)
    array = write_zip(path, {"0.npy": npy(LATENTS[:4])})
    refused(r"0\.npy .* is an array; config\.data\.resolution is for", array, resolution=8)
    name = write_zip(path, A)
    refused(r"data\.background='blak'; expected the name of a colour", name, background="blak")
    refused("no 'test' split", name, "test")
    content = path.read_bytes()
    middle = content.index(b"IDAT") + 6
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    refused(r"0\.png.*Bad CRC-32", name)
    path.write_bytes(content[:-30])
    refused("no intact file", name)
    path.unlink()
    refused(r"found no file .*a\.zip", name, error=FileNotFoundError)


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
    refused(r"no \['test_images', 'test_labels'\]", f"npz:{path}", "test")
    np.savez(path, images=floats, labels=[0, 4, 1], test_images=test, test_labels=[2, 2, 0])
    images, labels = everything(load(f"npz:{path}", "test", num_classes=5))
    np.testing.assert_array_equal(images, test.reshape(channels))
    np.testing.assert_array_equal(labels, [2, 2, 0])


@pytest.mark.parametrize(("changes", "message"), [
    ({"images": np.full((6, 4, 4, 1), np.nan)}, "6 images that are not finite, 0 first"),
    ({"images": np.array([[0.5], [np.inf]] * 3)}, "3 images that are not finite, 1 first"),
    ({"images": PIXELS.astype(float)}, r"float images from 0 to 255; expected \[-1, 1\], or uint8"),
    ({"images": np.zeros((6, 3, 8, 8))}, r"shape \(3, 8, 8\), which seem to be \(C, H, W\)"),
    ({"images": np.zeros((6, 1, 8, 8), np.uint8)}, r"shape \(1, 8, 8\), which seem"),
    ({"images": np.moveaxis([LATENTS] * 6, 1, 3)}, "a.npz seems to hold latents"),
    ({"images": PIXELS.astype(np.int64)}, "images of int64"),
    ({"images": PIXELS[0, 0, 0, 0]}, r"`images` has shape \(\), expected an axis"),
    ({"labels": [0, 1]}, r"labels of shape \(2,\) .* each of 6 images"),
    ({"labels": [0, 1, 2, 3, 4, -1]}, "labels from -1 to 4"),
    ({"labels": [0, 0, 0, 0, 0, 2**32 + 1]}, "0 to 4294967297, expected 0 to 2147483647"),
    ({"labels": [0.0] * 6}, "float64, expected one integer"),
    ({"labels": 0}, r"shape \(\)"),
    ({"labels": np.eye(6, dtype=np.int32)}, r"shape \(6, 6\)"),
])  # fmt: skip
def test_arrays_that_are_not_what_they_should_be_are_refused(tmp_path, changes, message):
    np.savez(tmp_path / "a.npz", **{"images": PIXELS, "labels": np.arange(6)} | changes)
    refused(message, f"npz:{tmp_path / 'a.npz'}")


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


def test_npz_errors(tmp_path):
    path, name = tmp_path / "a.npz", f"npz:{tmp_path / 'a.npz'}"
    path.write_bytes(npy(PIXELS))
    refused(r"a\.npz holds one array; expected an npz file", name)
    np.savez(path, images=PIXELS, labels=np.arange(6))
    refused("expected 0 to 4", name, num_classes=5)
    content = path.read_bytes()
    for broken in (content[:-30], b"", b"no zip", content[:300] + b"?" + content[301:]):
        path.write_bytes(broken)
        refused(r"no intact file|corrupt", name)
    np.savez(path, images=PIXELS)
    refused(r"no \['labels'\]", name)


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


def as_palette(image, image_format="PNG"):
    """The bytes of an image of few colours (H, W, 3 or 4) with a palette."""
    colours, numbers = np.unique(image.reshape(-1, image.shape[-1]), axis=0, return_inverse=True)
    picture = Image.fromarray(numbers.reshape(image.shape[:2]).astype(np.uint8), "P")
    picture.putpalette(colours[:, :3].ravel().tolist())
    alpha = {"transparency": bytes(colours[:, 3].tolist())} if image.shape[-1] == 4 else {}
    return png(picture, image_format, **alpha)


@pytest.mark.parametrize(("name", "content"), [
    ("0.PNG", png(SHOWN)),
    ("0.jpeg", png(SHOWN, "JPEG", **BEST)),
    ("0.webp", png(SHOWN, "WEBP", lossless=True)),
    ("0.bmp", png(SHOWN, "BMP")),
    ("0.gif", as_palette(SHOWN, "GIF")),
    ("0.png", as_palette(SHOWN)),
    ("0.png", png(np.dstack([SHOWN, np.full((6, 8), 255, np.uint8)]))),
    ("0.tiff", png(Image.fromarray(SHOWN).convert("CMYK"), "TIFF")),
    ("0.jpg", png(Image.fromarray(SHOWN).convert("CMYK"), "JPEG", **BEST)),
    ("0.png", png(SHOWN, exif=b"Exif\0\0no mark")),
    *[(f"0.{kind}", png(np.ascontiguousarray(TURNED[turn]), kind, exif=mark(turn), **options))
      for turn in TURNED for kind, options in
      (("png", {}), ("jpeg", BEST), ("tiff", {}), ("webp", {"lossless": True}))],
])  # fmt: skip
def test_whatever_pillow_reads_is_read_as_it_is_shown(tmp_path, name, content):
    images, _ = everything(load(write_zip(tmp_path / "a.zip", {name: content})))
    np.testing.assert_allclose(images[0], SHOWN.astype(int), atol=4 if "jp" in name else 0)


@pytest.mark.parametrize("content", [
    png(hidden(SHOWN)), png(hidden(SHOWN[..., :1])), as_palette(hidden(SHOWN)),
    png(hidden(SHOWN), "WEBP", lossless=True, exact=True), png(hidden(SHOWN), "TIFF"),
])  # fmt: skip
@pytest.mark.parametrize(("background", "value"), [("", 255), ("black", 0), ("#808080", 128)])
def test_transparent_pixels_show_the_background(tmp_path, caplog, content, background, value):
    """Not the colours that nobody sees; a half transparent row is half of both."""
    options = {"background": background} if background else {}
    images, _ = everything(load(write_zip(tmp_path / "a.zip", {"0.png": content}), **options))
    np.testing.assert_allclose(images[0], over(SHOWN, value)[..., : images.shape[-1]], atol=1)
    assert "a.zip has images with transparent pixels, which are shown over" in caplog.text


BITS = np.where(PIXELS[0, ..., 0] > 99, 255, 0).astype(np.uint8)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize(("others", "channels"), [
    ([], 1), (["L"], 1), (["LA"], 1), (["1"], 1), (["P"], 1), (["LA", "1", "P"], 1),
    (["RGB"], 3), (["1", "P", "RGBA"], 3),
])  # fmt: skip
def test_grey_images_become_colour_only_among_colour(tmp_path, others, channels, order):
    pictures = [Image.fromarray(BITS), *(Image.fromarray(BITS).convert(mode) for mode in others)]
    files = {f"{i}.png": png(picture) for i, picture in enumerate(pictures[::order])}
    images, _ = everything(load(write_zip(tmp_path / "a.zip", files)))
    assert images.shape == (len(files), 5, 4, channels)
    np.testing.assert_array_equal(images, np.broadcast_to(BITS[..., None], images.shape))


def test_zip_images_are_resized_and_the_first_of_several_frames_is_read(tmp_path, caplog):
    frames = [Image.fromarray(image) for image in PIXELS[:2]]
    files = {"0.png": png(frames[0], save_all=True, append_images=frames[1:]),
             "1.png": png(np.full((9, 20, 3), 7, np.uint8))}  # fmt: skip
    images, _ = everything(load(write_zip(tmp_path / "a.zip", files), resolution=4))
    square = formats.center_crop(frames[0], 4)
    np.testing.assert_array_equal(images, [np.asarray(square), np.full((4, 4, 3), 7)])
    assert "a.zip has images of several frames, of which the first are used" in caplog.text
