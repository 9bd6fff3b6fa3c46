"""Exponential moving averages of weights: the half-life of EDM and the power functions of EDM2.

Each track has a decay beta(step) and the update ema <- beta ema + (1 - beta) params.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from mclr_jax.schema import Keys, key

Decay = Callable[[jnp.ndarray], jnp.ndarray]  # number of updates done () -> beta ()


def halflife(halflife_steps: float, ramp_up: float = 0.05) -> Decay:
    """EMA in which the weight of old parameters halves every `halflife_steps`.

    With ramp_up > 0 the half-life is at most `ramp_up` times the number of updates, so that the
    random initialisation loses its weight early (Karras et al. 2022, Table 7).
    """

    def decay(step):
        step = jnp.asarray(step, jnp.float32)
        half = jnp.minimum(halflife_steps, step * ramp_up) if ramp_up else halflife_steps
        return 0.5 ** (1 / jnp.maximum(half, 1e-8))

    return decay


def power_exponent(std: float | np.ndarray) -> np.ndarray:
    """Exponents gamma of the profiles t^gamma of relative widths `std` (sigma_rel); float64.

    The positive root of std^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al. 2024,
    arXiv 2312.02696, eq. 126). Raises ValueError unless 0 < std < 0.2886..., the width of the flat
    profile.
    """
    std = np.asarray(std, np.float64)
    if not np.all((std > 0) & (std < 12**-0.5)):
        raise ValueError(f"Relative EMA width is {std}; expected 0 < std < {12**-0.5:.4f}.")
    roots = [np.roots([1, 7, 16 - s**-2, 12 - s**-2]).real.max() for s in std.reshape(-1)]
    return np.reshape(roots, std.shape)


def power(std: float) -> Decay:
    """Power-function EMA of relative width `std`: beta = (1 - 1/t)^(gamma + 1), t = 1, 2, ...

    Source: Karras et al. 2024, arXiv 2312.02696, eq. 127.
    """
    exponent = float(power_exponent(std))
    return lambda step: (1 - 1 / (jnp.asarray(step, jnp.float32) + 1)) ** (exponent + 1)


@dataclasses.dataclass(frozen=True)
class EMA(Keys, where="config.ema"):
    """The tracks of a training: `halflife`, if its steps are not 0, then `power_STD`."""

    halflife_steps: float = key(1000.0, 0.0, 1e9, says="0 for none")
    ramp_up: float = key(0.05, 0.0, 1.0, says="the half-life's largest share of the steps done")
    power_stds: tuple[float, ...] = key(
        (), 0.0, 12**-0.5, "()", says="relative widths of power-function averages, as 0.05,0.1"
    )
    snapshot_every: int = key(0, 0, says="store them for post-hoc reconstruction; 0 for never")

    @property
    def tracks(self) -> dict[str, Decay]:
        """The decay of each track by its name."""
        classic = {"halflife": halflife(self.halflife_steps, self.ramp_up)}
        powers = {f"power_{std}": power(std) for std in self.power_stds}
        return (classic if self.halflife_steps else {}) | powers


def posthoc_coefficients(in_steps, in_stds, out_step: float, out_std: float) -> np.ndarray:
    """Weights (n,) float64 with which stored averages approximate an average of another width.

    The weights sum to one and fit the profile by least squares (Karras et al. 2024, arXiv
    2312.02696, Algorithm 3).

    Args:
      in_steps, in_stds: (n,) steps and relative widths of the stored averages.
      out_step, out_std: last step and relative width of the wanted profile.
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
