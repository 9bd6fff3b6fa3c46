"""MCLR on Fashion-MNIST: fine-tunes configs/fashion_mnist.py for a tenth of its steps.

  python -m launch.train --config=configs/fashion_mnist.py --workdir=runs/fashion_mnist
  python -m launch.train --config=configs/fashion_mnist_classifier.py \\
      --workdir=runs/fashion_mnist_classifier
  python -m launch.train --config=configs/fashion_mnist_mclr.py --workdir=runs/fashion_mnist_mclr

The result samples without guidance as the base does with guidance_scale 1 + objective.beta.
"""

from ml_collections import ConfigDict

from configs import base, fashion_mnist


def get_config() -> ConfigDict:
    config = fashion_mnist.get_config()
    config.init_from = "runs/fashion_mnist"
    config.objective = base.mclr()
    config.objective.posterior_from = "runs/fashion_mnist_classifier"
    config.objective.beta = 0.3
    config.num_steps = 600
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.ema.halflife_steps = 30.0
    config.checkpoint_every = 200
    config.log_every = 50
    config.sample_every = 600
    return config
