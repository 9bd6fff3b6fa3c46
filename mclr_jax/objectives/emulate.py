"""Forecasts of one step: trains an emulator on each pair of frames that follow each other."""

import dataclasses

from mclr_jax.objectives import base
from mclr_jax.objectives.base import Batch, Loss, Models, Objective, Problem
from mclr_jax.reductions import mean
from mclr_jax.schema import key


@dataclasses.dataclass(frozen=True)
class Emulate(Objective):
    """Square error of the next state or, of a network with a variance, `base.likelihood`."""

    variance_power: float = key(0.5, 0.0, 1.0, says="see base.likelihood, if it has a variance")

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys) -> Loss:
        """Loss (B,); `error`, the mean square error, and with a variance `error_ratio`.
        ValueError: no emulator, or windows of one frame."""
        if models.forecast is None or batch.x0.shape[1] < 2:
            raise ValueError(
                f"The objective Emulate got windows of shape {batch.x0.shape[1:]}; expected an "
                "emulator and two frames or more: set config.network.name="
                "mclr_jax.networks.emulator:Emulator and config.data.frames=2."
            )
        estimate, variance = models.forecast(batch.x0[:, :-1])
        target = batch.x0[:, 1:]
        if variance is not None:
            return base.likelihood(estimate, variance, target, self.variance_power)
        error = base.per_example((estimate - target) ** 2)
        return error, {"error": mean(error)}
