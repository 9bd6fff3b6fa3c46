"""The directory of a run: its model, its weights and its companions.

`run.json` holds the config, the model and its companions with all values resolved; `checkpoints/`
the training state; `snapshots/` averages of earlier steps for post-hoc EMA; `frozen/` the weights
of the companions, so that the run needs no other directory.
"""

import dataclasses
import functools
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from flax import traverse_util

from mclr_jax import ema, experiment
from mclr_jax.files import flat, write_json
from mclr_jax.model import DataInfo, Model
from mclr_jax.samplers import Sampler
from mclr_jax.task import MADE_HERE
from mclr_jax.training.checkpoint import Checkpoints, check_same


def describe(
    workdir: pathlib.Path, config: Any, model: Model, companions: Mapping[str, Model]
) -> None:
    """Write run.json; warn of each value that differs from those of an existing run.json."""
    path = workdir / "run.json"
    description = {
        "config": config.to_dict(),
        "model": experiment.describe(model),
        "companions": {name: experiment.describe(other) for name, other in companions.items()},
    }
    if path.exists():
        texts = path.read_text(), json.dumps(description)
        before, now = (flat(json.loads(text)) for text in texts)
        for name in sorted(before.keys() | now.keys()):
            old, new = (json.dumps(tree.get(name)) for tree in (before, now))
            if old != new:
                logging.warning("%s is now %s; this run was started with %s.", name, new, old)
    write_json(path, description)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, its directory, its config, and the companions of its training by name."""

    workdir: pathlib.Path
    config: ml_collections.FrozenConfigDict
    model: Model
    companions: Mapping[str, Model]

    @property
    def sampler(self) -> Sampler:
        """config.sampler as a Sampler."""
        return Sampler(**self.config.sampler)

    def weights(
        self, average: str = "", step: int | None = None, interpolation: float = 1.0
    ) -> tuple[Any, int]:
        """(parameters on the first device, step), by default of the last step.

        `average` is the name of an EMA track; "none": the raw parameters; a number: the relative
        width of a power-function EMA, reconstructed from the run's snapshots; "": the first track,
        or the raw parameters of a run without tracks. `interpolation` is the place on the line from
        the weights that a fine-tuned run started from (0) to its own (1), or beyond. CFG is linear
        in gamma; likewise, for a model linear in its weights, the line has the optimum of MCLR at
        each strength up to that of training.

        FileNotFoundError: the run has no checkpoint. ValueError: no such average, or an
        interpolation other than 1 of a run without a start.
        """
        if interpolation != 1:
            tuned, step = self.weights(average, step)
            start = self._start()
            return jax.tree.map(lambda a, b: a + interpolation * (b - a), start, tuned), step
        like, names = _like(self.model), list(ema.tracks(self.config.ema))
        average = average or (names[0] if names else "none")
        if average not in (*names, "none"):
            return self._reconstruct(like, average, names, step)
        branch = {"params": like} if average == "none" else {"ema": {average: like}}
        with Checkpoints(self.workdir / "checkpoints", keep=None) as checkpoints:
            restored = checkpoints.restore(branch, step)
        if restored is None:
            raise FileNotFoundError(f"{self.workdir} has no checkpoint yet.")
        state, step = restored
        return (state["params"] if average == "none" else state["ema"][average]), step

    def _start(self) -> Any:
        """The weights that training started from: the run's copy, or those of config.init_from."""
        if not self.config.init_from:
            raise ValueError(
                f"{self.workdir} was not started from another run (config.init_from is empty): its "
                "only interpolation is 1."
            )
        if "reference" in self.companions and (self.workdir / "frozen").exists():
            with Checkpoints(self.workdir / "frozen", keep=None) as store:
                restored = store.restore({"reference": _like(self.companions["reference"])})
            if restored is not None:
                return fitted(restored[0]["reference"], self.model, f"{self.workdir}/frozen")
        return start_weights(self.config.init_from, self.model)

    def _reconstruct(self, like: Any, average: str, names: list[str], step: int | None):
        """Post-hoc EMA: a weighted sum of the snapshots up to `step`, read one at a time."""
        try:
            width = float(average)
            stds = [float(name.removeprefix("power_")) for name in names if "power_" in name]
            with Checkpoints(self.workdir / "snapshots", keep=None) as snapshots:
                steps = [s for s in snapshots.steps() if step is None or s <= step]
                if not steps or not stds:
                    raise ValueError("the run stored no power-function snapshots")
                in_steps, in_stds = zip(*itertools.product(steps, stds), strict=True)
                weights = ema.posthoc_coefficients(in_steps, in_stds, steps[-1], width)
                total = jax.tree.map(lambda x: 0.0, like)
                for s, std, weight in zip(in_steps, in_stds, weights, strict=True):
                    restored = snapshots.restore({f"power_{std}": like}, s)
                    assert restored is not None  # `restore` raises if the step is missing
                    part = restored[0][f"power_{std}"]
                    total = jax.tree.map(lambda t, x, w=weight: t + w * x, total, part)
            return total, steps[-1]
        except ValueError as error:
            raise ValueError(
                f"No EMA {average!r} in {self.workdir}: {error}. The run has {[*names, 'none']}; a "
                "number needs config.ema.power_stds and config.ema.snapshot_every."
            ) from error


def load(workdir: str | pathlib.Path) -> Run:
    """The run in a directory; FileNotFoundError: no run.json; ValueError: an old run.json."""
    path = pathlib.Path(workdir) / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} is not the directory of a run: no run.json. Pass the --workdir of training."
        )
    description = json.loads(path.read_text())
    if "model" not in description:
        raise ValueError(f"{path} was written by an older version; train that run again.")
    config = ml_collections.FrozenConfigDict(description["config"])
    others = {name: experiment.model_of(d) for name, d in description["companions"].items()}
    return Run(path.parent, config, experiment.model_of(description["model"]), others)


def load_model(workdir: str | pathlib.Path, interpolation: float = 1.0) -> tuple[Model, Any]:
    """(model, parameters) of a run: its last step and its first average, if it has one."""
    run = load(workdir)
    return run.model, run.weights(interpolation=interpolation)[0]


@functools.lru_cache(maxsize=8)
def shapes(model: Model) -> Any:
    """The shapes and types of a model's parameters."""
    return jax.eval_shape(model.init, jax.random.key(0))


def placed(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with a tree of shardings, as `Checkpoints.restore` needs it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )


def _like(model: Model) -> Any:
    """The shapes of the parameters, on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return placed(shapes(model), jax.tree.map(lambda x: first, shapes(model)))


def fitted(weights: Any, model: Model, source: str) -> Any:
    """Weights of another model for this one, which may differ in optional inputs.

    Optional inputs of this model alone get weights of zero; those of the other model alone, which
    were zero in sampling, are removed. MismatchError: another difference.
    """
    optional = set(getattr(model.network, "optional_inputs", ()))
    wanted, given = (traverse_util.flatten_dict(tree) for tree in (shapes(model), weights))
    changed = {path for path in wanted.keys() ^ given.keys() if optional & set(path)}
    result = {path: x for path, x in given.items() if path not in changed}
    for path in changed & wanted.keys():
        result[path] = jnp.zeros(wanted[path].shape, wanted[path].dtype)
    tree = traverse_util.unflatten_dict(result)
    check_same(shapes(model), tree, source)
    check_same(tree, shapes(model), "the network of this run")
    return tree


def start_weights(path: str, model: Model) -> Any:
    """The default weights of the run in `path`, `fitted` to a model."""
    weights, step = load(path).weights()
    logging.info("Weights from step %d of %s.", step, path)
    return fitted(weights, model, path)


def companion_paths(config: Any) -> dict[str, str]:
    """The directories of the runs that the objective reads, by name; ValueError: one is not set."""
    paths = {**config.companions, "reference": config.init_from}
    special = {"reference": "a frozen reference", "classifier": "a classifier"}
    needed = sorted(experiment.needs(config) - MADE_HERE)
    for name in needed:
        if not paths.get(name):
            what = special.get(name, f"the companion run {name!r}")
            key = "config.init_from" if name == "reference" else f"config.companions.{name}"
            raise ValueError(f"This objective needs {what}: set {key} to the directory of its run.")
    return {name: paths[name] for name in needed}


def companions(config: Any, data: DataInfo, workdir: pathlib.Path) -> dict[str, Model]:
    """The models that the objective reads, by name; from run.json if `workdir` has their weights.

    ValueError: a model is missing, of the wrong kind, or for other data.
    """
    paths, found = companion_paths(config), {}
    held = load(workdir).companions if (workdir / "frozen").exists() else {}
    for name, path in paths.items():
        model = held[name] if name in held else load(path).model
        kind = "a classifier" if model.is_classifier else "a denoiser"
        wanted = "a classifier" if name == "classifier" else "a denoiser"
        got, expected = ((info.shape, info.num_classes) for info in (model.data, data))
        if (kind, got) != (wanted, expected):
            raise ValueError(
                f"Companion {name!r} in {path!r}: expected {wanted}, data shape and number of "
                f"classes {expected}; it is {kind} of {got}."
            )
        found[name] = model
    return found
