"""A classifier of noisy Fashion-MNIST: the posterior p(class | x_sigma) that MCLR draws from.

Some minutes on 2 CPU cores. configs/fashion_mnist_mclr.py reads it from
runs/fashion_mnist_classifier.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base


def get_config() -> ConfigDict:
    config = base.base()
    config.num_steps = 4000
    config.batch_size = 128
    config.steps_per_dispatch = 10
    config.data.name = "fashion_mnist"
    config.objective = base.options("classify")
    config.noise = ConfigDict({"name": "lognormal", "mean": -1.2, "std": 1.4})
    config.network = ConfigDict({
        "name": "mlp_classifier",
        "width": 256,
        "depth": 2,
        "dropout": 0.3,
        "dtype": "float32",
    })  # fmt: skip
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 0.3
    config.optimizer.warmup_steps = 100
    config.optimizer.schedule = "cosine"
    config.ema.halflife_steps = 100.0
    config.log_every = 200
    config.eval_examples = 4096
    return config
