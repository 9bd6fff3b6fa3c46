"""Lorenz-63 trajectories: a network of 1.02M parameters for filtering, smoothing and forecasts.

About 22 minutes on one core of an AMD EPYC with AVX-512. benchmarks/lorenz63.py compares it with a
particle filter. With windows of 32 frames in place of 68 the smoother of 65 frames is worse: the
network has then not been trained on frames that are far from both ends.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import trajectories


def get_config() -> ConfigDict:
    config = trajectories.model()
    config.num_steps = 46_000
    config.data.name = "mclr_jax.assimilation.trajectories:Trajectories"
    config.data.system = "lorenz63"
    config.data.frames = 68
    config.data.trajectories = 1024
    config.data.length = 1024
    return config
