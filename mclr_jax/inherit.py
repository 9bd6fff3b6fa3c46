"""Configs that leave keys to the run in config.init_from, as configs/finetune.py does."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from flax import traverse_util
from ml_collections import ConfigDict

from mclr_jax import config as configuration
from mclr_jax import parts, record, runs
from mclr_jax.files import flat
from mclr_jax.runs import Run

SECTIONS = ("network", "preconditioning", "data")  # left open by an empty name
# Left open by None.
KEYS = ("num_steps", "batch_size", "optimizer.learning_rate", "optimizer.warmup_steps",
        "ema.halflife_steps")  # fmt: skip
# The training of published weights, as far as fine-tuning asks: half of DiT's learning rate.
UNKNOWN: dict[str, Any] = {
    "num_steps": 50_000, "batch_size": 256, "optimizer": {"learning_rate": 5e-5},
}  # fmt: skip


def training(config: Any, workdir: str | pathlib.Path = "") -> configuration.Training:
    """The training that a config describes, `completed`; ValueError: the config is invalid."""
    if isinstance(config, configuration.Training):
        return config
    values = config.to_dict() if isinstance(config, ConfigDict) else config
    return configuration.Training.parse(completed(values, workdir))


def completed(values: Mapping[str, Any], workdir: str | pathlib.Path = "") -> dict[str, Any]:
    """The values of a config, with those of the run in init_from where they are left open.

    Left open are SECTIONS with an empty name, of which only keys count that differ from their
    default, and KEYS that are None: a fifth of the run's steps and learning rate, its batch size,
    and a twentieth of the new steps as warm-up and as half-life of the averages. With the network
    come sigma_data and the sampler, where they have their default. Another folder of images is
    shown at the run's resolution. A run that is continued, in `workdir`, keeps what it has.
    ValueError: init_from is empty, or names a run without data.
    """
    given, default = flat(dict(values)), flat(configuration.blank())
    path = values.get("init_from", "")
    names = default | {"network.name": "" if path else None}
    sections = [name for name in SECTIONS if given.get(f"{name}.name", names[f"{name}.name"]) == ""]
    open_keys = [key for key in KEYS if key in given and given[key] is None]
    if not sections and not open_keys:
        return dict(values)
    found = record.continued(pathlib.Path(workdir)) if workdir else {}
    if not found and not path:
        left = ", ".join([*sections, *open_keys])
        raise ValueError(f"This config takes {left} from a run: set config.init_from to its "
                         "directory.")  # fmt: skip
    old = flat(found or _of(runs.load(path), given.get("num_steps")))
    taken = (*sections, *("sampler", "sigma_data") * ("network" in sections))
    for key, value in old.items():
        if key.partition(".")[0] in taken and given.get(key, "") in ("", default.get(key)):
            given[key] = value
    other = "" if "data" in sections else str(given.get("data.name", ""))
    if other.startswith("folder:") and not given.get("data.resolution"):
        given["data.resolution"] = old.get("resolution", old.get("data.resolution", 0))
    if given.get("data.name") == "":
        raise ValueError(f"The run in {path} names no data: set config.data.name.")
    if given.get("data.latents") and not given.get("data.autoencoder"):
        given["data.autoencoder"] = old.get("data.autoencoder", "")
    return traverse_util.unflatten_dict(given | {key: old[key] for key in open_keys}, sep=".")


def _of(run: Run, num_steps: int | None) -> dict[str, Any]:
    """The values of a run, and shares of them, that a fine-tuning takes over."""
    trained: Mapping[str, Any] = run.config or UNKNOWN
    model, steps = parts.describe(run.model), num_steps or max(trained["num_steps"] // 5, 1)
    images = len(run.model.data.shape) == 3 and not run.data.latents
    of_data = ("num_classes", "augment_dim", "takes_strength")
    return {
        "network": {key: x for key, x in model["network"].items() if key not in of_data},
        "preconditioning": model["preconditioning"],
        "sigma_data": model["preconditioning"].get("sigma_data", 0.0),
        "sampler": dataclasses.asdict(run.sampler),
        "resolution": run.model.data.shape[0] if images else 0,
        "data": run.config.get("data") or {"autoencoder": run.data.autoencoder},
        "num_steps": steps,
        "batch_size": trained["batch_size"],
        "optimizer": {"learning_rate": trained["optimizer"]["learning_rate"] / 5,
                      "warmup_steps": steps // 20},
        "ema": {"halflife_steps": steps / 20},
    }  # fmt: skip
