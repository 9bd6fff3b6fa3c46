"""Training distributions and sampling grids of noise levels; noise from one key per example.

`sigma` is a standard deviation in the unit of the data: x_sigma = x0 + sigma * n, n ~ N(0, I).
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from mclr_jax.denoiser import V
from mclr_jax.schema import Keys, in_range, key

SIGMA_RANGE = 1e-9, 1e9  # a float32 holds their squares


class NoiseLevels(Protocol):
    """A training distribution of noise levels."""

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        """The levels of one example: shape (), or (F,) with one level for each frame."""


@dataclasses.dataclass(frozen=True)
class LogNormal(Keys, where="config.noise"):
    """ln sigma ~ N(mean, std^2); the training distribution of EDM (Karras et al. 2022, Table 1)."""

    mean: float = key(-1.2, -20.0, 20.0, says="of ln sigma")
    std: float = key(1.2, 0.0, 10.0, says="of ln sigma")

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        return jnp.exp(self.mean + self.std * jax.random.normal(key, shape))


@dataclasses.dataclass(frozen=True)
class LogUniform(Keys, where="config.noise"):
    """ln sigma uniform between ln sigma_min and ln sigma_max."""

    sigma_min: float = key(0.002, *SIGMA_RANGE, says="lowest level")
    sigma_max: float = key(80.0, *SIGMA_RANGE, says="highest level")

    def __post_init__(self):
        super().__post_init__()
        in_range("config.noise.sigma_max", self.sigma_max, float(self.sigma_min), SIGMA_RANGE[1])

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        low, high = np.log(self.sigma_min), np.log(self.sigma_max)
        return jnp.exp(low + (high - low) * jax.random.uniform(key, shape))


@dataclasses.dataclass(frozen=True)
class Forcing(LogUniform):
    """Levels of the frames of a trajectory in the patterns of sampling, each with its share.

    `shared`: one level for all frames, as in joint denoising. `independent`: one for each frame.
    `prefix`: the frames up to a random one have a lower level, which is sigma_min for half of the
    examples; the others have one level, or levels that rise with the frame. A share `short` of them
    are short records, whose first frames are known: log-uniform many frames at sigma_min, those of
    the record at one level, and the others, which do not exist, at sigma_max. `segments`: three
    parts of random lengths, each with one level.

    A level is a quantile of one distribution on [sigma_min, sigma_max]: log-uniform for std = 0,
    else log-normal. Quantiles are uniform, and rise linearly where levels rise.
    """

    sigma_min: float = key(0.004, *SIGMA_RANGE, says="lowest level")
    sigma_max: float = key(20.0, *SIGMA_RANGE, says="highest level")
    shared: float = key(0.35, 0.0, 1.0, says="share with one level for all frames")
    independent: float = key(0.15, 0.0, 1.0, says="share with a level of its own for each frame")
    prefix: float = key(0.25, 0.0, 1.0, says="share with a lower level in the first frames")
    segments: float = key(0.25, 0.0, 1.0, says="share with three parts")
    short: float = key(0.0, 0.0, 1.0, says="share, of `prefix`, of short records")
    mean: float = key(-1.0, -20.0, 20.0, says="of ln sigma, if std > 0")
    std: float = key(0.0, 0.0, 10.0, says="of ln sigma; 0: log-uniform")

    def __post_init__(self):
        super().__post_init__()
        names = ("shared", "independent", "prefix", "segments")
        if abs(excess := sum(getattr(self, name) for name in names) - 1) > 1e-6:
            raise ValueError(
                f"The sum of noise.{' + '.join(names)} is {1 + excess:g}; expected 1: they are the "
                "shares of the patterns."
            )

    def quantile(self, u: jax.Array) -> jax.Array:
        """The noise level (...) below which the share u (...) of the distribution lies."""
        low, high = np.log(self.sigma_min), np.log(self.sigma_max)
        if not self.std:
            return jnp.exp(low + (high - low) * u)
        scores = ((end - self.mean) / self.std for end in (low, high))
        below, above = ((1 + math.erf(score / 2**0.5)) / 2 for score in scores)
        return jnp.exp(self.mean + self.std * ndtri(below + (above - below) * u))

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        k_kind, k_own, k_place, k_options = jax.random.split(key, 4)
        own = jax.random.uniform(k_own, shape)
        if not shape:
            return self.quantile(own)
        (frames,) = shape
        first, second, third = jax.random.uniform(k_options, (3,))
        # first frames of the parts
        places = jax.random.randint(k_place, (2,), 1, max(frames, 2))
        frame = jnp.arange(frames)

        low, high = jnp.minimum(first, second), jnp.maximum(first, second)
        start, rises = places[0], own[0] < 0.5
        tail = low + (high - low) * (frame - start) / jnp.maximum(frames - 1 - start, 1)
        before = jnp.where(own[-1] < 0.5, 0, third * jnp.where(rises, low, high))
        prefix = jnp.where(frame < start, before, jnp.where(rises, tail, high))
        if self.short:
            known = jnp.floor(jnp.exp(second * math.log(max(frames, 2))))
            ends = known + 1 + jnp.floor(third * (frames - known))
            record = jnp.where(frame < known, 0, jnp.where(frame < ends, first, 1))
            prefix = jnp.where(own[frames // 2] < self.short, record, prefix)

        parts = (frame[:, None] >= places).sum(-1)
        segments = jnp.stack([first, second, third])[parts]

        shares = np.cumsum([self.shared, self.independent, self.prefix])
        kind = (jax.random.uniform(k_kind) >= shares).sum()
        patterns = jnp.stack([jnp.full(shape, first), own, prefix, segments])
        return self.quantile(patterns[kind])


@dataclasses.dataclass(frozen=True)
class CausalForcing(Keys, where="config.noise"):
    """Causality-aware levels of diffusion forcing for data assimilation (arXiv 2605.14285).

    Levels are those of the preconditioning `v` at its steps. With probability 1 - rho the steps of
    all frames are independent and uniform. Otherwise those of the first n ~ U{1, ..., context}
    frames are, and frame j = 0, 1, ... of the others has the level clip(stages + j - m, 0, stages)
    of a pyramid with m ~ U{0, ..., stages + frames - n - 1}. Level k is step k steps / stages - 1,
    and level 0, clean data, the lowest step: the loss has no finite weight for data without noise.
    """

    rho: float = key(0.25, 0.0, 1.0, says="probability of a pyramid")
    stages: int = key(100, 1, says="levels of the pyramid")
    context: int = key(0, 0, says="largest number of first frames; 0: all but one")

    def steps(self, key: jax.Array, frames: int) -> jax.Array:
        """The steps (frames,) of one example, -1 for clean data."""
        k_kind, k_own, k_context, k_stage = jax.random.split(key, 4)
        count = len(V().table)
        own = jax.random.randint(k_own, (frames,), 0, count)
        context = jax.random.randint(k_context, (), 1, 1 + (self.context or max(frames - 1, 1)))
        moved = jax.random.randint(k_stage, (), 0, self.stages + frames - context)
        frame = jnp.arange(frames) - context
        level = jnp.clip(self.stages + frame - moved, 0, self.stages)
        pyramid = jnp.round(level * (count / self.stages)).astype(own.dtype) - 1
        is_pyramid = jax.random.uniform(k_kind) < self.rho
        return jnp.where(is_pyramid & (frame >= 0), pyramid, own)

    def sample(self, key: jax.Array, shape: tuple[int, ...] = ()) -> jax.Array:
        (frames,) = shape or (1,)
        steps = jnp.maximum(self.steps(key, frames), 0)
        return jnp.asarray(V().table, jnp.float32)[steps].reshape(shape)


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


def step_noise(keys: jax.Array, number: jax.Array | int, x: jax.Array) -> jax.Array:
    """The noise of a sampler's call of this number, as `normal_like`."""
    return normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x)
