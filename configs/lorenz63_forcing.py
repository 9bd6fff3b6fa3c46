"""Lorenz-63 trajectories: a network of 1.02M parameters for filtering, smoothing and forecasts.

About 22 minutes on one core of an AMD EPYC with AVX-512. benchmarks/lorenz63.py compares it with a
particle filter. With windows of 32 frames in place of 68 the smoother of 65 frames is worse: the
network has then not been trained on frames that are far from both ends.
"""

from ml_collections import ConfigDict

from mclr_jax.configs.base import base, options


def get_config() -> ConfigDict:
    config = base()
    config.num_steps = 46_000
    config.batch_size = 32
    config.steps_per_dispatch = 10
    config.data.name = "mclr_jax.assimilation.trajectories:Trajectories"
    config.data.system = "lorenz63"
    config.data.frames = 68
    config.data.trajectories = 1024
    config.data.length = 1024
    config.sigma_data = 1.0
    config.noise = options("forcing", shared=0.5, independent=0.1, prefix=0.2, segments=0.2)
    config.network = options("trajectory", variance=True)
    config.objective = options("dsm", label_dropout=0.0)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.schedule = "cosine"
    config.optimizer.clip_norm = 1.0
    config.ema.halflife_steps = 500.0
    config.log_every = 500
    config.checkpoint_every = 4000
    config.eval_examples = 4096
    return config
