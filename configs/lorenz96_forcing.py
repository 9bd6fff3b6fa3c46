"""Lorenz-96 trajectories: a network of patches on a ring."""

from ml_collections import ConfigDict

from configs.base import base, options


def get_config() -> ConfigDict:
    config = base()
    config.num_steps = 40_000
    config.batch_size = 16
    config.steps_per_dispatch = 10
    config.data.name = "mclr_jax.assimilation.trajectories:Trajectories"
    config.data.system = "lorenz96"
    config.data.frames = 32
    config.data.trajectories = 1024
    config.data.length = 1024
    config.sigma_data = 1.0
    config.noise = options("forcing", shared=0.5, independent=0.1, prefix=0.2, segments=0.2)
    config.network = options("trajectory", variance=True, width=64, patch=4, window=2)
    config.objective = options("dsm", label_dropout=0.0)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.schedule = "cosine"
    config.optimizer.clip_norm = 1.0
    config.ema.halflife_steps = 500.0
    config.log_every = 500
    config.checkpoint_every = 4000
    config.eval_examples = 1024
    return config
