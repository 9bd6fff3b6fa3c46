"""Denoising score matching, the objective of plain conditional training."""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from mclr_jax.denoiser import DenoiseFn, expand
from mclr_jax.noise import normal_like


class NoiseLevels(Protocol):
    """A training distribution of noise levels; see `noise.LogNormal`."""

    def sample(self, key: jax.Array) -> jax.Array: ...


def dsm(
    denoise: DenoiseFn,
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    *,
    noise: NoiseLevels,
    weight: Callable[[jax.Array], jax.Array],
    null_label: int,
    label_dropout: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """weight(sigma) * mean |D(x0 + sigma n, sigma, label) - x0|^2 for each example.

    Source: Karras et al. 2022, eq. 2 and 8 (the mean over dimensions in place of the sum). Label
    dropout trains the null label that classifier-free guidance needs (Ho & Salimans 2022).

    Args:
      denoise: the model.
      x0: (B, ...) clean data.
      label: (B,) int32.
      keys: (B,) typed keys; all randomness of example i comes from keys[i].
      noise: distribution that sigma is drawn from.
      weight: sigma (B,) -> loss weight (B,).
      null_label: label without condition, num_classes.
      label_dropout: probability that an example is shown with the null label.

    Returns:
      loss (B,), and metrics (B,): `error`, the unweighted mean square error.
    """
    k_sigma, k_noise, k_label = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)
    sigma = jax.vmap(noise.sample)(k_sigma)
    x = x0 + expand(sigma, x0) * normal_like(k_noise, x0)
    dropped = jax.vmap(jax.random.uniform)(k_label) < label_dropout
    label = jnp.where(dropped, null_label, label)
    square = (denoise(x, sigma, label) - x0) ** 2
    error = square.mean(tuple(range(1, x0.ndim)))
    return weight(sigma) * error, {"error": error}
