"""Pictures of samples: a grid with a row for each class, or a scatter plot of 2-D points."""

import io
import pathlib
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source, caption, names_of
from mclr_jax.files import write_atomically

MARGIN = 4
COLOURS = np.array([  # Okabe and Ito's palette, which colour-blind readers can distinguish
    (0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167),
    (213, 94, 0), (86, 180, 233), (240, 228, 66), (0, 0, 0),
])  # fmt: skip


def picture(
    samples: np.ndarray, labels: np.ndarray, columns: int = 10, class_names: Sequence[str] = (),
    captions: bool = True,
) -> np.ndarray:  # fmt: skip
    """An (H, W, 3) uint8 picture of samples with labels (n,) int.

    Samples are images (n, h, w, c) in [-1, 1], of which it shows at most `columns` per class, and
    of 2 channels the first; or points (n, d), of which it plots the first two coordinates.
    Of trajectories (n, f, h, w, c) or (n, f, d) it shows the frames: of fields the first channel,
    up to 3 standard deviations; of one coordinate each value beside the next one.
    Rows of images begin with their class, if they have captions.
    ValueError: they have more than 3 channels, such as latents.
    """
    samples, labels = np.asarray(samples), np.asarray(labels)
    if samples.ndim in (3, 5):
        samples = samples[..., :1] / 3 if samples.ndim == 5 else samples
        if samples.ndim == 3 and samples.shape[-1] == 1:
            samples = np.concatenate([samples[:, :-1], samples[:, 1:]], -1)
        labels = np.repeat(labels, samples.shape[1])
        samples = samples.reshape(-1, *samples.shape[2:])
    if samples.ndim == 4 and samples.shape[-1] > 3:
        raise ValueError(
            f"samples have {samples.shape[-1]} channels; a picture shows at most 3: decode latents "
            "first (`latents.shown`)"
        )
    if samples.ndim == 4:
        return _grid(samples, labels, columns, class_names, captions)
    return _scatter(samples, labels)


def of_source(source: Source, columns: int = 10) -> np.ndarray:
    """The picture of all examples of a source."""
    examples, labels = source[np.arange(len(source))]
    pixels = np.asarray(to_float(jnp.asarray(examples)))
    return picture(pixels, labels, columns, names_of(source))


def side_by_side(
    named: Mapping[str, np.ndarray], labels: np.ndarray, columns: int = 10,
    class_names: Sequence[str] = (),
) -> np.ndarray:  # fmt: skip
    """Pictures of the samples of several models, with these labels, and the name above each.

    The classes stand at the left alone. Arguments and errors are those of `picture`.
    """
    given = labels, columns, class_names
    blocks = {name: picture(samples, *given, captions=False) for name, samples in named.items()}
    whole, plain = picture(next(iter(named.values())), *given), next(iter(blocks.values()))
    edge = whole[:, : whole.shape[1] - plain.shape[1]]  # the captions
    parts = [_titled("", edge), *(_titled(name, block) for name, block in blocks.items())]
    return np.concatenate(parts, axis=1)


def _titled(name: str, block: np.ndarray) -> np.ndarray:
    """A picture, widened if need be, with a name above."""
    font, (height, width, _), top = ImageFont.load_default(size=14), block.shape, 22
    width = max(width + 3 * MARGIN, int(font.getlength(name)) + 4 * MARGIN) if name else width
    canvas = Image.new("RGB", (width, top + height), "white")
    ImageDraw.Draw(canvas).text((MARGIN, top / 2), name, "black", font, anchor="lm")
    if block.size:
        canvas.paste(Image.fromarray(block), (0, top))
    return np.asarray(canvas)


def clip(samples: np.ndarray) -> np.ndarray:
    """Grey or colour images (n, h, w, 1 or 3) clipped to [-1, 1]; points and latents unchanged."""
    is_image = samples.ndim == 4 and samples.shape[-1] in (1, 3)
    return np.clip(samples, -1, 1) if is_image else samples


def as_8_bits(samples: np.ndarray) -> np.ndarray:
    """Samples, clipped and rounded to the values k / 127.5 - 1 of 8-bit images, in float32."""
    return (np.round(clip(samples) * 127.5 + 127.5) / 127.5 - 1).astype(np.float32)


def to_uint8(samples: np.ndarray) -> np.ndarray:
    """8-bit images of the same shape, from values in [-1, 1], clipped and rounded."""
    return np.clip(np.round((samples + 1) * 127.5), 0, 255).astype(np.uint8)


def _grid(samples, labels, columns, class_names, captions):
    zoom = max(1, round(40 / samples.shape[1]))
    channels = [0, 1, 2] if samples.shape[-1] == 3 else [0, 0, 0]
    pixels = to_uint8(samples[..., channels])
    pixels = pixels.repeat(zoom, 1).repeat(zoom, 2)
    _, height, width, _ = pixels.shape
    classes = np.unique(labels)
    font = ImageFont.load_default(size=14)
    texts = [caption(int(label), class_names) if captions else "" for label in classes]
    left = (1 + captions) * MARGIN + max(int(font.getlength(text)) for text in texts)
    columns = min(columns, np.bincount(labels).max())
    size = (left + columns * (width + MARGIN), len(classes) * (height + MARGIN) + MARGIN)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, text) in enumerate(zip(classes, texts, strict=True)):
        top = MARGIN + row * (height + MARGIN)
        draw.text((MARGIN, top + height / 2), text, "black", font, anchor="lm")
        for column, number in enumerate(np.flatnonzero(labels == label)[:columns]):
            canvas.paste(Image.fromarray(pixels[number]), (left + column * (width + MARGIN), top))
    return np.asarray(canvas)


def _scatter(points, labels):
    size, x = 480, points[:, :2] - points[:, :2].min(0)
    pixels = x / max(x.max(), 1e-9) * (size - 20) + 10
    pixels[:, 1] = size - pixels[:, 1]  # the second coordinate increases upwards
    canvas = np.full((size, size, 3), 255, np.uint8)
    column, row = np.clip(pixels.astype(int), 1, size - 2).T
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
