"""Runs that train in seconds: configs of the project with small networks."""

import importlib
import os
import pathlib
import signal
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mclr_jax import main, parts, record
from mclr_jax.config import NOISE_LEVELS, OBJECTIVES, POSTERIORS, Training
from mclr_jax.configs import base
from mclr_jax.files import read_lines
from mclr_jax.model import shapes_of
from mclr_jax.training.checkpoint import Checkpoints
from mclr_jax.training.loop import Hook

SECTIONS = {
    "network": parts.NETWORKS,
    "objective": OBJECTIVES,
    "posterior": POSTERIORS,
    "preconditioning": parts.PRECONDITIONINGS,
    "noise": NOISE_LEVELS,
}
SMALL = {
    "num_steps": 12,
    "batch_size": 16,
    "steps_per_dispatch": 4,
    "log_every": 4,
    "checkpoint_every": 6,
    "eval_examples": 16,
    "sample_every": 0,
    "sampler.num_steps": 3,
}
LINEAR = {"network.name": "tiny:Linear"}  # where the network is of no importance
POWER = {"ema.power_stds": (0.05, 0.1), "ema.snapshot_every": 6}
NETWORKS = {
    "mixture": {"network.width": 16, "network.depth": 1, "network.dropout": 0.1},
    "digits": {
        "network.width": 16,
        "network.depth": 1,
        "network.heads": 2,
        "network.dropout": 0.1,
        "network.patch_size": 4,
    },
}


NETWORKS["mixture_mclr"] = NETWORKS["mixture"]


class Linear(nn.Module):
    """`--config.network.name=tiny:Linear`: one linear map of all inputs, which costs no tracing."""

    out_channels: int
    num_classes: int
    takes_strength: bool = False
    optional_inputs = ("map_strength",)

    @nn.compact
    def __call__(self, x, c_noise, condition):
        told = nn.Embed(self.num_classes + 1, 4)(condition.label)
        flat = jnp.concatenate([x.reshape(len(x), -1), told, c_noise[:, None]], axis=1)
        out = nn.Dense(x[0].size)(flat)
        if self.takes_strength:
            strength = jnp.zeros(len(x)) if condition.strength is None else condition.strength
            out += nn.Dense(x[0].size, name="map_strength")(strength[:, None])
        return out.reshape(x.shape)


def config(name="mixture", **changes):
    """configs/NAME.py with a small network and `changes`, whose keys have dots for levels.

    Where SECTION.name is changed, that section has the options of its new name.
    """
    result = importlib.import_module(f"mclr_jax.configs.{name}").get_config()
    small = SMALL | NETWORKS[name]
    if ":" in changes.get("network.name", ""):
        result.network, small = ConfigDict({"name": changes["network.name"]}), SMALL
    for section, known in SECTIONS.items():
        if (new := changes.get(f"{section}.name")) in known:
            result[section] = base.options(new)
    result.update_from_flattened_dict(small | changes)
    return result


def classifier(name="mixture"):
    """A classifier of noisy data for `config(name)`."""
    result = config(name)
    result.objective = ConfigDict({"name": "classify"})
    result.network = ConfigDict({"name": "mlp_classifier", "width": 16, "depth": 1, "dropout": 0.0,
                                 "dtype": "float32"})  # fmt: skip
    return result


def source_of(given):
    """The training data of a config."""
    return Training.parse(given).data.source("train", given.seed)


def model_of(given):
    """The model of a config."""
    training = Training.parse(given)
    return training.model(training.data_info(source_of(given)))


def drawn(shapes, seed=0, size=0.1):
    """Normal numbers in place of the leaves of a tree, drawn by NumPy, which compiles nothing."""
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(lambda x: jnp.asarray(size * draw(size=x.shape), x.dtype), shapes)


def normal(seed, *shape):
    """Normal numbers (*shape) float32, drawn by NumPy."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def params(network, *inputs, seed=0, size=0.3):
    """Random parameters of a network that is called with such inputs, none of which is zero."""
    return drawn(jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"], seed, size)


def weights(model, seed=0, size=0.1):
    """Random parameters, none of which is zero."""
    return drawn(shapes_of(model), seed, size)


def describe(workdir, companions=(), given=None, **changes):
    """(config, model) of a run that has not begun, with its run.json."""
    given = given or config(**changes)
    training, model = Training.parse(given), model_of(given)
    description = record.describe(training, model, dict(companions), source_of(given))
    record.write(workdir, description, record.changes(workdir, description), 0)
    return given, model


def with_weights(workdir, state, step=1):
    """Write a checkpoint of a run."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, state)


def records(workdir):
    """The log of a run, without the times."""
    lines = read_lines(workdir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def train_together(address, number, workdir, parallel, kill=""):
    """In a new process, one of two: 12 steps; `kill` ends process 1 by SIGKILL after step 8."""

    def die(_):
        while not (pathlib.Path(workdir) / "checkpoints" / "6").exists():  # is written meanwhile
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    jax.distributed.initialize(address, 2, int(number))
    hooks = [Hook(0, die, at=(8,))] if kill and number == "1" else []
    main.train(config(parallel=parallel, sample_every=12, **LINEAR), workdir, hooks)
