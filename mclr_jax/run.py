"""A run's directory: the description from which its network is rebuilt, and its weights.

`run.json` holds the config and what the network must know of the data; `checkpoints/` the training
state; `snapshots/` averages stored along the way for post-hoc EMA.
"""

import dataclasses
import io
import json
import os
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import logging
from jax.sharding import SingleDeviceSharding

from mclr_jax.experiment import DataInfo, Experiment
from mclr_jax.training import ema
from mclr_jax.training.checkpoint import Checkpoints, check_same


def write_atomically(path: pathlib.Path, data: bytes | str) -> None:
    """Write under a temporary name and rename: nobody ever sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    os.replace(temporary, path)


def save_arrays(path: pathlib.Path, **arrays: Any) -> None:
    """Write an npz file atomically; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def describe(workdir: pathlib.Path, experiment: Experiment) -> None:
    """Write run.json; where one is there already, say which config values have changed."""
    path = workdir / "run.json"
    description = _description(experiment)
    if path.exists():
        before, now = flat(json.loads(path.read_text())), flat(description)
        for name in sorted(before.keys() | now.keys()):
            old, new = (json.dumps(tree.get(name)) for tree in (before, now))
            if old != new:
                logging.warning("%s is now %s; this run was started with %s.", name, new, old)
    write_atomically(path, json.dumps(description, indent=2))


def _description(experiment: Experiment | None) -> dict[str, Any] | None:
    if experiment is None:
        return None
    return {
        "config": experiment.config.to_dict(),
        "data": dataclasses.asdict(experiment.data),
        "classifier": _description(experiment.classifier),
    }


def _experiment(description: dict[str, Any] | None) -> Experiment | None:
    """The inverse of `_description`."""
    if description is None:
        return None
    data: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in description["data"].items()
    }
    config = ml_collections.ConfigDict(description["config"], convert_dict=True)
    return Experiment(
        ml_collections.FrozenConfigDict(config),
        DataInfo(**data),
        _experiment(description.get("classifier")),
    )


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> one, its keys joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key in tree for k, v in flat(tree[key], f"{prefix}.{key}".strip(".")).items()}


def load_experiment(workdir: str | os.PathLike) -> Experiment:
    """The experiment of a run.

    Raises:
      FileNotFoundError: if `workdir` is not the directory of a run.
    """
    path = pathlib.Path(workdir) / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} is not the directory of a run: it has no run.json. Pass the --workdir that "
            "launch.train was given."
        )
    experiment = _experiment(json.loads(path.read_text()))
    assert experiment is not None
    return experiment


def load_weights(
    workdir: str | os.PathLike,
    average: str = "",
    step: int | None = None,
    strength: float = 1.0,
) -> tuple[Any, int]:
    """Parameters of a trained run, on the first device.

    Args:
      workdir: directory of the run.
      average: name of an EMA track, "none" for the raw parameters, or a number: the relative width
        of a power-function EMA that is reconstructed from the run's snapshots. "" is the first
        track, or the raw parameters of a run without any.
      step: training step; None for the last.
      strength: of a fine-tuned run: where on the line from the weights that it started from (0) to
        its own (1), or beyond. CFG is linear in gamma, and so is MCLR's optimum in the weights of a
        model that is linear in them: the line stands for all strengths up to that of training.

    Returns:
      (params, step).

    Raises:
      FileNotFoundError: if there is no checkpoint.
      ValueError: if the run has no such average, or a strength other than 1 has no start.
    """
    experiment = load_experiment(workdir)
    if strength != 1:
        tuned, step = load_weights(workdir, average, step)
        start = _start(workdir, experiment)
        return jax.tree.map(lambda a, b: a + strength * (b - a), start, tuned), step
    like = _like(experiment)
    names = list(experiment.ema_tracks)
    average = average or (names[0] if names else "none")
    if average not in (*names, "none"):
        return _reconstruct(workdir, like, average, names, step)
    branch = {"params": like} if average == "none" else {"ema": {average: like}}
    with Checkpoints(pathlib.Path(workdir) / "checkpoints", keep=None) as checkpoints:
        restored = checkpoints.restore(branch, step)
    if restored is None:
        raise FileNotFoundError(f"{workdir} has no checkpoint yet.")
    state, _, step = restored
    return (state["params"] if average == "none" else state["ema"][average]), step


def load_model(workdir: str | os.PathLike, strength: float = 1.0) -> tuple[Experiment, Any]:
    """(experiment, parameters) of a trained run, with the weights that sampling takes by default.

    strength as in `load_weights`, and the same errors.
    """
    return load_experiment(workdir), load_weights(workdir, strength=strength)[0]


def _like(experiment: Experiment) -> Any:
    """Shapes of the parameters, on the first device."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(experiment.init),
    )


def _start(workdir: str | os.PathLike, experiment: Experiment) -> Any:
    """The weights that a run was started from: its own copy, or those of config.init_from."""
    frozen, path = pathlib.Path(workdir) / "frozen", experiment.config.init_from
    if not path:
        raise ValueError(
            f"{workdir} was not started from another run (config.init_from is empty): its only "
            "strength is 1."
        )
    if frozen.exists() and "reference" in jax.eval_shape(experiment.init_frozen):
        with Checkpoints(frozen, keep=None) as store:
            restored = store.restore({"reference": _like(experiment)})
        if restored is not None:
            return restored[0]["reference"]
    return pretrained(experiment)[0]


def pretrained(experiment: Experiment) -> tuple[Any, int]:
    """The EMA weights of the run config.init_from for this experiment's network, and their step.

    Inputs that the other network lacks (strength, augmentation) get weights of zero; an
    augmentation input that this one lacks is left out.

    Raises:
      MismatchError: if the networks differ in more than that.
    """
    path = experiment.config.init_from
    weights, step = load_weights(path)
    shapes = jax.eval_shape(experiment.init)
    wanted = shapes.get("map_augment", {}).get("kernel")
    if wanted is None:
        weights.pop("map_augment", None)  # it is linear, and its input was zero when sampling
    else:
        kernel = np.zeros(wanted.shape, wanted.dtype)
        old = weights.get("map_augment", {}).get("kernel", kernel[:0])
        if old.shape[1] == kernel.shape[1] and len(old) <= len(kernel):
            kernel[: len(old)] = old
            weights["map_augment"] = {"kernel": kernel}
    check_same(shapes, weights, path)
    return weights, step


def _reconstruct(workdir, like, average: str, names, step) -> tuple[Any, int]:
    """Post-hoc EMA: the weighted sum of all snapshots up to `step`, read one by one."""
    try:
        width = float(average)
        stds = [float(name.removeprefix("power_")) for name in names if "power_" in name]
        with Checkpoints(pathlib.Path(workdir) / "snapshots", keep=None) as snapshots:
            steps = [s for s in snapshots.steps() if step is None or s <= step]
            if not steps or not stds:
                raise ValueError("the run stored no power-function snapshots")
            grid = [(s, std) for s in steps for std in stds]
            in_steps, in_stds = zip(*grid, strict=True)
            weights = ema.posthoc_coefficients(in_steps, in_stds, steps[-1], width)
            total = None
            for (s, std), weight in zip(grid, weights, strict=True):
                restored = snapshots.restore({f"power_{std}": like}, s)
                assert restored is not None  # it raises where the step is missing
                part = jax.tree.map(lambda x, w=weight: w * x, restored[0][f"power_{std}"])
                total = part if total is None else jax.tree.map(lambda a, b: a + b, total, part)
        return total, steps[-1]
    except ValueError as error:
        raise ValueError(
            f"No EMA {average!r} in {workdir}: {error}. The run has {[*names, 'none']}; a number "
            "needs config.ema.power_stds and config.ema.snapshot_every."
        ) from error
