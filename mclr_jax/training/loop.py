"""The train loop: one for every task, network and device layout. It knows hooks, not features."""

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from mclr_jax.data.pipeline import stack
from mclr_jax.metrics import Metrics, map_by_kind, over_rows, report
from mclr_jax.task import Task
from mclr_jax.training.devices import Devices
from mclr_jax.training.log import Writer
from mclr_jax.training.step import TrainState, make_update

LOSS_LIMIT = 1e4  # the weighted loss of an untrained network is about 1


class NonFiniteError(FloatingPointError):
    """A metric is infinite or not a number, or the loss is beyond LOSS_LIMIT."""


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a hook sees.

    Attributes:
      step: updates done.
      state: after that step, as arrays over all processes.
      readings: what the hooks before this one have found at this step, by name.
      stopping: whether training ends here because a signal asked for it.
    """

    step: int
    state: TrainState
    readings: Mapping[str, float]
    stopping: bool


@dataclasses.dataclass(frozen=True)
class Hook:
    """Something that happens beside the update.

    Attributes:
      every: steps between calls, or several such periods; 0 is never. A hook with a period is also
        called after the last step.
      run: Moment -> scalars by name, which are logged; or None.
      at: further steps at which it is called.
      when_stopped: whether it is called, too, when a signal ends training.
    """

    every: int | tuple[int, ...]
    run: Callable[[Moment], Mapping[str, float] | None]
    at: tuple[int, ...] = ()
    when_stopped: bool = False

    @property
    def periods(self) -> list[int]:
        """Those that are not 0."""
        return [n for n in (self.every if isinstance(self.every, tuple) else (self.every,)) if n]

    def is_due(self, step: int, last: bool, stopping: bool) -> bool:
        return (
            any(last or step % n == 0 for n in self.periods)
            or step in self.at
            or (stopping and self.when_stopped)
        )


class Interrupt:
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


class _Log:
    """Metrics on their way from the device: read one dispatch later, summed up, checked."""

    def __init__(self, diverged: Callable[[int, str], NonFiniteError]):
        self._diverged = diverged
        self._pending: tuple[int, int, Metrics] | None = None  # the dispatch that may still run
        self._sums: Metrics = {}

    def record(self, step: int, count: int, metrics: Metrics) -> None:
        """Take over the metrics of a dispatch; those of the one before are read meanwhile."""
        self.flush()
        self._pending = (step, count, metrics)

    def flush(self) -> None:
        """Read the metrics of the last dispatch and check that they are finite."""
        if self._pending is None:
            return
        (step, count, metrics), self._pending = self._pending, None
        rows = jax.tree.map(lambda x: np.asarray(x[:count], np.float64), jax.device_get(metrics))
        for row in range(count):
            for name, value in report(jax.tree.map(lambda x: x[row], rows)).items():  # noqa: B023
                if not np.isfinite(value) or (name == "loss" and abs(value) >= LOSS_LIMIT):
                    raise self._diverged(step + row, f"{name} is {value:.3g}")
        new = over_rows(rows)
        self._sums = map_by_kind(np.add, np.maximum, self._sums, new) if self._sums else new

    def report(self) -> dict[str, float]:
        """The metrics of all steps since the last report; they start anew."""
        self.flush()
        sums, self._sums = self._sums, {}
        return report(sums)


def run(
    task: Task,
    state: TrainState,
    frozen: Mapping[str, Any],
    stream: Iterator[dict],
    hooks: Sequence[Hook],
    writer: Writer,
    *,
    devices: Devices,
    num_steps: int,
    log_every: int,
    steps_per_dispatch: int,
    saved: Callable[[], Any] = lambda: None,
) -> tuple[TrainState, bool]:
    """Train to num_steps, or until SIGTERM or SIGINT.

    Args:
      task: what to train.
      state: to start from, placed by `devices`.
      frozen: parameters of task.frozen, placed likewise.
      stream: batches from step state.step on.
      hooks: called in their order.
      writer: of metrics.
      devices: layout.
      num_steps: of the whole training, of which log_every lie between two reports.
      steps_per_dispatch: steps in one call of the compiled program.
      saved: the step of the last checkpoint, for the error below.

    Returns:
      the last state, and whether a signal has stopped training.

    Raises:
      NonFiniteError: when a metric is not finite; names it, its step and the last checkpoint.
    """

    def diverged(step: int, what: str) -> NonFiniteError:
        good = saved()
        return NonFiniteError(
            f"{what} in step {step}: the run diverged. The last good checkpoint is "
            f"{'none' if good is None else f'of step {good}'}. {task.objective.advice()}"
        )

    periods = [log_every, *(n for hook in hooks for n in hook.periods)]
    marks = [at for hook in hooks for at in hook.at]

    def steps_to_next_event(step: int) -> int:  # a dispatch must not run past it
        ends = [step + n - step % n for n in periods] + [at for at in marks if at > step]
        return min(*ends, num_steps) - step

    update = devices.compile(make_update(task, devices.axis_name))
    step, stopping, log = int(state.step), False, _Log(diverged)
    with Interrupt() as interrupt:
        while step < num_steps and not stopping:
            count = min(steps_per_dispatch, steps_to_next_event(step))
            batches = devices.put_batches(stack(stream, count, steps_per_dispatch))
            number = devices.put_scalar(count)
            with jax.transfer_guard("disallow"):
                state, metrics = update(state, frozen, batches, number)
            log.record(step, count, metrics)
            step, last = step + count, step + count == num_steps
            writer.progress(step)
            stopping = interrupt.requested(sync=step % log_every == 0) and not last
            if step % log_every == 0 or last or stopping:
                rate = {"learning_rate": float(task.learning_rate(step))}
                writer.scalars(step, log.report() | rate)
            due = [hook for hook in hooks if hook.is_due(step, last, stopping)]
            if due:
                log.flush()  # nothing that is not finite may be saved
            readings: dict[str, float] = {}
            for hook in due:
                moment = Moment(step, devices.to_global(state), dict(readings), stopping)
                found = hook.run(moment) or {}
                if found:
                    writer.scalars(step, dict(found))
                readings |= found
        log.flush()
    if stopping:
        logging.warning("Stopped by a signal after step %d; run the same command to go on.", step)
    return state, stopping
