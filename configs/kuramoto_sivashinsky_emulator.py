"""One step of Kuramoto-Sivashinsky, for ensemble Kalman filters: learned from states with noise.

Without it the errors of a filter's members grow, since they are no states of the training data.
benchmarks/forcing_fields.py measures it.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import lorenz96_emulator


def get_config() -> ConfigDict:
    config = lorenz96_emulator.get_config()
    config.data.system = "kuramoto_sivashinsky"
    config.network.reach = 3
    config.objective.input_noise = 0.3
    return config
