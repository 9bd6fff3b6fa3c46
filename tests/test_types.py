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
    scalar, rows, frames = 3.0, jnp.array([1.0, 2.0]), jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(expand(scalar, x) * x, 3 * x)
    np.testing.assert_array_equal(expand(rows, x) * x, np.einsum("b,bfd->bfd", rows, x))
    np.testing.assert_array_equal(expand(frames, x) * x, np.einsum("bf,bfd->bfd", frames, x))
    assert expand(rows, x).shape == (2, 1, 1)
    assert expand(scalar, x).shape == (1, 1, 1)
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
        assert other.replace(label=condition.label) == condition
        np.testing.assert_array_equal(with_label(jnp.arange(4), label).label, expected)
    np.testing.assert_array_equal(condition.label, np.arange(4))  # it is no change in place


def test_rows_of_a_condition_are_taken_as_a_tree():
    """As objectives do: keys are cut and joined like numbers, and what is absent stays so."""
    condition = full()
    halves = [jax.tree.map(lambda x, r=r: x[r], condition) for r in (slice(0, 2), slice(2, 4))]
    joined = jax.tree.map(lambda *parts: jnp.concatenate(parts), *halves)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), joined, condition))
    assert jax.tree.map(lambda x: x[:1], Condition(jnp.arange(3))).strength is None
    assert len(jax.tree.leaves(Condition(jnp.arange(3)))) == 1
