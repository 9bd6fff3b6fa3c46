"""GFT, guidance-free training: the network learns the half of CFG that needs no second call.

Source: Chen et al. 2025, arXiv 2501.15420.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mclr_jax.denoiser import DenoiseFn, expand
from mclr_jax.objectives.dsm import NoiseLevels, mean_square, perturb


def gft(
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
    beta: float | jax.Array = 1.0,
    label_dropout: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """weight |b D(x_s, c, b) + (1 - b) D(x_s, null, 1) - x|^2 with b = 1 / (1 + beta).

    No gradient flows through D(x_s, null, 1). The optimum is CFG of guidance_scale 1 / b.

    Args:
      denoise, x0, label, keys, extra, noise, weight, null_label, label_dropout: as in `dsm`; the
        network is told beta by `extra`.
      teacher: the model itself at strength 0, as a DenoiseFn.
      beta: () or (B,), the strength that each example is trained for.

    Returns:
      loss (B,), and metrics (B,): `error` of the combination, unweighted.
    """
    x, sigma, shown, _ = perturb(x0, label, keys, noise, null_label, label_dropout)
    null = jnp.full_like(label, null_label)
    b = expand(jnp.where(shown == null_label, 1.0, 1 / (1 + beta)), x0)
    unconditional = jax.lax.stop_gradient(teacher(x, sigma, null))
    combined = b * denoise(x, sigma, shown, *extra) + (1 - b) * unconditional
    error = mean_square(combined - x0)
    return weight(sigma) * error, {"error": error}
