"""Geometric augmentation against the transforms it stands for, done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.data import augment as augment_lib

augment = jax.jit(augment_lib.augment)
warp = jax.jit(augment_lib.warp)
sample = jax.jit(jax.vmap(augment_lib.sample_transform, in_axes=(0, None)))
IDENTITY = np.array([[1.0, 0, 0], [0, 1, 0]], np.float32)


def noise(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


# One shape for all tests, so that `sample` and `augment` are compiled once.
MANY_KEYS = jax.random.split(jax.random.key(2), 40_000)
IMAGES, KEYS = noise(32, 8, 8, 3), MANY_KEYS[:32]


def smooth(y, x):
    """A band-limited picture of 16 pixels' period at real-valued pixel coordinates."""
    y, x = 2 * np.pi * y / 16, 2 * np.pi * x / 16
    return np.stack([np.sin(y) + np.cos(x + 1), np.sin(y + x)], -1).astype(np.float32)


def test_filter_is_the_orthonormal_one_with_six_vanishing_moments():
    """Daubechies 1992, sec. 6.1: these equations define the family that sym6 belongs to."""
    taps, n = augment_lib.SYM6, np.arange(12)
    for shift in range(6):
        product = taps[2 * shift :] @ taps[: 12 - 2 * shift]
        assert product == pytest.approx(float(shift == 0), abs=1e-11)
    for power in range(6):
        assert ((-1.0) ** n * n**power) @ taps == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize(("right", "down"), [(0, 0), (3, 0), (0, -4), (-13, 9), (31, 0)])
def test_integer_translation_shifts_and_reflects(right, down):
    """However far, even beyond the image's own size: reflection goes on for ever."""
    image = noise(10, 14, 2)
    matrix = IDENTITY + np.array([[0, 0, right / 14], [0, 0, down / 10]], np.float32)
    padded = np.pad(image, ((40, 40), (40, 40), (0, 0)), mode="reflect")
    expected = padded[40 - down : 50 - down, 40 - right : 54 - right]
    np.testing.assert_allclose(warp(image, matrix), expected, atol=2e-5)


@pytest.mark.parametrize("turns", [1, 2, -1])
def test_rotation_is_counter_clockwise(turns):
    image = smooth(*np.mgrid[:16, :16])
    turn = np.asarray(augment_lib.rotation(np.pi / 2 * turns))
    warped = warp(image, np.concatenate([turn, np.zeros((2, 1), np.float32)], axis=1))
    np.testing.assert_allclose(warped[4:-4, 4:-4], np.rot90(image, turns)[4:-4, 4:-4], atol=0.03)


@pytest.mark.parametrize(
    ("matrix", "atol"),
    [
        (IDENTITY + np.array([[0, 0, 0.5 / 16], [0, 0, 0]], np.float32), 0.01),
        (IDENTITY * np.float32(1.25), 0.03),
        (np.float32([[0.75**0.5, -0.5, 0], [0.5, 0.75**0.5, 0]]), 0.03),
    ],
)
def test_other_maps_show_the_picture_at_coordinates_mapped_back(matrix, atol):
    rows, columns = np.mgrid[:16, :16]
    moved = np.stack([columns - 7.5, rows - 7.5]) - 16 * matrix[:, 2, None, None]
    x, y = np.einsum("ij,jhw->ihw", np.linalg.inv(matrix[:, :2]), moved) + 7.5
    warped = warp(smooth(rows, columns), matrix)
    np.testing.assert_allclose(warped[4:-4, 4:-4], smooth(y, x)[4:-4, 4:-4], atol=atol)


def test_matrix_follows_from_label():
    """Table 6 written out in NumPy from the nine numbers alone."""
    matrices, labels = (part[:64] for part in sample(MANY_KEYS, 1.0))
    signs = []
    for matrix, label in zip(np.asarray(matrices), np.asarray(labels, np.float64), strict=True):
        angle = np.arctan2(label[4], label[3] + 1)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        # By 2^(0.2 a) along u = (cos d, -sin d), d counter-clockwise; (a, d) = (-a, d + pi).
        size = np.hypot(label[5], label[6])
        u = np.array([label[5], -label[6]]) / size
        along, across = np.outer(u, u), np.eye(2) - np.outer(u, u)
        zoomed = 2 ** (0.2 * label[2]) * turn
        errors = [
            np.abs((2**a * along + 2**-a * across) @ zoomed - matrix[:, :2]).max()
            for a in (0.2 * size, -0.2 * size)
        ]
        signs.append(np.argmin(errors))
        assert min(errors) < 1e-4
        np.testing.assert_allclose(matrix[:, 2], label[7:] / 8, rtol=1e-5)
    assert 12 < sum(signs) < 52  # both signs happen, five sigma


def test_label_frequencies_and_distributions():
    _, labels = sample(MANY_KEYS, 0.2)
    labels = np.asarray(labels)
    applied = (labels != 0).mean(0)
    expected = [0.5, 0.1] + 7 * [0.2]  # the y-flip is drawn from {0, 1} where it is applied
    np.testing.assert_allclose(applied, expected, atol=0.012)  # 4.8 sigma at 0.5
    scale, along, shift = labels[:, 2], np.hypot(labels[:, 5], labels[:, 6]), labels[:, 7]
    for values in (scale, along, shift):  # all N(0, 1), or its modulus
        assert (values[values != 0] ** 2).mean() == pytest.approx(1, abs=0.08)
    cos = labels[labels[:, 4] != 0, 3] + 1
    assert cos.mean() == pytest.approx(0, abs=0.04)  # uniform over the circle
    both = ((labels[:, 2] != 0) & (labels[:, 7] != 0)).mean()
    assert both == pytest.approx(0.04, abs=0.005)  # independent of each other
    np.testing.assert_array_equal(labels[:, 7] != 0, labels[:, 8] != 0)


def test_without_probability_only_flips_remain():
    out, labels = augment(IMAGES, KEYS, 0.0, 0.5)
    flipped = np.asarray(labels[:, 0], bool)
    assert 4 < flipped.sum() < 28
    expected = np.where(flipped[:, None, None, None], IMAGES[:, :, ::-1], IMAGES)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(labels[:, 1:], 0)
    out, labels = augment(IMAGES, KEYS, 0.0, 0.0)
    np.testing.assert_allclose(out, IMAGES, atol=1e-5)
    np.testing.assert_array_equal(labels, 0)


def test_augment_flips_then_warps_as_its_label_says():
    out, labels = augment(IMAGES, KEYS, 0.5, 0.5)
    assert set(map(tuple, np.asarray(labels[:, :2]))) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    matrices, _ = sample(MANY_KEYS, 0.5)
    for image, matrix, moved, label in zip(IMAGES, matrices[:32], out, labels, strict=True):
        image = image[:, ::-1] if label[0] else image
        image = image[::-1] if label[1] else image
        np.testing.assert_allclose(moved, warp(image, matrix), atol=1e-4)


def test_example_does_not_depend_on_its_batch():
    out, labels = augment(IMAGES, KEYS, 1.0, 0.5)
    others = jax.random.split(jax.random.key(3), 32).at[3].set(KEYS[7])
    again, other_labels = augment(np.roll(IMAGES, -4, axis=0), others, 1.0, 0.5)
    np.testing.assert_allclose(again[3], out[7], atol=1e-5)
    np.testing.assert_array_equal(other_labels[3], labels[7])
    assert np.abs(np.asarray(out[7]) - IMAGES[7]).max() > 0.1
    assert np.abs(np.asarray(again[4] - out[8])).max() > 0.1  # its key is another one


def test_one_pixel_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        augment_lib.warp(jnp.zeros((1, 4, 1)), jnp.asarray(IDENTITY))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(5, 2\), expected \(B, H, W, C\) to augment"):
        augment(jnp.zeros((5, 2)), jax.random.split(jax.random.key(0), 5))
