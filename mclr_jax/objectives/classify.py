"""Classification of noisy data: trains p(class | x_sigma), the posterior that MCLR draws from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mclr_jax.objectives.dsm import NoiseLevels, perturb


def classify(
    logits: Callable[..., jax.Array],
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    extra: tuple[Any, ...] = (),
    *,
    noise: NoiseLevels,
    null_label: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy of the class given x0 + sigma n and sigma; its optimum is the exact posterior.

    Args:
      logits: (x, sigma, label, *extra) -> (B, K); the label it gets is the null label.
      x0, label, keys, extra, noise, null_label: as in `dsm`.

    Returns:
      loss (B,), and metrics (B,): `accuracy`.
    """
    x, sigma, hidden, _ = perturb(x0, label, keys, noise, null_label, label_dropout=1.0)
    log_probs = jax.nn.log_softmax(logits(x, sigma, hidden, *extra))
    correct = jnp.argmax(log_probs, axis=-1) == label
    loss = -jnp.take_along_axis(log_probs, label[:, None], axis=-1)[:, 0]
    return loss, {"accuracy": correct.astype(jnp.float32)}
