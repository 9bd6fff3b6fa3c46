"""A run: a directory with a model and its weights, trained here or published by others.

`run.json` (`record`) has the model and the sampler, and the config of a training; `checkpoints/`
the training state, or the weights alone; `snapshots/` averages of earlier steps for post-hoc EMA;
`frozen/NAME/` copies of the runs that the objective reads, so that no other directory is needed.
"""

import contextlib
import dataclasses
import itertools
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from mclr_jax import parts, record
from mclr_jax.adapter import Adapter, relabelled
from mclr_jax.config import Training
from mclr_jax.data.protocol import Source
from mclr_jax.data.sources import Data
from mclr_jax.files import flat, made
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.samplers import Sampler
from mclr_jax.schema import read
from mclr_jax.training import ema
from mclr_jax.training.checkpoint import Checkpoints, MismatchError, check_same
from mclr_jax.training.devices import barrier, is_first, placed
from mclr_jax.training.ema import EMA


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with weights, the directory that has them, and how to sample."""

    workdir: pathlib.Path
    model: Model
    sampler: Sampler
    averages: tuple[str, ...] = ()  # names of EMA tracks; the first is the default
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # empty: not trained here
    data: Data = Data(name="")
    stored: tuple[str, str] = ("checkpoints", "params")  # folder and branch of the raw parameters
    class_names: tuple[str, ...] = ()  # of label 0, 1, ...; empty: they are not known
    adapter: Adapter = Adapter()  # which of the weights are stored here
    new_labels: str = ""  # how a fine-tuning began its rows of new labels; empty: it has no others

    def source(self, split: str) -> Source:
        """The data of training, or the held-out data for split "test".

        ValueError: the run does not name its data. FileNotFoundError: they are not there.
        """
        if not self.data.name:
            raise ValueError(f"{self.workdir} names no data; name them by --data.")
        try:
            return self.data.source(split, self.config.get("seed", 0))
        except FileNotFoundError as error:
            origin = f"{self.workdir} was trained on {self.data.name}"
            raise FileNotFoundError(f"{error}. {origin}; give its new place by --data.") from error

    def weights(
        self, average: str = "", step: int | None = None, interpolation: float = 1.0
    ) -> tuple[Any, int]:
        """(parameters on the first device, step), by default of the last step.

        `average` is the name of an EMA track; "none": the raw parameters; a number: the relative
        width of a power-function EMA, reconstructed from the run's snapshots; "": the first track,
        or the raw parameters of a run without tracks. `interpolation` is the place on the line from
        the weights that a fine-tuned run started from (0) to its own (1), or beyond. CFG is linear
        in gamma; likewise, for a model linear in its weights, the line has the optimum of MCLR at
        each strength up to that of training. Rows of labels that the start does not have are at
        both ends the run's own. An adapter is merged with the weights of its start.

        FileNotFoundError: the run has no checkpoint. ValueError: no such average, or an
        interpolation other than 1 of a run without a start.
        """
        if interpolation != 1:
            tuned, step = self.weights(average, step)
            start, name = self._start()
            if self.new_labels:
                start = relabelled(start, tuned, self.model.label_inputs)
            start = fitted(start, self.model, name)
            return jax.tree.map(lambda a, b: a + interpolation * (b - a), start, tuned), step
        if self.adapter.used:
            start, _ = self._start()
            trained, step = self._trained(self._in_training(start), average, step)
            return self.adapter.merged(shapes_of(self.model), start, trained), step
        return self._trained(shapes_of(self.model), average, step)

    def _in_training(self, start: Any) -> Any:
        """The shapes of the weights that an adapter trains."""
        new = self.model.label_inputs if self.new_labels else ()
        return jax.eval_shape(
            lambda: self.adapter.start(
                jax.random.key(0), self.model.init(jax.random.key(0)), start, new
            )
        )

    def _trained(self, shapes: Any, average: str, step: int | None) -> tuple[Any, int]:
        """The stored weights, and their step."""
        first, (folder, raw) = SingleDeviceSharding(jax.local_devices()[0]), self.stored
        like = placed(shapes, jax.tree.map(lambda x: first, shapes))
        average = average or (*self.averages, "none")[0]
        if average not in (*self.averages, "none"):
            return self._reconstruct(like, average, step)
        branch = {raw: like} if average == "none" else {"ema": {average: like}}
        with self._stored(folder) as checkpoints:
            restored = checkpoints.restore(branch, step)
        if restored is None:
            raise FileNotFoundError(f"{self.workdir} has no checkpoint yet.")
        state, step = restored
        return (state[raw] if average == "none" else state["ema"][average]), step

    @contextlib.contextmanager
    def _stored(self, folder: str) -> Iterator[Checkpoints]:
        """The checkpoints in a folder, to read; a folder that is not there is not left behind."""
        path = self.workdir / folder
        with made(path), Checkpoints(path, keep=None) as checkpoints:
            yield checkpoints

    def _start(self) -> tuple[Any, str]:
        """The weights that training started from, of the run's copy or of config.init_from, and
        where they are."""
        if not (path := self.config.get("init_from")):
            raise ValueError(
                f"{self.workdir} was not started from another run (config.init_from is empty): its "
                "only interpolation is 1."
            )
        try:
            start = _held(self.workdir, "reference") or load(path)
            return start.weights()[0], str(start.workdir)
        except FileNotFoundError as error:
            origin = f"{self.workdir} was started from {path}"
            raise FileNotFoundError(
                f"{error} {origin}; give its new place by --init_from."
            ) from error

    def _reconstruct(self, like: Any, average: str, step: int | None):
        """Post-hoc EMA: a weighted sum of the snapshots up to `step`, read one at a time."""
        names = self.averages
        try:
            width = float(average)
            stds = [float(name.removeprefix("power_")) for name in names if "power_" in name]
            with self._stored("snapshots") as snapshots:
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


def load(
    workdir: str | pathlib.Path, init_from: str = "", data: str = "", autoencoder: str = ""
) -> Run:
    """The run in a directory; FileNotFoundError: no run.json; ValueError: an old run.json.

    Files and runs that its config names are looked for at their absolute path, and then relative to
    `workdir`. `init_from`, `data` (a source, see `sources.load`, or the folder config.data.path)
    and `autoencoder` are new places that replace those of the config.
    """
    workdir = pathlib.Path(workdir)
    if not (description := record.read(workdir)):
        raise FileNotFoundError(
            f"{workdir} is not the directory of a run: no run.json. Pass the --workdir of training."
        )
    try:
        config = record.at_new_places(description, workdir)
        config |= {"init_from": init_from} if init_from else {}
        origin = record.origin(description, workdir)
        told = {key: origin[key] for key in ("latents", "autoencoder") if key in origin}
        held = read(Data, config["data"] if config else {"name": "", **told}, "config.data")
        if data:
            held = held.moved(data)
        if autoencoder:
            held = dataclasses.replace(held, autoencoder=autoencoder)
        model = parts.model_of(description["model"])
        hash(model)  # fails for values of other types
        sampler = read(Sampler, description.get("sampler") or config["sampler"], "config.sampler")
        averages = description.get("averages")  # which earlier versions did not write
        if averages is None:
            averages = read(EMA, config["ema"], "config.ema").tracks
        class_names = record.class_names(description)
        adapter = read(Adapter, config.get("adapter", {}), "config.adapter")
        new_labels = description.get("start", {}).get("new_labels", "")
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{workdir}/run.json is damaged ({reason}); restore it.") from error
    except ValueError as error:
        raise ValueError(f"{workdir}/run.json: {error}") from error
    return Run(
        workdir, model, sampler, tuple(averages), config, held, class_names=class_names,
        adapter=adapter, new_labels=new_labels,
    )  # fmt: skip


def load_model(workdir: str | pathlib.Path, interpolation: float = 1.0) -> tuple[Model, Any]:
    """(model, parameters) of a run: its last step and its first average, if it has one."""
    run = load(workdir)
    return run.model, run.weights(interpolation=interpolation)[0]


def publish(
    workdir: pathlib.Path, model: Model, params: Any, sampler: Sampler, step: int = 0,
    origin: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write parameters, on the devices of all processes, as a run without a training.

    `origin` says where the weights come from.
    """
    with Checkpoints(workdir / "checkpoints", keep=None) as checkpoints:
        checkpoints.save(step, {"params": params})
    if is_first():
        described = record.of_model(model, [], dataclasses.asdict(sampler))
        record.write(workdir, described | ({"origin": dict(origin)} if origin else {}))


def fitted(weights: Any, model: Model, source: str, other: Model | None = None) -> Any:
    """Weights of another model for this one, which may differ in optional inputs.

    Optional inputs of this model alone get weights of zero; those of the other model alone, which
    were zero in sampling, are removed. MismatchError: another difference; it names the values in
    which `other`, the model of the weights, differs, and a warning does so if all shapes fit.
    """
    optional = set(getattr(model.network, "optional_inputs", ()))
    expected = shapes_of(model)
    wanted, given = (traverse_util.flatten_dict(tree) for tree in (expected, weights))
    changed = {path for path in wanted.keys() ^ given.keys() if optional & set(path)}
    result = {path: x for path, x in given.items() if path not in changed}
    for path in changed & wanted.keys():
        result[path] = jnp.zeros(wanted[path].shape, wanted[path].dtype)
    tree = traverse_util.unflatten_dict(result)
    differences = _differences(other, model) if other else ""
    try:
        check_same(expected, tree, source)
        check_same(tree, expected, "the network of this run")
    except MismatchError as error:
        if not differences:
            raise
        raise MismatchError(
            f"The model of {source} is another one: {differences}. Use its values, or leave "
            f"config.network.name empty, which takes them over. ({error})"
        ) from error
    if differences:
        logging.warning("The model of %s has other values: %s.", source, differences)
    return tree


def _differences(other: Model, model: Model) -> str:
    """The values of another model that are different here and decide what its weights mean."""
    free = ("dtype", "remat", "dropout", "augment_dim", "takes_strength", "sigma_data",
            "num_classes")  # fmt: skip
    before, now = (flat(parts.describe(each)) for each in (other, model))
    keys = [key for key in before.keys() | now.keys()
            if key.startswith(("network.", "preconditioning.")) and before.get(key) != now.get(key)
            and key.rpartition(".")[2] not in free]  # fmt: skip
    shown = (f"{key} is {before.get(key)!r} there and {now.get(key)!r} here" for key in keys)
    return "; ".join(sorted(shown))


def companions(training: Training, data: DataInfo, workdir: pathlib.Path) -> dict[str, Run]:
    """The runs that the objective reads, by name: the copies of a training with checkpoints.

    ValueError: a run is not named, of the wrong kind, or for other data.
    """
    unused = {name for name, path in training.companions.items() if path} - training.runs.keys()
    for name in sorted(unused):
        logging.warning("config.companions.%s is not used: this objective reads %s.",
                        name, ", ".join(training.runs) or "no companion")  # fmt: skip
    found, resumed = {}, record.has_checkpoints(workdir)
    for name, path in training.runs.items():
        found[name] = (resumed and _held(workdir, name)) or load(path)
        other, asked = found[name].model, name in training.asked_for_classes
        check_companion(name, path, other, data, training.data.name, asked)
    return found


def keep(companions: Mapping[str, Run], weights: Mapping[str, Any], workdir: pathlib.Path) -> None:
    """Copy runs, whose weights are on the devices of all processes, to `workdir`/frozen."""
    if companions and not record.has_checkpoints(workdir):
        if is_first():  # copies of a start that was stopped before its first checkpoint
            shutil.rmtree(workdir / "frozen", ignore_errors=True)
        barrier("companions")
    for name, run in companions.items():
        if run.workdir != (place := workdir / "frozen" / name):
            publish(place, run.model, weights[name], run.sampler)


def _held(workdir: pathlib.Path, name: str) -> Run | None:
    """The copy of a companion in the directory of a training, if there is one."""
    if ((place := workdir / "frozen" / name) / "run.json").exists():
        return load(place)
    described = record.read(workdir).get("companions", {})
    if name in described and (workdir / "frozen" / "0").exists():  # of version 0.1: one tree of all
        return Run(workdir, parts.model_of(described[name]), Sampler(), stored=("frozen", name))
    return None


def check_companion(
    name: str, path: str, model: Model, data: DataInfo, source: str, asked_for_classes: bool = True
) -> None:
    """ValueError unless the model of the run in `path` is of the kind and data that `name` needs.

    `data` are those of `source`: a companion has their shape and, if it is asked for classes, their
    number of classes; a weak model may have no classes. The one named "classifier" is a classifier,
    all others are denoisers.
    """
    kinds = {"a classifier": model.is_classifier, "an emulator": model.is_emulator}
    kind = next((kind for kind, found in kinds.items() if found), "a denoiser")
    wanted = "a classifier" if name == "classifier" else "a denoiser"
    no_classes = model.data.num_classes == 0 and name in ("weak", "autoguidance")
    # else its one answer is for all classes
    with_classes = asked_for_classes and not no_classes and name != "domain_guidance"
    what = "data shape" + " and number of classes" * with_classes
    got, expected = ((x.shape, x.num_classes)[: 1 + with_classes] for x in (model.data, data))
    if (kind, got) != (wanted, expected):
        raise ValueError(
            f"Companion {name!r} in {path!r}: expected {wanted}, {what} "
            f"{', '.join(map(str, expected))}, as of config.data.name={source!r}; it is {kind} of "
            f"{', '.join(map(str, got))}."
        )
    if len(data.shape) == 3 and model.data.scale and data.scale:
        a, b = ([info.offset, info.scale] for info in (model.data, data))
        if not np.allclose(a, b, rtol=1e-3, atol=1e-3):
            raise ValueError(
                f"Companion {name!r} in {path!r} is for latents in other units than those of "
                f"config.data.name={source!r}: check config.data.latents."
            )
