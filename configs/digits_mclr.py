"""MCLR on digits: fine-tunes configs/digits.py, less than a minute on 2 CPU cores.

mclr train digits --workdir=runs/digits
mclr train digits_classifier --workdir=runs/digits_classifier
mclr train digits_mclr --workdir=runs/digits_mclr
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, digits


def get_config() -> ConfigDict:
    config = digits.get_config()
    config.init_from = "runs/digits"
    config.objective = base.options("mclr")
    config.posterior.name = "classifier"
    config.companions.classifier = "runs/digits_classifier"
    config.noise.mean = 0.3  # where classes are told apart; plain training hardly goes there
    config.num_steps = 400
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 20
    config.ema.halflife_steps = 20.0
    config.checkpoint_every = 200
    return config
