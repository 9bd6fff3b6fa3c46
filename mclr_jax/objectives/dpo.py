"""Diffusion-DPO with a wrong label: prefer the right label's error on the same noisy image.

Source: Wallace et al. 2023, arXiv 2311.12908, eq. 14, with (winner, loser) = (x under its label, x
under another), as MCLR's setting has no pairs of images.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mclr_jax.denoiser import DenoiseFn
from mclr_jax.objectives.dsm import NoiseLevels, at_labels, mean_square, perturb


def dpo(
    denoise: DenoiseFn,
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    extra: tuple[Any, ...] = (),
    *,
    noise: NoiseLevels,
    weight: Callable[[jax.Array], jax.Array],
    null_label: int,
    class_prior: Sequence[float],
    reference: DenoiseFn,
    beta: float = 5000.0,
    label_dropout: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """-log s(-(beta / 2) m), m = weight [(e(c) - e(c~)) - (e_ref(c) - e_ref(c~))], c~ != c.

    s is the logistic, e a mean square error. With l = -weight e a true log likelihood the optimum
    has l(c) - l(c~) - (the reference's) = (2 / beta) log of p(x|c) / (1 - p(c)) over the same of
    c~: c~ is drawn from the other classes by their shares. An example whose label was dropped gets
    plain DSM.

    Args:
      denoise, x0, label, keys, extra, noise, weight, null_label, label_dropout: as in `dsm`.
      class_prior: (K,) share of each class in the data.
      reference: the frozen model that training started from.
      beta: inverse temperature; the larger, the weaker the contrast.

    Returns:
      loss (B,), and metrics (B,): `error`, `negative_error` (both unweighted) and `accuracy`, how
      often the right label has gained more than the wrong one.
    """
    x, sigma, shown, keys = perturb(x0, label, keys, noise, null_label, label_dropout)
    log_prior = jnp.log(jnp.asarray(class_prior, x0.dtype))
    others = jnp.where(jnp.arange(null_label) == label[:, None], -jnp.inf, log_prior)
    labels = (shown, jax.vmap(jax.random.categorical)(keys, others))
    error, wrong = map(mean_square, at_labels(denoise, x, sigma, labels, extra) - x0)
    frozen = jax.lax.stop_gradient(at_labels(reference, x, sigma, labels, extra))
    error_then, wrong_then = map(mean_square, frozen - x0)
    margin = weight(sigma) * ((error - wrong) - (error_then - wrong_then))
    loss = jax.nn.softplus(beta / 2 * margin)
    metrics = {
        "error": error,
        "negative_error": wrong,
        "accuracy": (margin < 0).astype(x0.dtype),
    }
    return jnp.where(shown == null_label, weight(sigma) * error, loss), metrics
