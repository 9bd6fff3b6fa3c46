"""A class-conditional Gaussian mixture, for which the exact denoiser is known in closed form.

Class c has density sum_k weights[c, k] N(means[c, k], stds[c, k]^2 I). Noise of level sigma adds
sigma^2 to each variance, so densities, posteriors and denoisers are exact at every sigma.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax.nn import logsumexp

from mclr_jax.types import Condition, expand, label_of


@struct.dataclass
class GaussianMixture:
    """K classes of C isotropic components in d dimensions. x is (B, d); sigma is () or (B,).

    `denoise` is a `DenoiseFn`. Use float64 (`jax.enable_x64`) for results without visible rounding.

    Attributes:
      means: (K, C, d).
      stds: (K, C), not negative; a component of std 0 is one point.
      weights: (K, C), each row sums to one.
      class_prior: (K,), sums to one.
    """

    means: jax.Array
    stds: jax.Array
    weights: jax.Array
    class_prior: jax.Array

    def __post_init__(self):
        if hasattr(self.means, "shape"):  # JAX also builds this tree with leaves of other types
            k, c = self.means.shape[:2]
            expected = {"stds": (k, c), "weights": (k, c), "class_prior": (k,)}
            for name, shape in expected.items():
                if (found := getattr(self, name).shape) != shape:
                    raise ValueError(
                        f"{name} has shape {found}; expected {shape} for means of shape "
                        f"{self.means.shape}."
                    )

    @property
    def num_classes(self) -> int:
        return self.means.shape[0]

    def _log_components(self, x, sigma):
        """log [weights N(x; means, stds^2 + sigma^2)], (B, K, C)."""
        dim = self.means.shape[-1]
        variance = self.stds**2 + expand(jnp.asarray(sigma), x[:, :, None]) ** 2
        distance = jnp.sum((x[:, None, None] - self.means) ** 2, -1)
        log_normal = -0.5 * (distance / variance + dim * jnp.log(2 * jnp.pi * variance))
        return jnp.log(self.weights) + log_normal

    def log_prob_given_label(self, x: jax.Array, sigma) -> jax.Array:
        """log p_sigma(x | c) for all classes, (B, K)."""
        return logsumexp(self._log_components(x, sigma), axis=-1)

    def log_prob(self, x: jax.Array, sigma) -> jax.Array:
        """log p_sigma(x), (B,)."""
        return logsumexp(self.log_prob_given_label(x, sigma) + jnp.log(self.class_prior), axis=-1)

    def posterior(self, x: jax.Array, sigma) -> jax.Array:
        """p(c | x_sigma = x), (B, K)."""
        return jax.nn.softmax(self.log_prob_given_label(x, sigma) + jnp.log(self.class_prior))

    def denoise(self, x: jax.Array, sigma, condition: Condition | jax.Array) -> jax.Array:
        """E[x0 | x_sigma = x, label], (B, d); the null label K averages over the classes."""
        label = label_of(condition)
        classes = jnp.arange(self.num_classes)
        allowed = (label[:, None] == classes) | (label[:, None] == self.num_classes)
        log_weight = self._log_components(x, sigma) + jnp.log(self.class_prior)[:, None]
        log_weight = jnp.where(allowed[..., None], log_weight, -jnp.inf)
        responsibility = jax.nn.softmax(log_weight, axis=(1, 2))  # p(component | x, label)
        variance = self.stds**2 + expand(jnp.asarray(sigma), x[:, :, None]) ** 2
        gain = (self.stds**2 / variance)[..., None]  # of the linear denoiser of one component
        denoised = self.means + gain * (x[:, None, None] - self.means)
        return jnp.sum(responsibility[..., None] * denoised, axis=(1, 2))

    def sample(self, key: jax.Array, num_samples: int) -> tuple[jax.Array, jax.Array]:
        """Clean samples (n, d) and their labels (n,) int32."""
        key_label, key_component, key_noise = jax.random.split(key, 3)
        label = jax.random.categorical(key_label, jnp.log(self.class_prior), shape=(num_samples,))
        component = jax.random.categorical(key_component, jnp.log(self.weights[label]))
        noise = jax.random.normal(key_noise, (num_samples, self.means.shape[-1]))
        std = self.stds[label, component][:, None]
        return self.means[label, component] + std * noise, label.astype(jnp.int32)


def toy() -> GaussianMixture:
    """The data of configs/mixture.py: 3 overlapping classes of 2 components on a ring in 2-D.

    The classes alternate around the ring: each component has both other classes beside it.
    """
    angles = jnp.arange(6).reshape(2, 3).T * (2 * jnp.pi / 6)
    means = 1.55 * jnp.stack([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    uniform = jnp.full((3, 2), 0.5)
    return GaussianMixture(means, jnp.full((3, 2), 0.45), uniform, jnp.full(3, 1 / 3))
