"""Networks become denoisers: the one type that samplers, guidance and objectives take."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (x (B, ...), sigma (B,), label (B,) int32) -> estimate of E[x0 | x, label], the shape of x.
# label == num_classes is the null label: no condition.
DenoiseFn = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# The same arguments but noise conditioning c_noise (B,) in place of sigma -> raw output. Both may
# take further arrays (B, ...) after the label.
NetworkFn = Callable[..., jax.Array]


def expand(values: jax.Array, x: jax.Array) -> jax.Array:
    """values (B,) or () -> (B, 1, ..., 1), to be multiplied with x (B, ...)."""
    values = jnp.broadcast_to(values, x.shape[:1])
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def edm(network: NetworkFn, sigma_data: float) -> DenoiseFn:
    """EDM preconditioning: D = c_skip x + c_out F(c_in x, ln(sigma)/4, label).

    Source: Karras et al. 2022, Table 1 and eq. 7. Computed in float32 (or x's type if wider).
    """

    def denoise(x, sigma, label, *extra):
        sigma = expand(sigma, x).astype(x.dtype)
        total = sigma**2 + sigma_data**2
        c_skip = sigma_data**2 / total
        c_out = sigma * sigma_data / jnp.sqrt(total)
        c_noise = jnp.log(sigma).reshape(-1) / 4
        output = network(x / jnp.sqrt(total), c_noise, label, *extra)
        return c_skip * x + c_out * output.astype(x.dtype)

    return denoise
