"""A base fine-tuned to a small set of new classes, with the guidance in one call per step.

  mclr train transfer --config.init_from=runs/base --config.data.name=folder:mine \\
      --workdir=runs/mine

The contrast is `mclr_null`'s with the base's own answer without a class, at noise levels up to
sigma 3 and of a small strength: docs/transfer.md compares it. --config.objective.name=dsm is plain
fine-tuning, with which to find num_steps first; --config.adapter.rank=8 trains adapters alone. What
is not set here is that of the run, as in configs/finetune.py.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, finetune


def get_config() -> ConfigDict:
    config = finetune.get_config()
    config.objective = base.options(
        "mclr_null", teacher="average", wrong="source", beta=0.1, sigma_interval=(0.0, 3.0)
    )
    return config
