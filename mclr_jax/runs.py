"""A run's directory: the description from which its model is rebuilt, its weights, its companions.

`run.json` holds the config, the model and its companions with all values resolved; `checkpoints/`
the training state; `snapshots/` averages stored along the way for post-hoc EMA; `frozen/` the
weights of the companions, so that the run needs no other directory.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from mclr_jax import ema, experiment
from mclr_jax.files import flat, write_json
from mclr_jax.model import DataInfo, Model
from mclr_jax.samplers import Sampler
from mclr_jax.task import MADE_HERE
from mclr_jax.training.checkpoint import Checkpoints, check_same


def describe(
    workdir: pathlib.Path, config: Any, model: Model, companions: Mapping[str, Model]
) -> None:
    """Write run.json; where one is there already, say which values have changed."""
    path = workdir / "run.json"
    description = {
        "config": config.to_dict(),
        "model": experiment.describe(model),
        "companions": {name: experiment.describe(other) for name, other in companions.items()},
    }
    if path.exists():
        before = flat(json.loads(path.read_text()))
        now = flat(json.loads(json.dumps(description)))
        for name in sorted(before.keys() | now.keys()):
            old, new = (json.dumps(tree.get(name)) for tree in (before, now))
            if old != new:
                logging.warning("%s is now %s; this run was started with %s.", name, new, old)
    write_json(path, description)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model and where its weights are.

    Attributes:
      workdir: directory of the run.
      config: as the run was started.
      model: its model.
      companions: the other models that its training read, by name.
    """

    workdir: pathlib.Path
    config: ml_collections.FrozenConfigDict
    model: Model
    companions: Mapping[str, Model]

    @property
    def sampler(self) -> Sampler:
        """The run's own sampler, config.sampler."""
        return Sampler(**self.config.sampler.to_dict())

    def weights(
        self, average: str = "", step: int | None = None, interpolation: float = 1.0
    ) -> tuple[Any, int]:
        """Parameters, on the first device.

        Args:
          average: name of an EMA track, "none" for the raw parameters, or a number: the relative
            width of a power-function EMA that is reconstructed from the run's snapshots. "" is the
            first track, or the raw parameters of a run without any.
          step: training step; None for the last.
          interpolation: of a fine-tuned run: place on the line from the weights that it started
            from (0) to its own (1), or beyond. CFG is linear in gamma, and so is MCLR's optimum in
            the weights of a model that is linear in them: the line then has a model for every
            strength up to that of training.

        Returns:
          (params, step).

        Raises:
          FileNotFoundError: if there is no checkpoint.
          ValueError: if the run has no such average, or an interpolation other than 1 has no start.
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
        """The weights that the run was started from: its own copy, or those of config.init_from."""
        if not self.config.init_from:
            raise ValueError(
                f"{self.workdir} was not started from another run (config.init_from is empty): its "
                "only interpolation is 1."
            )
        if "reference" in self.companions and (self.workdir / "frozen").exists():
            reference = {"reference": _like(self.companions["reference"])}
            with Checkpoints(self.workdir / "frozen", keep=None) as store:
                restored = store.restore(reference)
            if restored is not None:
                return fitted(restored[0]["reference"], self.model, str(self.workdir / "frozen"))
        return start_weights(self.config.init_from, self.model)[0]

    def _reconstruct(self, like: Any, average: str, names: list[str], step: int | None):
        """Post-hoc EMA: the weighted sum of all snapshots up to `step`, read one by one."""
        try:
            width = float(average)
            stds = [float(name.removeprefix("power_")) for name in names if "power_" in name]
            with Checkpoints(self.workdir / "snapshots", keep=None) as snapshots:
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
                    total = part if total is None else jax.tree.map(jnp.add, total, part)
            return total, steps[-1]
        except ValueError as error:
            raise ValueError(
                f"No EMA {average!r} in {self.workdir}: {error}. The run has {[*names, 'none']}; a "
                "number needs config.ema.power_stds and config.ema.snapshot_every."
            ) from error


def load(workdir: str | os.PathLike) -> Run:
    """The run of a directory.

    Raises:
      FileNotFoundError: if `workdir` is not the directory of a run.
      ValueError: if its run.json is of another version.
    """
    path = pathlib.Path(workdir) / "run.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{workdir} is not the directory of a run: it has no run.json. Pass the --workdir that "
            "launch.train was given."
        )
    description = json.loads(path.read_text())
    if "model" not in description:
        raise ValueError(f"{path} was written by an older version; train that run again.")
    config = ml_collections.ConfigDict(description["config"], convert_dict=True)
    return Run(
        pathlib.Path(workdir),
        ml_collections.FrozenConfigDict(config),
        experiment.model_of(description["model"]),
        {name: experiment.model_of(d) for name, d in description["companions"].items()},
    )


def load_model(workdir: str | os.PathLike, interpolation: float = 1.0) -> tuple[Model, Any]:
    """(model, parameters) of a run, with the weights that sampling takes by default."""
    run = load(workdir)
    return run.model, run.weights(interpolation=interpolation)[0]


@functools.lru_cache(maxsize=8)
def _shapes(model: Model) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


def _like(model: Model) -> Any:
    """Shapes of the parameters, on the first device."""
    sharding = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), _shapes(model)
    )


def fitted(weights: Any, model: Model, source: str) -> Any:
    """Another model's weights for this one: optional inputs that they lack get weights of zero.

    Optional inputs that this model lacks are left out: they were zero when sampling.

    Raises:
      MismatchError: if the networks differ in more than that.
    """
    optional = set(getattr(model.network, "optional_inputs", ()))
    wanted, given = (traverse_util.flatten_dict(tree) for tree in (_shapes(model), weights))
    result = {path: x for path, x in given.items() if path in wanted or not optional & set(path)}
    for path, shape in wanted.items():
        if path not in given and optional & set(path):
            result[path] = jnp.zeros(shape.shape, shape.dtype)
    tree = traverse_util.unflatten_dict(result)
    check_same(_shapes(model), tree, source)
    check_same(tree, _shapes(model), "the network of this run")
    return tree


def start_weights(path: str, model: Model) -> tuple[Any, int]:
    """The default weights of the run in `path`, fitted to the model that starts from them; step.

    Raises:
      MismatchError: if the networks differ in more than optional inputs.
    """
    weights, step = load(path).weights()
    logging.info("Weights from step %d of %s.", step, path)
    return fitted(weights, model, path), step


# ---- companions ----------------------------------------------------------------------------------


def companion_paths(config: Any) -> dict[str, str]:
    """The work directories of the runs that a config's objective reads, by name.

    Raises:
      ValueError: naming the key where one is not given.
    """
    paths = {**config.companions, "reference": config.init_from}
    found = {}
    for name in sorted(experiment.needs(config) - MADE_HERE):
        key = "config.init_from" if name == "reference" else f"config.companions.{name}"
        if not paths.get(name):
            what = {"reference": "a frozen reference", "classifier": "a classifier"}
            raise ValueError(
                f"This objective needs {what.get(name, f'the companion run {name!r}')}: set {key} "
                "to the work directory of its run."
            )
        found[name] = paths[name]
    return found


def companions(config: Any, data: DataInfo, workdir: pathlib.Path) -> dict[str, Model]:
    """The models that a config's objective reads; of a run that holds their weights its own copies.

    Raises:
      ValueError: if one is not given, or is for other data.
    """
    paths, found = companion_paths(config), {}
    held = load(workdir).companions if (workdir / "frozen").exists() else {}
    for name, path in paths.items():
        model = held[name] if name in held else load(path).model
        kind = "a classifier" if model.is_classifier else "a denoiser"
        wanted = "a classifier" if name == "classifier" else "a denoiser"
        got = (kind, model.data.shape, model.data.num_classes)
        expected = (wanted, data.shape, data.num_classes)
        if got != expected:
            raise ValueError(
                f"Companion {name!r} in {path!r}: expected {wanted}, data shape and number of "
                f"classes {expected[1:]}; it is {kind} of {got[1:]}."
            )
        found[name] = model
    return found
