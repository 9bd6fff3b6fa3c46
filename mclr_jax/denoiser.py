"""Preconditioning: how a network's raw output becomes a denoiser, for every published convention.

    D(x, sigma, condition) = c_skip x + c_out F(c_in x, c_noise, condition)

Each convention is a frozen dataclass with `scales(sigma)`, which gives the four factors, and
`levels`, the range of noise levels that sampling may use. Whoever has a `DenoiseFn` need not know
which it was. The natural loss weight 1 / c_out^2 makes the loss |F - F_exact|^2, the network's own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.types import Condition, DenoiseFn, as_condition, expand

# (x (B, ...), c_noise (B,) or (B, F), condition) -> raw output (B, ...)
NetworkFn = Callable[[jax.Array, jax.Array, Condition], jax.Array]


class Scales(NamedTuple):
    """The factors of a preconditioning at noise levels sigma; each has the shape of sigma."""

    c_in: jax.Array
    c_skip: jax.Array
    c_out: jax.Array
    c_noise: jax.Array


class Preconditioning(Protocol):
    """What `denoiser` needs; frozen dataclasses, so that they compare and hash by value."""

    @property
    def levels(self) -> tuple[float, float]:
        """Lowest and highest noise level that the network knows."""

    def scales(self, sigma: jax.Array) -> Scales: ...


@dataclasses.dataclass(frozen=True)
class EDM:
    """Karras et al. 2022 (arXiv 2206.00364), Table 1: c_noise = ln(sigma) / 4.

    Natural weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """

    sigma_data: float = 0.5

    levels = (0.0, float("inf"))

    def scales(self, sigma: jax.Array) -> Scales:
        total = sigma**2 + self.sigma_data**2
        root = jnp.sqrt(total)
        return Scales(
            1 / root, self.sigma_data**2 / total, sigma * self.sigma_data / root, jnp.log(sigma) / 4
        )


@dataclasses.dataclass(frozen=True)
class Velocity:
    """Linear flow matching, x_t = (1 - t) x0 + t n with sigma = t / (1 - t).

    With data_at = 1 the network sees 1 - t and gives x0 - n (SiT, Ma et al. 2024, arXiv
    2401.08740); with data_at = 0 it sees t and gives n - x0 (REPA, Yu et al. 2024, arXiv
    2410.06940). Natural weight ((1 + sigma) / sigma)^2. Sampling starts at a finite level (1e4).
    """

    data_at: int = 1

    levels = (0.0, float("inf"))

    def __post_init__(self):
        if self.data_at not in (0, 1):
            raise ValueError(f"data_at is {self.data_at}; expected 0 or 1, the time of the data.")

    def scales(self, sigma: jax.Array) -> Scales:
        data, noise = 1 / (1 + sigma), sigma / (1 + sigma)  # 1 - t and t
        c_out, clock = (noise, data) if self.data_at else (-noise, noise)
        return Scales(data, data, c_out, clock)


# Variance-preserving processes in discrete steps: x_t = sqrt(ab) x0 + sqrt(1 - ab) n is c_in x for
# sigma = sqrt(1 / ab - 1). `table` has the sigma of each step.


def _table(alpha_bar: np.ndarray) -> np.ndarray:
    return np.sqrt(1 / alpha_bar - 1)


def _clock(table: np.ndarray, sigma: jax.Array) -> jax.Array:
    """The step, 0 .. T - 1, whose noise level is sigma; between steps by its logarithm."""
    steps = jnp.arange(len(table), dtype=sigma.dtype)
    return jnp.interp(jnp.log(sigma), jnp.asarray(np.log(table), sigma.dtype), steps)


@dataclasses.dataclass(frozen=True)
class Epsilon:
    """The network gives the noise n, for betas that rise linearly (DDPM; DiT's, by default).

    Source: Ho et al. 2020 (arXiv 2006.11239). Natural weight 1 / sigma^2.

    Attributes:
      betas: of the first and the last step.
      steps: number of steps T.
    """

    betas: tuple[float, float] = (1e-4, 0.02)
    steps: int = 1000

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Noise level of each step, (steps,) float64."""
        return _table(np.cumprod(1 - np.linspace(*self.betas, self.steps)))

    @property
    def levels(self) -> tuple[float, float]:
        return float(self.table[0]), float(self.table[-1])

    def scales(self, sigma: jax.Array) -> Scales:
        c_in = 1 / jnp.sqrt(1 + sigma**2)
        return Scales(c_in, jnp.ones_like(sigma), -sigma, _clock(self.table, sigma))


@dataclasses.dataclass(frozen=True)
class V:
    """The network gives v = sqrt(ab) n - sqrt(1 - ab) x0, for the sigmoid schedule.

    Sources: Salimans and Ho 2022 (arXiv 2202.00512) for v; Jabri et al. 2022 (arXiv 2212.11972) for
    the schedule, which diffusion forcing takes (Chen et al. 2024, arXiv 2407.01392). Natural weight
    (1 + sigma^2) / sigma^2.

    Attributes:
      start, end, tau: ab(t) falls from 1 to 0 as sigmoid(-(start + (end - start) t) / tau) does.
      steps: number of steps T.
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0
    steps: int = 1000

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Noise level of each step, (steps,) float64; the last beta is at most 0.999."""
        times = (
            self.start + (self.end - self.start) * np.linspace(0, 1, self.steps + 1)
        ) / self.tau
        falling = 1 / (1 + np.exp(times))
        alpha_bar = (falling - falling[-1]) / (falling[0] - falling[-1])
        alphas = np.maximum(alpha_bar[1:] / alpha_bar[:-1], 0.001)
        return _table(np.cumprod(alphas))

    @property
    def levels(self) -> tuple[float, float]:
        return float(self.table[0]), float(self.table[-1])

    def scales(self, sigma: jax.Array) -> Scales:
        total = 1 + sigma**2
        c_in = 1 / jnp.sqrt(total)
        return Scales(c_in, 1 / total, -sigma * c_in, _clock(self.table, sigma))


def denoiser(preconditioning: Preconditioning, network: NetworkFn) -> DenoiseFn:
    """The network as a `DenoiseFn`, computed in x's type.

    Channels of the output beyond those of x (the variance of DiT) are left out.
    """

    def denoise(x: jax.Array, sigma: jax.Array, condition: Any) -> jax.Array:
        sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), jnp.shape(sigma) or x.shape[:1])
        scales = preconditioning.scales(sigma)
        raw = network(expand(scales.c_in, x) * x, scales.c_noise, as_condition(condition))
        raw = raw[..., : x.shape[-1]].astype(x.dtype)
        return expand(scales.c_skip, x) * x + expand(scales.c_out, x) * raw

    return denoise


def natural_weight(preconditioning: Preconditioning, sigma: jax.Array) -> jax.Array:
    """1 / c_out^2, the shape of sigma: the loss weight of the network's own square error."""
    return 1 / preconditioning.scales(sigma).c_out ** 2
