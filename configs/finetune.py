"""Fine-tune any run, or a published model: MCLR against its own null answer, or another loss.

  mclr convert --input=DiT-XL-2-256x256.pt --family=dit --out=runs/dit
  mclr train finetune --config.init_from=runs/dit \\
      --config.data.name=zip:latents.zip --workdir=runs/dit_mclr

Data, network, preconditioning, sigma_data and sampler are those of the run in init_from; keys that
are set differ from it. So are batch size, steps and learning rate, of which a fifth is taken;
published weights get 10,000 steps of 256 examples at 1e-5. --config.objective.name=dsm is plain
fine-tuning. A model without a trained null label (EDM, EDM2) needs an unconditional or weaker one
as the wrong explanation: --config.objective.wrong=weak
--config.companions.weak=runs/unconditional. Not run at the size of published models: no accelerator
was available.
"""

from ml_collections import ConfigDict, config_dict

from mclr_jax.configs import base


def get_config() -> ConfigDict:
    config = base.base()
    config.data.name = ""
    config.network = ConfigDict({"name": ""})
    config.preconditioning = ConfigDict({"name": ""})
    config.objective = base.options("mclr_null")
    config.noise.mean, config.noise.std = 0.8, 1.5
    config.num_steps = config_dict.placeholder(int)
    config.batch_size = config_dict.placeholder(int)
    config.optimizer.schedule = "cosine"
    config.optimizer.learning_rate = config_dict.placeholder(float)
    config.optimizer.warmup_steps = config_dict.placeholder(int)
    config.ema.halflife_steps = config_dict.placeholder(float)
    return config
