"""DDO, direct discriminative optimisation: tell data from the frozen model's own samples.

Source: Zheng et al. 2025, arXiv 2503.01103, in the denoising form of `dsm.log_ratio`.
"""

from collections.abc import Callable
from typing import Any

import jax

from mclr_jax.denoiser import DenoiseFn
from mclr_jax.objectives.dsm import NoiseLevels, log_ratio, perturb


def ddo(
    denoise: DenoiseFn,
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    extra: tuple[Any, ...] = (),
    *,
    noise: NoiseLevels,
    weight: Callable[[jax.Array], jax.Array],
    null_label: int,
    reference: DenoiseFn,
    generated: tuple[jax.Array, jax.Array],
    beta: float = 0.05,
    negative_weight: float = 1.0,
    label_dropout: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log s(beta r(x, c)) - alpha log(1 - s(beta r(x', c'))), x' a sample of the frozen model.

    s is the logistic. With r a true log ratio the optimum is p_ref [p / (alpha p_ref)]^(1/beta).
    Rounds of self-play: sample the fine-tuned model, and go on from it against those samples.

    Args:
      denoise, x0, label, keys, extra, noise, weight, null_label, label_dropout: as in `dsm`.
      reference: the frozen model that training started from.
      generated: (x' (B, ...), c' (B,)), samples of the frozen model.
      beta: inverse temperature.
      negative_weight: alpha.

    Returns:
      loss (B,), and metrics (B,): `positive_ratio` and `negative_ratio`, r of data and of samples.
    """
    split = jax.vmap(jax.random.split, out_axes=1)(keys)

    def ratio(x0, label, keys):
        x, sigma, shown, _ = perturb(x0, label, keys, noise, null_label, label_dropout)
        frozen = jax.lax.stop_gradient(reference(x, sigma, shown, *extra))
        return log_ratio(denoise(x, sigma, shown, *extra), frozen, x0, weight(sigma))

    positive, negative = ratio(x0, label, split[0]), ratio(*generated, split[1])
    loss = jax.nn.softplus(-beta * positive) + negative_weight * jax.nn.softplus(beta * negative)
    return loss, {"positive_ratio": positive, "negative_ratio": negative}
