"""MCLR on the 2-D mixture with the exact posterior: ends at exact CFG of guidance_scale 2.

python -m launch.train --config=configs/mixture.py --workdir=runs/mixture
python -m launch.train --config=configs/mixture_mclr.py --workdir=runs/mixture_mclr
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
