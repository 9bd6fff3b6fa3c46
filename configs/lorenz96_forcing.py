"""Lorenz-96 trajectories: a network of patches on a ring."""

from ml_collections import ConfigDict

from mclr_jax.configs import lorenz63_forcing


def get_config() -> ConfigDict:
    config = lorenz63_forcing.get_config()
    config.num_steps = 40_000
    config.batch_size = 16
    config.data.system = "lorenz96"
    config.data.frames = 32
    config.network.width = 64
    config.network.patch = 4
    config.network.window = 2
    config.eval_examples = 1024
    return config
