"""Kuramoto-Sivashinsky trajectories: see lorenz96_forcing.py."""

from ml_collections import ConfigDict

from mclr_jax.configs import lorenz96_forcing


def get_config() -> ConfigDict:
    config = lorenz96_forcing.get_config()
    config.num_steps = 13_000
    config.data.system = "kuramoto_sivashinsky"
    config.data.trajectories = 512
    config.network.patch = 8
    return config
