"""Classification of noisy data: trains p(class | x_sigma), a posterior for MCLR."""

import dataclasses

import jax
import jax.numpy as jnp

from mclr_jax.objectives.base import Objective, perturb
from mclr_jax.problem import Batch, Loss, Models, Problem
from mclr_jax.reductions import mean


@dataclasses.dataclass(frozen=True)
class Classify(Objective):
    """Cross-entropy of the class given x0 + sigma n and sigma; its optimum is the exact posterior.

    The classifier gets only the null label.
    """

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Loss (B,), and the metric `accuracy`."""
        x, sigma, hidden, _ = perturb(problem, batch.x0, batch.condition, keys, label_dropout=1.0)
        log_probs = jax.nn.log_softmax(models.logits(x, sigma, hidden))
        label = batch.condition.label
        correct = jnp.argmax(log_probs, axis=-1) == label
        loss = -jnp.take_along_axis(log_probs, label[:, None], axis=-1)[:, 0]
        return loss, {"accuracy": mean(correct.astype(jnp.float32))}
