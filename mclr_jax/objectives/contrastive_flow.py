"""Contrastive flow matching (dFM): keep the velocity away from those of other examples.

Source: Stoica et al. 2025, arXiv 2506.05350.
"""

from collections.abc import Callable
from typing import Any

import jax

from mclr_jax.denoiser import DenoiseFn, expand
from mclr_jax.noise import normal_like
from mclr_jax.objectives.dsm import NoiseLevels, mean_square, perturb


def contrastive_flow(
    denoise: DenoiseFn,
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    extra: tuple[Any, ...] = (),
    *,
    noise: NoiseLevels,
    weight: Callable[[jax.Array], jax.Array],
    null_label: int,
    other: jax.Array,
    contrast: float = 0.05,
    label_dropout: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """weight' [|v(x_s, c) - v|^2 - lambda |v(x_s, c) - v~|^2], v = n - x of flow matching.

    x_t = (1 - t) x + t n is x_s / (1 + s) with t = s / (1 + s), so that v(x_s, c) =
    x_s / s - (1 + 1/s) D(x_s, c), and weight' = weight / (1 + 1/s)^2 is that of `dsm`. v~ = n~ - x~
    is of another example. The optimum is (v_c - lambda E v~) / (1 - lambda).

    Args:
      denoise, x0, label, keys, extra, noise, weight, null_label, label_dropout: as in `dsm`.
      other: (B, ...) clean data x~ of other examples.
      contrast: lambda, in [0, 1).

    Returns:
      loss (B,), and metrics (B,): `error`, |D - x|^2, and `negative_error`, |v - v~|^2, unweighted.

    Raises:
      ValueError: if the contrast is not in [0, 1), where the loss has no minimum.
    """
    if not 0 <= contrast < 1:
        raise ValueError(f"objective.contrast is {contrast}; expected at least 0 and below 1.")
    x, sigma, shown, keys = perturb(x0, label, keys, noise, null_label, label_dropout)
    away = normal_like(keys, x0) - other
    slope = 1 + 1 / sigma
    denoised = denoise(x, sigma, shown, *extra)
    velocity = x / expand(sigma, x) - expand(slope, x) * denoised
    error, negative_error = mean_square(denoised - x0), mean_square(velocity - away)
    loss = weight(sigma) * (error - contrast * negative_error / slope**2)
    return loss, {"error": error, "negative_error": negative_error}
