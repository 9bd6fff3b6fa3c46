"""Two of scikit-learn's digits side by side: 8x16 images of 100 classes, "two_digits:pairs"."""

import numpy as np

from mclr_jax.data import sources
from mclr_jax.data.protocol import Arrays

COUNTS = {"train": 30_000, "test": 5_000}


def pairs(split: str) -> Arrays:
    """Pairs of digits of a split of "digits", drawn once; the class is ten times left plus right.

    The pairs of either split are of its digits alone: 1,497 for training and 300 for the test.
    """
    digits = sources.load("digits", split)
    draws = np.random.default_rng(0).integers(len(digits), size=(2, COUNTS[split]))
    (left, tens), (right, ones) = (digits[rows] for rows in draws)
    return Arrays(np.concatenate([left, right], axis=2), 10 * tens + ones, 100)
