"""Pictures of samples: a grid with a row for each class, or a scatter plot of 2-D points."""

import io
import pathlib

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mclr_jax.files import write_atomically

MARGIN = 4
COLOURS = np.array(  # Okabe and Ito's palette, told apart by colour-blind readers too
    [
        (0, 114, 178),
        (230, 159, 0),
        (0, 158, 115),
        (204, 121, 167),
        (213, 94, 0),
        (86, 180, 233),
        (240, 228, 66),
        (0, 0, 0),
    ]
)


def picture(samples: np.ndarray, labels: np.ndarray, columns: int = 10) -> np.ndarray:
    """An (H, W, 3) uint8 picture of samples.

    Args:
      samples: (n, h, w, c) images in [-1, 1], of which the first channel (c < 3) or the first three
        are shown, or (n, d) points, of which the first two coordinates are plotted.
      labels: (n,) int.
      columns: at most so many images of each class.
    """
    samples, labels = np.asarray(samples), np.asarray(labels)
    return _grid(samples, labels, columns) if samples.ndim == 4 else _scatter(samples, labels)


def clip(samples: np.ndarray) -> np.ndarray:
    """Grey or colour images (n, h, w, 1 or 3) cut to [-1, 1]; points and latents as they are."""
    is_image = samples.ndim == 4 and samples.shape[-1] in (1, 3)
    return np.clip(samples, -1, 1) if is_image else samples


def as_8_bits(samples: np.ndarray) -> np.ndarray:
    """Samples, clipped and rounded to the values k / 127.5 - 1 of 8-bit images, float32."""
    return (np.round(clip(samples) * 127.5 + 127.5) / 127.5 - 1).astype(np.float32)


def _grid(samples, labels, columns):
    _, height, width, channels = samples.shape
    zoom = max(1, round(40 / height))
    pixels = np.clip(np.round((samples + 1) * 127.5), 0, 255).astype(np.uint8)
    pixels = pixels[..., :3] if channels >= 3 else np.repeat(pixels[..., :1], 3, -1)
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    height, width = height * zoom, width * zoom
    classes = np.unique(labels)
    font = ImageFont.load_default(size=14)
    left = MARGIN + max(int(font.getlength(str(c))) for c in classes) + MARGIN
    columns = min(columns, np.bincount(labels).max())
    size = (left + columns * (width + MARGIN), len(classes) * (height + MARGIN) + MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(classes):
        top = MARGIN + row * (height + MARGIN)
        draw.text((MARGIN, top + height / 2), str(label), "black", font, anchor="lm")
        for column, number in enumerate(np.flatnonzero(labels == label)[:columns]):
            canvas.paste(Image.fromarray(pixels[number]), (left + column * (width + MARGIN), top))
    return np.asarray(canvas)


def _scatter(points, labels, size=480):
    x = points[:, :2]
    low, high = x.min(0), x.max(0)
    place = (x - low) / np.maximum((high - low).max(), 1e-9) * (size - 20) + 10
    place[:, 1] = size - place[:, 1]  # the second coordinate grows upwards
    canvas = np.full((size, size, 3), 255, np.uint8)
    column, row = np.clip(place.astype(int), 1, size - 2).T
    for dy, dx in np.ndindex(3, 3):
        canvas[row + dy - 1, column + dx - 1] = COLOURS[labels % len(COLOURS)]
    return canvas


def save(path: str | pathlib.Path, array: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 picture as PNG, atomically."""
    write_atomically(pathlib.Path(path), png(array))


def png(array: np.ndarray) -> bytes:
    """An (H, W, 3) uint8 picture as the content of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
