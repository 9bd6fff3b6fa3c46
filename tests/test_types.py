import operator

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.types import Condition, as_condition, expand, label_of, with_label


def full():
    """A condition of 4 rows that has everything."""
    keys = jax.random.split(jax.random.key(0), 4)
    return Condition(jnp.arange(4), jnp.arange(4.0), jnp.ones((4, 9)), keys)


def test_expand_broadcasts_over_the_trailing_axes():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    for values, shape in [(3.0, (1, 1, 1)), (x[:, 0, 0], (2, 1, 1)), (x[:, :, 0], (2, 3, 1))]:
        np.testing.assert_array_equal(expand(values, x), np.reshape(values, shape))
    assert expand(x, x) is x


def test_bare_labels_are_a_condition_at_the_edges():
    for labels in (jnp.array([2, 0]), np.array([2, 0], np.uint8), [2, 0]):
        condition = as_condition(labels)
        np.testing.assert_array_equal(condition.label, [2, 0])
        assert condition.label.dtype == jnp.int32
        assert (condition.strength, condition.augment, condition.dropout_keys) == (None,) * 3
        np.testing.assert_array_equal(label_of(labels), [2, 0])
    condition = full()
    assert as_condition(condition) is condition
    assert label_of(condition) is condition.label


def test_another_label_leaves_the_rest_as_it_is():
    condition = full()
    for label, expected in [(7, [7] * 4), (jnp.array([3, 2, 1, 0]), [3, 2, 1, 0])]:
        other = with_label(condition, label)
        np.testing.assert_array_equal(other.label, expected)
        assert other.label.dtype == condition.label.dtype
        leaves = jax.tree.leaves((other.replace(label=condition.label), condition))
        assert all(map(operator.is_, leaves[: len(leaves) // 2], leaves[len(leaves) // 2 :]))
        np.testing.assert_array_equal(with_label(jnp.arange(4), label).label, expected)
