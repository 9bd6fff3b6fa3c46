"""Preconditioning: turns the raw output of a network into a denoiser.

    D(x, sigma, condition) = c_skip x + c_out F(c_in x, c_noise, condition)

Each published convention is a frozen dataclass with `scales(sigma)`, the four factors, and
`sigma_range`, the noise levels that sampling may use. Code that calls a `DenoiseFn` does not depend
on the convention. With the natural loss weight 1 / c_out^2 the loss is |F - F_exact|^2.
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.schema import Keys, key
from mclr_jax.types import Condition, DenoiseFn, MomentsFn, as_condition, expand

# (x (B, ...), c_noise (B,) or (B, F), condition) -> raw output (B, ...)
NetworkFn = Callable[[jax.Array, jax.Array, Condition], jax.Array]


class Scales(NamedTuple):
    """The factors of a preconditioning at noise levels sigma, each of the shape of sigma."""

    c_in: jax.Array
    c_skip: jax.Array
    c_out: jax.Array
    c_noise: jax.Array


class Preconditioning(Protocol):
    """The interface of all conventions; frozen dataclasses, which compare and hash by value."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Lowest and highest noise level of the training."""

    def scales(self, sigma: jax.Array) -> Scales: ...


@dataclasses.dataclass(frozen=True)
class EDM(Keys, where="config.preconditioning"):
    """Karras et al. 2022 (arXiv 2206.00364), Table 1: c_noise = ln(sigma) / 4.

    Natural weight (sigma^2 + sigma_data^2) / (sigma sigma_data)^2.
    """

    sigma_data: float = key(0.5, 1e-9, 1e9, says="standard deviation of the data")

    sigma_range = (0.0, float("inf"))

    def scales(self, sigma: jax.Array) -> Scales:
        total = sigma**2 + self.sigma_data**2
        root = jnp.sqrt(total)
        return Scales(
            1 / root, self.sigma_data**2 / total, sigma * self.sigma_data / root, jnp.log(sigma) / 4
        )


class Path(NamedTuple):
    """A path x_u = a x0 + s n from data, u = 0, to noise, u = 1, with a^power + s^power = 1.

    The network's factors follow from the level sigma = s / a, the coefficients of `flow` from u.
    With `pace`, 1 / (a ds/du - s da/du), the derivatives are da = -s^(power - 1) / pace and
    ds = a^(power - 1) / pace.
    """

    power: int
    at: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # u -> a, s in float64
    time: Callable[[jax.Array], jax.Array]  # sigma -> u
    pace: Callable[[Any, Any, Any], Any]  # u, a, s -> pace


def _vp_at(u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a = np.exp(-4.975 * u**2 - 0.05 * u)
    return a, np.sqrt(1 - a**2)


def _vp_time(sigma: jax.Array) -> jax.Array:
    depth = jnp.log1p(sigma**2) / 2  # -ln a, whose slope is .05 + 9.95 u
    return 2 * depth / (0.05 + jnp.sqrt(0.05**2 + 2 * 9.95 * depth))


PATHS = {
    "linear": Path(1, lambda u: (1 - u, u), lambda sigma: sigma / (1 + sigma), lambda u, a, s: 1.0),
    "cosine": Path(
        2, lambda u: (np.cos(np.pi / 2 * u), np.sin(np.pi / 2 * u)),
        lambda sigma: 2 / np.pi * jnp.arctan(sigma), lambda u, a, s: 2 / np.pi,
    ),
    "vp": Path(2, _vp_at, _vp_time, lambda u, a, s: s / (a * (0.05 + 9.95 * u))),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Velocity(Keys, where="config.preconditioning"):
    """Flow matching, x_u = a x0 + s n with sigma = s / a, for u from 0 (data) to 1 (noise).

    The path is linear (a = 1 - u, s = u), cosine (cos and sin of pi u / 2; SiT's GVP) or vp (SiT's
    VP: ln a = -4.975 u^2 - .05 u, a^2 + s^2 = 1). With data_at = 1 the network gets 1 - u and
    gives the velocity towards the data (SiT, Ma et al. 2024, arXiv 2401.08740); with data_at = 0 it
    gets u and gives the velocity towards the noise, n - x0 on the linear path (REPA, Yu et al.
    2024, arXiv 2410.06940). SiT's other predictions are the noise n and the score, -n / s. Natural
    weight ((1 + sigma) / sigma)^2 on the linear path. Sampling starts at a finite level (1e4).
    """

    data_at: int = key(1, words=(0, 1), says="time of the data: 1 of SiT, 0 of REPA")
    path: str = key("linear", words=PATHS, says="between data and noise")
    prediction: str = key("velocity", words=("velocity", "noise", "score"), says="of the network")

    sigma_range = (0.0, float("inf"))

    def scales(self, sigma: jax.Array) -> Scales:
        power, _, time, pace = PATHS[self.path]
        norm, u = 1 + sigma if power == 1 else jnp.sqrt(1 + sigma**2), time(sigma)
        data, noise = 1 / norm, sigma / norm  # a and s
        times = u, data if power == 1 else 1 - u  # a is the more exact form of 1 - u
        skip, out = data**power, noise * pace(u, data, noise)
        if self.prediction != "velocity":
            skip, out = jnp.ones_like(sigma), sigma
            out = -noise * out if self.prediction == "score" else out
        towards_data = self.data_at and self.prediction == "velocity"
        return Scales(data, skip, out if towards_data else -out, times[self.data_at])


def _of_noise(sigma: jax.Array, clock: jax.Array) -> Scales:
    """The factors of a network that gives the noise of a variance-preserving process."""
    return Scales(1 / jnp.sqrt(1 + sigma**2), jnp.ones_like(sigma), -sigma, clock)


class _Discrete(Keys, abc.ABC, where="config.preconditioning"):
    """A variance-preserving process in discrete steps, with ab the product of the alphas so far.

    c_in x is x_t = sqrt(ab) x0 + sqrt(1 - ab) n for sigma = sqrt(1 / ab - 1).
    """

    @property
    @abc.abstractmethod
    def alphas(self) -> np.ndarray:
        """1 - beta of each step, (steps,) float64."""

    steps: int

    def __post_init__(self):
        super().__post_init__()
        with np.errstate(all="ignore"):
            levels = self.table
        if not (np.isfinite(levels).all() and 0 < levels[0] and np.all(np.diff(levels) > 0)):
            raise ValueError(
                f"{self.where}: {self} has noise levels from {levels[0]:g} to "
                f"{levels[-1]:g}; expected finite levels above 0 that rise in every step."
            )

    @functools.cached_property
    def table(self) -> np.ndarray:
        """Noise level of each step, (steps,) float64."""
        return np.sqrt(1 / np.cumprod(self.alphas) - 1)

    @property
    def sigma_range(self) -> tuple[float, float]:
        return float(self.table[0]), float(self.table[-1])

    def _clock(self, sigma: jax.Array) -> jax.Array:
        """The step, 0 .. T - 1, with noise level sigma; interpolated in log sigma."""
        steps = jnp.arange(len(self.table), dtype=sigma.dtype)
        return jnp.interp(jnp.log(sigma), jnp.asarray(np.log(self.table), sigma.dtype), steps)


@dataclasses.dataclass(frozen=True)
class Epsilon(_Discrete):
    """The network gives the noise n, for betas that rise linearly (DDPM; the defaults are DiT's).

    Source: Ho et al. 2020 (arXiv 2006.11239). Natural weight 1 / sigma^2.
    """

    betas: tuple[float, float] = key(
        (1e-4, 0.02), 0.0, 1.0, ordered=True, says="of the first and of the last step"
    )
    steps: int = key(1000, 2, 1_000_000, says="of the process")

    @property
    def alphas(self) -> np.ndarray:
        return 1 - np.linspace(*self.betas, self.steps)

    def scales(self, sigma: jax.Array) -> Scales:
        return _of_noise(sigma, self._clock(sigma))


@dataclasses.dataclass(frozen=True)
class V(_Discrete):
    """The network gives v = sqrt(ab) n - sqrt(1 - ab) x0, for the sigmoid schedule.

    Sources: Salimans and Ho 2022 (arXiv 2202.00512) for v; Jabri et al. 2022 (arXiv 2212.11972) for
    the schedule, as in diffusion forcing (Chen et al. 2024, arXiv 2407.01392). Natural weight
    (1 + sigma^2) / sigma^2. ab(t) is sigmoid(-(start + (end - start) t) / tau) for 0 <= t <= 1,
    scaled to the range from 1 to 0.
    """

    start: float = key(-3.0, says="of the sigmoid")
    end: float = key(3.0, says="of the sigmoid")
    tau: float = key(1.0, 0.0, ends="(", says="temperature of the sigmoid")
    steps: int = key(1000, 2, 1_000_000, says="of the process")

    @property
    def alphas(self) -> np.ndarray:
        falling = 1 / (1 + np.exp(np.linspace(self.start, self.end, self.steps + 1) / self.tau))
        alpha_bar = (falling - falling[-1]) / (falling[0] - falling[-1])
        return np.maximum(alpha_bar[1:] / alpha_bar[:-1], 0.001)  # the last beta is at most 0.999

    def scales(self, sigma: jax.Array) -> Scales:
        total = 1 + sigma**2
        c_in = 1 / jnp.sqrt(total)
        return Scales(c_in, 1 / total, -sigma * c_in, self._clock(sigma))


@dataclasses.dataclass(frozen=True)
class VP(Keys, where="config.preconditioning"):
    """Song et al. 2021's variance-preserving process in time t (Karras et al. 2022, Table 1).

    The network gives the noise, and gets (steps - 1) t. Natural weight 1 / sigma^2.
    """

    beta_d: float = key(19.9, 0.0, 1e6, "(", says="growth of beta over the process")
    beta_min: float = key(0.1, 0.0, 1e6, says="beta at its start")
    steps: int = key(1000, 2, 1_000_000, says="of the process from which the clock is taken")
    first: float = key(1e-5, 0.0, 1.0, "()", says="lowest t of the training")

    @property
    def sigma_range(self) -> tuple[float, float]:
        low, high = np.expm1([(self.beta_d / 2 * t + self.beta_min) * t for t in (self.first, 1.0)])
        return float(np.sqrt(low)), float(np.sqrt(high))

    def scales(self, sigma: jax.Array) -> Scales:
        total = self.beta_min**2 + 2 * self.beta_d * jnp.log(1 + sigma**2)
        time = (jnp.sqrt(total) - self.beta_min) / self.beta_d
        return _of_noise(sigma, (self.steps - 1) * time)


@dataclasses.dataclass(frozen=True)
class VE(Keys, where="config.preconditioning"):
    """Song et al. 2021's variance-exploding process (Karras et al. 2022, Table 1).

    The network gives x0 - x over sigma, and gets ln(sigma / 2). Natural weight 1 / sigma^2.
    """

    sigma_min: float = key(0.02, 0.0, 1e9, "(", says="lowest level of the training")
    sigma_max: float = key(100.0, 0.0, 1e9, "(", says="highest level of the training")

    @property
    def sigma_range(self) -> tuple[float, float]:
        return self.sigma_min, self.sigma_max

    def scales(self, sigma: jax.Array) -> Scales:
        one = jnp.ones_like(sigma)
        return Scales(one, one, sigma, jnp.log(sigma / 2))


@dataclasses.dataclass(frozen=True)
class IDDPM(_Discrete):
    """The network gives the noise, and gets the nearest step of a cosine schedule.

    Sources: Nichol and Dhariwal 2021 (arXiv 2102.09672); Karras et al. 2022, Table 1, whose step j
    is steps - 1 minus ours. Levels that are nearer to 0 than to the first step get the step -1.
    """

    offset: float = key(0.008, 0.0, 1.0, says="of the cosine, C_2")
    least_alpha: float = key(0.001, 0.0, 1.0, "()", says="of a step, C_1")
    steps: int = key(1000, 2, 1_000_000, says="of the process")

    @property
    def alphas(self) -> np.ndarray:
        place = np.arange(self.steps, -1, -1) / self.steps
        alpha_bar = np.sin(np.pi / 2 * place / (self.offset + 1)) ** 2
        return np.maximum(alpha_bar[1:] / alpha_bar[:-1], self.least_alpha)

    @property
    def _middles(self) -> np.ndarray:
        """The levels from which on a step is nearer than the one before it, or than 0."""
        return (np.append(0.0, self.table[:-1]) + self.table) / 2

    def rounded(self, sigma: np.ndarray) -> np.ndarray:
        """The nearest levels of the process, or 0: those that the official sampler visits."""
        return np.append(0.0, self.table)[np.searchsorted(self._middles, sigma)]

    def scales(self, sigma: jax.Array) -> Scales:
        step = jnp.searchsorted(jnp.asarray(self._middles, sigma.dtype), sigma) - 1
        return _of_noise(sigma, step.astype(sigma.dtype))


def denoiser(preconditioning: Preconditioning, network: NetworkFn) -> DenoiseFn:
    """The network as a `DenoiseFn`, computed in the type of x.

    Output channels beyond the number of channels of x (the variance of DiT) are dropped.
    """
    return lambda *inputs: _parts(preconditioning, network, *inputs)[0]


def with_range(preconditioning: Preconditioning, network: NetworkFn) -> DenoiseFn:
    """The denoiser, its answer followed by the second half of the network's output channels.

    That half is the place of a step's log variance between its ends, see `samplers.sample`.
    """
    return lambda *inputs: jnp.concatenate(_parts(preconditioning, network, *inputs)[:2], axis=-1)


def moments(preconditioning: Preconditioning, network: NetworkFn, learned: bool) -> MomentsFn:
    """The network as a `MomentsFn`, computed in the type of x: mean and variance of x0 given x.

    The variance is c_out^2 e^s for each coordinate. If it is `learned`, s is the second half of the
    output's channels, otherwise 0: the square error of a network that gives 0.
    """

    def mean_and_variance(x: jax.Array, sigma: jax.Array, condition: Any):
        mean, second, c_out = _parts(preconditioning, network, x, sigma, condition)
        return mean, c_out**2 * jnp.exp(second if learned else jnp.zeros_like(x))

    return mean_and_variance


def _parts(
    preconditioning: Preconditioning, network: NetworkFn, x: jax.Array, sigma: Any, condition: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The denoised x, the second half of the output's channels, and c_out with the axes of x."""
    sigma = jnp.broadcast_to(jnp.asarray(sigma, x.dtype), jnp.shape(sigma) or x.shape[:1])
    scales, channels = preconditioning.scales(sigma), x.shape[-1]
    condition = None if condition is None else as_condition(condition)
    raw = network(expand(scales.c_in, x) * x, scales.c_noise, condition)
    first, second = (raw[..., k * channels :][..., :channels].astype(x.dtype) for k in (0, 1))
    c_out = expand(scales.c_out, x)
    return expand(scales.c_skip, x) * x + c_out * first, second, c_out


def natural_weight(preconditioning: Preconditioning, sigma: jax.Array) -> jax.Array:
    """1 / c_out^2, of the shape of sigma: with it the loss is the square error of the network."""
    return 1 / preconditioning.scales(sigma).c_out ** 2


def fused_snr_weight(
    preconditioning: Preconditioning, sigma: jax.Array, clip: float = 5.0, decay: float = 0.96
) -> jax.Array:
    """The natural weight times the fused signal-to-noise weight of the levels sigma (B, F).

    With R = sigma^-2 / clip, S = min(R, 1) and c the average of S over earlier frames,
    c' = decay c + (1 - decay) S, the factor is clip F / (clip G + 1) for F = 1 - (1 - decay c)
    (1 - S) and G = 1 - (1 - decay c)(1 - R). The average starts as S of frame 0, where it is 0.

    Source: Chen et al. 2024 (arXiv 2407.01392), for v-prediction with frames in their order.
    Raises ValueError on one level for each example, which has no frames to look along.
    """
    if sigma.ndim < 2:
        raise ValueError(
            f"Noise levels have shape {sigma.shape}; weight 'fused_snr' needs a level for each "
            "frame, (B, F): use a network with per_frame, or config.weight = 'natural'."
        )
    ratio = 1 / (clip * sigma**2)
    clipped, frames = jnp.minimum(ratio, 1), np.arange(sigma.shape[-1])
    age = frames - 1 - frames[:, None]  # of frame j in the average that frame k uses: k - 1 - j
    share = np.where(age >= 0, decay ** np.maximum(age, 0), 0)
    share[1:] *= 1 - decay
    rest = 1 - decay * (clipped @ jnp.asarray(share, sigma.dtype))
    fused = clip * (1 - rest * (1 - clipped)) / (clip * (1 - rest * (1 - ratio)) + 1)
    return natural_weight(preconditioning, sigma) * fused
