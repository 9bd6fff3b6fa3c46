"""One step of Navier-Stokes, for ensemble Kalman filters: places are patches of 4x4 points.

benchmarks/navier_stokes.py measures it.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import lorenz96_emulator


def get_config() -> ConfigDict:
    config = lorenz96_emulator.get_config()
    config.num_steps = 4000
    config.batch_size = 16
    config.data.system = "navier_stokes"
    config.data.trajectories = 128
    config.data.length = 256
    config.network.reach = 1
    config.network.patch_size = 4
    config.network.width = 96
    config.network.hidden = 128
    config.network.depth = 6
    config.objective.input_noise = 0.5
    config.log_every = 100
    config.checkpoint_every = 500
    config.eval_examples = 64
    return config
