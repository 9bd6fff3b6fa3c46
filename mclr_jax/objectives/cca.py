"""CCA, condition contrastive alignment: tell right from wrong labels by the model's own likelihood.

Source: Chen et al. 2024, arXiv 2410.09347, in the denoising form of `dsm.log_ratio`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mclr_jax.denoiser import DenoiseFn
from mclr_jax.objectives.dsm import NoiseLevels, at_labels, log_ratio, perturb


def cca(
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
    beta: float = 0.02,
    negative_weight: float = 1000.0,
    label_dropout: float = 0.1,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """[-log s(beta r(x, c)) - lambda log s(-beta r(x, c~))] / max(lambda, 1), s the logistic.

    c~ is drawn from the classes' shares (the paper rolls the labels of a batch, whose result would
    depend on how a batch is spread over devices). With r a true log ratio the optimum is
    p_ref(x|c) [p(x|c) / (lambda p(x))]^(1/beta). An example whose label was dropped is a positive
    of the null label and has no negative.

    Args:
      denoise, x0, label, keys, extra, noise, weight, null_label, label_dropout: as in `dsm`.
      class_prior: (K,) share of each class in the data.
      reference: the frozen model that training started from.
      beta: inverse temperature; the larger, the weaker the contrast.
      negative_weight: lambda.

    Returns:
      loss (B,), and metrics (B,): `positive_ratio` and `negative_ratio`, r at c and at c~.
    """
    x, sigma, shown, keys = perturb(x0, label, keys, noise, null_label, label_dropout)
    log_prior = jnp.log(jnp.asarray(class_prior, x0.dtype))
    wrong = jax.vmap(lambda key: jax.random.categorical(key, log_prior))(keys)
    labels = (shown, wrong)
    denoised = at_labels(denoise, x, sigma, labels, extra)
    frozen = jax.lax.stop_gradient(at_labels(reference, x, sigma, labels, extra))
    positive, negative = (
        log_ratio(d, r, x0, weight(sigma)) for d, r in zip(denoised, frozen, strict=True)
    )
    share = jnp.where(shown == null_label, 0.0, negative_weight)
    loss = jax.nn.softplus(-beta * positive) + share * jax.nn.softplus(beta * negative)
    metrics = {"positive_ratio": positive, "negative_ratio": negative}
    return loss / max(negative_weight, 1.0), metrics
