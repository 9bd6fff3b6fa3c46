"""Fashion-MNIST at 28x28: a DiT that takes 25 minutes on a CPU core.

The files come with Debian and Ubuntu (`apt-get install dataset-fashion-mnist`); another folder of
IDX files goes in --config.data.path. For TFDS: --config.data.name=tfds:fashion_mnist.
"""

from ml_collections import ConfigDict

from mclr_jax.configs.base import base


def get_config() -> ConfigDict:
    config = base()
    config.num_steps = 6000
    config.batch_size = 64
    config.data.name = "fashion_mnist"
    config.data.flip = False  # shoes and bags have a side
    config.network = ConfigDict({
        "name": "dit",
        "patch_size": 4,
        "width": 96,
        "depth": 4,
        "heads": 3,
        "unit_condition": True,
        "time_scale": 30.0,
        "dropout": 0.0,
        "dtype": "float32",
    })  # fmt: skip
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 200
    config.optimizer.schedule = "cosine"
    config.ema.halflife_steps = 200.0
    config.log_every = 200
    config.steps_per_dispatch = 10
    config.checkpoint_every = 1000
    config.sampler.sigma_min = 0.01
    config.sampler.sigma_max = 40.0
    config.sample_every = 2000
    return config
