"""MCLR on any run, published models among them: fine-tuned against its own null answer.

  mclr convert --input=DiT-XL-2-256x256.pt --family=dit --out=runs/dit
  mclr train finetune --config.init_from=runs/dit \\
      --config.data.name=zip:latents.zip --workdir=runs/dit_mclr

Network, preconditioning, sampler and sigma_data are those of the run in init_from. A model without
a trained null label (EDM, EDM2) needs an unconditional or weaker one as the wrong explanation:
--config.objective.wrong=weak --config.companions.weak=runs/unconditional. The learning rate and the
number of steps are a start for published models and batches of 256; benchmarks/outside.py tunes
them for a small one. Not run at the size of published models: no accelerator was available.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base


def get_config() -> ConfigDict:
    config = base.base()
    config.network = ConfigDict({"name": ""})
    config.preconditioning = ConfigDict({"name": ""})
    config.objective = base.options("mclr_null")
    config.noise.mean, config.noise.std = 0.8, 1.5
    config.num_steps = 10_000
    config.batch_size = 256
    config.optimizer.learning_rate = 1e-5
    config.optimizer.warmup_steps = 500
    config.ema.halflife_steps = 500.0
    return config
