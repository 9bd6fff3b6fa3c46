"""A run that trains in seconds: the digits config, shrunk."""

from configs import digits


def config(**changes):
    """configs/digits.py with a small network and `changes`, keys with dots for levels."""
    result = digits.get_config()
    small = {
        "num_steps": 12,
        "batch_size": 16,
        "steps_per_dispatch": 4,
        "log_every": 4,
        "checkpoint_every": 6,
        "eval_examples": 16,
        "sample_every": 0,
        "network.width": 16,
        "network.depth": 1,
        "network.heads": 2,
        "network.dropout": 0.1,
        "network.patch_size": 4,
        "sampler.num_steps": 3,
        "ema.power_stds": (0.05, 0.1),
        "ema.snapshot_every": 6,
    }
    result.update_from_flattened_dict(small | changes)
    return result
