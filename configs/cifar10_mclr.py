"""MCLR on CIFAR-10: fine-tunes configs/cifar10.py for 2% of its length.

  mclr train cifar10 --workdir=runs/cifar10
  mclr train cifar10_classifier --workdir=runs/cifar10_classifier
  mclr train cifar10_mclr --workdir=runs/cifar10_mclr

Not run at full length: no accelerator was available.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, cifar10


def get_config() -> ConfigDict:
    config = cifar10.get_config()
    config.init_from = "runs/cifar10"
    config.objective = base.options("mclr")
    config.posterior.name = "classifier"
    config.companions.classifier = "runs/cifar10_classifier"
    config.objective.beta = 0.3
    config.objective.negative_share = 0.5  # few of the posterior's draws differ from the label
    config.noise.mean = 0.3  # where classes are told apart; plain training hardly goes there
    config.data.augment = 0.0  # the classifier knows no augmented images
    config.data.flip = True
    config.num_steps = 8000
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 500
    config.ema.halflife_steps = 500.0
    config.ema.snapshot_every = 2000
    config.checkpoint_every = 2000
    return config
