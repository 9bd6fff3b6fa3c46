"""What benchmarks/accelerator.py measures: the rows of its sections, as functions.

It imports what the ground floors of the package import: jax, flax, optax and NumPy.
"""

import contextlib
import dataclasses
import functools
import importlib.util
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
import optax
import tasks

from mclr_jax import ema, experiment, generate, names, plan
from mclr_jax.denoiser import EDM, natural_weight
from mclr_jax.files import digest
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks import layers
from mclr_jax.noise import LogNormal
from mclr_jax.posterior import Classifier
from mclr_jax.problem import Problem
from mclr_jax.reductions import report
from mclr_jax.samplers import Sampler
from mclr_jax.task import Task
from mclr_jax.training.devices import Devices
from mclr_jax.training.step import TrainState, init_state, make_update

SIGMA_DATA = 0.5
# Type, precision of products, and the largest relative errors (norm of the difference over norm)
# of output and gradient against float32 on the CPU. Products in float32 are in bfloat16 on TPUs and
# in TF32 on GPUs, unless the highest precision is asked for. A bfloat16 number has a relative error
# of up to 2^-9; on the CPU, the networks below have 0.007 and 0.014.
PARITY = {
    "float32": ("float32", "highest", 1e-4, 1e-4),
    "float32, default precision": ("float32", "default", 3e-2, 5e-2),
    "bfloat16": ("bfloat16", "default", 3e-2, 5e-2),
}
BY_XLA = "bfloat16, XLA's attention"  # of the DiT, on GPUs; the package takes that of cuDNN
STEP_TOLERANCE = 1e-3  # of the metrics and of the update of an objective in float32
OPTIONS: dict[str, dict[str, Any]] = {"mclr": {"negative_share": 0.5}}
RIVALS = ("mclr_null", "cca", "gft", "model_guidance", "contrastive_flow", "ddo", "dpo")


@dataclasses.dataclass(frozen=True)
class Case:
    """A network, its data and its batch."""

    network: str
    options: Mapping[str, Any]
    shape: tuple[int, ...]
    classes: int
    batch: int = 8
    flip: bool = False
    judge: tuple[str, Mapping[str, Any]] | None = None  # the classifier that MCLR reads
    torch: Mapping[str, Any] | None = None  # the options of the same network in PyTorch

    def model(self, **changes: Any) -> Model:
        return make_model(self.network, {**self.options, **changes}, self.shape, self.classes)

    def task(self, objective: str, **changes: Any) -> Task:
        """A training by `objective`; `changes` are those of the network."""
        model = self.model(**changes)
        companions = {"reference": model, "weak": model}
        if self.judge:
            companions["classifier"] = make_model(*self.judge, self.shape, self.classes)
        return make_task(model, objective, companions, flip=self.flip)


JUDGE = {"channels": (128, 256, 256), "patch_size": 1, "dtype": "bfloat16"}
UNET = {"channels": 128, "channel_mult": (2, 2, 2), "num_blocks": 4, "attention_resolutions": (16,)}


def _latents(batch: int, torch: bool, **size: int) -> Case:
    """A DiT on 32x32x4 latents of 1,000 classes, with patches of 2x2."""
    options = {"patch_size": 2, "dtype": "bfloat16", **size}
    same = {**size, "patch": 2, "channels": 4, "num_classes": 1000} if torch else None
    judge = "conv_classifier", JUDGE
    return Case("dit", options, (32, 32, 4), 1000, batch, judge=judge, torch=same)


CASES = {
    "DiT-XL/2": _latents(64, True, width=1152, depth=28, heads=16),
    "CIFAR-10 U-Net": Case(
        "unet", {**UNET, "dropout": 0.13, "dtype": "bfloat16"}, (32, 32, 3), 10, 512, True,
        ("conv_classifier", JUDGE), UNET,
    ),
    "DiT-B/2": _latents(256, False, width=768, depth=12, heads=12),
}  # fmt: skip
DIGITS = Case("dit", {"patch_size": 2, "width": 96, "depth": 3, "heads": 3}, (8, 8, 1), 10, 64)
TINY_MLP = Case("mlp", {"width": 8, "depth": 1}, (2,), 3, 8,
                judge=("mlp_classifier", {"width": 8, "depth": 1}))  # fmt: skip
TINY_DIT = Case(
    "dit", {"patch_size": 2, "width": 16, "depth": 1, "heads": 2}, (4, 4, 4),
    5, 8, judge=("conv_classifier", {"channels": (8,)}),
    torch={"width": 16, "depth": 1, "heads": 2, "patch": 2, "channels": 4, "num_classes": 5,
           "resolution": 4},
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    cases: Mapping[str, Case]
    small: Case  # the time of its step is that of the dispatch
    width: int  # of the networks that are compared with the CPU
    depth: int
    side: int  # of their images
    product: int  # rows of the matrices whose product gives the peak
    rounds: int  # repetitions, of which the median counts
    seconds: float  # of a repetition, at least
    dispatches: tuple[int, ...]  # steps in one
    sampling_steps: int
    rivals: tuple[str, ...]


FULL = Size(CASES, DIGITS, 128, 3, 16, 8192, 5, 0.5, (1, 4, 16), 18, RIVALS)
TINY = Size({"MLP": TINY_MLP, "DiT": TINY_DIT}, TINY_MLP, 8, 1, 4, 64, 2, 0.0, (1, 2), 2, ("cca",))


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


# ---- models, tasks and arrays --------------------------------------------------------------------


def make_model(network: str, options: Mapping[str, Any], shape: tuple, classes: int) -> Model:
    """The model of a network by its name, with the preconditioning of EDM."""
    filled_in = {"num_classes": classes, "out_channels": shape[-1]}
    section = {"name": network, **options}
    made = names.make(experiment.NETWORKS, section, "network", **filled_in)
    data = DataInfo(shape, classes, SIGMA_DATA, (1 / classes,) * classes)
    return Model(made, EDM(SIGMA_DATA), data)


def make_task(model: Model, objective: str, companions: Mapping[str, Model], **more: Any) -> Task:
    """A training by Adam, with an average of the weights; MCLR's posterior is a classifier."""
    problem = Problem(
        LogNormal(), functools.partial(natural_weight, model.preconditioning), model.null_label,
        model.data.class_prior, SIGMA_DATA, model.frames,
    )  # fmt: skip
    made = experiment.OBJECTIVES[objective](**OPTIONS.get(objective, {}))
    posterior = Classifier() if "posterior" in made.needs else None
    options = {"learning_rate": lambda step: 1e-4, "averages": {"halflife": ema.halflife(1000.0)}}
    options |= {"optimizer": optax.adamw(1e-4, weight_decay=0.0), "posterior": posterior, **more}
    return Task(model, made, problem, companions=companions, **options)


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


def error(found: Any, wanted: Any) -> float:
    """Norm of the difference of two trees over the norm of the second, in float64."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    pairs = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    above, below = (
        math.sqrt(sum(float(np.sum(part**2)) for part in parts))
        for parts in ((a - b for a, b in pairs), (b for _, b in pairs))
    )
    return above / below if below else float(above > 0)


# ---- against the CPU -----------------------------------------------------------------------------


def families(size: Size) -> dict[str, Case]:
    """A small network of each kind."""
    w, d, image = size.width, size.depth, (size.side, size.side, 3)
    heads = {"width": w, "depth": d, "heads": 2}
    unet = {"channels": w, "channel_mult": (1, 2), "num_blocks": d,
            "attention_resolutions": (size.side // 2,)}  # fmt: skip
    return {
        "mlp": Case("mlp", {"width": w, "depth": d}, (2,), 3),
        "dit": Case("dit", {**heads, "patch_size": 2}, image, 3),
        "unet ddpmpp": Case("unet", unet, image, 3),
        "unet ncsnpp": Case("unet", {**unet, "architecture": "ncsnpp"}, image, 3),
        "unet adm": Case("unet", {**unet, "architecture": "adm"}, image, 3),
        "mlp_classifier": Case("mlp_classifier", {"width": w, "depth": d}, (2,), 3),
        "conv_classifier": Case("conv_classifier", {"channels": (w, w)}, image, 3),
        "trajectory": Case("trajectory", {**heads, "frames_per_token": 2}, (4, 3), 3),
        "frame_dit": Case("frame_dit", {**heads, "patch_size": 2}, (2, *image), 3),
    }


def parity(case: Case) -> dict[str, Any]:
    """Errors of a network's output and gradient on the device.

    The gradient is that of a random linear function of the output, in the parameters and the input.
    """
    reference, found, asked = _answers(case, *PARITY["float32"][:2]), {}, dict(PARITY)
    wanted = reference(_cpu())
    if jax.default_backend() == "gpu" and case.network == "dit":
        asked[BY_XLA] = PARITY["bfloat16"]
    for name, (dtype, precision, *limits) in asked.items():
        answers = reference if name == "float32" else _answers(case, dtype, precision)
        with attention_of("xla" if name == BY_XLA else None):
            got = answers(jax.devices()[0])
        errors = {part: error(got[part], wanted[part]) for part in wanted}
        tolerances = dict(zip(wanted, limits, strict=True))
        passed = all(errors[part] <= tolerances[part] for part in wanted)
        found[name] = {**errors, "tolerances": tolerances, "passed": passed}
    return {**found, "passed": all(row["passed"] for row in found.values())}


def _answers(case: Case, dtype: str, precision: str) -> Callable[[jax.Device], dict[str, Any]]:
    """Device -> a network's output and gradient."""
    model = case.model(dtype=dtype)
    shapes = {"x": (case.batch, *case.shape), "c_noise": (case.batch, *model.frames)}
    shapes = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    inputs = numbers(shapes, 1, scale=1.0)
    label = np.arange(case.batch, dtype=np.int32) % (case.classes + 1)

    def weighed(params: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        condition = model.complete(label, case.batch)
        output = model.network.apply({"params": params}, x, inputs["c_noise"], condition)
        return jnp.vdot(output, numbers(output, 2, scale=1.0)), output

    program = jax.jit(jax.grad(weighed, (0, 1), has_aux=True))
    arguments = numbers(shapes_of(model), scale=0.1), inputs["x"]

    def answers(device: jax.Device) -> dict[str, Any]:
        with jax.default_matmul_precision(precision):
            gradient, output = jax.device_get(program(*jax.device_put(arguments, device)))
        return {"output": output, "gradient": gradient}

    return answers


def objective_step(name: str, size: Size) -> dict[str, Any]:
    """Errors of an objective's metrics and of its update of the state, for one step of an MLP."""
    options = {"width": size.width, "depth": size.depth}
    model, judge = (make_model(n, options, (2,), 3) for n in ("mlp", "mlp_classifier"))
    companions = {"reference": model, "weak": model, "classifier": judge}
    # With a large eps Adam's first update is about the gradient, and not its sign.
    more = {"optimizer": optax.adam(1e-2, eps=1e-2)}
    task = make_task(judge if name == "classify" else model, name, companions, **more)
    if name == "dpo":  # its default, 5000, enlarges rounding errors of the answers
        task = dataclasses.replace(task, objective=dataclasses.replace(task.objective, beta=10.0))
    state = state_of(task, 0.1)
    arguments = state, frozen_of(task, 0.2), rows(task, 16, 1), np.int32(1)
    update = jax.jit(make_update(task))

    def step(device: jax.Device) -> tuple[Any, Any]:
        with jax.default_matmul_precision("highest"):
            new, metrics = jax.device_get(update(*jax.device_put(arguments, device)))
        return jax.tree.map(np.subtract, new, state), metrics

    (change, metrics), (wanted, wanted_metrics) = map(step, (jax.devices()[0], _cpu()))
    both = zip(jax.tree.leaves(metrics), jax.tree.leaves(wanted_metrics), strict=True)
    errors = {"update": error(change, wanted), "metrics": max(error(*pair) for pair in both)}
    passed = all(value <= STEP_TOLERANCE for value in errors.values())
    return {**errors, "tolerance": STEP_TOLERANCE, "passed": passed}


def resume(case: Case) -> dict[str, Any]:
    """Whether a training that stops and is restored from the host continues bit for bit.

    Where two uninterrupted trainings differ, the device's own operations are not deterministic.
    """
    task, length = case.task("dsm", dropout=0.1), 4
    step = Step(Candidate(task, length=length), case.batch)

    def train(state: TrainState, first: int, last: int) -> TrainState:
        for number in range(first, last):
            data = step.devices.put_batches(rows(task, case.batch, length, seed=number))
            state, _ = step.compiled(state, {}, data, step.count)
        return jax.tree.map(np.array, state)  # copies on the host

    start, put = state_of(task), step.devices.put_state
    whole, again = (train(put(start), 0, 4) for _ in range(2))
    stopped = train(put(start), 0, 2)
    resumed = train(put(stopped), 2, 4)
    digests = {"uninterrupted": digest(whole), "again": digest(again), "resumed": digest(resumed)}
    return {
        "steps": 4 * length,
        "digests": digests,
        "deterministic": digests["again"] == digests["uninterrupted"],
        "difference": error(resumed.params, whole.params),
        "passed": digests["resumed"] == digests["uninterrupted"],
    }


# ---- time ----------------------------------------------------------------------------------------


def alternate(
    runs: Mapping[str, Callable[[int], Any]], rounds: int, seconds: float
) -> dict[str, list[float]]:
    """Seconds of one call of each function, which are repeated in alternation.

    Args:
      runs: functions of a number of calls, which return when the device is done. They are warm.
      rounds: repetitions of each.
      seconds: length of a repetition, at least.
    """
    counts, times = {}, {name: [] for name in runs}
    for name, run in runs.items():
        counts[name] = max(1, math.ceil(seconds / _seconds(run, 1)))
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run, counts[name]) / counts[name])
    return times


def _seconds(run: Callable[[int], Any], count: int) -> float:
    start = time.perf_counter()
    run(count)
    return time.perf_counter() - start


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


class Step:
    """A training step, compiled for one device."""

    def __init__(self, candidate: Candidate, batch: int):
        self.task, self.length, self.batch = candidate.task, candidate.length, batch
        self.devices = Devices(candidate.parallel, (jax.devices()[0],))
        self.count = self.devices.put_state(np.int32(self.length))
        before, start = len(_cached), time.perf_counter()
        arguments = plan.shapes(self.task, batch, self.length)
        with attention_of(candidate.attention):
            lowered = plan.lowered(self.task, self.devices, arguments)
        traced = time.perf_counter()
        self.compiled = lowered.compile()
        self.origin = {
            "trace_seconds": traced - start,
            "compile_seconds": time.perf_counter() - traced,
            "from_cache": len(_cached) > before,
        }
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


def fitted(candidate: Candidate, batch: int) -> Step:
    """The step with the batch halved until it fits into the memory of the device."""
    while (step := Step(candidate, batch)).needed > _limit() and batch > 1:
        batch //= 2
    return step


def timed(
    candidates: Mapping[str, Candidate], batch: int, size: Size,
    others: Callable[[int], Mapping[str, Callable[[int], Any]]] = lambda batch: {},
) -> dict[str, Any]:  # fmt: skip
    """Speed, memory and compilation of training steps, in alternation, on one state.

    The batch is halved until the first candidate fits. A candidate that fails has its error.

    Args:
      candidates: steps by name; their networks have the same parameters.
      batch: examples in a step.
      size: how long to measure.
      others: the batch that fits -> functions of a number of calls, with which the steps alternate,
        and which do the work of the first candidate.
    """
    steps, found, holder = {}, {}, None
    for name, candidate in candidates.items():
        try:
            step = fitted(candidate, batch) if not steps else Step(candidate, batch)
            batch = step.batch
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
        found[name] = {
            **step.origin,
            "loss": loss,
            "flops_per_step": work,
            "memory_bytes": step.memory,
            "peak_bytes": _peak(),
        }
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
        "seconds_per_step": median,
        "examples_per_second": batch / median,
        "flops_per_second": flops / median,
        "utilisation": flops / median / chip.flops if chip else None,
        "seconds": list(seconds),
    }


def chip_of_device() -> plan.Chip | None:
    """The published peaks of the first device, if they are known."""
    return plan.KINDS_OF_CHIP.get(jax.devices()[0].device_kind)


def _cpu() -> jax.Device:
    return jax.devices("cpu")[0]


def _stats() -> Mapping[str, int]:
    return jax.devices()[0].memory_stats() or {}


def _peak() -> int | None:
    """Bytes that were in use at most since the process began."""
    return _stats().get("peak_bytes_in_use")


def _limit() -> float:
    return _stats().get("bytes_limit", math.inf)


def first_lines(failed: BaseException) -> str:
    """Type and beginning of an error; those of XLA can have pages."""
    return f"{type(failed).__name__}: {failed}"[:1000]


# ---- the rows that are timed ---------------------------------------------------------------------


def throughput(case: Case, size: Size, objectives: Sequence[str]) -> dict[str, Any]:
    """Training steps by several objectives."""
    return timed({name: Candidate(case.task(name)) for name in objectives}, case.batch, size)


def layouts(case: Case, size: Size) -> dict[str, Any]:
    """A step of DSM on one device by layout, with recomputed blocks and with a loop over them.

    On GPUs also with the attention of XLA, where the package takes that of cuDNN.
    """
    kept = {"remat": True, "remat_policy": "weight_products"}
    task, changed = case.task("dsm"), {"recomputed": {"remat": True}, "weight products kept": kept}
    if case.network == "dit":
        changed["scanned"] = {"scan_blocks": True}
        changed["scanned, recomputed"] = {"scan_blocks": True, "remat": True}
    steps = {"data": Candidate(task), "pmap": Candidate(task, "pmap")}
    for name, changes in changed.items():
        steps[name] = Candidate(case.task("dsm", **changes), work=task)
    if jax.default_backend() == "gpu" and case.network == "dit":
        steps["XLA's attention"] = Candidate(task, attention="xla")
    return timed(steps, case.batch, size)


def dispatches(case: Case, size: Size) -> dict[str, Any]:
    """Steps of DSM, several in one dispatch."""
    lengths = {f"{n} steps": Candidate(case.task("dsm"), length=n) for n in size.dispatches}
    return timed(lengths, case.batch, size)


def sampling(case: Case, size: Size) -> dict[str, Any]:
    """Samples without guidance, as MCLR needs it, and with CFG."""
    model, sampler = case.model(dropout=0.0), Sampler(num_steps=size.sampling_steps)
    params = generate.replicated(jax.device_put(numbers(shapes_of(model))))
    labels = np.arange(case.batch, dtype=np.int32) % case.classes

    def run(scale: float, calls: int) -> None:
        for _ in range(calls):
            options = {"guidance_scale": scale, "batch_size": case.batch}
            generate.generate(model, params, labels, sampler, **options)

    scales, found = {"unguided": 1.0, "CFG": 2.0}, {}
    for name, scale in scales.items():
        calls = generate.network_calls(model, sampler, guidance_scale=scale)
        flops = plan.forward_flops(model) * calls * case.batch
        found[name] = {"first_call_seconds": _seconds(functools.partial(run, scale), 1)}
        found[name] |= {"network_calls": calls, "flops": flops, "peak_bytes": _peak()}
    runs = {name: functools.partial(run, scale) for name, scale in scales.items()}
    for name, seconds in alternate(runs, size.rounds, size.seconds).items():
        found[name] |= speed(seconds, case.batch, found[name]["flops"])
    return {"batch_size": case.batch, **found}


def peaks(size: Size) -> dict[str, float]:
    """FLOP/s of a product of bfloat16 matrices, and bytes/s read and written by a copy."""
    n = size.product
    shapes = [jax.ShapeDtypeStruct((n, n), jnp.bfloat16)] * 2
    a, b = jax.device_put(numbers(shapes, scale=1.0))
    x = jax.device_put(np.ones(4 * n * n, np.float32))  # many times the caches
    multiply, copy = jax.jit(lambda a, b: a @ b), jax.jit(lambda x: x + 1)

    def repeated(program: Callable, *arguments: Any) -> Callable[[int], None]:
        def run(calls: int) -> None:
            for _ in range(calls):
                answer = program(*arguments)
            jax.block_until_ready(answer)

        run(2)
        return run

    runs = {"product": repeated(multiply, a, b), "copy": repeated(copy, x)}
    times = alternate(runs, size.rounds, size.seconds)
    return {
        "flops_per_second": 2 * n**3 / float(np.median(times["product"])),
        "bytes_per_second": 2 * x.nbytes / float(np.median(times["copy"])),
    }


def calibration(name: str, stored: Sequence[dict]) -> dict[str, Any]:
    """What `plan` predicts for the steps of a row of `throughput`, beside what was measured.

    The lower bound of the seconds is that of the published peaks, where they are known, and that of
    the peaks measured by `peaks`.
    """
    measured = tasks.made(stored, {"section": "plan", "name": "peaks"})
    row = tasks.made(stored, {"section": "throughput", "name": name})
    if not measured or not row or "error" in {**measured, **row}:
        return {"skipped": "it needs the rows peaks of plan, and this one of throughput"}
    published, found = chip_of_device(), {}
    own = plan.Chip(0, measured["flops_per_second"], measured["bytes_per_second"], 1.0, "measured")
    for objective in ("dsm", "mclr"):
        if "error" in (step := row[objective]):
            continue
        work, memory = step["flops_per_step"], step["memory_bytes"]
        bounds = {
            kind: plan.roofline(chip, work, memory, {})["seconds"]
            for kind, chip in {"published": published, "measured": own}.items()
            if chip
        }
        planned = memory["arguments"] + memory["temporaries"]
        found[objective] = {
            "seconds_per_step": step["seconds_per_step"],
            "bounds": bounds,
            "over_bound": {
                kind: step["seconds_per_step"] / max(parts.values())
                for kind, parts in bounds.items()
            },
            "planned_bytes": planned,
            "peak_over_planned": step["peak_bytes"] and step["peak_bytes"] / planned,
        }
    return found


# ---- PyTorch -------------------------------------------------------------------------------------

TORCH = {"compiled": "default", "CUDA graphs": "reduce-overhead", "eager": ""}  # in this order


class Worker:
    """A training in PyTorch, in a process of its own."""

    def __init__(self, settings: Mapping[str, Any]):
        script = tasks.ROOT / "benchmarks" / "torch_models.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(settings)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.origin = self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"PyTorch ended with status {self.process.wait()}; see its output.")
        return json.loads(line)

    def run(self, calls: int) -> None:
        """So many steps."""
        print(calls, file=self.process.stdin, flush=True)
        self._answer()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def torch_training(case: Case, mode: str, size: Size) -> dict[str, Any]:
    """A step of DSM in turns with the same network in PyTorch, both without dropout."""
    on_cpu = jax.default_backend() == "cpu"
    if importlib.util.find_spec("torch") is None:
        return {"skipped": "torch cannot be imported"}
    if on_cpu and TORCH[mode]:
        return {"skipped": "PyTorch's compiler is for GPUs here"}
    settings = {"network": case.network, "options": case.torch, "shape": case.shape,
                "device": "cpu" if on_cpu else "cuda", "mode": TORCH[mode]}  # fmt: skip
    workers: list[Worker] = []

    def others(batch: int) -> dict[str, Callable[[int], Any]]:
        workers.append(Worker({**settings, "batch": batch}))
        return {"torch": workers[0].run}

    try:
        found = timed({"ours": Candidate(case.task("dsm", dropout=0.0))}, case.batch, size, others)
        return {**found, "torch": {**found["torch"], **workers[0].origin}}
    finally:
        for worker in workers:
            worker.close()


# ---- all rows ------------------------------------------------------------------------------------

Row = Callable[[Sequence[dict]], dict[str, Any]]  # the rows that are stored -> a new one


def all_rows(size: Size) -> dict[str, dict[str, Row]]:
    """Section -> name -> what makes that row. The most valuable ones are first."""

    def made(function: Callable, *arguments: Any) -> Row:
        return lambda stored: function(*arguments)

    def calibrated(name: str) -> Row:
        return lambda stored: calibration(name, stored)

    cases = size.cases
    torch = {f"{n}, {m}": (c, m, size) for m in TORCH for n, c in cases.items() if c.torch}
    return {
        "parity": {name: made(parity, case) for name, case in families(size).items()},
        "throughput": {n: made(throughput, c, size, ("dsm", "mclr")) for n, c in cases.items()},
        "plan": {"peaks": made(peaks, size), **{name: calibrated(name) for name in cases}},
        "torch": {name: made(torch_training, *arguments) for name, arguments in torch.items()},
        "sampling": {name: made(sampling, case, size) for name, case in cases.items()},
        "resume": {"small": made(resume, size.small)},
        "objectives": {n: made(objective_step, n, size) for n in experiment.OBJECTIVES},
        "layouts": {
            "small, dispatches": made(dispatches, size.small, size),
            **{name: made(layouts, case, size) for name, case in cases.items()},
        },
        "rivals": {n: made(throughput, c, size, ("dsm", *size.rivals)) for n, c in cases.items()},
    }
