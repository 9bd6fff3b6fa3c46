"""What tests of benchmarks/ share: configs of no size, and what rows say of their origin."""

import tasks

SMALL = {
    "num_steps": 3,
    "batch_size": 32,  # 4 for each device: a quarter of the negatives needs as many
    "steps_per_dispatch": 1,
    "log_every": 1,
    "checkpoint_every": 3,
    "eval_examples": 0,
    "sample_every": 0,
    "sampler.num_steps": 2,
    "optimizer.warmup_steps": 0,
    "network.width": 16,
    "network.depth": 1,
}
MADE_BY = {"command", "revision"}
TRAINED = MADE_BY | {"name", "config", "changes", "steps", "parameters"}


def config(file, changes=()):
    """`tasks.config_of` with a network of no size and a few steps."""
    found = tasks.config_of(file, dict(changes))
    found.update_from_flattened_dict(SMALL)
    if found.network.name == "dit":
        found.network.update({"heads": 2, "patch_size": 4})
    return found
