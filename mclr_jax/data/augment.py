"""Non-leaking geometric augmentation of EDM: Karras et al. 2022 (arXiv:2206.00364), App. F.2 and
Table 6, written from the paper's text.

Nine numbers tell the network how an example was transformed. They are zero in sampling, so that
samples look like the data without augmentation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

LABEL_SIZE = 9
SCALE_LOG2_STD = 0.2  # Table 6: A_scale = A_aniso = 2^0.2
TRANSLATION_STD = 0.125  # Table 6: A_trans, as a fraction of the image's side

# Orthonormal sym6 scaling filter (Daubechies, "Ten Lectures on Wavelets", sec. 8.1; values as in
# PyWavelets, MIT licence). The tests check the equations that define the filter.
SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
# Pixel k lies at 2 k + CENTRE on the twice finer grid. CENTRE is the centroid of sym6, 5.1: the
# filter is not symmetric, and the middle of its support, 5.5, would shift rotations by 0.2 pixels.
CENTRE = float(SYM6 @ np.arange(len(SYM6)) / SYM6.sum())

# Accelerators would by default round coordinates and filters to bfloat16 or TF32.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def augment(
    images: jax.Array, keys: jax.Array, probability: float = 0.12, flip_probability: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Float images (B, H, W, C), each transformed by its typed key (B,), and their labels (B, 9).

    `flip_probability` is that of a horizontal flip (1/2 in the paper), `probability` that of each
    other transform (A_prob: 0.12 for CIFAR-10, 0.15 for FFHQ and AFHQv2) and may be traced. Raises
    ValueError if H or W is 1, or on data of another shape.
    """
    if images.ndim != 4:
        raise ValueError(f"got images of shape {images.shape}, expected (B, H, W, C) to augment")

    def one(image, key):
        matrix, label = sample_transform(key, probability, flip_probability)
        image = jnp.where(label[0] > 0, image[:, ::-1], image)  # flips are exact, not resampled
        image = jnp.where(label[1] > 0, image[::-1], image)
        return warp(image, matrix), label

    return jax.vmap(one)(images, keys)


def sample_transform(
    key: jax.Array, probability: float | jax.Array, flip_probability: float | jax.Array = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Draws one transform (Table 6, top to bottom).

    Returns:
      matrix: (2, 3) forward affine map after the flips, in pixels about the centre (x right, y
        down); the last column, the translation, is in fractions of width and height.
      label: (9,) float32, 0 for a transform that is not applied: x-flip and y-flip (0 or 1),
        isotropic scale a (by 2^(0.2 a)), rotation cos - 1 and sin (counter-clockwise on screen),
        anisotropy a cos and a sin (2^(0.2 a) along this direction, the inverse across; as in the
        paper, a may be negative), translation x and y (in 1/8 of the side).
    """
    uniform_key, normal_key = jax.random.split(key)
    uniform = jax.random.uniform(uniform_key, (9,))
    on = (uniform[:5] < probability).astype(jnp.float32)
    xflip = (uniform[5] < flip_probability).astype(jnp.float32)
    yflip = (uniform[6] < 0.5) * on[0]  # a_1 ~ U{0, 1}
    scale, stretch, *shift = jax.random.normal(normal_key, (4,)) * on[jnp.array([1, 3, 4, 4])]
    angle, direction = jnp.pi * (2 * uniform[7:] - 1)
    angle = angle * on[2]

    factors = jnp.exp2(SCALE_LOG2_STD * stretch * jnp.array([1.0, -1.0]))
    along = rotation(direction)
    linear = _einsum("ij,j,kj,kl->il", along, factors, along, rotation(angle))
    linear = linear * jnp.exp2(SCALE_LOG2_STD * scale)
    matrix = jnp.concatenate([linear, TRANSLATION_STD * jnp.stack(shift)[:, None]], axis=1)
    turn = [jnp.cos(angle) - 1, jnp.sin(angle)]
    anisotropy = [stretch * jnp.cos(direction), stretch * jnp.sin(direction)]
    return matrix, jnp.stack([xflip, yflip, scale, *turn, *anisotropy, *shift])


def rotation(angle: jax.Array) -> jax.Array:
    """(2, 2) rotation by an angle in radians, counter-clockwise on screen (x right, y down)."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.array([[cos, sin], [-sin, cos]])


def warp(image: jax.Array, matrix: jax.Array) -> jax.Array:
    """Moves an image (H, W, C) by a (2, 3) affine map as returned by `sample_transform`.

    Twofold upsampling by sym6, bilinear interpolation, twofold downsampling by the same filter.
    Outside, the image is reflected about the centres of its outermost pixels. This is periodic:
    one period suffices, and both filters are matrices.
    """
    from jax.scipy.ndimage import map_coordinates

    height, width, _ = image.shape
    fine = _einsum("yh,hwc,xw->yxc", _upsample(height), image, _upsample(width))

    # The source of each pixel of the finer output grid, in pixels.
    half = jnp.array([width - 1, height - 1]) / 2
    x = (jnp.arange(2 * width + len(SYM6) - 2) - CENTRE) / 2 - half[0] - matrix[0, 2] * width
    y = (jnp.arange(2 * height + len(SYM6) - 2) - CENTRE) / 2 - half[1] - matrix[1, 2] * height
    (a, b), (c, d) = matrix[0, :2], matrix[1, :2]
    determinant = a * d - b * c
    source_x = (d * x[None, :] - b * y[:, None]) / determinant + half[0]
    source_y = (a * y[:, None] - c * x[None, :]) / determinant + half[1]

    place = [2 * source_y + CENTRE, 2 * source_x + CENTRE]
    bilinear = functools.partial(map_coordinates, coordinates=place, order=1, mode="wrap")
    moved = jax.vmap(bilinear, -1, -1)(fine)
    moved = _einsum("hy,yxc,wx->hwc", _downsample(height), moved, _downsample(width))
    return moved.astype(image.dtype)


def _upsample(size: int) -> np.ndarray:
    """(4 (size - 1), size): pixels -> one period of the reflected, upsampled signal."""
    if size < 2:
        raise ValueError(f"got an image side of {size} pixel, expected at least 2 to augment")
    period = 2 * (size - 1)
    matrix = np.zeros((2 * period, size), np.float32)
    for pixel, tap in np.ndindex(period, len(SYM6)):
        reflected = min(pixel, period - pixel)
        matrix[(2 * pixel + tap) % (2 * period), reflected] += np.sqrt(2) * SYM6[tap]
    return matrix


def _downsample(size: int) -> np.ndarray:
    """(size, 2 size + 10): the adjoint of upsampling, and by orthonormality its inverse."""
    first = np.pad(SYM6 / np.sqrt(2), (0, 2 * size - 2)).astype(np.float32)
    return np.stack([np.roll(first, 2 * pixel) for pixel in range(size)])
