"""The train loop: one function for every objective, data set, network and device layout."""

import dataclasses
import pathlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mclr_jax import generate, images, run
from mclr_jax.data import pipeline, sources
from mclr_jax.experiment import DataInfo, Experiment
from mclr_jax.representation import monitor
from mclr_jax.training import step as steps
from mclr_jax.training.checkpoint import Checkpoints
from mclr_jax.training.devices import Devices, banner, require_accelerator
from mclr_jax.training.metrics import Writer


class NonFiniteError(FloatingPointError):
    """A loss or gradient is infinite or not a number, or the loss is beyond LOSS_LIMIT."""


LOSS_LIMIT = 1e4  # the weighted loss of an untrained network is about 1


def load_source(config: ml_collections.ConfigDict, split: str) -> sources.Source:
    """The data set of `config.data`; options left empty or 0 are not passed on."""
    data = config.data
    if split == "test" and data.test:
        return sources.load(data.test)
    options = {key: data[key] for key in ("path", "resolution", "num_classes") if data[key]}
    source = sources.load(data.name, split, **options)
    if data.limit and split == "train":
        source = sources.limit(source, data.limit, config.seed)
    return source


def make_experiment(
    config: ml_collections.ConfigDict,
    source: sources.Source,
    classifier: Experiment | None = None,
) -> Experiment:
    """The config's experiment on this source; sigma_data is measured where the config has 0."""
    sigma_data = config.sigma_data or sources.sigma_data(source)
    if not 0 < sigma_data < np.inf:
        raise ValueError(
            f"The data have standard deviation {sigma_data}; expected a positive number. Check the "
            "images of config.data, or set config.sigma_data."
        )
    frozen = ml_collections.FrozenConfigDict(config)
    info = DataInfo(tuple(source.shape), source.num_classes, sigma_data)
    experiment = Experiment(frozen, info, classifier)
    if experiment.takes("class_prior"):
        prior = tuple(np.bincount(source.labels, minlength=source.num_classes) / len(source))
        info = dataclasses.replace(info, class_prior=prior)
        experiment = Experiment(frozen, info, classifier)
    return experiment


def _companions(experiment: Experiment, source: sources.Source) -> sources.Source | None:
    """What an objective sets beside each example: samples of the frozen model, or other data."""
    if not experiment.takes("generated"):
        return source if experiment.takes("other") else None
    path = experiment.config.objective.generated_from
    if not path:
        raise ValueError(
            "This objective needs samples of the model that training starts from: write them by "
            "python -m launch.sample and set objective.generated_from=npz:FILE."
        )
    generated = sources.load(path)
    if tuple(generated.shape) != experiment.data.shape:
        raise ValueError(
            f"objective.generated_from={path!r} has examples of shape {tuple(generated.shape)}; "
            f"expected {experiment.data.shape}."
        )
    return generated


def _classifier(
    config: ml_collections.ConfigDict, source: sources.Source, workdir: pathlib.Path
) -> Experiment | None:
    """The experiment that config.objective.posterior_from names, None where it names none.

    A run that has copied the classifier's weights needs its directory no more.
    """
    path = config.objective.get("posterior_from", "")
    if config.objective.get("posterior", "") != "classifier" or not path:
        return None
    if (workdir / "frozen").exists():
        return run.load_experiment(workdir).classifier
    classifier = run.load_experiment(path)
    found = (classifier.config.objective.name, classifier.data.shape, classifier.data.num_classes)
    wanted = ("classify", tuple(source.shape), source.num_classes)
    if found != wanted:
        raise ValueError(
            f"objective.posterior_from={path!r}: expected a run with objective, shape and number "
            f"of classes {wanted}; it has {found}."
        )
    return classifier


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> steps.TrainState:
    """Train until config.num_steps, from the newest checkpoint in `workdir` if there is one.

    SIGTERM and SIGINT save a checkpoint and end the run; the same call goes on, bit for bit.

    Args:
      config: see configs/base.py.
      workdir: directory of the run; created if missing.

    Returns:
      The last state.

    Raises:
      NonFiniteError: when a metric is not finite; names it, its step and the last checkpoint.
      ValueError: on a config that makes no sense.
    """
    # ---- set-up -------------------------------------------------------------------------------
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    logging.info(banner())
    if config.require_accelerator:
        require_accelerator()
    devices = Devices(config.parallel)
    devices.check_batch_size(config.batch_size)
    source = load_source(config, "train")
    experiment = make_experiment(config, source, _classifier(config, source, workdir))
    first_process = jax.process_index() == 0
    if first_process:
        run.describe(workdir, experiment)

    with (
        Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints,
        Checkpoints(workdir / "snapshots", keep=None) as snapshots,
        _Interrupt() as interrupt,
    ):
        # ---- start or go on -------------------------------------------------------------------
        state, data_state, start = _start(experiment, devices, checkpoints)
        frozen = _frozen(experiment, devices, workdir)
        stream = pipeline.stream(
            source,
            config.batch_size,
            config.seed,
            start_step=start,
            state=data_state,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            other=_companions(experiment, source),
        )
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        logging.info(
            "%d examples of shape %s in %d classes, sigma_data %.4g; %d parameters; from step %d",
            len(source), source.shape, source.num_classes, experiment.data.sigma_data, parameters,
            start,
        )  # fmt: skip
        update = devices.compile(steps.make_update(experiment, devices.axis_name))
        evaluate = _evaluator(experiment, devices.to_global(frozen))
        read_icr = monitor.make(experiment, source, workdir, start)
        loop = _Loop(
            config, experiment, devices, checkpoints, snapshots, workdir, evaluate, read_icr
        )
        with Writer(workdir, start, config.num_steps, first_process) as loop.writer:
            # ---- train ------------------------------------------------------------------------
            step = start
            while step < config.num_steps:
                count = min(config.steps_per_dispatch, loop.steps_to_next_event(step))
                batches = stack(stream, count, config.steps_per_dispatch)
                batches, number = devices.put_batches(batches), devices.put_scalar(count)
                with jax.transfer_guard("disallow"):
                    state, metrics = update(state, frozen, batches, number)
                loop.record(step, count, metrics)
                step += count
                stop = interrupt.requested(sync=step % config.log_every == 0)
                loop.events(step, state, stream.get_state(), stop)
                if stop:
                    logging.warning(
                        "Stopped by a signal after step %d; run the same command to go on.", step
                    )
                    break
            loop.flush()
    return state


def _restore(checkpoints: Checkpoints, devices: Devices, shapes: Any):
    """The newest checkpoint as (tree like `shapes`, position in the data, step), or None."""
    global_devices = Devices("data") if devices.parallel == "pmap" else devices
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        global_devices.state_shardings(shapes),
    )
    restored = checkpoints.restore(like)
    return restored and (devices.from_global(restored[0]), *restored[1:])


def _start(experiment: Experiment, devices: Devices, checkpoints: Checkpoints):
    """(state, position in the data or None, step) of the newest checkpoint, or of a new run."""
    init = lambda: steps.init_state(experiment)  # noqa: E731
    restored = _restore(checkpoints, devices, jax.eval_shape(init))
    if restored is not None:
        logging.info("Resumed from the checkpoint of step %d.", restored[-1])
        return restored
    state = devices.initialise(init)
    if experiment.config.init_from:
        params = _pretrained(experiment, devices)
        copies = {name: jax.tree.map(jnp.copy, params) for name in state.ema}
        state = state.replace(params=params, ema=copies)
    return state, None, 0


def _pretrained(experiment: Experiment, devices: Devices) -> Any:
    """The EMA weights of the run config.init_from, placed for training."""
    weights, step = run.pretrained(experiment)
    logging.info("Weights from step %d of %s.", step, experiment.config.init_from)
    return devices.put_state(weights)


def _frozen(experiment: Experiment, devices: Devices, workdir: pathlib.Path) -> dict[str, Any]:
    """What the objective holds frozen; copied into `workdir`, so that the run needs no other."""
    shapes = jax.eval_shape(experiment.init_frozen)
    if not shapes:
        return {}
    with Checkpoints(workdir / "frozen", keep=None) as store:
        restored = _restore(store, devices, shapes)
        if restored is not None:
            return restored[0]
        frozen = {}
        if "reference" in shapes:
            if not experiment.config.init_from:
                raise ValueError(
                    "This objective needs a frozen reference: set config.init_from to the work "
                    "directory of the base run."
                )
            frozen["reference"] = _pretrained(experiment, devices)
        if "classifier" in shapes:
            weights, _ = run.load_weights(experiment.config.objective.posterior_from)
            frozen["classifier"] = devices.put_state(weights)
        store.save(0, devices.to_global(frozen), {})
    return frozen


def stack(stream: Iterator[dict], count: int, length: int) -> dict[str, np.ndarray]:
    """`count` batches stacked to (length, B, ...); the rest repeats the last and is never used."""
    batches = [next(stream) for _ in range(count)]
    batches += [batches[-1]] * (length - count)
    return jax.tree.map(lambda *rows: np.stack(rows), *batches)


def _evaluator(experiment: Experiment, frozen: dict[str, Any]):
    """params -> metrics on held-out examples, or None where config.eval_examples is 0.

    The batches and their noise are the same each time, so that checkpoints can be ranked.
    """
    config = experiment.config
    if not config.eval_examples:
        return None
    source = load_source(config, "test")
    size = config.batch_size
    count = -(-min(config.eval_examples, len(source)) // size)
    rows = np.resize(np.arange(len(source)), (count, size))
    local = np.array_split(np.arange(size), jax.process_count())[jax.process_index()]
    batches = {"index": np.broadcast_to(local.astype(np.int32), (count, len(local)))}

    def add(prefix, examples, shift):
        parts = [examples[(r[local] + shift) % len(examples)] for r in rows]
        batches[f"{prefix}image"] = np.stack([images for images, _ in parts])
        batches[f"{prefix}label"] = np.stack([labels for _, labels in parts])

    add("", source, 0)
    companions = _companions(experiment, source)
    if companions is not None:
        add("other_", companions, 1)
    data_parallel = Devices("data")
    evaluate = jax.jit(steps.make_evaluate(experiment))
    return lambda params: evaluate(params, frozen, data_parallel.put_batches(batches))


class _Interrupt:
    """Turns SIGTERM and SIGINT into a request that the loop sees; a second signal kills."""

    def __enter__(self):
        self._requested, self._old = False, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        self._requested = True
        signal.signal(number, self._old[number])

    def requested(self, sync: bool) -> bool:
        """Whether to stop. With several processes all must agree, which they do where `sync`."""
        if jax.process_count() == 1:
            return self._requested
        return sync and bool(multihost_utils.process_allgather(np.array(self._requested)).any())


class _Loop:
    """What happens beside the update: records, reports, checkpoints, snapshots, pictures."""

    writer: Writer

    def __init__(self, config, experiment, devices, checkpoints, snapshots, workdir, evaluate,
                 read_icr):  # fmt: skip
        self._config, self._experiment, self._devices = config, experiment, devices
        self._checkpoints, self._snapshots, self._evaluate = checkpoints, snapshots, evaluate
        self._workdir, self._read_icr = workdir, read_icr
        self._pending: tuple[int, int, Any] | None = None  # of the dispatch that may still run
        self._since_report: dict[str, list[np.ndarray]] = {}

    def steps_to_next_event(self, step: int) -> int:
        """Steps until something is due; a dispatch must not run past it."""
        config = self._config
        periods = (config.log_every, config.checkpoint_every, config.sample_every,
                   config.ema.snapshot_every, config.icr.every_steps)  # fmt: skip
        ends = [step + period - step % period for period in periods if period]
        profile = (config.profile.start, config.profile.start + config.profile.num_steps)
        ends += [end for end in profile if config.profile.num_steps and end > step]
        return min(*ends, config.num_steps) - step

    def record(self, step: int, count: int, metrics: Any) -> None:
        """Take over the metrics of a dispatch; those of the one before are read meanwhile."""
        self.flush()
        self._pending = (step, count, metrics)
        self.writer.progress(step)

    def flush(self) -> None:
        """Read the metrics of the last dispatch and check that they are finite."""
        if self._pending is None:
            return
        (step, count, metrics), self._pending = self._pending, None
        for name, values in jax.device_get(metrics).items():
            values = values[:count]
            fine = np.isfinite(values) & ((name != "loss") | (np.abs(values) < LOSS_LIMIT))
            if not fine.all():
                row = int(np.argmin(fine))
                self._fail(step + row, f"{name} is {values[row]:.3g}")
            self._since_report.setdefault(name, []).append(values)

    def _fail(self, step: int, what: str) -> None:
        self._checkpoints.wait()
        good = self._checkpoints.steps()
        raise NonFiniteError(
            f"{what} in step {step}: the run diverged. The last good checkpoint is "
            f"{f'of step {good[-1]}' if good else 'none'}. {self._experiment.advice}"
        )

    def events(self, step: int, state, data_state: dict, stop: bool) -> None:
        """Whatever is due after `step` updates."""
        config, last = self._config, step == self._config.num_steps

        def due(period):
            return period and (step % period == 0 or last)

        self._profile(step)
        if due(config.log_every) or stop:
            self._report(step)
        if not (stop or due(config.checkpoint_every) or due(config.sample_every)
                or due(config.ema.snapshot_every) or due(config.icr.every_steps)):  # fmt: skip
            return
        self.flush()  # nothing that is not finite may be saved
        whole = self._devices.to_global(state)
        average = next(iter(whole.ema.values()), whole.params)
        powers = {name: x for name, x in whole.ema.items() if name.startswith("power_")}
        if powers and due(config.ema.snapshot_every):
            self._snapshots.save(step, powers, {})
            self._snapshots.wait()  # before a checkpoint can say that this step is done
        reading = self._read_icr(step, average) if due(config.icr.every_steps) else {}
        if reading:
            self.writer.scalars(step, reading)  # before the checkpoint that it belongs to
        if stop or due(config.checkpoint_every) or due(config.icr.every_steps):
            metrics = jax.device_get(self._evaluate(average)) if self._evaluate else {}
            metrics = {name: float(value) for name, value in metrics.items()}
            self._checkpoints.save(step, whole, data_state, (metrics | reading) or None)
            if metrics:
                self.writer.scalars(step, {f"eval_{k}": v for k, v in metrics.items()})
        if due(config.sample_every):
            self._samples(step, average)

    def _report(self, step: int) -> None:
        self.flush()
        self.writer.progress(step)
        means = {name: float(np.concatenate(v).mean()) for name, v in self._since_report.items()}
        self._since_report = {}
        rate = float(self._experiment.learning_rate(step))
        self.writer.scalars(step, means | {"learning_rate": rate})

    def _samples(self, step: int, params) -> None:
        """8 images, or 500 points, of each of the first 10 classes, from the same seeds."""
        number = 8 if len(self._experiment.data.shape) == 3 else 500
        labels = np.repeat(np.arange(min(self._experiment.null_label, 10)), number)
        samples = generate.generate(self._experiment, params, labels)
        if jax.process_index() == 0:
            grid = images.picture(samples, labels)
            (self._workdir / "samples").mkdir(exist_ok=True)
            images.save(self._workdir / "samples" / f"{step:08d}.png", grid)
            self.writer.image(step, "samples", grid)

    def _profile(self, step: int) -> None:
        """Trace config.profile.num_steps steps for TensorBoard's profiler."""
        profile = self._config.profile
        if profile.num_steps and step == profile.start:
            jax.profiler.start_trace(str(self._workdir / "profile"))
        elif profile.num_steps and step == profile.start + profile.num_steps:
            self.flush()
            jax.profiler.stop_trace()
