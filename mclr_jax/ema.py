"""Exponential moving averages of weights: EDM's half-life, and EDM2's power functions.

Every track is a decay beta(step) and the update ema <- beta ema + (1 - beta) params.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

Decay = Callable[[jnp.ndarray], jnp.ndarray]  # number of steps taken before this one, () -> ()


def halflife(halflife_steps: float, ramp_up: float = 0.05) -> Decay:
    """Classic EMA whose memory halves every `halflife_steps`.

    Early on the half-life is at most `ramp_up` times the steps taken, so that the random
    initialisation is forgotten at once (EDM's training loop; Karras et al. 2022, Table 7);
    ramp_up = 0 switches that off.
    """

    def decay(step):
        step = jnp.asarray(step, jnp.float32)
        half = jnp.minimum(halflife_steps, step * ramp_up) if ramp_up else halflife_steps
        return 0.5 ** (1 / jnp.maximum(half, 1e-8))

    return decay


def power_exponent(std: float | np.ndarray) -> np.ndarray:
    """Exponent gamma of the power-function profile t^gamma of relative width `std` (sigma_rel).

    The positive root of std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))
    (Karras et al. 2024, arXiv 2312.02696, eq. 126). Shape as `std`, float64.

    Raises:
      ValueError: unless 0 < std < 0.2886..., the width of the flat profile.
    """
    std = np.asarray(std, np.float64)
    if not np.all((std > 0) & (std < 12**-0.5)):
        raise ValueError(f"Relative EMA width is {std}; expected 0 < std < {12**-0.5:.4f}.")
    roots = [np.roots([1, 7, 16 - s**-2, 12 - s**-2]).real.max() for s in std.reshape(-1)]
    return np.reshape(roots, std.shape)


def power(std: float) -> Decay:
    """Power-function EMA of relative width `std`: beta = (1 - 1/t)^(gamma + 1), t counts from 1.

    Source: Karras et al. 2024, arXiv 2312.02696, eq. 127.
    """
    exponent = float(power_exponent(std))
    return lambda step: (1 - 1 / (jnp.asarray(step, jnp.float32) + 1)) ** (exponent + 1)


def tracks(config) -> dict[str, Decay]:
    """The tracks that `config.ema` asks for, by name: `halflife` first, then `power_STD`."""
    result = {}
    if config.halflife_steps:
        result["halflife"] = halflife(config.halflife_steps, config.ramp_up)
    return result | {f"power_{std}": power(std) for std in config.power_stds}


def posthoc_coefficients(in_steps, in_stds, out_step: float, out_std: float) -> np.ndarray:
    """Weights (n,) of stored averages that best make the average of another width.

    Args:
      in_steps: (n,) steps at which the averages were stored.
      in_stds: (n,) their relative widths.
      out_step: step at which the wanted profile ends.
      out_std: its relative width.

    Returns:
      (n,) float64 weights that sum to one: the least-squares fit of the profile
      (Karras et al. 2024, arXiv 2312.02696, Algorithm 3).
    """
    steps, exponents = np.asarray(in_steps, np.float64), power_exponent(in_stds)

    def inner(t_a, gamma_a, t_b, gamma_b):
        """Integral of the product of two profiles (ibid., eq. 151)."""
        shorter = np.where(t_a < t_b, gamma_b, -gamma_a)
        numerator = (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** shorter
        return numerator / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))

    a = inner(steps[:, None], exponents[:, None], steps, exponents)
    b = inner(steps, exponents, float(out_step), power_exponent(out_std))
    weights = np.linalg.solve(a, b)
    return weights / weights.sum()
