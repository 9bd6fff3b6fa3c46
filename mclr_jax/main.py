"""Training from a config in a directory, with the hooks that the config enables."""

import contextlib
import functools
import operator
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from mclr_jax import experiment, generate, images, runs, target
from mclr_jax.data import pipeline, sources
from mclr_jax.files import digest
from mclr_jax.metrics import report
from mclr_jax.model import shapes_of
from mclr_jax.names import check_keys, construct, in_range, of_kind
from mclr_jax.noise import LEVELS
from mclr_jax.samplers import Sampler
from mclr_jax.task import Task
from mclr_jax.training import loop
from mclr_jax.training.checkpoint import Checkpoints, digests, not_finite
from mclr_jax.training.devices import Devices, banner, is_first, placed, require_accelerator
from mclr_jax.training.log import Writer
from mclr_jax.training.loop import Hook, Moment
from mclr_jax.training.step import TrainState, init_state, make_evaluate

# The keys that only this file reads: the range of a number (low, high), or another kind.
KEYS: dict[str, Any] = {
    "seed": (0,), "num_steps": (1,), "batch_size": (1,), "parallel": str, "init_from": str,
    "require_accelerator": bool, "steps_per_dispatch": (0,), "grad_accumulation": (1,),
    "log_every": (1,), "checkpoint_every": (0,), "keep_checkpoints": (1,), "eval_examples": (0,),
    "sample_every": (0,), "sigma_data": (0.0, LEVELS[1]), "strength": tuple[float, ...],
    "class_strengths": tuple[float, ...],
    "icr.every_steps": (0,), "icr.num_images": (2,), "icr.sigma": (0.0, LEVELS[1], "("),
    "icr.layer": str, "icr.samples": (0,), "profile.start": (0,), "profile.num_steps": (0,),
    "data.name": str, "data.path": str, "data.test": str, "data.generated": str,
    "data.num_classes": (0,), "data.resolution": (0,), "data.limit": (0,), "data.flip": bool,
    "data.augment": (0.0, 1.0), "posterior.name": str, "weight": str,
}  # fmt: skip
# Sections whose readers check the keys.
SECTIONS = ("network", "noise", "preconditioning", "objective", "posterior", "companions",
            "optimizer", "ema", "sampler")  # fmt: skip


def check(config: Any) -> None:
    """Raise ValueError with the first key that is unknown, missing or of a wrong kind or range."""
    known: dict[str, set[str]] = {"": {*SECTIONS, "icr", "profile", "data"}}
    for key in KEYS:
        section, _, name = key.rpartition(".")
        known.setdefault(section, set()).add(name)
    check_keys("config", config.keys(), known[""])
    for section in (*SECTIONS, "icr", "profile", "data"):
        if not isinstance(given := config[section], ConfigDict):
            raise ValueError(f"config.{section} is {given!r}; expected a section with keys.")
    for section in ("icr", "profile", "data", "posterior"):
        # The user's own source of data has options, and so has a posterior.
        more = set(config[section]) if section in ("data", "posterior") else set()
        check_keys(f"config.{section}", config[section].keys(), known[section] | more)
    for key, limits in KEYS.items():
        value = operator.attrgetter(key)(config)
        if isinstance(limits, tuple):
            in_range(f"config.{key}", value, *limits)
        else:
            of_kind(f"config.{key}", value, limits)
    for name, path in config.companions.items():
        of_kind(f"config.companions.{name}", path, str)


def train(
    config: Any,
    workdir: str | pathlib.Path,
    more_hooks: Sequence[Hook] = (),
    restart: bool = False,
) -> TrainState:
    """Train to config.num_steps (see configs/base.py), and return the last state.

    Training starts from the newest checkpoint in `workdir`, if one exists. SIGTERM and SIGINT save
    a checkpoint and stop; the same call then continues to the same bits. `more_hooks` run before
    the checkpoint is saved. `restart` moves an existing run to workdir/replaced and begins anew.

    Raises:
      Interrupted: a signal stopped the training; a SystemExit, so that callers stop too.
      NonFiniteError: a metric is not finite; names the metric, the step and the last checkpoint.
      RuntimeError: another process trains in `workdir`, or no checkpoint there can be read.
      ValueError: the config is invalid, or `workdir` has a run of another model or of other data.
    """
    check(config)
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    logging.info(banner())
    if config.require_accelerator:
        require_accelerator()
    first_process = is_first()
    with runs.locked(workdir) if first_process else contextlib.nullcontext():
        if restart:
            _begin_anew(workdir)
        state, stopped_by = _train(config, workdir, more_hooks)
    if stopped_by:
        raise loop.Interrupted(stopped_by, int(state.step))
    return state


def _train(
    config: Any, workdir: pathlib.Path, more_hooks: Sequence[Hook]
) -> tuple[TrainState, int]:
    """The last state, and the number of the signal that stopped the training, or 0."""
    # ---- set-up -------------------------------------------------------------------------------
    devices = Devices(config.parallel)
    devices.check_batch_size(config.batch_size, config.grad_accumulation)
    source = sources.from_config(config.data, "train", config.seed)
    data = experiment.data_info(config, source)
    companions = runs.companions(config, data, workdir)
    task = experiment.make_task(config, data, companions)
    extra = extra_sources(config, task, source)
    sampler = construct(Sampler, config.sampler, "sampler")
    first_process = is_first()
    description = runs.describe(config, task.model, companions, source)
    changes = runs.changes(workdir, description)
    if changes and not runs.has_checkpoints(workdir):
        _begin_anew(workdir)  # its frozen weights and snapshots are those of the other config
        changes = {}
    with (
        Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints,
        Checkpoints(workdir / "snapshots", keep=None) as snapshots,
    ):
        # ---- start or resume ------------------------------------------------------------------
        state, start, origin = _start(config, task, devices, checkpoints)
        checkpoints.require_space(devices.to_global(state))
        frozen, content = _frozen(config, task, devices, workdir)
        description |= {"frozen": content} if frozen else {}
        if first_process:  # all that has been read fits together
            runs.record(workdir, description, changes, start, origin)
        shard = jax.process_index(), jax.process_count()
        stream = pipeline.stream(source, config.batch_size, config.seed, start, *shard, extra=extra)
        parameters = sum(x.size for x in jax.tree.leaves(state.params))
        logging.info(
            "%d examples of shape %s in %d classes, sigma_data %.4g; %d parameters; from step %d",
            len(source), data.shape, data.num_classes, data.sigma_data, parameters, start,
        )  # fmt: skip
        hooks = [
            *_profile(config, workdir),
            _snapshots(config, snapshots),
            *_held_out(config, task, devices.to_global(frozen), extra),
            *_icr(config, task, source, workdir, start),
        ]
        # ---- train ----------------------------------------------------------------------------
        with Writer(workdir, start, config.num_steps, first_process) as writer:
            samples = _samples(config.sample_every, sampler, task, workdir, writer)
            hooks += [samples, *more_hooks, _checkpoint(config, checkpoints)]
            return loop.run(
                task, state, frozen, stream, hooks, writer,
                devices=devices, num_steps=config.num_steps, log_every=config.log_every,
                steps_per_dispatch=steps_per_dispatch(config), saved=lambda: _last(checkpoints),
            )  # fmt: skip


def steps_per_dispatch(config: Any) -> int:
    """config.steps_per_dispatch, where 0 selects 1 on the CPU and 8 elsewhere.

    XLA:CPU computes gradients of convolutions up to 59 times slower inside a loop.
    """
    return config.steps_per_dispatch or (1 if target.backend() == "cpu" else 8)


def extra_sources(config: Any, task: Task, source: Any) -> dict[str, Any]:
    """Further sources that the objective reads: other data, samples of the frozen model."""
    extra = {"other": source} if "other" in task.needs else {}
    if "generated" not in task.needs:
        return extra
    path, expected = config.data.generated, task.model.data.shape
    if not path:
        raise ValueError(
            "This objective needs samples of the model that training starts from: write them with "
            "python -m launch.sample and set config.data.generated=npz:FILE."
        )
    generated = sources.load(path)
    if (shape := tuple(generated.shape)) != expected:
        raise ValueError(f"config.data.generated: examples of shape {shape}; expected {expected}.")
    return extra | {"generated": generated}


def _restore(checkpoints: Checkpoints, devices: Devices, shapes: Any) -> tuple[Any, int] | None:
    """(tree like `shapes`, step) from the newest checkpoint, or None if no checkpoint exists."""
    layout = Devices("data") if devices.parallel == "pmap" else devices
    restored = checkpoints.restore(placed(shapes, layout.state_shardings(shapes)))
    return (devices.from_global(restored[0]), restored[1]) if restored else None


def _start(
    config: Any, task: Task, devices: Devices, checkpoints: Checkpoints
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """State and step of the newest checkpoint, or of a new run and the origin of its weights."""
    complete = functools.partial(init_state, task)
    shapes = jax.eval_shape(complete, shapes_of(task.model))
    restored = _restore(checkpoints, devices, shapes)
    if restored is not None:
        logging.info("Resumed from the checkpoint of step %d.", restored[-1])
        return *restored, None
    state, origin = devices.initialise(task.init, complete), None
    if config.init_from:
        weights, step = runs.start_weights(config.init_from, task.model)
        origin, params = {"run": config.init_from, "step": step}, devices.put_state(weights)
        copies = {name: jax.tree.map(jnp.copy, params) for name in state.ema}
        state = state.replace(params=params, ema=copies)
    return state, 0, origin


def _begin_anew(workdir: pathlib.Path) -> None:
    if is_first():
        runs.set_aside(workdir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("work directory")


def _frozen(
    config: Any, task: Task, devices: Devices, workdir: pathlib.Path
) -> tuple[dict[str, Any], str]:
    """The companions' weights and their digest.

    `workdir` gets a copy of the weights, so that the run needs no other directory. ValueError: the
    copy is missing, and the companions have other weights than those that the run was started with.
    """
    shapes = {name: shapes_of(model) for name, model in task.frozen.items()}
    if not shapes:
        return {}, ""
    with Checkpoints(workdir / "frozen", keep=None) as store:
        if restored := _restore(store, devices, shapes):
            frozen = restored[0]
        else:
            paths = runs.companion_paths(config)
            weights = {name: runs.load(paths[name]).weights()[0] for name in shapes}
            frozen = {name: devices.put_state(x) for name, x in weights.items()}
        content = digest(digests(devices.to_global(frozen)))
        if content != (known := runs.read(workdir).get("frozen", content)):
            raise ValueError(
                f"The frozen weights of {', '.join(shapes)} have digest {content}; this run was "
                f"started with {known}. Restore {workdir}/frozen and the runs of config.init_from "
                "and config.companions from a copy, or begin again by --restart."
            )
        if not restored:
            store.save(0, devices.to_global(frozen))
    return frozen, content


def _last(checkpoints: Checkpoints) -> int | None:
    checkpoints.wait()
    return max(checkpoints.steps(), default=None)


def _save_periods(config: Any) -> tuple[int, int]:
    """The periods of checkpoints and their measurements; the last step always has both."""
    return config.checkpoint_every or config.num_steps, config.icr.every_steps


def _checkpoint(config: Any, checkpoints: Checkpoints) -> Hook:
    """Also saves at each reading of ICR, so that the checkpoint with the lowest is kept."""

    def save(moment: Moment) -> None:
        found = {"loss": "eval_loss", "icr": "icr"}
        metrics = {k: moment.readings[n] for k, n in found.items() if n in moment.readings}
        if bad := not_finite(moment.state):
            raise loop.NonFiniteError(
                f"{bad[0]} is not finite after step {moment.step}, which is not saved. The last "
                f"good checkpoint is of step {_last(checkpoints)}."
            )
        checkpoints.save(moment.step, moment.state, metrics)

    return Hook(_save_periods(config), save, when_stopped=True)


def _snapshots(config: Any, snapshots: Checkpoints) -> Hook:
    """Stores power-function averages, from which `Run.weights` reconstructs any width."""

    def save(moment: Moment) -> None:
        powers = {n: x for n, x in moment.state.ema.items() if n.startswith("power_")}
        snapshots.save(moment.step, powers)
        snapshots.wait()  # before a checkpoint of this step exists

    return Hook(config.ema.snapshot_every if config.ema.power_stds else 0, save)


def _held_out(config: Any, task: Task, frozen: Mapping[str, Any], extra: dict) -> list[Hook]:
    """Loss and metrics on held-out examples at each checkpoint, always with the same noise."""
    if not config.eval_examples:
        return []
    source, data = sources.from_config(config.data, "test", config.seed), task.model.data
    if tuple(source.shape) != data.shape or source.num_classes > data.num_classes:
        raise ValueError(
            f"The held-out set has examples of shape {tuple(source.shape)} in {source.num_classes} "
            f"classes, the training set {data.shape} in {data.num_classes}: change data.test."
        )
    size = config.batch_size
    count = -(-min(config.eval_examples, len(source)) // size)
    rows = np.resize(np.arange(len(source)), (count, size))
    local = np.array_split(np.arange(size), jax.process_count())[jax.process_index()]
    batches = {"index": np.broadcast_to(local.astype(np.int32), (count, len(local)))}
    held_out = {"other": source}  # no samples of the frozen model are held out
    shifted = {f"{name}_": held_out.get(name, found) for name, found in extra.items()}
    for prefix, examples in {"": source, **shifted}.items():
        parts = [examples[(r[local] + bool(prefix)) % len(examples)] for r in rows]
        batches[f"{prefix}image"] = np.stack([images for images, _ in parts])
        batches[f"{prefix}label"] = np.stack([labels for _, labels in parts])
    devices = Devices("data")
    put, evaluate = devices.put_batches, jax.jit(devices.in_mesh(make_evaluate(task)))

    def measure(moment: Moment) -> dict[str, float]:
        params = task.default(moment.state.params, moment.state.ema)
        found = jax.device_get(evaluate(params, frozen, put(batches)))
        return {f"eval_{name}": value for name, value in report(found).items()}

    return [Hook(_save_periods(config), measure, when_stopped=True)]


def _icr(config: Any, task: Task, source: Any, workdir: pathlib.Path, start: int) -> list[Hook]:
    """The Invariant Contamination Ratio along the run."""
    if not config.icr.every_steps:
        return []
    from mclr_jax.representation import monitor  # with scikit-learn, which takes a second

    read = monitor.make(config, task.model, source, workdir, start)

    def measure(moment: Moment) -> dict[str, float]:
        return read(moment.step, task.default(moment.state.params, moment.state.ema))

    return [Hook(config.icr.every_steps, measure)]


def _samples(
    every: int, sampler: Sampler, task: Task, workdir: pathlib.Path, writer: Writer
) -> Hook:
    """8 images, or 500 points, of each of the first 10 classes, from the same seeds."""
    model = task.model
    number = 8 if len(model.data.shape) == 3 else 500
    labels = np.repeat(np.arange(min(model.null_label, 10)), number)

    def draw(moment: Moment) -> None:
        params = task.default(moment.state.params, moment.state.ema)
        try:
            samples = generate.generate(model, params, labels, sampler)
        except FloatingPointError as error:  # a picture is no reason to stop a run
            logging.warning("No picture at step %d: %s", moment.step, error)
            return
        if is_first():
            grid = images.picture(samples, labels)
            images.save(workdir / "samples" / f"{moment.step:08d}.png", grid)
            writer.image(moment.step, "samples", grid)

    return Hook(every, draw)


def _profile(config: Any, workdir: pathlib.Path) -> list[Hook]:
    """Trace config.profile.num_steps steps for TensorBoard's profiler."""
    start, folder = config.profile.start, str(workdir / "profile")
    stop = start + config.profile.num_steps
    return [] if stop == start else [
        Hook(0, lambda moment: jax.profiler.start_trace(folder), at=(start,)),
        Hook(0, lambda moment: jax.profiler.stop_trace(), at=(stop,)),
    ]  # fmt: skip
