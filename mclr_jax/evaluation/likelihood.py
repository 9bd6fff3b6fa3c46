"""Likelihood of data under a model, by the probability-flow ODE and its divergence."""

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.types import Condition, DenoiseFn, as_condition


def log_likelihood(
    denoise: DenoiseFn,
    x: jax.Array,
    condition: Condition | jax.Array,  # or bare labels (B,) int32
    sigmas: jax.Array,  # (N + 1,) rising noise levels above 0, as noise.rho_grid(...)[-2::-1]
    keys: jax.Array | None = None,  # (B,) typed keys
    *,
    sigma_data: float = 0.5,
    probes: int = 1,
) -> jax.Array:
    """log p(x | condition) in nats, (B,), of data x (B, ...) with noise of level sigmas[0].

    Integrates dx/dsigma = (x - D) / sigma upwards, and its divergence, by Heun's method; at the top
    x is normal with variance sigmas[-1]^2 + sigma_data^2. Source: Chen et al. 2018 (arXiv
    1806.07366), Song et al. 2021 (arXiv 2011.13456, section 4.3). sigmas[0] must be small relative
    to the structure of the data, but about the rounding step of 8-bit images, which have no density
    without noise. ValueError: other sigmas.

    `keys` give Hutchinson's estimate of the divergence from `probes` random sign vectors, the same
    at all noise levels; without keys, it is exact, with one transposed call per dimension.
    """
    if not isinstance(sigmas, jax.core.Tracer):
        grid = np.asarray(sigmas)
        if grid.ndim != 1 or len(grid) < 2 or grid[0] <= 0 or not np.all(np.diff(grid) > 0):
            raise ValueError(f"sigmas must rise from above 0, at least 2 of them; got {grid}.")
    size, condition = x[0].size, as_condition(condition)
    if keys is None:
        units = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
        vectors = jnp.broadcast_to(units, (size, *x.shape))
    else:
        shape = (probes, *x.shape[1:])
        vectors = jax.vmap(lambda key: jax.random.rademacher(key, shape, x.dtype), 0, 1)(keys)
    inner = jax.vmap(lambda a, b: jnp.sum(a * b))

    def slope(x, sigma):
        """dx/dsigma (B, ...) and its divergence (B,)."""
        levels = jnp.full(len(x), sigma, x.dtype)
        denoised, transpose = jax.vjp(lambda y: denoise(y, levels, condition), x)
        products = jax.lax.map(lambda v: inner(transpose(v)[0], v), vectors)
        trace = products.sum(0) if keys is None else products.mean(0)
        return (x - denoised) / sigma, (size - trace) / sigma

    def step(carry, pair):
        (x, change), (low, high) = carry, pair
        first, divergence = slope(x, low)
        second, then = slope(x + (high - low) * first, high)
        half = (high - low) / 2
        return (x + half * (first + second), change + half * (divergence + then)), None

    sigmas = jnp.asarray(sigmas, x.dtype)
    start = x, jnp.zeros(len(x), x.dtype)
    (x, change), _ = jax.lax.scan(step, start, (sigmas[:-1], sigmas[1:]))
    variance = sigmas[-1] ** 2 + sigma_data**2
    return change - inner(x, x) / (2 * variance) - size / 2 * jnp.log(2 * jnp.pi * variance)


def bits_per_dim(nats: jax.Array, size: int) -> jax.Array:
    """Bits per dimension (B,) of 8-bit images of `size` numbers in [-1, 1], from `nats` (B,)."""
    return -nats / (size * np.log(2)) + np.log2(128)
