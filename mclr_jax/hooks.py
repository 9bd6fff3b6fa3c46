"""Hooks, called beside the update: functions of a Moment, as frozen dataclasses of typed parts."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from mclr_jax import generate, images, latents
from mclr_jax.data.protocol import Source, drawn, for_training, names_of
from mclr_jax.experiment import Experiment
from mclr_jax.reductions import report
from mclr_jax.task import Task
from mclr_jax.training.checkpoint import Checkpoints, not_finite
from mclr_jax.training.devices import Devices, is_first
from mclr_jax.training.log import Writer
from mclr_jax.training.loop import Hook, Moment, NonFiniteError
from mclr_jax.training.step import make_evaluate

FEWEST = 16  # images for a reading of memorization: the standard error of fewer is uncertain


@dataclasses.dataclass(frozen=True, eq=False)
class Snapshots:
    """Stores power-function averages, from which `Run.weights` reconstructs any width."""

    store: Checkpoints

    def __call__(self, moment: Moment) -> None:
        powers = {n: x for n, x in moment.state.ema.items() if n.startswith("power_")}
        self.store.save(moment.step, powers)
        self.store.wait()  # before a checkpoint of this step exists


@dataclasses.dataclass(frozen=True, eq=False)
class HeldOut:
    """Loss and metrics on held-out examples, always with the same noise.

    Of the sources the one named "" gives the images. Those with more examples than `count` give a
    random subset, each its own; of the others, row i of all but the first is example i + 1.
    """

    task: Task
    frozen: Mapping[str, Any]  # weights of the companions
    sources: Mapping[str, Source]
    count: int  # examples, rounded up to whole batches
    size: int  # of a batch, over all processes

    @functools.cached_property
    def batches(self) -> dict[str, np.ndarray]:
        """Arrays (K, rows of this process, ...)."""
        count = -(-min(self.count, len(self.sources[""])) // self.size)
        local = np.array_split(np.arange(self.size), jax.process_count())[jax.process_index()]
        batches = {"index": np.broadcast_to(local.astype(np.int32), (count, len(local)))}
        for seed, (prefix, examples) in enumerate(self.sources.items()):
            rows = np.roll(drawn(examples, count * self.size, seed), -bool(prefix))
            parts = [for_training(examples, r[local]) for r in np.resize(rows, (count, self.size))]
            batches[f"{prefix}image"] = np.stack([found for found, _ in parts])
            batches[f"{prefix}label"] = np.stack([labels for _, labels in parts])
        return batches

    @functools.cached_property
    def evaluate(self) -> Callable:
        devices = Devices("data")
        program = jax.jit(devices.in_mesh(make_evaluate(self.task)))
        return lambda params: program(params, self.frozen, devices.put_batches(self.batches))

    def __call__(self, moment: Moment) -> dict[str, float]:
        params = self.task.default(moment.state.params, moment.state.ema)
        found = jax.device_get(self.evaluate(params))
        return {f"eval_{name}": value for name, value in report(found).items()}


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """A reading of the weights for sampling, such as that of `representation.sweep.Monitor`."""

    experiment: Experiment
    read: Callable[[int, Any], dict[str, float]]

    def __call__(self, moment: Moment) -> dict[str, float]:
        return self.read(moment.step, self.experiment.for_sampling(moment.state))


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """A picture of 8 images, or 500 points, of each of the first 10 classes, from fixed seeds."""

    experiment: Experiment
    writer: Writer

    def __post_init__(self):  # an autoencoder that does not fit is an error before the first step
        with contextlib.suppress(FileNotFoundError):
            latents.decoder(self.experiment.training.data, self.experiment.model)

    def __call__(self, moment: Moment) -> None:
        task, workdir = self.experiment.task, self.experiment.workdir
        model, params = task.model, self.experiment.for_sampling(moment.state)
        number = 8 if len(model.data.shape) == 3 else 500
        labels = np.repeat(np.arange(min(model.null_label, 10)), number)
        data, sampler = self.experiment.training.data, self.experiment.training.sampler
        try:
            decode = latents.decoder(data, model)
            samples = generate.generate(model, params, labels, sampler)
            found = latents.shown(samples, decode)
        except (FloatingPointError, FileNotFoundError) as error:  # no reason to stop a run
            logging.warning("No picture at step %d: %s", moment.step, error)
            return
        if found is not None and is_first():
            names = names_of(self.experiment.source)
            grid = images.picture(found, labels, class_names=names)
            images.save(workdir / "samples" / f"{moment.step:08d}.png", grid)
            self.writer.image(moment.step, "samples", grid)


@dataclasses.dataclass(frozen=True, eq=False)
class Save:
    """Writes a checkpoint with the readings that rank it."""

    checkpoints: Checkpoints

    def good(self, step: int) -> int | None:
        """The step of the last checkpoint from before a divergence that `step` steps have made.

        A checkpoint of just these steps is set aside, unless its own loss was measured.
        """
        self.checkpoints.wait()
        last = max(self.checkpoints.steps(), default=None)
        if last is not None and last == step and not self.checkpoints.has_loss(last):
            self.checkpoints.set_aside(last, "the next step diverged")
            last = max(self.checkpoints.steps(), default=None)
        return last

    def __call__(self, moment: Moment) -> None:
        found = {"loss": "eval_loss", "memorization": "memorization_warning"}
        metrics = {k: moment.readings[n] for k, n in found.items() if n in moment.readings}
        if bad := not_finite(moment.state):
            raise NonFiniteError(
                f"{bad[0]} is not finite after step {moment.step}, which is not saved. The last "
                f"good checkpoint is of step {self.good(moment.step)}."
            )
        self.checkpoints.save(moment.step, moment.state, metrics)


def profile(experiment: Experiment) -> list[Hook]:
    """Trace some steps for TensorBoard's profiler."""
    options, folder = experiment.training.profile, str(experiment.workdir / "profile")
    start, stop = options.start, options.start + options.num_steps

    def begin(moment: Moment) -> None:
        jax.profiler.start_trace(folder)  # of which newer versions of JAX return a session

    def end(moment: Moment) -> None:
        jax.profiler.stop_trace()

    return [Hook(0, begin, at=(start,)), Hook(0, end, at=(stop,))] if stop > start else []


def memorization(experiment: Experiment, start: int) -> list[Hook]:
    """The readings that announce copies of training images, in a run from step `start`.

    They compare training images with held-out ones where config.eval_examples says that there are
    some.
    """
    training, model, source = experiment.training, experiment.model, experiment.source
    options, asked = training.memorization, training.memorization.every_steps > 0
    if not model.is_denoiser or model.frames or len(model.data.shape) != 3:
        if asked:
            text = "config.memorization is for images and latents, of networks that denoise: no "
            logging.warning(text + "readings here, of data of shape %s.", model.data.shape)
        return []
    if not (training.eval_examples or asked):
        return []
    held_out = experiment.held_out[""] if training.eval_examples else None
    counts = [min(options.num_images, len(x)) for x in (source, held_out) if x is not None]
    if min(counts) < FEWEST:
        kinds = zip(counts, ("training", "held-out"), strict=False)
        seen = " and ".join(f"{number} {kind}" for number, kind in kinds)
        text = (
            "No readings of memorization: of %s images; they need %d of each kind. Raise "
            "config.memorization.num_images or config.data.held_out, or hold out none: set "
            "config.eval_examples=0 and config.memorization.every_steps."
        )
        logging.log(logging.WARNING if asked else logging.INFO, text, seen, FEWEST)
        return []
    given = training.batch_size, training.num_steps, training.save_every
    every = options.period(2 * sum(counts), *given)
    if not every:
        return []
    from mclr_jax.representation.memorization import Monitor  # with SciPy's: it takes a second

    calls = options.samples * generate.NONE.calls(model, training.sampler)
    pause = 0 if asked else options.period(calls, training.batch_size, 2**31, every)
    monitor = Monitor(options, model, training.sampler, training.data, source, held_out,
                      experiment.workdir, start, pause)  # fmt: skip
    return [Hook((every, training.save_every) if asked else every, Read(experiment, monitor))]


def readings(experiment: Experiment, start: int) -> list[Hook]:
    """The readings of the model that the config asks for, in a run from step `start`."""
    training, task, found = experiment.training, experiment.task, []
    if count := training.eval_examples:
        frozen = experiment.devices.to_global(experiment.frozen)
        held_out = HeldOut(task, frozen, experiment.held_out, count, training.batch_size)
        found.append(Hook(training.save_every, held_out, when_stopped=True))
    found += memorization(experiment, start)
    if every := training.icr.every_steps:
        from mclr_jax.representation.sweep import Monitor  # with scikit-learn: it takes a second

        shown = experiment.source, training.data.mirrored
        monitor = Monitor(training.icr, task.model, training.sampler, *shown)
        found.append(Hook(every, Read(experiment, monitor)))
    if every := training.evaluate.every_steps:
        from mclr_jax.evaluation.evaluate import Measures  # with SciPy's: it takes a second

        given = training.sampler, training.data, experiment.source
        found.append(Hook(every, Read(experiment, Measures(training.evaluate, task.model, *given))))
    return found
