"""The optax optimizer and the learning rate, as config.optimizer says."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import optax

from mclr_jax.schema import Keys, key

# Step () and number of steps -> factor (). "inverse_sqrt" is that of Karras et al. 2024, arXiv
# 2312.02696: 1 / sqrt(step / decay_steps) beyond decay_steps.
DECAYS: dict[str, Callable] = {
    "constant": lambda step, num_steps, decay_steps: 1.0,
    "cosine": lambda step, num_steps, decay_steps: (
        0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / num_steps, 1)))
    ),
    "inverse_sqrt": lambda step, num_steps, decay_steps: (
        1 / jnp.sqrt(jnp.maximum(step / decay_steps, 1))
    ),
}


@dataclasses.dataclass(frozen=True)
class Optimizer(Keys, where="config.optimizer"):
    """AdamW after clipping by the global norm; a linear warm-up times a decay."""

    learning_rate: float = key(1e-3, 0.0, 1e6, says="after the warm-up")
    warmup_steps: int = key(0, 0, says="over which the rate rises linearly")
    schedule: str = key("constant", words=DECAYS, says="constant, cosine or inverse_sqrt")
    decay_steps: int = key(70_000, 1, says="inverse_sqrt: steps before the decay begins")
    b1: float = key(0.9, 0.0, 1.0, ")", says="Adam's decay of the mean gradient")
    b2: float = key(0.999, 0.0, 1.0, ")", says="Adam's decay of the mean square")
    eps: float = key(1e-8, 0.0, 1e6, "(", says="Adam's divisor is at least this")
    weight_decay: float = key(0.0, 0.0, 1e6, says="of AdamW")
    clip_norm: float = key(0.0, 0.0, 1e9, says="largest global norm of a gradient; 0 for none")

    def rate(self, num_steps: int) -> Callable:
        """Step () -> learning rate (), for a training of so many steps."""

        def rate(step):
            warm_up = jnp.minimum((step + 1) / max(self.warmup_steps, 1), 1)
            decay = DECAYS[self.schedule](step, num_steps, self.decay_steps)
            return self.learning_rate * warm_up * decay

        return rate

    def transformation(self, num_steps: int) -> optax.GradientTransformation:
        """The optimizer for a training of so many steps."""
        rate = self.rate(num_steps)
        adam = optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay)
        clip = optax.clip_by_global_norm(self.clip_norm) if self.clip_norm else optax.identity()
        return optax.chain(clip, adam)
