"""A stationary linear-Gaussian process with its exact denoiser and its exact posteriors."""

import dataclasses
import functools
import types

import jax.numpy as jnp
import numpy as np

from mclr_jax.assimilation.observe import Observations, Operator, Select


@dataclasses.dataclass(frozen=True)
class Process:
    """x' = rho R(angle) x + noise in two coordinates, each of variance 1; the units are optional.

    It is a model for `regimes`: `moments` has the exact mean and variance of all frames given noisy
    ones, for any number of frames, with the noise levels of the first row in all rows.
    """

    rho: float = 0.8
    angle: float = 0.6
    window: int = 8
    offset: tuple = ()
    scale: tuple = ()

    null_label = 1
    preconditioning = types.SimpleNamespace(sigma_range=(0.0, np.inf))

    @property
    def data(self):
        return types.SimpleNamespace(
            shape=(self.window, 2),
            num_classes=1,
            offset=self.offset,
            scale=self.scale,
            time_step=0.5,
        )

    @property
    def step(self):
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return self.rho * np.array([[cos, -sin], [sin, cos]])

    @functools.cache  # noqa: B019
    def covariance(self, frames):
        """(2 F, 2 F)."""
        blocks = np.zeros((frames, 2, frames, 2))
        for f in range(frames):
            for g in range(f, frames):
                blocks[g, :, f] = np.linalg.matrix_power(self.step, g - f)
                blocks[f, :, g] = blocks[g, :, f].T
        return blocks.reshape(2 * frames, 2 * frames)

    def moments(self, params):
        del params

        def exact(x, sigma, condition):
            del condition
            covariance = jnp.asarray(self.covariance(x.shape[1]), x.dtype)
            levels = jnp.broadcast_to(sigma.reshape(len(x), -1), x.shape[:2])[0]
            levels = jnp.repeat(levels, 2) ** 2  # of all rows
            gain = jnp.linalg.solve(covariance + jnp.diag(levels), covariance).T
            mean = (x.reshape(len(x), -1) @ gain.T).reshape(x.shape)
            return mean, jnp.broadcast_to((jnp.diag(gain) * levels).reshape(x.shape[1:]), x.shape)

        return exact

    def draw(self, count, frames, std, every=1, missing=(), seed=0, initial=False):
        """Truth (N, T, 2) and observations of coordinate 0, in physical units if there are any."""
        rng = np.random.default_rng(seed)
        x = rng.multivariate_normal(np.zeros(2 * frames), self.covariance(frames), count)
        x = np.asarray(self.offset or 0) + np.asarray(self.scale or 1) * x.reshape(-1, frames, 2)
        values = x[:, :, :1] + std * rng.standard_normal((count, frames, 1))
        values[:, [f for f in range(frames) if f % every or f in missing]] = np.nan
        start = x[:, 0] if initial else None
        return x, Observations(values, Operator(Select((0,))), std, initial=start)

    def posterior(self, observations, until, frames=None):
        """Mean (N, T, 2) and std (T, 2) of frame k given the observations of frames <= until[k].

        Plain conditioning of one large normal distribution, in float64.
        """
        values, std = np.float64(observations.values[..., 0]), float(observations.std)
        frames = frames or values.shape[1]
        offset, scale = np.broadcast_to(self.offset or 0, 2), np.broadcast_to(self.scale or 1, 2)
        covariance = self.covariance(frames) * np.tile(np.outer(scale, scale), (frames, frames))
        means, stds = np.zeros((len(values), frames, 2)), np.zeros((frames, 2))
        for k in range(frames):
            seen = [
                f for f in range(min(until[k] + 1, values.shape[1])) if np.isfinite(values[0, f])
            ]
            rows = np.eye(2 * frames)[[2 * f for f in seen]]
            data, noise = values[:, seen] - offset[0], std**2 * np.ones(len(seen))
            if observations.initial is not None:
                rows = np.concatenate([np.eye(2 * frames)[:2], rows])
                data = np.concatenate([observations.initial - offset, data], 1)
                noise = np.concatenate([[1e-9, 1e-9], noise])
            gain = np.linalg.solve(rows @ covariance @ rows.T + np.diag(noise), rows @ covariance).T
            here = slice(2 * k, 2 * k + 2)
            means[:, k] = offset + data @ gain[here].T
            stds[k] = np.sqrt(np.diag(covariance - gain @ rows @ covariance)[here].clip(0))
        return means, stds


def errors(members, mean, std):
    """RMS error of the ensemble mean in posterior stds, without sampling error; spread ratio."""
    wrong = ((members.mean(1) - mean) / std) ** 2
    spread = members.var(1, ddof=1) / std**2
    rms = np.sqrt(max(wrong.mean() - (spread / members.shape[1]).mean(), 0))
    return rms, np.sqrt(spread.mean())
