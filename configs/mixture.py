"""A 2-D mixture of 3 classes whose densities and denoisers are known exactly: an MLP in seconds."""

from ml_collections import ConfigDict

from mclr_jax.configs.base import base


def get_config() -> ConfigDict:
    config = base()
    config.num_steps = 10_000
    config.batch_size = 512
    config.steps_per_dispatch = 50
    config.data.name = "mixture"
    config.sigma_data = 1.0
    config.noise = ConfigDict({"name": "lognormal", "mean": -0.4, "std": 1.2})
    config.network = ConfigDict({
        "name": "mlp",
        "width": 128,
        "depth": 4,
        "dropout": 0.0,
        "dtype": "float32",
    })  # fmt: skip
    config.optimizer.schedule = "cosine"
    config.log_every = 500
    config.checkpoint_every = 2500
    config.sample_every = 2500
    config.sampler.sigma_min = 0.01
    config.sampler.sigma_max = 20.0
    return config
