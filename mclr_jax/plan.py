"""The cost of a training on TPUs or GPUs, without any: memory, FLOPs, collectives and a roofline.

libtpu, the TPU's compiler, and JAX's CUDA plugin compile the training step for a topology of chips
on any machine. Every argument is a shape: no parameter is allocated, and no data are read.
"""

import dataclasses
import functools
import math
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from mclr_jax import backend, chips, generate, runs
from mclr_jax.chips import CARDS, Chip
from mclr_jax.config import Training
from mclr_jax.configs import find, load
from mclr_jax.files import flat
from mclr_jax.generate import Guidance
from mclr_jax.hlo import collectives
from mclr_jax.model import DataInfo, Model, shapes_of, size_of
from mclr_jax.samplers import Churn, Sampler
from mclr_jax.schema import fields
from mclr_jax.task import Task
from mclr_jax.training.devices import AXIS, Devices, placed, shardings
from mclr_jax.training.step import init_state, make_update

# ---- counts --------------------------------------------------------------------------------------


def _inner(equation: Any) -> Iterator[Any]:
    """The jaxprs among the parameters of an equation."""
    for value in equation.params.values():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def flops(jaxpr: Any) -> int:
    """FLOPs of the matrix products and convolutions of a jaxpr, 2 for each multiply and add.

    The body of a scan counts once for each iteration, that of another loop once, and of the
    branches of a condition the most expensive one. Products with zeros that a convolution inserts
    between the rows of its input do not count. Operations on single elements are left out.
    """
    total = 0
    for equation in jaxpr.eqns:
        name, results = equation.primitive.name, [variable.aval for variable in equation.outvars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += 2 * results[0].size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
            inserted = math.prod(equation.params["lhs_dilation"])
            total += 2 * results[0].size * (kernel.size // features) // inserted
        parts = [flops(part) for part in _inner(equation)]
        if name == "cond":
            total += max(parts)
        else:
            total += (equation.params["length"] if name == "scan" else 1) * sum(parts)
    return total


# ---- the step ------------------------------------------------------------------------------------


def batches(task: Task, batch_size: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes (length, batch_size, ...) of what `data.pipeline` gives to a dispatch.

    Images of 1 or 3 channels are taken to be uint8, other data float32.
    """
    shape = task.model.data.shape
    kind = np.uint8 if len(shape) == 3 and shape[-1] in (1, 3) else np.float32
    prefixes = ["", *(f"{name}_" for name in sorted(task.needs & {"other", "generated"}))]
    integer = jax.ShapeDtypeStruct((length, batch_size), np.int32)
    image = jax.ShapeDtypeStruct((length, batch_size, *shape), kind)
    rows = {f"{prefix}label": integer for prefix in prefixes}
    return {"index": integer, **rows, **{f"{prefix}image": image for prefix in prefixes}}


def lowered(task: Task, devices: Devices, shapes: tuple) -> Any:
    """The step of `training.step`, ready to compile for these devices."""
    state, frozen, rows, count = shapes
    if devices.parallel == "pmap":
        n = len(devices.mesh.local_devices)

        def split(x):
            shape = len(x), n, x.shape[1] // devices.mesh.size, *x.shape[2:]
            return jax.ShapeDtypeStruct(shape, x.dtype)

        rows = jax.tree.map(split, rows)
    else:
        state, frozen, count = (
            placed(x, devices.state_shardings(x)) for x in (state, frozen, count)
        )
        over_rows = NamedSharding(devices.mesh, PartitionSpec(None, AXIS))
        rows = placed(rows, jax.tree.map(lambda x: over_rows, rows))
    step: Any = devices.compile(make_update(task, devices.axis_name))
    return step.lower(state, frozen, rows, count)


# Without the card XLA cannot tune its own kernels for matrix products; those of cuBLAS need none.
UNTUNED = {"xla_gpu_enable_triton_gemm": False}


def _compiled(
    program: Any, scale: int, options: Mapping[str, Any] | None = None
) -> tuple[dict[str, int | None], dict]:
    """Bytes of memory by part, times `scale`, and the collectives.

    Of a program that does not fit, the compiler tells at most the peak.
    """
    try:
        compiled = program.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        wanted = re.search(r"(?:Used |\()([\d.]+)([KMGT])", str(error))
        factor = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        peak = int(float(wanted[1]) * factor[wanted[2]]) * scale if wanted else None
        return {"arguments": None, "outputs": None, "temporaries": None, "peak": peak}, {}
    memory: dict[str, int | None] = {k: scale * v for k, v in memory_of(compiled).items()}
    return memory, collectives(compiled.as_text())


def memory_of(compiled: Any) -> dict[str, int]:
    """Bytes of memory by part that the compiler has planned for a program on one device."""
    found = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "peak": found.peak_memory_in_bytes,
    }


def forward_flops(model: Model) -> int:
    """FLOPs of one call of the network for one example."""
    answer: Any = model.logits if model.is_classifier else model.denoise
    if model.is_emulator:
        answer = lambda params: lambda x, sigma, label: model.forecast(params)(x)  # noqa: E731
    inputs = jax.ShapeDtypeStruct((1, *model.data.shape), np.float32), np.ones(1, np.float32)

    def call(params, x, sigma):
        return answer(params)(x, sigma, np.zeros(1, np.int32))

    with backend.programs_for_others():
        return flops(jax.make_jaxpr(call)(shapes_of(model), *inputs).jaxpr)


def shapes(task: Task, batch_size: int, length: int = 1) -> tuple:
    """The arguments of a dispatch of `length` steps: state, frozen, batches, count."""
    state = jax.eval_shape(functools.partial(init_state, task), task.shapes)
    frozen = {name: shapes_of(model) for name, model in task.frozen.items()}
    rows = batches(task, batch_size, length)
    return state, frozen, rows, jax.ShapeDtypeStruct((), np.int32)


def step_flops(task: Task, batch_size: int) -> int:
    """FLOPs of a training step, of all devices together."""
    with backend.programs_for_others():
        return flops(jax.make_jaxpr(make_update(task))(*shapes(task, batch_size)).jaxpr)


def sampling(
    model: Model, name: str, sampler: Sampler, *, batch_size: int, guidance_scale: float = 1.0
) -> dict[str, Any]:
    """The cost of `generate.generate` for a batch on a topology, as JSON like that of `planned`.

    Each call of the sampler is a round of `roofline`, which reads the parameters. ValueError,
    MissingCompilerError: see `chips.topology`; a classifier; the devices do not divide the batch.
    """
    chip, all_devices = chips.topology(name)
    if not model.is_denoiser:
        what = "a classifier" if model.is_classifier else "an emulator"
        raise ValueError(f"The network is {what}, which draws no samples.")
    (rows, whole), count = shardings(all_devices), len(all_devices) // chip.devices
    if batch_size % len(all_devices):
        raise ValueError(
            f"A batch of {batch_size} samples on {len(all_devices)} devices; expected a multiple."
        )
    guided = Guidance(guidance_scale)
    scales = guided.scales(model.null_label)
    run = generate.program(model, sampler.method, guided.is_second_call(model))
    scalars = (
        sampler.table(model.preconditioning),
        *jax.tree.map(np.float32, (scales, (0.0, np.inf), Churn())),
    )
    scalars = jax.eval_shape(lambda: scalars)
    params: tuple = (shapes_of(model), {})  # no weaker model's
    seed = jax.ShapeDtypeStruct((), np.uint32)
    every = jax.ShapeDtypeStruct((batch_size,), np.int32)
    put = functools.partial(jax.tree.map, lambda x: placed(x, whole))
    arguments = (*put((params, seed)), *placed((every, every), (rows, rows)), *put(scalars))
    with backend.programs_for_others():
        in_batch = flops(jax.make_jaxpr(run)(*arguments).jaxpr)
        program = functools.partial(jax.jit(run, out_shardings=whole).lower, *arguments)
        steps = Guidance().calls(model, sampler)
        cost = _costs(chip, name, count, program, in_batch, steps)
    return cost | {
        "batch_size": batch_size,
        "guidance_scale": guidance_scale,
        "thousand_samples": {
            "network_calls": guided.calls(model, sampler),
            "flops": 1000 * in_batch // batch_size,
            "chip_seconds": 1000 * cost["roofline"]["seconds_per_step"] * count / batch_size,
        },
    }


def _costs(
    chip: Chip, name: str, count: int, lower: Callable, flops: float, rounds: int = 1
) -> dict[str, Any]:
    """Costs of the program of `lower()`, found by compiling it for a topology."""
    start = time.perf_counter()
    options = UNTUNED if CARDS.fullmatch(name) else None
    memory, exchanged = _compiled(lower(), chip.devices, options)
    return {
        "topology": name,
        "chips": count,
        "memory_per_chip_bytes": memory,
        "chip_memory_bytes": chip.memory,
        "fits": memory["arguments"] is not None and (memory["peak"] or 0) <= chip.memory,
        "collectives": exchanged,
        "roofline": roofline(chip, flops / count, memory, exchanged, rounds),
        "compile_seconds": time.perf_counter() - start,
    }


def roofline(
    chip: Chip, flops: float, memory: dict, exchanged: dict, rounds: int = 1
) -> dict[str, Any]:
    """A lower bound of the seconds of a step: the longest of computing, memory and links.

    Arguments are read, results written, and temporaries both, once in each round. An all-reduce
    moves its result twice. Of a step that does not fit only the computing is known.
    """
    times = {"arguments": 1, "outputs": 1, "temporaries": 2}
    moved = rounds * sum(n * (memory[part] or 0) for part, n in times.items())
    sent = sum((1 + (kind == "all-reduce")) * each["bytes"] for kind, each in exchanged.items())
    parts = {
        "compute": flops / chip.flops,
        "memory": moved / chip.bandwidth,
        "links": sent / chip.link,
    }
    peaks = dataclasses.asdict(chip)
    return {"seconds_per_step": max(parts.values()), "seconds": parts, "chip": peaks}


# ---- of a config ---------------------------------------------------------------------------------

# Changes of a config that save memory, beside more parts of a batch.
REMEDIES: Mapping[str, Any] = {
    "network.remat": True,
    "network.dtype": "bfloat16",
    "parallel": "fsdp",
}


def data_info(training: Training, shape: Sequence[int] | None, num_classes: int) -> DataInfo:
    """The properties of the data, measured unless a shape is given.

    ValueError: a shape without classes. FileNotFoundError: neither a shape nor the data.
    """
    if shape:
        if not (classes := num_classes or training.data.num_classes):
            raise ValueError("--shape is given without --num_classes; both are needed.")
        if min(shape) < 1:
            raise ValueError(f"--shape is {shape}; expected positive sizes, such as 32,32,3.")
        share = (1 / classes,) * classes
        return DataInfo(tuple(shape), classes, training.sigma_data or 1.0, share)
    try:
        return training.data_info(training.data.source("train", training.seed))
    except FileNotFoundError as error:
        hint = "Without the data give their shape, such as --shape=32,32,3 --num_classes=10."
        raise FileNotFoundError(f"{error}. {hint}") from error


def companions(training: Training, data: DataInfo) -> dict[str, Model]:
    """The models that the objective reads: those of runs or, for runs/NAME, of configs/NAME.py."""

    def model(name: str, path: str) -> Model:
        if (pathlib.Path(path) / "run.json").exists():
            return runs.load(path).model
        config = pathlib.Path(path).name
        file = config if find(config) else f"configs/{config}.py"
        if not find(file):
            raise FileNotFoundError(
                f"Companion {name!r}: {path} is no run, and there is no {file} to train it from; "
                "set the companion to the directory of a run, or to runs/NAME of a config."
            )
        return Training.parse(load(file)).model(data)

    return {name: model(name, path) for name, path in training.runs.items()}


def planned(
    training: Training, data: DataInfo, topology: str, models: Mapping[str, Model] | None = None
) -> dict[str, Any]:
    """The cost of a training on a topology, as JSON; docs/devices.md explains the keys.

    `models` are the companions, by default those of `companions`. ValueError, MissingCompilerError:
    see `chips.topology`; the devices do not divide the batch.
    """
    task = training.task(data, companions(training, data) if models is None else models)
    calls = 0 if not task.model.is_denoiser else Guidance().calls(task.model, training.sampler)
    chip, all_devices = chips.topology(topology)
    devices, count = Devices(training.parallel, all_devices), len(all_devices) // chip.devices
    batch_size = training.batch_size
    devices.check_batch_size(batch_size, task.grad_accumulation)
    in_step, in_call = step_flops(task, batch_size), forward_flops(task.model)
    with backend.programs_for_others():
        length = training.dispatch
        arguments = shapes(task, batch_size, length)
        program = functools.partial(lowered, task, devices, arguments)
        cost = _costs(chip, topology, count, program, in_step)
    seconds, samples = cost["roofline"]["seconds_per_step"], 1000 * calls * in_call
    return cost | {
        "parallel": training.parallel,
        "batch_size": batch_size,
        "steps_per_dispatch": length,
        "parameters": size_of(arguments[0].params),
        "frozen_parameters": size_of(arguments[1]),
        "flops_per_step": in_step,
        "flops_per_example": {"forward": in_call, "step": in_step / batch_size},
        "device_hours": seconds * training.num_steps * count / 3600,
        "thousand_samples": {
            "network_calls": calls,
            "flops": samples,
            "chip_seconds": samples / chip.flops,
        },
    }


def suggestions(
    training: Training, data: DataInfo, topology: str, say: Callable[[str], Any]
) -> dict[str, dict[str, Any]]:
    """Keys that save memory, one by one and together -> the memory needed, and whether it fits.

    `say` gets a line for each when it is found: the memory, or why it is not possible.
    """
    given, found = flat(dict(training.config)), {}
    possible: dict[str, Any] = {"grad_accumulation": 4 * training.grad_accumulation}
    for key, value in REMEDIES.items():
        section, _, name = key.rpartition(".")
        if given.get(key) != value and (not section or name in fields(training.network.factory)):
            possible[key] = value
    alone = [{key: value} for key, value in possible.items()]
    if "network.remat" in possible:  # less is computed again, and more is kept
        alone.append({"network.remat": True, "network.remat_policy": "weight_products"})
    for change in [*alone, possible]:
        changed = ConfigDict(training.config)
        changed.update_from_flattened_dict(change)
        name = ", ".join(f"{key}={value}" for key, value in change.items())
        try:
            cost = planned(Training.parse(changed), data, topology)
        except ValueError as error:  # the parts of the batch are too small
            say(f"{name}: not possible ({error})")
            continue
        found[name] = {key: cost[key] for key in ("fits", "memory_per_chip_bytes")}
        say(f"{name}: {memory_told(cost)}")
    return found


# ---- in words ------------------------------------------------------------------------------------


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.3g} GiB"


def memory_told(cost: Mapping[str, Any]) -> str:
    """The memory of a chip by its parts, and whether it suffices."""
    parts = {k: v for k, v in cost["memory_per_chip_bytes"].items() if v is not None}
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return f"{listed or 'unknown'}: {'fits' if cost['fits'] else 'DOES NOT FIT'}"


def _listed(lines: Mapping[str, str]) -> str:
    return "\n".join(f"{name:21s} {line}" for name, line in lines.items())


def sampling_told(cost: Mapping[str, Any]) -> str:
    """Findings of `sampling`, as lines for humans."""
    each = cost["thousand_samples"]
    lines = {
        "sampling": f"{cost['batch_size']} at once, guidance scale {cost['guidance_scale']:g}, "
        f"{each['network_calls']} network calls each",
        "... memory per chip": memory_told(cost),
        "... 1,000 samples": f"{each['flops']:.4g} FLOPs, at least {each['chip_seconds']:.3g} "
        "chip-seconds",
        "... compiled in": f"{cost['compile_seconds']:.1f} s",
    }
    return _listed(lines)


def told(cost: Mapping[str, Any]) -> str:
    """Findings of `planned`, as lines for humans."""
    each, roofline, samples = (
        cost[key] for key in ("flops_per_example", "roofline", "thousand_samples")
    )
    chip = roofline["chip"]
    exchanged = (f"{kind} {each['count']} ({each['bytes'] / 2**20:.3g} MiB)"
                 for kind, each in cost["collectives"].items())  # fmt: skip
    seconds = ", ".join(f"{name} {value:.2e}" for name, value in roofline["seconds"].items())
    peaks = (f"{chip['flops'] / 1e12:g} TFLOP/s, memory {chip['bandwidth'] / 1e9:g} GB/s, "
             f"links {chip['link'] / 1e9:g} GB/s ({chip['source']})")  # fmt: skip
    lines = {
        "topology": f"{cost['topology']}: {cost['chips']} chips of "
        f"{_bytes(cost['chip_memory_bytes'])}; parallel={cost['parallel']}",
        "step": f"{cost['batch_size']} examples, {cost['steps_per_dispatch']} steps in a dispatch",
        "parameters": f"{cost['parameters']:,}, and frozen {cost['frozen_parameters']:,}",
        "memory per chip": memory_told(cost),
        "FLOPs": f"{cost['flops_per_step']:.4g} a step; of one example {each['forward']:.4g} "
        f"forward, {each['step']:.4g} in a step",
        "collectives per step": ", ".join(exchanged) or "none",
        "seconds per step": f"at least {roofline['seconds_per_step']:.2e} ({seconds})",
        "peaks assumed": peaks,
        "whole training": f"at least {cost['device_hours']:.3g} chip-hours",
        "1,000 samples": f"{samples['network_calls']} network calls each, "
        f"{samples['flops']:.4g} FLOPs, at least {samples['chip_seconds']:.3g} chip-seconds",
        "compiled in": f"{cost['compile_seconds']:.1f} s",
    }
    return _listed(lines)
