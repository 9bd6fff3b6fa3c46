import numpy as np
from PIL import Image

from mclr_jax import images


def test_each_sample_stands_in_the_row_of_its_class_with_its_grey_value():
    """6 flat images of 2 classes; each must appear, enlarged, in order, left to right."""
    values = np.array([-1.0, -0.5, 0.0, 0.25, 0.5, 1.0], np.float32)
    samples = np.broadcast_to(values[:, None, None, None], (6, 8, 8, 1))
    labels = np.array([7, 3, 7, 3, 7, 3])
    grid = images.picture(samples, labels)
    rows = [grid[images.MARGIN + 20], grid[2 * images.MARGIN + 40 + 20]]
    for row, expected in zip(rows, [[-0.5, 0.25, 1.0], [-1.0, 0.0, 0.5]], strict=True):
        got = row[-3 * (40 + images.MARGIN) + 20 :: 40 + images.MARGIN, 0]
        np.testing.assert_array_equal(got, np.round((np.array(expected) + 1) * 127.5))


def test_colour_is_kept_and_rows_are_limited():
    samples = np.zeros((30, 32, 32, 3), np.float32)
    samples[..., 0] = 1.0
    grid = images.picture(samples, np.zeros(30, int), columns=4)
    assert grid.shape[0] == 32 + 2 * images.MARGIN
    np.testing.assert_array_equal(grid[20, -20], [255, 128, 128])


def test_images_are_clipped_and_points_are_not():
    values = np.array([-3.0, 0.5, 3.0], np.float32)
    np.testing.assert_array_equal(images.clip(values.reshape(3, 1, 1, 1)).ravel(), [-1, 0.5, 1])
    np.testing.assert_array_equal(images.clip(values.reshape(3, 1)).ravel(), values)
    latents = np.full((1, 2, 2, 4), 5.0)
    np.testing.assert_array_equal(images.clip(latents), latents)


def test_rounding_to_8_bits_leaves_what_an_8_bit_file_would_hold():
    stored = (np.arange(256) / 127.5 - 1).astype(np.float32).reshape(1, 16, 16, 1)
    shaken = stored + np.random.default_rng(0).uniform(-0.0039, 0.0039, stored.shape)
    np.testing.assert_array_equal(images.as_8_bits(shaken), stored)
    assert images.as_8_bits(3 * stored).max() == 1


def test_points_are_plotted_where_they_lie():
    points = np.array([[0.0, 0.0], [1.0, 1.0]])
    grid = images.picture(points, np.array([0, 1]))
    dark = np.argwhere((grid != 255).any(-1))
    assert dark[0].tolist() == [9, 469]  # (1, 1) is at the top right
    assert dark[-1].tolist() == [471, 11]  # (0, 0) at the bottom left
    np.testing.assert_array_equal(grid[10, 470], images.COLOURS[1])


def test_a_saved_picture_is_read_back(tmp_path):
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    images.save(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(Image.open(tmp_path / "a.png"), pixels)


def test_rows_have_the_names_of_their_classes():
    """The first of several names, shortened; a class without a name has its number."""
    names = ["a", "shark, great", "x" * 21, "y" * 20]
    captions = [images.caption(label, names) for label in range(5)]
    assert captions == ["a", "shark", "x" * 19 + "\N{HORIZONTAL ELLIPSIS}", "y" * 20, "4"]
    samples, labels = np.ones((2, 8, 8, 1), np.float32), np.array([0, 1])
    numbers = images.picture(samples, labels)
    named = images.picture(samples, labels, class_names=["a", "great white shark"])
    assert named.shape[1] > numbers.shape[1] + 80
    np.testing.assert_array_equal(named[:, -45:], numbers[:, -45:])


def test_models_stand_side_by_side_under_their_names():
    """The same rows in each block; the class at the left alone; a long name widens its block."""
    labels = np.array([0, 1, 0, 1])
    values = {"base, scale 2": -1.0, "m": 1.0, "a name longer than its two columns": 0.0}
    named = {name: np.full((4, 8, 8, 1), value, np.float32) for name, value in values.items()}
    grid = images.side_by_side(named, labels, class_names=("cat", "dog"))
    top, row = 22, 40 + images.MARGIN
    first = images.picture(named["base, scale 2"], labels, class_names=("cat", "dog"))
    assert grid.shape[0] == top + first.shape[0]
    np.testing.assert_array_equal(grid[top:, : first.shape[1]], first)
    for line in grid[[top + images.MARGIN + 38, top + images.MARGIN + 38 + row], :, 0]:
        shown = line[first.shape[1] :]  # below the captions' letters
        assert [int((shown == value).sum()) for value in (0, 128)] == [0, 2 * 40]
        assert (shown == 255).sum() == shown.size - 2 * 40  # white images, gaps
        gaps = 3 + 4 + 1  # after the first block, of the second, before the third's first image
        assert np.flatnonzero(shown == 128)[0] == gaps * images.MARGIN + 2 * row
    dark = np.flatnonzero((grid[:top] < 128).any((0, 2)))
    starts = dark[np.flatnonzero(np.diff(dark, prepend=-99) > 20)]
    assert len(starts) == 3  # of the names


def test_trajectories_are_shown_as_their_frames():
    """A field's first channel, 3 standard deviations white; each state; one coordinate in pairs."""
    fields = np.zeros((2, 3, 8, 8, 2), np.float32)
    fields[0, :, :, :, 0] = np.array([-3.0, 0.0, 3.0])[:, None, None]
    labels = np.zeros(2, np.int32)
    frames = np.repeat(np.array([-1.0, 0, 1, 0, 0, 0], np.float32), 64).reshape(6, 8, 8, 1)
    want = images.picture(frames, np.zeros(6, np.int32))
    np.testing.assert_array_equal(images.picture(fields, labels), want)
    states = np.random.default_rng(0).normal(size=(2, 5, 3))
    points = images.picture(states.reshape(10, 3), np.zeros(10, np.int32))
    np.testing.assert_array_equal(images.picture(states, labels), points)
    pairs = np.array([[1.0, 2], [2, 4], [5, 1], [1, 0]])
    one = np.array([[1.0, 2, 4], [5, 1, 0]])[..., None]
    plotted = images.picture(pairs, np.zeros(4, np.int32))
    np.testing.assert_array_equal(images.picture(one, labels), plotted)
