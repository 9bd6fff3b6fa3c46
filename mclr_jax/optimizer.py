"""The optax optimizer and the learning rate of a config."""

from collections.abc import Callable

import jax.numpy as jnp
import optax

from mclr_jax.names import INT32, check_keys, in_range, look_up

LIMITS = {"learning_rate": (0.0, 1e6, ""), "warmup_steps": (0, INT32, ""),
          "decay_steps": (1, INT32, ""), "b1": (0.0, 1.0, ")"), "b2": (0.0, 1.0, ")"),
          "eps": (0.0, 1e6, "("), "weight_decay": (0.0, 1e6, ""),
          "clip_norm": (0.0, 1e9, "")}  # fmt: skip


def learning_rate(config, num_steps: int) -> Callable:
    """Step () -> learning rate (): linear warm-up times a decay.

    `config.schedule` is "constant", "cosine" (to 0 at num_steps) or "inverse_sqrt"
    (1 / sqrt(step / decay_steps) beyond decay_steps, as in Karras et al. 2024, arXiv 2312.02696);
    any other name raises ValueError.
    """
    decays = {
        "constant": lambda step: 1.0,
        "cosine": lambda step: 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(step / num_steps, 1))),
        "inverse_sqrt": lambda step: 1 / jnp.sqrt(jnp.maximum(step / config.decay_steps, 1)),
    }
    decay = look_up(decays, config.schedule, "config.optimizer.schedule")

    def rate(step):
        warm_up = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1)
        return config.learning_rate * warm_up * decay(step)

    return rate


def optimizer(config, num_steps: int) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm, from config.optimizer; clip_norm = 0 for none."""
    check_keys("config.optimizer", config.keys(), [*LIMITS, "schedule"])
    for key, (low, high, ends) in LIMITS.items():
        in_range(f"config.optimizer.{key}", config[key], low, high, ends)
    rate = learning_rate(config, num_steps)
    adam = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay)
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, adam)
