"""MCLR for any run in its recommended form: no classifier, no second run, nothing to tune first.

  mclr train digits --workdir=runs/digits
  mclr train mclr_null --config.init_from=runs/digits --workdir=runs/digits_null
  mclr train mclr_null --config.init_from=runs/digits --workdir=runs/mine \\
      --config.data.name=folder:mine --config.adapter.rank=8  # other classes, and megabytes

The result samples, in one call per step, as the run does with guidance_scale 2 up to sigma 3; `mclr
sample --interpolation=0.5` has half of that. What is not set here is that of the run, as in
configs/finetune.py.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, finetune


def get_config() -> ConfigDict:
    config = finetune.get_config()
    config.objective = base.options("mclr_null", teacher="average", sigma_interval=(0.0, 3.0))
    return config
