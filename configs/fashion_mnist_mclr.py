"""MCLR on Fashion-MNIST: fine-tunes configs/fashion_mnist.py for a fifth of its steps.

  mclr train fashion_mnist --workdir=runs/fashion_mnist
  mclr train fashion_mnist_classifier \\
      --workdir=runs/fashion_mnist_classifier
  mclr train fashion_mnist_mclr --workdir=runs/fashion_mnist_mclr

The result samples as the base does with guidance_scale 1 + beta; 1.4 is this base's best
(benchmarks/results/fashion_mnist_mclr.json).
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, fashion_mnist


def get_config() -> ConfigDict:
    config = fashion_mnist.get_config()
    config.init_from = "runs/fashion_mnist"
    config.objective = base.options("mclr")
    config.posterior.name = "classifier"
    config.companions.classifier = "runs/fashion_mnist_classifier"
    config.objective.beta = 0.4
    config.objective.target = "reference"
    config.objective.negative_share = 0.5  # most of the posterior's draws are the label itself
    config.noise.mean = 0.3  # where classes are told apart; plain training hardly goes there
    config.num_steps = 1200
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.ema.halflife_steps = 60.0
    config.checkpoint_every = 200
    config.log_every = 50
    config.sample_every = 1200
    return config
