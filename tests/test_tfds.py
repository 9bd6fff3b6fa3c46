"""Sets of TensorFlow Datasets, which are made and read without TensorFlow."""

import io
import shutil

import numpy as np
import pytest
from pictures import BEST, PIXELS, SHOWN, everything, hidden, mark, over, png, refused

from mclr_jax.data.sources import load


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    """Sets made without TensorFlow: of equal size (PNG), grey, and unequal (JPEG among PNG)."""
    import tensorflow_datasets as tfds  # takes a second, in this process alone

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
    turned = png(SHOWN.transpose(1, 0, 2)[::-1].copy(), "JPEG", exif=mark(6), **BEST)
    prepare("mclr_shown", SHOWN.shape, train=[turned, png(hidden(SHOWN))])
    return str(folder)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_and_labels_are_those_of_the_set(tfds_dir, in_memory):
    name = "tfds:mclr_equal:1.0.0" if in_memory else "tfds:mclr_equal"
    source = load(name, path=tfds_dir, in_memory=in_memory)
    images, labels = everything(source)
    order = [int(np.flatnonzero((PIXELS == image).all((1, 2, 3)))[0]) for image in images]
    assert sorted(order) == list(range(6))  # TFDS permutes by a hash of the key
    np.testing.assert_array_equal(labels, np.array(order) % 4)
    np.testing.assert_array_equal(source.labels, labels)
    assert (source.shape, source.num_classes, source.in_memory) == ((5, 4, 3), 4, in_memory)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_a_set_of_grey_images_has_one_channel_in_each_split(tfds_dir):
    for split, expected in [("train", PIXELS[..., :1]), ("test", PIXELS[:4, ..., 1:2])]:
        images, _ = everything(load("tfds:mclr_grey", split, path=tfds_dir))
        assert sorted(map(bytes, images)) == sorted(map(bytes, expected.copy()))
    assert load("tfds:mclr_grey", path=tfds_dir).shape == images.shape[1:] == (5, 4, 1)


def test_unequal_sizes_are_cropped_and_resized(tfds_dir):
    refused(r"config\.data\.resolution", "tfds:mclr_unequal", path=tfds_dir)
    images, _ = everything(load("tfds:mclr_unequal", path=tfds_dir, resolution=8))
    assert images.shape == (2, 8, 8, 3)
    by_brightness = images[np.argsort(images.mean((1, 2, 3)))]
    # The central square of the wide image is of one colour, and the other's is not.
    np.testing.assert_array_equal(by_brightness[1], np.broadcast_to([200, 100, 50], (8, 8, 3)))
    assert by_brightness[0][:, 3:5].mean() > 80
    assert by_brightness[0][:, 0].mean() < 20


def test_images_are_read_as_they_are_shown(tfds_dir):
    images, _ = everything(load("tfds:mclr_shown", path=tfds_dir, background="black"))
    expected = np.stack([SHOWN, over(SHOWN, 0)])
    expected = expected[:: -1 if images[0, 0, 0].max() == 0 else 1]  # TFDS permutes
    np.testing.assert_allclose(images, expected.astype(int), atol=4)


def test_what_is_wrong_is_said(tfds_dir, tmp_path):
    shutil.copytree(f"{tfds_dir}/mclr_equal", tmp_path / "mclr_equal")
    (file,) = tmp_path.rglob("*array_record*")
    content = file.read_bytes()
    middle = content.index(b"IHDR")
    file.write_bytes(content[:middle] + bytes(9) + content[middle + 9 :])
    broken = r"image \d of TFDS set 'mclr_equal' in .* is corrupt; prepare the set again"
    refused(broken, "tfds:mclr_equal", path=str(tmp_path))
    unprepared = r"tfds\.builder\('mnist', data_dir='DIR', file_format"
    refused(unprepared, "tfds:mnist", error=FileNotFoundError, path=tfds_dir)
    refused("^TFDS has no 'no_such_set'.{,250}$", "tfds:no_such_set", path=tfds_dir)
    refused(r"splits \['train'\], got 'test'", "tfds:mclr_equal", "test", path=tfds_dir)
