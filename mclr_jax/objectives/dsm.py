"""Denoising score matching (DSM), the objective of plain conditional training."""

import dataclasses

import jax

from mclr_jax.objectives import base
from mclr_jax.objectives.base import Batch, Loss, Models, Objective, Problem
from mclr_jax.reductions import mean
from mclr_jax.schema import key
from mclr_jax.types import expand


@dataclasses.dataclass(frozen=True)
class DSM(Objective):
    """weight(sigma) * mean |D(x0 + sigma n, sigma, label) - x0|^2 for each example.

    With EDM2's log-variance head it is `base.weighted`.

    Source: Karras et al. 2022, eq. 2 and 8 (with a mean over dimensions instead of the sum). With a
    noise level for each frame DSM is diffusion forcing (Chen et al. 2024, arXiv 2407.01392).

    A network with a variance has `base.likelihood` of each coordinate.
    """

    label_dropout: float = base.label_dropout()
    variance_power: float = key(
        0.5, 0.0, 1.0, says="see base.likelihood, if the network has a variance"
    )

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Loss (B,); `error`, the unweighted mean square error; with a variance `error_ratio`."""
        noisy = base.perturb(problem, batch.x0, batch.condition, keys, self.label_dropout)
        x, sigma, condition, _ = noisy
        if models.moments is None:
            error = base.square_error(models.denoise(x, sigma, condition), batch.x0, sigma)
            loss = base.per_example(base.weighted(models, problem, error, sigma))
            return loss, {"error": mean(base.per_example(error))}
        moments, weight = models.moments(x, sigma, condition), expand(problem.weight(sigma), x)
        return base.likelihood(*moments, batch.x0, self.variance_power, weight)
