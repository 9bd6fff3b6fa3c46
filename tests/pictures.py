"""Pictures as files, for the tests of formats, and what is shown of them."""

import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from mclr_jax.data.sources import load

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4, 3), np.uint8)
SHOWN = np.stack([np.add.outer(30 * np.arange(6), 9 * np.arange(8)) % 256,
                  np.add.outer(5 * np.arange(6), 20 * np.arange(8)),
                  np.full((6, 8), 90)], -1).astype(np.uint8)  # fmt: skip
TURNED = {  # what a file holds with this Exif mark of its orientation, if it shows SHOWN
    1: SHOWN, 2: SHOWN[:, ::-1], 3: SHOWN[::-1, ::-1], 4: SHOWN[::-1],
    5: SHOWN.transpose(1, 0, 2), 6: np.rot90(SHOWN), 7: SHOWN[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(SHOWN, -1),
}  # fmt: skip
BEST = {"quality": 100, "subsampling": 0}


def mark(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def hidden(image):
    """The image with a first row of noise that is transparent, and a second that is half so."""
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[0], alpha[1] = 0, 128
    noise = RNG.integers(0, 256, image[:1].shape, np.uint8)
    return np.dstack([np.concatenate([noise, image[1:]]), alpha])


def over(image, background):
    """What is seen of such an image, over a grey background."""
    seen = image.astype(float)
    seen[0], seen[1] = background, (seen[1] * 128 + background * 127) / 255
    return seen


def everything(source):
    return source[np.arange(len(source))]


def refused(message, name, *split, error=ValueError, **options):
    with pytest.raises(error, match=message):
        everything(load(name, *split, **options))


def png(image, image_format="PNG", **options):
    """The bytes of an array, or of an image of Pillow's, as a file of this format."""
    file, image = io.BytesIO(), image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, image_format, **options)
    return file.getvalue()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_zip(path, files, labels=0, place="dataset.json"):
    """`files` {name: bytes}; `labels` whatever dataset.json shall say, 0 for label 0 of each file,
    or ... for no such file."""
    labels = [[name, 0] for name in files] if labels == 0 else labels
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        if labels is not ...:
            archive.writestr(place, json.dumps({"labels": labels}))
    return f"zip:{path}"
