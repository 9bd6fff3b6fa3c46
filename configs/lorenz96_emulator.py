"""One step of Lorenz-96: a network of 68,321 parameters for ensemble Kalman filters.

benchmarks/forcing_fields.py measures it. `mclr assimilate` takes such a run with --method=enkf.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import trajectories


def get_config() -> ConfigDict:
    config = trajectories.emulator()
    config.num_steps = 16_500
    config.data.name = "mclr_jax.assimilation.trajectories:Trajectories"
    config.data.system = "lorenz96"
    config.data.trajectories = 1024
    config.data.length = 1024
    config.network.reach = 2
    config.network.variance = False
    return config
