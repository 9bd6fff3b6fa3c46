"""Training from a config in a directory."""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging

from mclr_jax import hooks, inherit, record, runs
from mclr_jax.data import pipeline
from mclr_jax.experiment import Experiment
from mclr_jax.files import made
from mclr_jax.labels import warn_of_companions
from mclr_jax.model import size_of
from mclr_jax.schema import local
from mclr_jax.training import loop
from mclr_jax.training.checkpoint import Checkpoints
from mclr_jax.training.devices import banner, barrier, is_first, require_accelerator
from mclr_jax.training.lock import locked
from mclr_jax.training.log import Writer
from mclr_jax.training.loop import Hook
from mclr_jax.training.step import TrainState


def train(
    config: Any,
    workdir: str | pathlib.Path,
    more_hooks: Sequence[Hook] = (),
    restart: bool = False,
    change: bool = False,
) -> TrainState:
    """Train to config.num_steps (see `config.Training`), and return the last state.

    Training starts from the newest checkpoint in `workdir`, if one exists; a run that has done its
    steps does not change. SIGTERM and SIGINT save a checkpoint and stop; the same call then
    continues to the same bits. `more_hooks` run before the checkpoint is saved. `restart` moves an
    existing run to workdir/replaced and begins anew. `change` permits other values of keys that
    decide what the next steps learn, such as those of the objective; run.json has both, by step.

    Raises:
      Interrupted: a signal stopped the training; a SystemExit, so that callers stop too.
      NonFiniteError: a metric is not finite; names the metric, the step and the last checkpoint.
      RuntimeError: another process trains in `workdir`, or no checkpoint there can be read.
      ValueError: the config is invalid, or `workdir` has a run of another model, of other data or,
        without `change`, of other values of deciding keys.
    """
    local("workdir", str(workdir))
    experiment = Experiment(inherit.training(config, workdir), pathlib.Path(workdir))
    warn_of_companions(experiment.training)
    logging.info(banner())
    if experiment.training.require_accelerator:
        require_accelerator()
    with (
        made(experiment.workdir),
        locked(experiment.workdir) if is_first() else contextlib.nullcontext(),
        # not before: those of another process may still be empty
        made(experiment.workdir, *("checkpoints", "snapshots") * is_first()),
    ):
        if restart:
            _begin_anew(experiment.workdir)
        state, stopped_by = _train(experiment, more_hooks, change)
    if stopped_by:
        raise loop.Interrupted(stopped_by, int(state.step))
    return state


def _train(
    experiment: Experiment, more_hooks: Sequence[Hook], change: bool
) -> tuple[TrainState, int]:
    """The last state, and the number of the signal that stopped the training, or 0."""
    training, workdir, task = experiment.training, experiment.workdir, experiment.task
    extra, devices = experiment.extra, experiment.devices
    changes = record.changes(workdir, experiment.description)
    if changes and not record.has_checkpoints(workdir):
        _begin_anew(workdir)  # its frozen weights and snapshots are those of the other config
        changes = {}
    with (
        Checkpoints(workdir / "checkpoints", training.keep_checkpoints) as checkpoints,
        Checkpoints(workdir / "snapshots", keep=None) as snapshots,
    ):
        if not change and max(checkpoints.steps(), default=0) < training.num_steps:
            record.require_none(changes, workdir)
        stored = experiment.stored_state(checkpoints)
        if stored and stored[1] >= training.num_steps:
            ignored = f" Nothing is changed: {record.told(changes)}." if changes else ""
            logging.warning(
                "Nothing to train: %s has done %d steps, and config.num_steps is %d.%s",
                workdir, stored[1], training.num_steps, ignored,
            )  # fmt: skip
            return stored[0], 0
        if stored:
            (state, start), origin = stored, None
            if not change:  # the newest checkpoint could not be read
                record.require_none(changes, workdir)
            logging.info("Resumed from the checkpoint of step %d.", start)
        else:
            (state, origin), start = experiment.first_state(), 0
        checkpoints.require_space(devices.to_global(state))
        runs.keep(experiment.companions, devices.to_global(experiment.frozen), workdir)
        if is_first():  # all that has been read fits together
            record.write(workdir, experiment.description, changes, start, origin)
        shard = jax.process_index(), jax.process_count()
        stream = pipeline.stream(
            experiment.source, training.batch_size, training.seed, start, *shard, extra=extra
        )
        logging.info(
            "%d examples of shape %s in %d classes, sigma_data %.4g; %d parameters; from step %d",
            len(experiment.source), experiment.data.shape, experiment.data.num_classes,
            experiment.data.sigma_data, size_of(state.params), start,
        )  # fmt: skip
        every = training.ema.snapshot_every if training.ema.power_stds else 0
        ours = [
            *hooks.profile(experiment),
            Hook(every, hooks.Snapshots(snapshots)),
            *hooks.readings(experiment, start),
        ]
        last = Hook(training.save_every, save := hooks.Save(checkpoints), when_stopped=True)
        writer = Writer(
            workdir, start, training.num_steps, config=training.config, device=banner(),
            batch_size=training.batch_size, wandb=training.log.wandb,
        )  # fmt: skip
        with writer:
            samples = Hook(training.sample_every, hooks.Samples(experiment, writer))
            return loop.run(
                task, state, experiment.frozen, stream, [*ours, samples, *more_hooks, last], writer,
                devices=devices, num_steps=training.num_steps, log_every=training.log_every,
                steps_per_dispatch=training.dispatch, saved=save.good,
            )  # fmt: skip


def _begin_anew(workdir: pathlib.Path) -> None:
    if is_first():
        record.set_aside(workdir)
    barrier("work directory")
