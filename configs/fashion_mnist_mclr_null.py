"""MCLR on Fashion-MNIST against the network's own null answer: needs no classifier.

  mclr train fashion_mnist --workdir=runs/fashion_mnist
  mclr train fashion_mnist_mclr_null --workdir=runs/fashion_null

The result samples as the base does with guidance_scale 2 up to sigma 3: the row "mclr null, beta 1"
of benchmarks/results/guidance_free_fashion_mnist.json. With beta, wrong_label and negative_share of
0.5 it is the row "mclr null and wrong label, beta 0.5".
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, fashion_mnist_mclr


def get_config() -> ConfigDict:
    config = fashion_mnist_mclr.get_config()
    config.objective = base.options("mclr_null", teacher="average", sigma_interval=(0.0, 3.0))
    config.posterior.name = config.companions.classifier = ""
    config.noise.mean, config.noise.std = 0.8, 1.5
    return config
