"""The train loop for all tasks, networks and device layouts; hooks add everything else."""

import dataclasses
import operator
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mclr_jax.data.pipeline import stack
from mclr_jax.reductions import Metrics, over_rows, report
from mclr_jax.task import Task
from mclr_jax.training.devices import Devices
from mclr_jax.training.log import Writer
from mclr_jax.training.step import TrainState, make_update

LOSS_LIMIT = 1e4  # the weighted loss of an untrained network is about 1


class Interrupted(SystemExit):
    """A signal stopped a training after a checkpoint; the exit status is 128 + its number."""

    def __init__(self, number: int, step: int):
        super().__init__(128 + number)
        self.step = step


class NonFiniteError(FloatingPointError):
    """A metric or a weight is infinite or NaN, or the loss is at least LOSS_LIMIT."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """The input of a hook."""

    step: int  # number of updates done
    state: TrainState  # after that step, as arrays over all processes
    readings: Mapping[str, float]  # results of the earlier hooks at this step, by name
    stopping: bool  # whether a signal ends training here


@dataclasses.dataclass(frozen=True)
class Hook:
    """A function that the loop calls between updates; with a period also after the last step."""

    every: int | tuple[int, ...]  # steps between calls, or several such periods; 0 for none
    run: Callable[[Moment], Mapping[str, float] | None]  # -> scalars by name, for the log
    at: tuple[int, ...] = ()  # further steps with a call
    when_stopped: bool = False  # whether to call the function when a signal ends training

    @property
    def periods(self) -> list[int]:
        """The periods that are not 0."""
        return [n for n in (self.every if isinstance(self.every, tuple) else (self.every,)) if n]

    def is_due(self, step: int, last: bool, stopping: bool) -> bool:
        periodic = any(last or step % n == 0 for n in self.periods)
        return periodic or step in self.at or (stopping and self.when_stopped)


class Interrupt:
    """Turns SIGTERM and SIGINT into a request to stop; a second signal ends the process."""

    def __enter__(self):
        self._requested, self._old = 0, {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del frame
        self._requested = number
        signal.signal(number, self._old[number])

    def requested(self, sync: bool) -> int:
        """The signal that asks to stop, or 0; several processes agree, and only if `sync`."""
        if jax.process_count() == 1:
            return self._requested
        if not sync:
            return 0
        return int(multihost_utils.process_allgather(np.array(self._requested)).max())


def beyond(name: str, value: float) -> bool:
    """True for a metric or reading that a training has only when it diverges."""
    limit = LOSS_LIMIT if name in ("loss", "eval_loss") else np.inf
    return not abs(value) < limit


class _Log:
    """The metrics since the last report, each read from the device one dispatch later."""

    def __init__(self, diverged: Callable[[int, str], NonFiniteError]):
        self._diverged = diverged
        self._pending: tuple[int, int, Metrics] | None = None  # of a dispatch that may still run
        self._rows: list[Metrics] = []

    def record(self, step: int, count: int, metrics: Metrics) -> None:
        """Keep the metrics of a dispatch; read and check those of the dispatch before."""
        self.flush()
        self._pending = (step, count, metrics)

    def flush(self) -> None:
        """Read the metrics of the last dispatch and check that they are finite."""
        if self._pending is None:
            return
        (step, count, metrics), self._pending = self._pending, None
        rows = jax.tree.map(lambda x: np.asarray(x[:count], np.float64), jax.device_get(metrics))
        for row in range(count):
            for name, value in report(jax.tree.map(operator.itemgetter(row), rows)).items():
                if beyond(name, value):
                    raise self._diverged(step + row, f"{name} is {value:.3g}")
        self._rows.append(rows)

    def report(self) -> dict[str, float]:
        """The metrics of all steps since the last report, reduced."""
        self.flush()
        rows, self._rows = self._rows, []
        return report(over_rows(jax.tree.map(lambda *x: np.concatenate(x), *rows)))


def run(
    task: Task,
    state: TrainState,  # the initial state, placed by `devices`
    frozen: Mapping[str, Any],  # the parameters of task.frozen, placed by `devices`
    stream: Iterator[dict],  # batches, beginning with that of step state.step
    hooks: Sequence[Hook],  # called in this order
    writer: Writer,
    *,
    devices: Devices,
    num_steps: int,  # of the whole training
    log_every: int,  # steps between two reports
    steps_per_dispatch: int,  # steps in one call of the compiled program
    saved: Callable[[int], Any] = lambda step: None,  # last checkpoint, good if `step` diverged
) -> tuple[TrainState, int]:
    """Train to num_steps, or until SIGTERM or SIGINT; the last state, and that signal or 0.

    NonFiniteError: a metric is not finite; names the metric, step and last checkpoint.
    """

    def diverged(step: int, what: str) -> NonFiniteError:
        good = saved(step)
        found = "none" if good is None else f"of step {good}, from which --change continues"
        return NonFiniteError(
            f"{what} in step {step}: the run diverged. The last good checkpoint is {found}. "
            f"{task.objective.advice()}"
        )

    periods = [log_every, *(n for hook in hooks for n in hook.periods)]
    marks = [at for hook in hooks for at in hook.at]

    def steps_to_next_event(step: int) -> int:  # a dispatch must not pass the next event
        ends = [step + n - step % n for n in periods] + [at for at in marks if at > step]
        return min(*ends, num_steps) - step

    update = devices.compile(make_update(task, devices.axis_name))
    step, stopping, log = int(state.step), 0, _Log(diverged)
    with Interrupt() as interrupt:
        while step < num_steps and not stopping:
            count = min(steps_per_dispatch, steps_to_next_event(step))
            batches = devices.put_batches(stack(stream, count, steps_per_dispatch))
            length = devices.put_state(np.int32(count))
            with jax.transfer_guard("disallow"):
                state, metrics = update(state, frozen, batches, length)
            log.record(step, count, metrics)
            step, last = step + count, step + count == num_steps
            writer.progress(step)
            stopping = 0 if last else interrupt.requested(sync=step % log_every == 0)
            if step % log_every == 0 or last or stopping:
                rate = {"learning_rate": float(task.learning_rate(step))}
                writer.scalars(step, log.report() | rate)
            due = [hook for hook in hooks if hook.is_due(step, last, bool(stopping))]
            if due:
                log.flush()  # raises before a hook saves weights that are not finite
            readings: dict[str, float] = {}
            for hook in due:
                moment = Moment(step, devices.to_global(state), dict(readings), bool(stopping))
                if found := hook.run(moment):
                    for name, value in found.items():
                        if beyond(name, value):
                            raise diverged(step, f"{name} is {value:.3g}")
                    writer.scalars(step, dict(found))
                    readings |= found
        log.flush()
    if stopping:
        logging.warning("Stopped by a signal after step %d; run the same command to resume.", step)
    return state, stopping
