"""Denoising score matching, the objective of plain conditional training."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from mclr_jax.denoiser import DenoiseFn, expand
from mclr_jax.noise import normal_like


class NoiseLevels(Protocol):
    """A training distribution of noise levels; see `noise.LogNormal`."""

    def sample(self, key: jax.Array) -> jax.Array: ...


def perturb(
    x0: jax.Array, label: jax.Array, keys: jax.Array, noise: NoiseLevels, null_label: int,
    label_dropout: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """What every objective shows a network: noise added, some labels replaced by the null label.

    Returns:
      x (B, ...), sigma (B,), label (B,), and keys (B,) for whatever else an objective draws.
    """
    split = jax.vmap(lambda key: jax.random.split(key, 4), out_axes=1)
    k_sigma, k_noise, k_label, k_rest = split(keys)
    sigma = jax.vmap(noise.sample)(k_sigma)
    x = x0 + expand(sigma, x0) * normal_like(k_noise, x0)
    dropped = jax.vmap(jax.random.uniform)(k_label) < label_dropout
    return x, sigma, jnp.where(dropped, null_label, label), k_rest


def mean_square(x: jax.Array) -> jax.Array:
    """(B, ...) -> (B,): the mean of x^2 over all but the first axis."""
    return jnp.mean(x**2, axis=tuple(range(1, x.ndim)))


def at_labels(
    denoise: DenoiseFn, x: jax.Array, sigma: jax.Array, labels: Sequence[jax.Array], extra: tuple
) -> jax.Array:
    """D at each of n label arrays (B,), in one call of the network: (n, B, ...)."""

    def repeat(values):
        return jnp.concatenate([values] * len(labels))

    arguments: Any = (x, sigma, *extra)
    x_all, sigma_all, *extra_all = jax.tree.map(repeat, arguments)
    out = denoise(x_all, sigma_all, jnp.concatenate(labels), *extra_all)
    return out.reshape(len(labels), *x.shape)


def log_ratio(
    denoised: jax.Array, reference: jax.Array, x0: jax.Array, weight: jax.Array
) -> jax.Array:
    """What stands for log p_theta / p_ref in preference losses: (B,).

    weight (|D_ref - x0|^2 - |D - x0|^2), summed over dimensions, with weight (B,) that of the
    noise levels.
    """
    size = x0[0].size
    return weight * size * (mean_square(reference - x0) - mean_square(denoised - x0))


def dsm(
    denoise: DenoiseFn,
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    extra: tuple[Any, ...] = (),
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
      extra: further arrays (B, ...) or None that `denoise` takes after the label.
      noise: distribution that sigma is drawn from.
      weight: sigma (B,) -> loss weight (B,).
      null_label: label without condition, num_classes.
      label_dropout: probability that an example is shown with the null label.

    Returns:
      loss (B,), and metrics (B,): `error`, the unweighted mean square error.
    """
    x, sigma, label, _ = perturb(x0, label, keys, noise, null_label, label_dropout)
    error = mean_square(denoise(x, sigma, label, *extra) - x0)
    return weight(sigma) * error, {"error": error}
