"""A training in its directory: all that follows from both, each part made once, when asked for."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from mclr_jax import record, runs
from mclr_jax.adapter import NEW_LABELS, relabelled
from mclr_jax.config import Training
from mclr_jax.data.protocol import Source, check_names, names_of
from mclr_jax.files import digest
from mclr_jax.model import DataInfo, Model
from mclr_jax.runs import Run
from mclr_jax.task import Task
from mclr_jax.training.checkpoint import Checkpoints, digests
from mclr_jax.training.devices import Devices, placed
from mclr_jax.training.step import TrainState, init_state


@dataclasses.dataclass(frozen=True, eq=False)
class Experiment:
    """A training in a directory; properties raise the ValueError of what they read."""

    training: Training
    workdir: pathlib.Path

    @functools.cached_property
    def devices(self) -> Devices:
        devices = Devices(self.training.parallel)
        devices.check_batch_size(self.training.batch_size, self.training.grad_accumulation)
        return devices

    @functools.cached_property
    def source(self) -> Source:
        data = self.training.data
        source = data.source("train", self.training.seed)
        if (kind := getattr(source, "latents", "")) != data.latents:
            raise ValueError(
                f"config.data.latents is {data.latents!r}; the examples of {data.name} are "
                f"{kind or 'no latents, but images'}. Encode images by mclr encode."
            )
        return source

    @functools.cached_property
    def data(self) -> DataInfo:
        return self.training.data_info(self.source)

    @functools.cached_property
    def companions(self) -> Mapping[str, Run]:
        """The runs that the objective reads, by name; ValueError: one has other classes."""
        if self.new_labels and "reference" in self.training.asked_for_classes:
            raise ValueError(
                f"This objective asks the run in {self.training.init_from} for answers at its "
                f"classes, and the data have other ones: {self._classes}. Use an objective that "
                "does not, such as dsm or mclr_null with objective.teacher='average'. If they are "
                "the same classes by other names, set config.new_labels='keep'."
            )
        return runs.companions(self.training, self.data, self.workdir)

    @functools.cached_property
    def _base(self) -> Run | None:
        """The run that a training without checkpoints starts from, if there is one."""
        path = self.training.init_from
        return runs.load(path) if path and not record.has_checkpoints(self.workdir) else None

    @property
    def _classes(self) -> str:
        """The classes of the run that training starts from, and of the data, in words."""
        assert self._base is not None
        names = self._base.class_names, names_of(self.source)
        numbers = self._base.model.null_label, self.data.num_classes
        there, here = (
            f"{number} ({', '.join(told[:5])}{', ...' * (len(told) > 5)})" if told else str(number)
            for number, told in zip(numbers, names, strict=True)
        )
        return f"{there} there, {here} here"

    @functools.cached_property
    def new_labels(self) -> str:
        """The first rows of labels that the run in init_from does not have; "": it has all."""
        if self._base is None:
            return record.read(self.workdir).get("start", {}).get("new_labels", "")
        how, old, new = self.training.new_labels, self._base.class_names, names_of(self.source)
        same = self._base.model.null_label == self.data.num_classes
        if how == "auto":
            return "" if same and (old == new or not (old and new)) else NEW_LABELS[0]
        if how == "keep" and not same:
            raise ValueError(
                f"config.new_labels is 'keep', and the run in {self.training.init_from} has "
                f"another number of classes: {self._classes}. Use 'drawn' or 'null'."
            )
        return "" if how == "keep" else how

    @functools.cached_property
    def task(self) -> Task:
        models = {name: run.model for name, run in self.companions.items()}
        return self.training.task(self.data, models, bool(self.new_labels))

    @functools.cached_property
    def _weights(self) -> dict[str, tuple[Any, int]]:
        """The companions' weights, on the devices, and their steps."""
        read = {name: run.weights() for name, run in self.companions.items()}
        return {name: (self.devices.put_state(tree), step) for name, (tree, step) in read.items()}

    @property
    def frozen(self) -> dict[str, Any]:
        """The companions' weights, on the devices."""
        return {name: tree for name, (tree, _) in self._weights.items()}

    @functools.cached_property
    def extra(self) -> dict[str, Source]:
        """Further sources that the objective reads: other data, samples of the frozen model."""
        extra = {"other": self.source} if "other" in self.task.needs else {}
        if "generated" not in self.task.needs:
            return extra
        if not self.training.data.generated:
            raise ValueError(
                "This objective needs samples of the model that training starts from: write them "
                "with mclr sample and set config.data.generated=npz:FILE."
            )
        generated = self.training.data.generated_source()
        if (shape := tuple(generated.shape)) != self.data.shape:
            raise ValueError(
                f"config.data.generated: examples of shape {shape}; expected {self.data.shape}."
            )
        return extra | {"generated": generated}

    @functools.cached_property
    def held_out(self) -> dict[str, Source]:
        """The held-out examples, named "", and those of `extra`."""
        data = self.data
        test = self.training.data.source("test", self.training.seed, data)
        if tuple(test.shape) != data.shape or test.num_classes > data.num_classes:
            raise ValueError(
                f"The held-out set has examples of shape {tuple(test.shape)} in {test.num_classes} "
                f"classes, the training set {data.shape} in {data.num_classes}: change data.test."
            )
        check_names(self.source, test)
        # No samples of the frozen model are held out.
        others = {f"{name}_": {"other": test}.get(name, x) for name, x in self.extra.items()}
        return {"": test, **others}

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """The content of run.json, without the history."""
        found = record.describe(self.training, self.task.model, self.task.companions, self.source)
        if self.frozen:
            found["frozen"] = digest(digests(self.devices.to_global(self.frozen)))
        return found

    def first_state(self) -> tuple[TrainState, dict[str, Any] | None]:
        """The state before the first step, and the origin of its weights, if it is a run."""
        training, task, devices = self.training, self.task, self.devices
        state = devices.initialise(task.init, functools.partial(init_state, task))
        if not (path := training.init_from):
            return state, None
        base = self.companions.get("reference") or self._base
        assert base is not None
        weights, step = self._weights.get("reference") or base.weights()
        steps = base.config.get("num_steps", step)
        log = logging.warning if step < steps else logging.info
        log("Weights from step %d of %d of %s.", step, steps, path)
        if self.new_labels:
            logging.warning(
                "The classes of %s are others: %s. The rows of the labels are %s; the null "
                "label's is kept.", path, self._classes,
                {"null": "those of the null label"}.get(self.new_labels, "drawn anew"),
            )  # fmt: skip
            change = functools.partial(
                relabelled, inputs=task.model.label_inputs, at_null=self.new_labels == "null"
            )
            given = devices.put_state(weights), state.params
            places = devices.state_shardings(jax.eval_shape(change, *given))
            weights = jax.jit(change, out_shardings=places)(*given)
        weights = runs.fitted(weights, task.model, path, base.model)
        params = devices.put_state(task.adapter.of(state.params, weights))
        params, *copies = (jax.tree.map(jnp.copy, params) for _ in range(1 + len(state.ema)))
        averages = dict(zip(state.ema, copies, strict=True))
        origin = {"run": path, "step": step}
        origin |= {"new_labels": self.new_labels} if self.new_labels else {}
        return state.replace(params=params, ema=averages), origin

    def stored_state(self, checkpoints: Checkpoints) -> tuple[TrainState, int] | None:
        """State and step of the newest checkpoint; None: there is no checkpoint."""
        devices = self.devices
        shapes = jax.eval_shape(functools.partial(init_state, self.task), self.task.shapes)
        layout = Devices("data") if devices.parallel == "pmap" else devices
        restored = checkpoints.restore(placed(shapes, layout.state_shardings(shapes)))
        return (devices.from_global(restored[0]), restored[1]) if restored else None

    def for_sampling(self, state: TrainState) -> Any:
        """All parameters for sampling, of a state over all processes."""
        params = self.task.default(state.params, state.ema)
        return self._merge(params, self.devices.to_global(self.frozen))

    @functools.cached_property
    def _merge(self) -> Any:
        """`Task.merged`, of arrays over all processes."""
        return jax.jit(self.task.merged) if self.training.adapter.used else self.task.merged

    @property
    def model(self) -> Model:
        return self.task.model
