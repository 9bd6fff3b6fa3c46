"""Denoising score matching (DSM), the objective of plain conditional training."""

import dataclasses

import jax

from mclr_jax.metrics import mean
from mclr_jax.objectives.base import Objective, per_example, perturb, square_error
from mclr_jax.problem import Batch, Loss, Models, Problem


@dataclasses.dataclass(frozen=True)
class DSM(Objective):
    """weight(sigma) * mean |D(x0 + sigma n, sigma, label) - x0|^2 for each example.

    Source: Karras et al. 2022, eq. 2 and 8 (with a mean over dimensions instead of the sum). With a
    noise level for each frame DSM is diffusion forcing (Chen et al. 2024, arXiv 2407.01392).
    """

    label_dropout: float = 0.1  # probability that the null label replaces the label of an example

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Loss (B,), and the metric `error`, the unweighted mean square error."""
        noisy = perturb(problem, batch.x0, batch.condition, keys, self.label_dropout)
        x, sigma, condition, _ = noisy
        error = square_error(models.denoise(x, sigma, condition), batch.x0, sigma)
        loss = per_example(problem.weight(sigma) * error)
        return loss, {"error": mean(per_example(error))}
