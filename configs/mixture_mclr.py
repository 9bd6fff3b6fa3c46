"""MCLR on the 2-D mixture with the exact posterior: ends at exact CFG of guidance_scale 2.

mclr train mixture --workdir=runs/mixture
mclr train mixture_mclr --workdir=runs/mixture_mclr
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, mixture


def get_config() -> ConfigDict:
    config = mixture.get_config()
    config.init_from = "runs/mixture"
    config.objective = base.options("mclr")
    config.posterior.name = "exact"
    config.num_steps = 4000
    config.optimizer.learning_rate = 5e-4
    config.checkpoint_every = 2000
    config.sample_every = 2000
    return config
