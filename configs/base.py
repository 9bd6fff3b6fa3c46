"""Every key of a training config, with its meaning; the other configs change this one."""

from typing import Any

from ml_collections import ConfigDict

from mclr_jax import experiment


def base() -> ConfigDict:
    """A config without data set and network, which configs/NAME.py add."""
    config = ConfigDict()
    config.seed = 0
    config.num_steps = 10_000
    config.batch_size = 128  # over all devices
    config.parallel = "pmap"  # "pmap", "data" (jit, replicated) or "fsdp" (jit, sharded state)
    config.require_accelerator = False  # stop if JAX finds only the CPU
    config.init_from = ""  # work directory of a run; training starts from its EMA weights
    # Training steps in one call of the compiled program; 0 is 1 on the CPU and 8 elsewhere. A
    # resumed run has the same bits only with the same value.
    config.steps_per_dispatch = 0
    config.grad_accumulation = 1  # parts of a batch, computed one after the other to save memory

    config.log_every = 100
    config.checkpoint_every = 1000
    config.keep_checkpoints = 2  # newest ones; the one with the lowest held-out loss is kept too
    config.eval_examples = 1024  # held-out examples for that loss; 0 for none
    config.sample_every = 0  # write a grid of samples; 0 for never
    # ICR during training (mclr_jax/representation), a warning of memorization.
    config.icr = ConfigDict({
        "every_steps": 0,  # measure and write a checkpoint; the lowest is kept; 0 for never
        "num_images": 2048,  # training images, at least twice the length of the features
        "sigma": 0.29,  # noise level at which features are read
        "layer": "",  # name of a block; "" for the middle one
        "samples": 0,  # samples for the memorized fraction; 0 for none
    })  # fmt: skip
    config.profile = ConfigDict({"start": 0, "num_steps": 0})  # trace some steps; 0 for none

    # digits, fashion_mnist, mixture, tfds:NAME, zip:PATH, npz:PATH, or package.module:Name, such as
    # mclr_jax.assimilation.trajectories:Trajectories
    config.data = ConfigDict({
        "name": "digits",
        "path": "",  # folder of the files (fashion_mnist, tfds); "" for the default
        "test": "",  # a source of held-out examples; "" for the test split of `name`
        "num_classes": 0,  # 0 counts them in the labels (zip, npz)
        "resolution": 0,  # crop and resize to this size (tfds); 0 for the original size
        "generated": "",  # source with samples of the run in init_from (objective ddo)
        "limit": 0,  # train on a random subset of this size; 0 for all
        "flip": False,  # random horizontal flips
        "augment": 0.0,  # probability of EDM's non-leaking augmentations
    })  # fmt: skip
    config.sigma_data = 0.0  # standard deviation of the data; 0 measures it

    # or loguniform; with a noise level for each frame also forcing and causal_forcing
    config.noise = ConfigDict({"name": "lognormal", "mean": -1.2, "std": 1.2})
    config.preconditioning = ConfigDict({"name": "edm"})  # or velocity, epsilon, v
    config.weight = "natural"  # 1 / c_out^2; or "fused_snr", with a noise level for each frame
    config.strength = ()  # (low, high) of the guidance strength, if it is an input of the network
    # Factors of the objective's strength, one per class, as launch.calibrate prints them; () is all
    # 1. mclr, mclr_null, cca, gft and model_guidance read them.
    config.class_strengths = ()
    config.objective = options("dsm")
    config.posterior = ConfigDict(
        {"name": ""}
    )  # exact (mixture), classifier, denoiser or "" for none
    # Work directories of the other runs that an objective or a posterior reads.
    config.companions = ConfigDict({"classifier": "", "weak": ""})
    config.optimizer = ConfigDict({
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "schedule": "constant",  # "constant", "cosine" or "inverse_sqrt"
        "decay_steps": 70_000,  # inverse_sqrt: steps before the decay begins
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "clip_norm": 0.0,  # 0 does not clip
    })  # fmt: skip
    config.ema = ConfigDict({
        "halflife_steps": 1000.0,  # 0 for none
        "ramp_up": 0.05,  # the half-life is at most this share of the steps done
        "power_stds": (),  # relative widths of power-function averages, e.g. (0.05, 0.1)
        "snapshot_every": 0,  # store them for post-hoc reconstruction; 0 for never
    })  # fmt: skip
    config.sampler = ConfigDict({
        "method": "heun",  # "euler", "heun" or "dpmpp_2m"
        "num_steps": 18,
        "sigma_min": 0.002,
        "sigma_max": 80.0,
        "rho": 7.0,
    })  # fmt: skip
    return config


def options(name: str, **values: Any) -> ConfigDict:
    """A section of a config, such as config.objective = options("mclr", beta=0.4).

    Args:
      name: an objective, network, posterior, preconditioning or distribution of noise levels, or
        package.module:Name. Objectives are explained in mclr_jax/objectives/; all but dsm, classify
        and contrastive_flow fine-tune the run in config.init_from. ddo needs config.data.generated.
      values: options that differ from the defaults.
    """
    return ConfigDict(experiment.options(name, **values))
