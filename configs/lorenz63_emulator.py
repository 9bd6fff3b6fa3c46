"""One step of Lorenz-63 with its noise: a network for particle filters.

benchmarks/lorenz63.py measures it. `mclr assimilate` takes such a run with --method=particle.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import trajectories


def get_config() -> ConfigDict:
    config = trajectories.emulator()
    config.num_steps = 16_000
    config.batch_size = 256
    config.data.name = "mclr_jax.assimilation.trajectories:Trajectories"
    config.data.system = "lorenz63"
    config.data.trajectories = 1024
    config.data.length = 1024
    config.network.width = 64
    config.network.hidden = 64
    config.network.depth = 3
    return config
