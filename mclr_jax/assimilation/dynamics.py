"""Dynamical systems whose states are assimilated.

A system is a frozen dataclass. Its states (..., *shape) are in its own units; a network sees
(state - offset) / scale, which has about zero mean and unit variance.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Dynamics:
    """x' = advance(x) + noise * n, n ~ N(0, I): the step from one frame to the next.

    Subclasses have these attributes; one with an `advance` of its own needs no `slope`.
    """

    time_step: float
    noise: float  # 0 for a deterministic system
    shape: tuple[int, ...]  # of a state
    offset: tuple[float, ...]  # of the last axis, as is `scale`
    scale: tuple[float, ...]
    spin_up_steps = 1000  # from `start` to the attractor
    slope: Callable[[jax.Array], jax.Array]  # state -> dx/dt, both (..., *shape)

    def advance(self, state: jax.Array) -> jax.Array:
        """The mean of the next state (..., *shape), by the classical method of order 4."""
        h = self.time_step
        a = self.slope(state)
        b = self.slope(state + h / 2 * a)
        c = self.slope(state + h / 2 * b)
        d = self.slope(state + h * c)
        return state + h / 6 * (a + 2 * b + 2 * c + d)

    def start(self, key: jax.Array) -> jax.Array:
        """A random state (*shape) from which the attractor is reached."""
        offset, scale = (jnp.asarray(x, jnp.float32) for x in (self.offset, self.scale))
        return offset + scale * jax.random.normal(key, self.shape)

    def step(self, key: jax.Array, state: jax.Array) -> jax.Array:
        """The next state (..., *shape); the noise of all its numbers comes from one key."""
        noise = jax.random.normal(key, state.shape, state.dtype) if self.noise else 0
        return self.advance(state) + self.noise * noise

    def spin_up(self, key: jax.Array) -> jax.Array:
        """A random state (*shape) on the attractor."""
        k_start, k_steps = jax.random.split(key)
        return self.trajectory(k_steps, self.start(k_start), self.spin_up_steps + 1)[-1]

    def trajectory(self, key: jax.Array, state: jax.Array, length: int) -> jax.Array:
        """States (length, ..., *shape), of which the first is the given one."""

        def body(state, number):
            return self.step(jax.random.fold_in(key, number), state), state

        return jax.lax.scan(body, state, jnp.arange(length))[1]


@dataclasses.dataclass(frozen=True)
class Lorenz63(Dynamics):
    """Lorenz's three variables at the chaotic parameters 10, 28, 8/3, with noise in each step.

    Units and noise are those of FlowDAS (Chen et al. 2025, arXiv 2501.16642).
    """

    time_step: float = 0.025
    noise: float = 0.025**0.5

    shape = (3,)
    offset, scale = (0.0, 0.0, 25.0), (8.0, 9.0, 8.6)

    def slope(self, state: jax.Array) -> jax.Array:
        x, y, z = jnp.moveaxis(state, -1, 0)
        return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)


@dataclasses.dataclass(frozen=True)
class Lorenz96(Dynamics):
    """Lorenz's 40 variables on a circle, with forcing 8."""

    time_step: float = 0.05
    noise: float = 0.0
    forcing: float = 8.0

    shape = (40,)
    offset, scale = (2.34,) * 40, (3.64,) * 40

    def slope(self, state: jax.Array) -> jax.Array:
        shift = functools.partial(jnp.roll, state, axis=-1)
        return (shift(-1) - shift(2)) * shift(1) - state + self.forcing


class ExponentialStep:
    """One step h of du/dt = linear * u + nonlinear(u), of order 4 and exact for the linear part.

    ETDRK4 of Cox and Matthews 2002, its coefficients by the contour integrals of Kassam and
    Trefethen 2005 (section 3), in float64.
    """

    def __init__(self, linear: np.ndarray, h: float):
        z = h * linear[..., None] + np.exp(1j * np.pi * (np.arange(1, 33) - 0.5) / 32)
        e = np.exp(z)

        def mean(values: np.ndarray) -> np.ndarray:
            return (h * values.mean(-1).real).astype(np.float32)

        self.whole, self.half = (np.exp(s * linear).astype(np.float32) for s in (h, h / 2))
        self.q = mean((np.exp(z / 2) - 1) / z)
        self.f1 = mean((-4 - z + e * (4 - 3 * z + z**2)) / z**3)
        self.f2 = mean((2 + z + e * (-2 + z)) / z**3)
        self.f3 = mean((-4 - 3 * z - z**2 + e * (4 - z)) / z**3)

    def __call__(self, u: jax.Array, nonlinear: Callable[[jax.Array], jax.Array]) -> jax.Array:
        n_u = nonlinear(u)
        a = self.half * u + self.q * n_u
        n_a = nonlinear(a)
        n_b = nonlinear(self.half * u + self.q * n_a)
        n_c = nonlinear(self.half * a + self.q * (2 * n_b - n_u))
        return self.whole * u + self.f1 * n_u + 2 * self.f2 * (n_a + n_b) + self.f3 * n_c


@dataclasses.dataclass(frozen=True)
class KuramotoSivashinsky(Dynamics):
    """u_t = -u u_x - u_xx - u_xxxx on a circle of length 32 pi, in 128 points.

    A time step is two steps of order 4.
    """

    time_step: float = 1.0
    noise: float = 0.0

    shape = (128,)
    offset, scale = (0.0,) * 128, (1.3,) * 128

    @functools.cached_property
    def _parts(self) -> tuple[np.ndarray, ExponentialStep]:
        k = np.arange(65) / 16
        return (-0.5j * k).astype(np.complex64), ExponentialStep(k**2 - k**4, self.time_step / 2)

    def advance(self, state: jax.Array) -> jax.Array:
        slope, step = self._parts
        u = jnp.fft.rfft(state)
        for _ in range(2):
            u = step(u, lambda u: jnp.fft.rfft(jnp.fft.irfft(u) ** 2) * slope)
        return jnp.fft.irfft(u).astype(state.dtype)


@dataclasses.dataclass(frozen=True)
class NavierStokes(Dynamics):
    """Vorticity w on a torus of length 2 pi: dw = (-v . grad w + viscosity lap w - drag w) dt + dW.

    dW = forcing (sin 6x dW1 + cos 7x dW2 + sin 5(x + y) dW3 + cos 8(x + y) dW4), x along axis -3
    and y along axis -2. The drag damps: without it energy of the forcing gathers at the largest
    scales, and no state is stationary. (The code that made the data of FlowDAS has the other sign.)
    A time step has `substeps` steps of order 4, each with its part of dW; the nonlinear term has
    no modes beyond 2/3 of the highest.
    """

    time_step: float = 0.5
    size: int = 64
    viscosity: float = 1e-3
    drag: float = 0.1
    forcing: float = 1.0
    substeps: int = 20

    noise = float("nan")  # the forcing acts within the step
    offset, scale = (0.0,), (2.25,)
    spin_up_steps = 100

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.size, self.size, 1)

    @functools.cached_property
    def _wave(self) -> tuple[np.ndarray, np.ndarray]:
        """Wave numbers along both axes of the transform, (size, 1) and (1, size / 2 + 1)."""
        p, q = (numbers(self.size, 1 / self.size) for numbers in (np.fft.fftfreq, np.fft.rfftfreq))
        return p[:, None], q[None]

    @functools.cached_property
    def _step(self) -> ExponentialStep:
        p, q = self._wave
        linear = -self.viscosity * (p**2 + q**2) - self.drag
        return ExponentialStep(linear, self.time_step / self.substeps)

    def _nonlinear(self, w: jax.Array) -> jax.Array:
        """-v . grad w of the transform (..., size, size / 2 + 1) of w."""
        p, q = (np.float32(k) for k in self._wave)
        stream = w / np.maximum(p**2 + q**2, 1)  # v = (d/dy, -d/dx) of it
        kept = np.float32((np.abs(p) < self.size / 3) & (q < self.size / 3))
        parts = [1j * q * stream, -1j * p * stream, 1j * p * w, 1j * q * w]
        u, v, w_x, w_y = (jnp.fft.irfft2(kept * part) for part in parts)
        return -kept * jnp.fft.rfft2(u * w_x + v * w_y)

    def _run(self, state: jax.Array, forcing: jax.Array) -> jax.Array:
        """With forcing (substeps, ..., 4), what the four modes get in each substep."""
        x, y = np.mgrid[: self.size, : self.size] * (2 * np.pi / self.size)
        modes = [np.sin(6 * x), np.cos(7 * x), np.sin(5 * (x + y)), np.cos(8 * (x + y))]
        modes_hat = np.complex64(np.fft.rfft2(modes))

        def body(w, amount):
            return self._step(w, self._nonlinear) + jnp.tensordot(amount, modes_hat, 1), None

        w, _ = jax.lax.scan(body, jnp.fft.rfft2(state[..., 0]), forcing)
        return jnp.fft.irfft2(w)[..., None].astype(state.dtype)

    def advance(self, state: jax.Array) -> jax.Array:
        """The next state without forcing."""
        return self._run(state, jnp.zeros((self.substeps, *state.shape[:-3], 4)))

    def step(self, key: jax.Array, state: jax.Array) -> jax.Array:
        std = self.forcing * (self.time_step / self.substeps) ** 0.5
        shape = (self.substeps, *state.shape[:-3], 4)
        return self._run(state, std * jax.random.normal(key, shape))

    def start(self, key: jax.Array) -> jax.Array:
        """A smooth field of standard deviation 1."""
        p, q = self._wave
        w = jnp.fft.rfft2(jax.random.normal(key, self.shape[:2])) * np.exp(-(p**2 + q**2) / 32)
        w = jnp.fft.irfft2(w.at[0, 0].set(0))
        return (w / w.std())[..., None]


SYSTEMS: dict[str, Any] = {"lorenz63": Lorenz63, "lorenz96": Lorenz96,
                           "kuramoto_sivashinsky": KuramotoSivashinsky,
                           "navier_stokes": NavierStokes}  # fmt: skip
