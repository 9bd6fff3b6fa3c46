"""The truth for data assimilation: Lorenz-63, three protocols, a particle filter and smoothers.

Nothing of the package computes here, so that its models can be judged by it. All is in units of the
state. System: x_{k+1} = RK4(x_k) + sqrt(.025) n, dt = .025, 10 / 28 / (8/3); standardised
z = (x - (0, 0, 25)) / (8, 9, 8.6). Protocols, 64 trajectories in each of two sets:
  flowdas  15 frames, the first known; frames 2 to 15: y = arctan(z_1) + .25 n
           (FlowDAS, Chen et al. 2025, table 1)
  lo       65 frames, the first unknown; frames 1, 9, ..., 65: y = x_1 + .4 n
  hi       65 frames, the first unknown; every frame:          y = x_1 + 2 n
           (SDA, Rozet and Louppe 2023: .05 and .25 in units of z, 8 times that in x)
"""

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MEAN, STD = np.array([0.0, 0.0, 25.0]), np.array([8.0, 9.0, 8.6])
TIME_STEP = 0.025
SETS = {"validation": 1, "test": 2}


def rk4(x: jax.Array) -> jax.Array:
    """One step of Lorenz-63, (..., 3) to (..., 3)."""

    def slope(x):
        a, b, c = x[..., 0], x[..., 1], x[..., 2]
        return jnp.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c], -1)

    k1 = slope(x)
    k2 = slope(x + TIME_STEP / 2 * k1)
    k3 = slope(x + TIME_STEP / 2 * k2)
    k4 = slope(x + TIME_STEP * k3)
    return x + TIME_STEP / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


@dataclasses.dataclass(frozen=True)
class System:
    """x_{k+1} = step(x_k) + process_std n; y_k = observe(x_k) + observation_std n, (..., m)."""

    step: Callable = rk4
    process_std: float = TIME_STEP**0.5
    observe: Callable = lambda x: x[..., :1]
    observation_std: float = 1.0

    def log_likelihood(self, values: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y | x), (..., m) and (..., d) to (...); NaN in y is no observation."""
        std, difference = self.observation_std, values - self.observe(x)
        terms = -0.5 * (difference / std) ** 2 - 0.5 * jnp.log(2 * jnp.pi * std**2)
        return jnp.where(jnp.isnan(values), 0, terms).sum(-1)

    def move(self, x: jax.Array, key: jax.Array) -> jax.Array:
        """States (..., d) one step later."""
        return self.step(x) + self.process_std * jax.random.normal(key, x.shape)

    def trajectories(self, key: jax.Array, x: jax.Array, frames: int) -> jax.Array:
        """Continue the states x (n, d), which are the first frame: (n, frames, d)."""
        keys = jax.random.split(key, frames)
        return jnp.moveaxis(jax.lax.scan(lambda x, k: (self.move(x, k), x), x, keys)[1], 0, 1)


def attractor(key: jax.Array, n: int) -> jax.Array:
    """Independent states of the stationary law: 20 units of time after a normal draw."""
    keys = jax.random.split(key)
    start = MEAN + STD * jax.random.normal(keys[0], (n, 3))
    steps = jax.random.split(keys[1], 800)
    return jax.lax.scan(lambda x, key: (System().move(x, key), None), start, steps)[0]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is observed, when, and how it is written into the file of observations."""

    system: System
    operator: dict
    frames: int = 65
    every: int = 1
    known: bool = False

    def draw(self, seed: int, n: int = 64) -> tuple[jax.Array, jax.Array]:
        """Truth (n, frames, 3) and observations (n, frames, 1), NaN where there is none."""
        keys = jax.random.split(jax.random.key(seed), 3)
        truth = self.system.trajectories(keys[0], attractor(keys[1], n), self.frames)
        values = self.system.observe(truth)
        values += self.system.observation_std * jax.random.normal(keys[2], values.shape)
        frame = jnp.arange(self.frames)[:, None]
        seen = (frame % self.every == 0) & ~(self.known & (frame == 0))
        return truth, jnp.where(seen, values, jnp.nan)


FIRST = {"H": np.eye(3)[:1]}
ARCTAN = {"name": "select", "indices": [0], "function": "arctan", "offset": 0.0, "scale": 8.0}
PROTOCOLS = {
    "flowdas": Protocol(
        System(observe=lambda x: jnp.arctan(x[..., :1] / 8), observation_std=0.25),
        {"operator_json": json.dumps(ARCTAN)}, frames=15, known=True),
    "lo": Protocol(System(observation_std=0.4), FIRST, every=8),
    "hi": Protocol(System(observation_std=2.0), FIRST),
}  # fmt: skip


class History(NamedTuple):
    """Particles (T, N, d), their log weights (T, N), normalised, and ancestors (T, N) in T - 1."""

    particles: jax.Array
    log_weights: jax.Array
    ancestors: jax.Array


def systematic(key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Indices (N,), each i about N w_i times: one uniform number shifts the whole comb."""
    n = log_weights.shape[0]
    ends = jnp.cumsum(jnp.exp(log_weights))
    comb = (jnp.arange(n) + jax.random.uniform(key)) / n * ends[-1]
    return jnp.clip(jnp.searchsorted(ends, comb), 0, n - 1)


def particle_filter(system: System, values: jax.Array, particles: jax.Array, key: Any) -> History:
    """Bootstrap filter: particles (N, d) of the first frame's prior, observations (T, m).

    They are resampled before a step where the effective number is below N / 2.
    """
    n = particles.shape[0]

    def weigh(log_weights, value, particles):
        log_weights = log_weights + system.log_likelihood(value, particles)
        return log_weights - jax.nn.logsumexp(log_weights)

    def move(carry, inputs):
        (particles, log_weights), (value, key) = carry, inputs
        keys = jax.random.split(key)
        few = jnp.exp(jax.nn.logsumexp(2 * log_weights)) > 2 / n
        ancestors = jnp.where(few, systematic(keys[0], log_weights), jnp.arange(n))
        log_weights = jnp.where(few, -jnp.log(n), log_weights)
        particles = system.move(particles[ancestors], keys[1])
        log_weights = weigh(log_weights, value, particles)
        return (particles, log_weights), History(particles, log_weights, ancestors)

    even = jnp.full(n, -jnp.log(n))
    first = History(particles, weigh(even, values[0], particles), jnp.arange(n))
    keys = jax.random.split(key, len(values) - 1)
    _, later = jax.lax.scan(move, (particles, first.log_weights), (values[1:], keys))
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)


def fixed_lag(history: History, lag: int, key: jax.Array, members: int) -> tuple[jax.Array, ...]:
    """Frame k given the observations up to k + lag: mean and std (T, d), members (T, E, d)."""
    frames, n, _ = history.particles.shape
    same = jnp.broadcast_to(jnp.arange(n), (lag, n))
    ancestors = jnp.concatenate([history.ancestors, same])

    def back(index, j):  # from frame k + j to k + j - 1, for every k; (T, N)
        step = jax.lax.dynamic_slice_in_dim(ancestors, j, frames)
        return jnp.take_along_axis(step, index, 1), None

    index = jnp.broadcast_to(jnp.arange(n), (frames, n))
    index, _ = jax.lax.scan(back, index, jnp.arange(lag, 0, -1))
    last = jnp.minimum(jnp.arange(frames) + lag, frames - 1)
    weights = jnp.exp(history.log_weights[last])[..., None]
    x = jnp.take_along_axis(history.particles, index[..., None], 1)
    mean = (weights * x).sum(1)
    std = jnp.sqrt((weights * (x - mean[:, None]) ** 2).sum(1))
    some = functools.partial(draw, count=members)
    chosen = jax.vmap(some)(jax.random.split(key, frames), weights[..., 0])
    return mean, std, jnp.take_along_axis(x, chosen[..., None], 1)


def draw(key: jax.Array, weights: jax.Array, count: int) -> jax.Array:
    """Independent indices (count,) by weights (N,) that need not be normalised."""
    ends = jnp.cumsum(weights)
    return jnp.searchsorted(ends, ends[-1] * jax.random.uniform(key, (count,)))


def backward_simulation(system: System, history: History, key: Any, members: int) -> jax.Array:
    """Joint trajectories (T, E, d) given all observations (Godsill et al. 2004)."""

    def back(later, inputs):
        particles, log_weights, key = inputs
        # log N(later; step(particle), process_std^2), up to what all particles share
        centre = later.mean(0)  # keeps the squares small: float32
        ahead = (system.step(particles) - centre) / system.process_std
        shift = log_weights - 0.5 * (ahead**2).sum(-1)
        logits = (later - centre) / system.process_std @ ahead.T + shift  # (E, N)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        keys = jax.random.split(key, members)
        index = jax.vmap(functools.partial(draw, count=1))(keys, weights)[:, 0]
        return particles[index], particles[index]

    keys = jax.random.split(key, len(history.particles))
    last = history.particles[-1][draw(keys[-1], jnp.exp(history.log_weights[-1]), members)]
    inputs = (history.particles[:-1], history.log_weights[:-1], keys[:-1])
    _, x = jax.lax.scan(back, last, inputs, reverse=True)
    return jnp.concatenate([x, last[None]])
