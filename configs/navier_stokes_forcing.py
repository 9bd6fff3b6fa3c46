"""Vorticity of 2-D Navier-Stokes, 64x64: a FrameDiT of 1.80M parameters for data assimilation.

About 15 minutes on one core of an AMD EPYC with AVX-512, after 4 minutes that make the data (0.6 GB
in ~/.cache). benchmarks/navier_stokes.py measures it: a run that was stopped twice, and had the
learning rates of a config of 4,000 steps from step 1,841 to 2,681.
"""

from ml_collections import ConfigDict

from mclr_jax.configs import base, lorenz63_forcing


def get_config() -> ConfigDict:
    config = lorenz63_forcing.get_config()
    config.num_steps = 6000
    config.batch_size = 2
    config.steps_per_dispatch = 0
    config.data.system = "navier_stokes"
    config.data.frames = 16
    config.data.trajectories = 128
    config.data.length = 256
    config.noise.sigma_min = 0.01
    config.network = base.options(
        "frame_dit", patch_size=8, reach=1, width=128, depth=4, heads=4, window=8, causal=False,
        variance=True,
    )  # fmt: skip
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.warmup_steps = 300
    config.ema.halflife_steps = 400.0
    config.log_every = 100
    config.checkpoint_every = 400
    config.eval_examples = 64
    return config
