"""A classifier of noisy CIFAR-10, the posterior of configs/cifar10_mclr.py.

Not run at full length: no accelerator was available.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, cifar10


def get_config() -> ConfigDict:
    config = cifar10.get_config()
    config.objective = base.options("classify")
    config.network = ConfigDict({
        "name": "conv_classifier",
        "channels": (128, 256, 256),
        "patch_size": 1,
        "dropout": 0.1,
        "dtype": "bfloat16",
    })  # fmt: skip
    config.data.augment = 0.0
    config.data.flip = True
    config.num_steps = 40_000
    config.optimizer.warmup_steps = 1000
    config.optimizer.schedule = "cosine"
    config.ema.halflife_steps = 1000.0
    config.ema.power_stds = ()
    config.ema.snapshot_every = 0
    config.sample_every = 0
    return config
