"""Training distributions and sampling grids of noise levels; noise from one key per example.

`sigma` is a standard deviation in the unit of the data: x_sigma = x0 + sigma * n, n ~ N(0, I).
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.names import in_range

LEVELS = 1e-9, 1e9  # a float32 holds their squares


class NoiseLevels(Protocol):
    """A training distribution of noise levels."""

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """Independent levels of one example: shape (), or (F,) with one level for each frame."""


@dataclasses.dataclass(frozen=True)
class LogNormal:
    """ln sigma ~ N(mean, std^2); the training distribution of EDM (Karras et al. 2022, Table 1)."""

    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        in_range("noise.mean", self.mean, -20.0, 20.0)
        in_range("noise.std", self.std, 0.0, 10.0)

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        return jnp.exp(self.mean + self.std * jax.random.normal(key, shape))


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """ln sigma uniform between ln sigma_min and ln sigma_max."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self):
        in_range("noise.sigma_min", self.sigma_min, *LEVELS)
        in_range("noise.sigma_max", self.sigma_max, float(self.sigma_min), LEVELS[1])

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        low, high = np.log(self.sigma_min), np.log(self.sigma_max)
        return jnp.exp(low + (high - low) * jax.random.uniform(key, shape))


def rho_grid(
    num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """Sampling grid (num_steps + 1,) float64 that falls from sigma_max to sigma_min, then to 0.

    sigma_i = (sigma_max^(1/rho) + i/(N-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
    (Karras et al. 2022, eq. 5). With one step the grid is (sigma_max, 0). Raises ValueError unless
    num_steps >= 1, 0 < sigma_min < sigma_max and rho > 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a sampling grid needs at least 1.")
    if not 0 < sigma_min < sigma_max < np.inf or not 0 < rho < np.inf:
        raise ValueError(
            f"Got sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}; "
            "expected 0 < sigma_min < sigma_max and rho > 0, all finite."
        )
    roots = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps)
    return np.append(roots**rho, 0.0)


def sample_keys(seed, indices) -> jax.Array:
    """Keys (n,) of the samples numbered `indices` (n,): sample i depends only on (seed, i)."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))


def split(keys: jax.Array, count: int) -> jax.Array:
    """`count` new keys from each of (B,) keys: (count, B)."""
    return jax.vmap(lambda key: jax.random.split(key, count), out_axes=1)(keys)


def normal_like(keys: jax.Array, x: jax.Array) -> jax.Array:
    """Standard normal noise of the shape and type of x (B, ...); example i uses only keys[i]."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
