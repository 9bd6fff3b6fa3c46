"""Guidance: transforms DenoiseFn -> DenoiseFn, which compose.

Convention: guided = weak + guidance_scale * (strong - weak); guidance_scale = 1 is none. Scales and
intervals may be traced arrays: changing them does not recompile, and a scale of 1, or a noise level
outside the interval, costs no call of the weak denoiser.
"""

import jax
import jax.numpy as jnp

from mclr_jax.types import DenoiseFn, expand, with_label


def autoguidance(denoise: DenoiseFn, weak: DenoiseFn, guidance_scale, interval=None) -> DenoiseFn:
    """Extrapolate from a weak denoiser through `denoise` (Karras et al. 2024, arXiv 2406.02507).

    Args:
      denoise: the model to be guided.
      weak: a denoiser of the same data with worse conditioning, capacity or training.
      guidance_scale: () or (B,); 1 returns `denoise`, 0 returns `weak`.
      interval: (low, high): guide only where low < sigma <= high (Kynkaanniemi et al. 2024,
        arXiv 2404.07724), frame by frame where frames have levels of their own; None guides at
        every noise level.
    """

    def guided(x, sigma, condition):
        strong = denoise(x, sigma, condition)
        scale = jnp.asarray(guidance_scale, x.dtype)
        if interval is not None:
            low, high = interval
            scale = jnp.where((low < sigma) & (sigma <= high), expand(scale, sigma), 1)
        # Under cond the weak call is skipped at run time wherever no example is guided.
        weak_output = jax.lax.cond(
            jnp.any(scale != 1), lambda: weak(x, sigma, condition), lambda: strong
        )
        # This form returns `strong` to the last bit where the scale is 1.
        return strong + (expand(scale, x) - 1) * (strong - weak_output)

    return guided


def classifier_free(
    denoise: DenoiseFn, null_label: int, guidance_scale, interval=None
) -> DenoiseFn:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): autoguidance whose weak
    denoiser is the same model under the null label (= num_classes).

    Arguments and convention as in `autoguidance`; gamma = guidance_scale - 1 elsewhere.
    """

    def unconditional(x, sigma, condition):
        return denoise(x, sigma, with_label(condition, null_label))

    return autoguidance(denoise, unconditional, guidance_scale, interval)
