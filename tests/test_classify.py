"""Classification of noisy data is the cross-entropy of what a model says of x0 + sigma n."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from mclr_jax import noise
from mclr_jax.objectives.base import Batch, Models
from mclr_jax.objectives.classify import Classify
from mclr_jax.types import Condition


def test_the_loss_is_the_cross_entropy_of_a_model_that_is_never_told_the_label():
    seen, count = [], 4000

    def model(x, sigma, condition):
        seen.append((x, sigma, condition))
        return jnp.sin(x + 3 * jnp.arange(3)) + sigma[:, None]

    keys, label = jax.random.split(jax.random.key(0), count), jnp.arange(count) % 3
    x0 = jax.random.normal(jax.random.key(1), (count, 1)) + label[:, None]
    told = Condition(label, augment=jnp.arange(count)[:, None] * jnp.ones(9), dropout_keys=keys)
    problem = cases.problem(noise.LogUniform(0.2, 3.0))
    loss, metrics = Classify()(Models(cases.no_answer, model), problem, Batch(x0, told), keys)
    ((x, sigma, condition),) = seen
    np.testing.assert_array_equal(condition.label, np.full(count, 3))
    np.testing.assert_array_equal(condition.augment, told.augment)
    assert jnp.all(condition.dropout_keys == keys)
    assert condition.strength is None
    n = np.asarray((x - x0)[:, 0] / sigma)  # x is x0 + sigma n for the sigma that is told
    assert abs(n.mean()) < 4 / np.sqrt(count)
    low = np.asarray(sigma) < 0.8
    for half in (n[low], n[~low]):
        assert abs((half**2).mean() - 1) < 4 * np.sqrt(2 / len(half))
    logits = np.sin(x + 3 * np.arange(3))  # a constant changes nothing
    expected = -log_softmax(logits, axis=1)[np.arange(count), label]
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    correct = metrics["accuracy"].parts[0]
    np.testing.assert_array_equal(correct, logits.argmax(1) == label)
