"""Guidance: transforms DenoiseFn -> DenoiseFn, which compose.

Convention: guided = weak + guidance_scale * (strong - weak); guidance_scale = 1 is no guidance.
Scales and intervals may be traced arrays, which change without recompilation. The weak denoiser is
not called if no example is guided: at scale 1, or at noise levels outside the interval.
"""

import jax
import jax.numpy as jnp

from mclr_jax.types import DenoiseFn, expand, with_label


def autoguidance(
    denoise: DenoiseFn, weak: DenoiseFn, guidance_scale, interval=None, channels=None
) -> DenoiseFn:
    """Extrapolate from a weak denoiser through `denoise` (Karras et al. 2024, arXiv 2406.02507).

    Args:
      denoise: the model to guide.
      weak: a denoiser of the same data with worse conditioning, capacity or training.
      guidance_scale: () or (B,); 1 returns `denoise`, 0 returns `weak`.
      interval: (low, high): guide each example or frame only if low < sigma <= high (Kynkaanniemi
        et al. 2024, arXiv 2404.07724); None for all noise levels.
      channels: number of the first channels to guide; the others are those of `denoise`.

    The guided denoiser has an optional fourth argument: the level that the interval is about, where
    it is not sigma; both are then as in `flow`.
    """

    def guided(x, sigma, condition, level=None):
        strong = denoise(x, sigma, condition)
        scale = jnp.asarray(guidance_scale, x.dtype)
        if interval is not None:
            (low, high), level = interval, sigma if level is None else level
            scale = jnp.where((low < level) & (level <= high), expand(scale, level), 1)
        some = jnp.any(scale != 1)
        weak_output = jax.lax.cond(some, lambda: weak(x, sigma, condition), lambda: strong)
        step = (expand(scale, x) - 1) * (strong - weak_output)
        if channels is not None:
            step = jnp.where(jnp.arange(step.shape[-1]) < channels, step, 0)
        return strong + step  # exactly `strong` at scale 1

    return guided


def classifier_free(
    denoise: DenoiseFn, null_label: int, guidance_scale, interval=None, channels=None
) -> DenoiseFn:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    `autoguidance` whose weak denoiser is the same model with the null label (num_classes).
    """
    weak = unconditional(denoise, null_label)
    return autoguidance(denoise, weak, guidance_scale, interval, channels)


def unconditional(denoise: DenoiseFn, null_label: int) -> DenoiseFn:
    """The denoiser at the null label, whatever label it is shown."""
    return lambda x, sigma, condition: denoise(x, sigma, with_label(condition, null_label))
