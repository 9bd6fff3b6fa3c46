"""What all data sets share: their standard deviation, subsets, and labels that are read late."""

import numpy as np
import pytest

from mclr_jax.data.protocol import Arrays, Lazy, drawn, evenly, limit, sigma_data


def test_sigma_data():
    images = np.repeat(np.array([0, 255], np.uint8), 5000)[:, None]
    labels = np.zeros(10_000, np.int32)
    assert sigma_data(Arrays(images, labels, 1)) == pytest.approx(1.0)  # half at -1, half at 1
    floats = np.linspace(-3, 3, 10_000, dtype=np.float32)[:, None]
    assert sigma_data(Arrays(floats, labels, 1)) == pytest.approx(3 / 3**0.5, rel=1e-3)
    read = []
    lazy = Lazy(9999, (1,), 1, lambda i: (read.append(i), (floats[i], 0))[1], lambda: labels)
    sigma_data(lazy)
    assert (len(read), read[0], read[-1]) == (4096, 0, 9998)


def test_limit_is_balanced_nested_and_seeded():
    labels = np.repeat(np.arange(4), [2, 50, 70, 30]).astype(np.int32)
    source = Arrays(np.arange(152, dtype=np.float32)[:, None], labels, 4)
    small, large, other = limit(source, 41, 0), limit(source, 120, 0), limit(source, 41, 1)
    images, got = small[np.arange(len(small))]
    np.testing.assert_array_equal(labels[images[:, 0].astype(int)], got)
    np.testing.assert_array_equal(np.bincount(got), [2, 13, 13, 13])
    np.testing.assert_array_equal(np.bincount(large.labels), [2, 44, 44, 30])
    assert set(small.indices) < set(large.indices)
    assert set(small.indices) != set(other.indices)
    assert len(np.unique(large.indices)) == 120
    assert (small.shape, small.num_classes, small.in_memory, len(small)) == ((1,), 4, True, 41)
    np.testing.assert_array_equal(limit(source, 41, 0).indices, small.indices)
    for n in (0, 153):
        with pytest.raises(ValueError, match="expected 1 to 152"):
            limit(source, n, 0)


@pytest.mark.parametrize("by_class", [False, True])
@pytest.mark.parametrize("stored", [np.sort, lambda rows: rows, np.random.default_rng(0).permuted])
def test_a_subset_stands_for_the_set_in_whatever_order_it_is_stored(stored, by_class):
    """Classes of 50%, 40% and 10%, stored one after the other, in turn or in a random order."""
    labels = stored(np.resize([0, 1, 0, 1, 0, 1, 0, 1, 0, 2], 5000)).astype(np.int32)
    source = Arrays(np.zeros((5000, 1), np.float32), labels, 3)
    rows = drawn(source, 501, 3, by_class)
    assert len(set(rows)) == len(rows) == 501
    counts = np.bincount(labels[rows], minlength=3)
    np.testing.assert_allclose(counts, [250, 200, 50], atol=2 if by_class else 45)  # 4 sigma
    assert abs(rows.mean() - 2500) < 260  # 4 sigma
    np.testing.assert_array_equal(drawn(source, 501, 3, by_class), rows)
    assert set(drawn(source, 501, 4, by_class)) != set(rows)
    for count in (5000, 9999):
        np.testing.assert_array_equal(drawn(source, count, 3, by_class), np.arange(5000))


def test_lazy_reads_labels_once_and_checks_them():
    reads = []

    def read_labels():
        reads.append(1)
        return np.array([0, 1], np.int32)

    lazy = Lazy(2, (1,), 2, lambda i: (np.zeros(1, np.float32), 2 * i), read_labels)
    np.testing.assert_array_equal(lazy.labels, lazy.labels)
    assert reads == [1]
    with pytest.raises(ValueError, match="labels from 0 to 2, expected 0 to 1"):
        lazy[np.arange(len(lazy))]


def test_subsets_are_those_of_earlier_versions():
    """2 of each class and one more by the seed, and evenly spaced examples from end to end."""
    source = Arrays(np.zeros((12, 1), np.float32), np.arange(12, dtype=np.int32) % 3, 3)
    assert limit(source, 5, 0).indices.tolist() == [2, 4, 5, 7, 9]
    assert limit(source, 5, 1).indices.tolist() == [0, 4, 7, 8, 11]
    assert evenly(source, 5).tolist() == [0, 2, 5, 8, 11]
    assert evenly(source, 99).tolist() == list(range(12))
