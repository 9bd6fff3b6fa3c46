"""A classifier of noisy digits, the posterior of configs/digits_mclr.py: half a minute on CPU."""

from ml_collections import ConfigDict

from mclr_jax.configs import fashion_mnist_classifier


def get_config() -> ConfigDict:
    config = fashion_mnist_classifier.get_config()
    config.num_steps = 1500
    config.batch_size = 64
    config.data.name = "digits"
    config.network.width = 128
    config.eval_examples = 300
    config.checkpoint_every = 500
    return config
