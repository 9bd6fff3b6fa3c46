"""scikit-learn's 8x8 digits: a DiT that trains in a minute or two on 2 CPU cores."""

from ml_collections import ConfigDict

from mclr_jax.configs.base import base


def get_config() -> ConfigDict:
    config = base()
    config.num_steps = 1000
    config.batch_size = 64
    config.data.name = "digits"
    config.network = ConfigDict({
        "name": "dit",
        "patch_size": 2,
        "width": 96,
        "depth": 3,
        "heads": 3,
        "unit_condition": True,
        "time_scale": 30.0,
        "dropout": 0.0,
        "dtype": "float32",
    })  # fmt: skip
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.ema.halflife_steps = 100.0
    config.checkpoint_every = 500
    config.sample_every = 0
    config.sampler.sigma_min = 0.01
    config.sampler.sigma_max = 40.0
    return config
