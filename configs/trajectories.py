"""Trajectories of your own: one model that filters, smooths and forecasts.

  mclr train trajectories --config.data.name=npy:mine.npy --workdir=runs/mine
  mclr assimilate --workdir=runs/mine --observations=seen.npz --regime=batch --out=analysis.npz

The array is (N, T, d), or (T, d) for one long trajectory; `trajectories:fields` trains on fields
(N, T, H, W, C). benchmarks/journey_trajectories.py measures such a training.
`trajectories:emulator` trains a forecast of one step, for --method=enkf and --method=particle; on
a ring or a torus with --config.network.reach=2 or 1.
"""

from ml_collections import ConfigDict

from mclr_jax.configs.base import base, options


def model() -> ConfigDict:
    """The config without data."""
    config = base()
    config.num_steps = 10_000
    config.batch_size = 32
    config.steps_per_dispatch = 10
    config.sigma_data = 1.0
    config.noise = options("forcing", shared=0.5, independent=0.1, prefix=0.2, segments=0.2)
    config.network = options("trajectory", variance=True)
    config.objective = options("dsm", label_dropout=0.0)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.warmup_steps = 500
    config.optimizer.schedule = "cosine"
    config.optimizer.clip_norm = 1.0
    config.ema.halflife_steps = 500.0
    config.log_every = 500
    config.checkpoint_every = 4000
    config.eval_examples = 4096
    return config


def emulator() -> ConfigDict:
    """The config of an emulator, without data."""
    config = model()
    config.batch_size = 64
    config.data.frames = 2
    config.network = options("mclr_jax.networks.emulator:Emulator", variance=True)
    config.objective = options("mclr_jax.objectives.emulate:Emulate")
    config.optimizer.learning_rate = 3e-3
    config.optimizer.b2 = 0.99
    config.ema.halflife_steps = 350.0
    return config


def get_config(kind: str = "states") -> ConfigDict:
    config = emulator() if kind == "emulator" else model()
    config.data.name = "npy:trajectories.npy"
    config.data.array = ""  # its name, in a file of several
    config.data.axes = ""  # such as NTD, THWC; empty: by their number
    if kind != "emulator":
        config.data.frames = 64  # of a window; more are better for smoothing long records
    config.data.time_step = 0.0
    if kind == "fields":
        config.data.frames = 16
        config.batch_size = 4
        config.steps_per_dispatch = 0
        config.network = options(
            "frame_dit", patch_size=8, width=128, depth=4, heads=4, window=8, causal=False,
            variance=True,
        )  # fmt: skip
        config.noise.sigma_min = 0.01
        config.optimizer.learning_rate = 1.5e-3
        config.log_every = 100
        config.checkpoint_every = 500
        config.eval_examples = 64
    elif kind not in ("states", "emulator"):
        raise ValueError(
            f"got trajectories:{kind}, expected trajectories, trajectories:fields or "
            "trajectories:emulator"
        )
    return config
