"""MG, model guidance: add the model's own guidance to the target that it is trained on.

Source: Tang et al. 2025, arXiv 2502.12154.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mclr_jax.denoiser import DenoiseFn, expand
from mclr_jax.objectives.dsm import NoiseLevels, at_labels, mean_square, perturb


def model_guidance(
    denoise: DenoiseFn,
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    extra: tuple[Any, ...] = (),
    *,
    noise: NoiseLevels,
    weight: Callable[[jax.Array], jax.Array],
    null_label: int,
    teacher: DenoiseFn,
    scale: float = 0.45,
    sigma_interval: Sequence[float] = (0.0, 3.0),
    label_dropout: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """weight |D(x_s, c) - [x + w (D_ema(x_s, c) - D_ema(x_s, null))]|^2.

    No gradient flows through the target. The fixed point is CFG of guidance_scale 1 / (1 - w).

    Args:
      denoise, x0, label, keys, extra, noise, weight, null_label, label_dropout: as in `dsm`.
      teacher: the average of the model's weights, as a DenoiseFn.
      scale: w, in [0, 1).
      sigma_interval: (low, high): guided targets where low < sigma <= high only. The paper's
        t < 0.75 of flow matching is sigma = t / (1 - t) < 3 for data of unit variance.

    Returns:
      loss (B,), and metrics (B,): `error`, |D - x|^2 unweighted.

    Raises:
      ValueError: if the scale is not in [0, 1), where there is no fixed point.
    """
    if not 0 <= scale < 1:
        raise ValueError(f"objective.scale is {scale}; expected at least 0 and below 1.")
    x, sigma, shown, _ = perturb(x0, label, keys, noise, null_label, label_dropout)
    low, high = sigma_interval
    guided = (shown != null_label) & (low < sigma) & (sigma <= high)
    null = jnp.full_like(label, null_label)
    right, unconditional = at_labels(teacher, x, sigma, (shown, null), ())
    shift = expand(jnp.where(guided, scale, 0.0), x0) * (right - unconditional)
    denoised = denoise(x, sigma, shown, *extra)
    loss = weight(sigma) * mean_square(denoised - x0 - jax.lax.stop_gradient(shift))
    return loss, {"error": mean_square(denoised - x0)}
