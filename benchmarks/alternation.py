"""Programs that are timed in alternation, in this process and in others."""

import contextlib
import dataclasses
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import ROOT

from mclr_jax import chips, plan
from mclr_jax.model import shapes_of
from mclr_jax.networks import layers
from mclr_jax.reductions import report
from mclr_jax.task import Task
from mclr_jax.training.devices import Devices
from mclr_jax.training.step import TrainState, init_state

SIGMA_DATA = 0.5


def alternate(runs: Mapping[str, Callable], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Seconds of one call of each function, in `rounds` repetitions in alternation.

    `runs` are warm functions of a number of calls, which return when the device is done; a
    repetition has at least these seconds.
    """
    counts, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        counts[name] = max(1, math.ceil(seconds / seconds_of(run, 1)))
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds_of(run, counts[name]) / counts[name])
    return times


def seconds_of(run: Callable[[int], Any], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


class Worker:
    """A process that answers in JSON: first that it is set up, then for each line (`tasks.serve`).

    `script` is a file of this folder; `prefix` is a command that starts the process.
    """

    def __init__(self, script: str, *arguments: str, prefix: Any = (), environment: Any = None):
        command = [*prefix, sys.executable, str(ROOT / "benchmarks" / script), *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=environment, **pipes)
        self.origin = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}.")
        return json.loads(line)

    def run(self, calls: int) -> dict[str, Any]:
        """So many calls, and the answer."""
        print(calls, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def numbers(shapes: Any, seed: int = 0, classes: int = 1, scale: float = 0.03) -> Any:
    """Arrays of these shapes on the host, of which none is zero: zeros would be multiplied faster.

    Floats are normal with standard deviation `scale`, bytes uniform, integers labels.
    """
    random = np.random.default_rng(seed)

    def filled(leaf: Any) -> np.ndarray:
        if leaf.dtype == np.uint8:
            return random.integers(0, 256, leaf.shape, np.uint8)
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return (scale * random.standard_normal(leaf.shape, np.float32)).astype(leaf.dtype)
        return random.integers(0, classes, leaf.shape).astype(leaf.dtype)

    return jax.tree.map(filled, shapes)


def rows(task: Task, batch: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random batches (length, batch, ...) of all that the objective reads."""
    classes = task.model.data.num_classes
    made = numbers(plan.batches(task, batch, length), seed, classes, SIGMA_DATA)
    return made | {"index": np.tile(np.arange(batch, dtype=np.int32), (length, 1))}


def state_of(task: Task, scale: float = 0.03) -> TrainState:
    """The state before the first step on the host, with random weights."""
    shapes = jax.eval_shape(functools.partial(init_state, task))
    zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    params = numbers(shapes.params, scale=scale)
    return zeros.replace(params=params, ema={name: params for name in shapes.ema})


def frozen_of(task: Task, scale: float = 0.03) -> dict[str, Any]:
    """Random weights of the frozen models on the host."""
    models = enumerate(task.frozen.items())
    return {name: numbers(shapes_of(model), 1 + i, scale=scale) for i, (name, model) in models}


@contextlib.contextmanager
def attention_of(implementation: str | None) -> Iterator[None]:
    """Programs traced inside have this attention of `jax.nn.dot_product_attention`, such as "xla".

    None is that of the package.
    """
    plain = layers.attention
    if implementation:
        asked = functools.partial(jax.nn.dot_product_attention, implementation=implementation)
        layers.attention = asked
    try:
        yield
    finally:
        layers.attention = plain


_cached: list[str] = []  # an entry for each program that came from the compilation cache
jax.monitoring.register_event_listener(
    lambda event, **_: _cached.append(event) if event.endswith("/cache_hits") else None
)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A step to be timed; `work` is the same step without recomputation, whose FLOPs count."""

    task: Task
    parallel: str = "data"
    length: int = 1  # steps in a dispatch
    work: Task | None = None
    attention: str | None = None  # see `attention_of`
    devices: tuple[jax.Device, ...] | None = None  # None: the first one


class Step:
    """A training step, compiled for the devices of its candidate."""

    def __init__(self, candidate: Candidate, batch: int):
        self.task, self.length, self.batch = candidate.task, candidate.length, batch
        self.devices = Devices(candidate.parallel, candidate.devices or (jax.devices()[0],))
        self.count = self.devices.put_state(np.int32(self.length))
        before, start = len(_cached), time.perf_counter()
        arguments = plan.shapes(self.task, batch, self.length)
        with attention_of(candidate.attention):
            lowered = plan.lowered(self.task, self.devices, arguments)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        compiled = time.perf_counter()
        self.origin = {"trace_seconds": traced - start, "compile_seconds": compiled - traced,
                       "from_cache": len(_cached) > before}  # fmt: skip
        self.memory = plan.memory_of(self.compiled)

    @property
    def needed(self) -> int:
        """Bytes: the outputs take the place of the old state."""
        return self.memory["arguments"] + self.memory["temporaries"]

    def load(self) -> None:
        """Put the batch and the frozen weights on the device."""
        self.data = self.devices.put_batches(rows(self.task, self.batch, self.length))
        self.frozen = self.devices.put_state(frozen_of(self.task))


class Holder:
    """The state that steps of several objectives change in turn."""

    def __init__(self, task: Task, devices: Devices):
        self.state, self.metrics = devices.put_state(state_of(task)), None

    def run(self, step: Step, calls: int) -> None:
        for _ in range(calls):
            new = step.compiled(self.state, step.frozen, step.data, step.count)
            self.state, self.metrics = new
        jax.block_until_ready((self.state, self.metrics))

    def loss(self) -> float:
        """That of the last step; FloatingPointError if it is not finite."""
        loss = report(jax.tree.map(lambda x: np.asarray(x)[-1], self.metrics))["loss"]
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss}: times of such steps mean nothing")
        return loss


def timed(
    candidates: Mapping[str, Candidate], batch: int, size: Any, others: Callable = lambda batch: {}
) -> dict[str, Any]:
    """Speed, memory and compilation of training steps, in alternation, on one state.

    The networks of the candidates have the same parameters. The batch is halved until the first one
    fits. A candidate that fails has its error. `size` has `rounds` and `seconds` of `alternate`;
    `others` gives, of the batch that fits, functions that alternate with the steps and do the work
    of the first candidate.
    """
    limit = peak_bytes("bytes_limit") or math.inf
    steps, found, holder = {}, {}, None
    for name, candidate in candidates.items():
        try:
            while (step := Step(candidate, batch)).needed > limit and batch > 1 and not steps:
                batch //= 2
            step.load()
            holder = holder or Holder(candidate.task, step.devices)
            holder.run(step, 2)
            loss = holder.loss()
        except Exception as failed:
            found[name] = {"error": first_lines(failed)}
            holder = None  # a step that fails takes the state with it
            continue
        work = plan.step_flops(candidate.work or candidate.task, batch)
        steps[name] = step
        found[name] = {**step.origin, "loss": loss, "flops_per_step": work,
                       "memory_bytes": step.memory, "peak_bytes": peak_bytes()}  # fmt: skip
    if not steps:
        return {"batch_size": batch, **found}
    first = next(iter(steps))
    holder = holder or Holder(steps[first].task, steps[first].devices)
    runs = {name: functools.partial(holder.run, step) for name, step in steps.items()}
    times = alternate({**runs, **others(batch)}, size.rounds, size.seconds)
    holder.loss()
    for name, seconds in times.items():
        length = steps[name].length if name in steps else 1
        row = found.setdefault(name, {"flops_per_step": found[first]["flops_per_step"]})
        row |= speed(np.divide(seconds, length).tolist(), batch, row["flops_per_step"])
    each = {name: found[name]["seconds_per_step"] for name in times}
    return {
        "batch_size": batch,
        "parameters": sum(x.size for x in jax.tree.leaves(holder.state.params)),
        "over_first": {name: seconds / each[first] for name, seconds in each.items()},
        **found,
    }


def speed(seconds: Sequence[float], batch: int, flops: float) -> dict[str, Any]:
    """The median of several times of a step, and what follows from it."""
    median, chip = float(np.median(seconds)), chip_of_device()
    return {
        "seconds_per_step": median, "examples_per_second": batch / median,
        "flops_per_second": flops / median, "seconds": list(seconds),
        "utilisation": flops / median / chip.flops if chip else None,
    }  # fmt: skip


def chip_of_device() -> chips.Chip | None:
    """The published peaks of the first device, if they are known."""
    return chips.KINDS_OF_CHIP.get(jax.devices()[0].device_kind)


def peak_bytes(key: str = "peak_bytes_in_use") -> int | None:
    """Bytes that were in use at most since the process began; `key` is of JAX's statistics."""
    return (jax.devices()[0].memory_stats() or {}).get(key)


def first_lines(failed: BaseException) -> str:
    """Type and beginning of an error; those of XLA can have pages."""
    return f"{type(failed).__name__}: {failed}"[:1000]
