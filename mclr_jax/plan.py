"""The cost of a training on TPUs or GPUs, without any: memory, FLOPs, collectives and a roofline.

libtpu, the TPU's compiler, and JAX's CUDA plugin compile the training step for a topology of chips
on any machine. Every argument is a shape: no parameter is allocated, and no data are read.
"""

import dataclasses
import functools
import importlib.util
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from mclr_jax import backend, generate
from mclr_jax.hlo import collectives
from mclr_jax.model import Model, shapes_of
from mclr_jax.samplers import Churn, Sampler
from mclr_jax.task import Task
from mclr_jax.training.devices import AXIS, Devices, placed
from mclr_jax.training.step import init_state, make_update

DOCS = "https://docs.cloud.google.com/tpu/docs"


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published peaks of a chip, and the memory that libtpu leaves to a program."""

    memory: int  # bytes, from the errors of libtpu 0.0.42; of a GPU, the memory of the card
    # Dense bf16 FLOP/s. XLA multiplies float32 matrices in bf16 on TPUs, in TF32 on GPUs from
    # Ampere on, unless told otherwise.
    flops: float
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s to the other chips, sum over the chip's links, in one direction
    source: str
    devices: int = 1  # of JAX


CHIPS = {
    "v4": Chip(int(30.5 * 2**30), 275e12, 1200e9, 300e9, f"{DOCS}/v4, arXiv:2304.01433", devices=2),
    "v5e": Chip(int(15.75 * 2**30), 197e12, 819e9, 200e9, f"{DOCS}/v5e"),
    "v5p": Chip(int(95.74 * 2**30), 459e12, 2765e9, 600e9, f"{DOCS}/v5p"),
    "v6e": Chip(int(31.25 * 2**30), 918e12, 1638e9, 400e9, f"{DOCS}/v6e"),
}
# One direction of NVLink or, without it, of PCIe; tables with sparsity have twice these FLOP/s.
H100 = "https://www.nvidia.com/en-us/data-center/h100/"
A100 = "https://www.nvidia.com/en-us/data-center/a100/"
# By `jax.Device.device_kind`.
KINDS_OF_CHIP = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA H200": Chip(
        int(141e9), 989e12, 4800e9, 450e9, "https://www.nvidia.com/en-us/data-center/h200/"
    ),
    "NVIDIA H100 80GB HBM3": Chip(int(80e9), 989e12, 3350e9, 450e9, H100),
    "NVIDIA H100 PCIe": Chip(int(80e9), 756e12, 2000e9, 64e9, H100),
    "NVIDIA A100-SXM4-80GB": Chip(int(80e9), 312e12, 2039e9, 300e9, A100),
    "NVIDIA A100 80GB PCIe": Chip(int(80e9), 312e12, 1935e9, 32e9, A100),
    "NVIDIA A100-SXM4-40GB": Chip(int(40e9), 312e12, 1555e9, 300e9, A100),
    "NVIDIA A100-PCIE-40GB": Chip(int(40e9), 312e12, 1555e9, 32e9, A100),
    "NVIDIA L4": Chip(
        int(24e9), 121e12, 300e9, 32e9, "https://www.nvidia.com/en-us/data-center/l4/"
    ),
    # It has no bf16 units: these are the FLOP/s of float16.
    "Tesla T4": Chip(
        int(16e9), 65e12, 320e9, 16e9, "https://www.nvidia.com/en-us/data-center/tesla-t4/"
    ),
}
SLICE = re.compile(rf"({'|'.join(CHIPS)}):([1-9]\d*(?:x[1-9]\d*){{1,2}})(?:\*([1-9]\d*))?")

# What XLA's compiler must be told of a GPU that is not there, from the cards' own descriptions in
# https://github.com/openxla/xla/tree/main/xla/backends/gpu/target_config/specs.
ANY_GPU: dict[str, Any] = {
    "threads_per_block_limit": 1024, "threads_per_warp": 32, "threads_per_core_limit": 2048,
    "thread_dim_limit_x": 1024, "thread_dim_limit_y": 1024, "thread_dim_limit_z": 64,
    "block_dim_limit_x": 2**31 - 1, "block_dim_limit_y": 65535, "block_dim_limit_z": 65535,
    "registers_per_core_limit": 65536, "registers_per_block_limit": 65536,
    "shared_memory_per_block": 49152,
}  # fmt: skip
HOPPER = ANY_GPU | {
    "core_count": 132, "fpus_per_core": 128, "clock_rate_ghz": 1.98, "l2_cache_size": 52428800,
    "shared_memory_per_core": 233472, "shared_memory_per_block_optin": 232448,
    "cuda_compute_capability": {"major": 9},
}  # fmt: skip
AMPERE = ANY_GPU | {
    "core_count": 108, "fpus_per_core": 64, "clock_rate_ghz": 1.41, "l2_cache_size": 41943040,
    "shared_memory_per_core": 167936, "shared_memory_per_block_optin": 166912,
    "cuda_compute_capability": {"major": 8},
}  # fmt: skip
VERSIONS = {"runtime_version": '"12.8.0"', "driver_version": '"12.8.0"', "dnn_version": '"9.10.0"'}
GPUS = {
    "h100": ("NVIDIA H100 80GB HBM3", HOPPER),
    "h200": ("NVIDIA H200", HOPPER),
    "a100": ("NVIDIA A100-SXM4-80GB", AMPERE),
}
CARDS = re.compile(rf"cuda:({'|'.join(GPUS)})x([1-9]\d*)")


def topology(name: str) -> tuple[Chip, tuple[jax.Device, ...]]:
    """The kind of chip and all devices of a topology, see `launch.plan`.

    ValueError: an unknown topology. MissingCompilerError: see there.
    """
    if match := CARDS.fullmatch(name):
        return _cards(match[1], int(match[2]))
    if not (match := SLICE.fullmatch(name)):
        raise ValueError(
            f"Unknown topology {name!r}; expected the kind of chip, one of {', '.join(CHIPS)}, and "
            "the grid of chips, such as v5e:1x1, v5e:4x4, v6e:2x4 or v5p:2x2x1, with *2 for two "
            f"slices of such a grid, or cuda:KINDxCOUNT of {', '.join(GPUS)}, such as cuda:h100x8."
        )
    _require("libtpu", "libtpu, the TPU's compiler,", "tpu-compile")
    # Do not ask the network for a TPU, nor stop because another process uses libtpu.
    os.environ.update({"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    slices, single = int(match[3] or 1), {*match[2].split("x")} == {"1"}
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if single else {}
    options |= {"num_slices": slices} if slices > 1 else {}
    grid = name.partition("*")[0]
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=grid, **options)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu has no topology {name!r} ({error}); the sides of several chips are even, such "
            "as v5e:2x2, v5e:4x4 or v5p:2x2x1."
        ) from error
    return CHIPS[match[1]], tuple(found.devices)


class MissingCompilerError(RuntimeError):
    """The compiler for a kind of chip is not installed."""


def _require(module: str, what: str, extra: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise MissingCompilerError(
            f"{what} is not installed: pip install -e '.[{extra}]', best in an environment of its "
            "own."
        )


def _cards(kind: str, count: int) -> tuple[Chip, tuple[jax.Device, ...]]:
    """GPUs, up to 8 in a host."""
    hosts = -(-count // 8)
    if count % hosts:
        raise ValueError(f"{count} GPUs on {hosts} hosts of 8; use a multiple of {hosts}.")
    _require("jax_cuda12_plugin", "JAX's CUDA plugin, the compiler for GPUs,", "gpu-compile")
    device, details = GPUS[kind]
    chip = KINDS_OF_CHIP[device]
    memory = {"device_memory_size": chip.memory, "memory_bandwidth": int(chip.bandwidth)}
    text = _text_of({
        "gpu_device_info": details | memory | VERSIONS,
        "platform_name": '"CUDA"',
        "dnn_version_info": {"major": 9, "minor": 10},
        "device_description_str": f'"{device}"',
    })  # fmt: skip
    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=kind,
        target_config=text,
        topology=f"1x{hosts}x{count // hosts}",
    )
    return chip, tuple(found.devices)


def _text_of(message: Mapping[str, Any]) -> str:
    """A message in the text format of protocol buffers."""
    return " ".join(
        f"{key} {{ {_text_of(value)} }}" if isinstance(value, Mapping) else f"{key}: {value}"
        for key, value in message.items()
    )


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
    answer = model.logits if model.is_classifier else model.denoise
    inputs = jax.ShapeDtypeStruct((1, *model.data.shape), np.float32), np.ones(1, np.float32)

    def call(params, x, sigma):
        return answer(params)(x, sigma, np.zeros(1, np.int32))

    with backend.programs_for_others():
        return flops(jax.make_jaxpr(call)(shapes_of(model), *inputs).jaxpr)


def shapes(task: Task, batch_size: int, length: int = 1) -> tuple:
    """The arguments of a dispatch of `length` steps: state, frozen, batches, count."""
    state = jax.eval_shape(functools.partial(init_state, task), shapes_of(task.model))
    frozen = {name: shapes_of(model) for name, model in task.frozen.items()}
    rows = batches(task, batch_size, length)
    return state, frozen, rows, jax.ShapeDtypeStruct((), np.int32)


def step_flops(task: Task, batch_size: int) -> int:
    """FLOPs of a training step, of all devices together."""
    with backend.programs_for_others():
        return flops(jax.make_jaxpr(make_update(task))(*shapes(task, batch_size)).jaxpr)


def plan(
    task: Task, name: str, parallel: str, *, batch_size: int, steps_per_dispatch: int,
    num_steps: int, network_calls: int,
) -> dict[str, Any]:  # fmt: skip
    """The cost of a training on a topology, as JSON; docs/devices.md explains the keys.

    Args:
      name: of the topology.
      parallel: layout of the devices, as config.parallel.
      batch_size: over all devices.
      steps_per_dispatch, num_steps: of the training.
      network_calls: for one sample.

    ValueError, MissingCompilerError: see `topology`; the devices do not divide the batch.
    """
    chip, all_devices = topology(name)
    devices, chips = Devices(parallel, all_devices), len(all_devices) // chip.devices
    devices.check_batch_size(batch_size, task.grad_accumulation)
    in_step, in_call = step_flops(task, batch_size), forward_flops(task.model)
    arguments = shapes(task, batch_size, steps_per_dispatch)
    with backend.programs_for_others():
        program = functools.partial(lowered, task, devices, arguments)
        cost = _costs(chip, name, chips, program, in_step)
    sampling = 1000 * network_calls * in_call
    return cost | {
        "parallel": parallel,
        "batch_size": batch_size,
        "steps_per_dispatch": steps_per_dispatch,
        "parameters": _size(arguments[0].params),
        "frozen_parameters": _size(arguments[1]),
        "flops_per_step": in_step,
        "flops_per_example": {"forward": in_call, "step": in_step / batch_size},
        "device_hours": cost["roofline"]["seconds_per_step"] * num_steps * chips / 3600,
        "thousand_samples": {
            "network_calls": network_calls,
            "flops": sampling,
            "chip_seconds": sampling / chip.flops,
        },
    }


def sampling(
    model: Model, name: str, sampler: Sampler, *, batch_size: int, guidance_scale: float = 1.0
) -> dict[str, Any]:
    """The cost of `generate.generate` for one batch on a topology, as JSON like that of `plan`.

    Each call of the sampler is a round of `roofline`, which reads the parameters. ValueError,
    MissingCompilerError: see `topology`; a classifier; the devices do not divide the batch.
    """
    chip, all_devices = topology(name)
    if model.is_classifier:
        raise ValueError("The network is a classifier, which draws no samples.")
    (rows, whole), chips = generate.shardings(all_devices), len(all_devices) // chip.devices
    if batch_size % len(all_devices):
        raise ValueError(
            f"A batch of {batch_size} samples on {len(all_devices)} devices; expected a multiple."
        )
    sigmas = sampler.grid(model.preconditioning.sigma_range)
    scales = generate.scales_by_label(model, guidance_scale, None)
    run = generate.program(model, sampler.method, generate.is_guided(model, guidance_scale))
    scalars = jax.eval_shape(
        lambda: jax.tree.map(np.float32, (sigmas, scales, (0.0, np.inf), Churn()))
    )
    params: tuple = (shapes_of(model), {})  # no weaker model's
    seed = jax.ShapeDtypeStruct((), np.uint32)
    every = jax.ShapeDtypeStruct((batch_size,), np.int32)
    put = functools.partial(jax.tree.map, lambda x: placed(x, whole))
    arguments = (*put((params, seed)), *placed((every, every), (rows, rows)), *put(scalars))
    with backend.programs_for_others():
        in_batch = flops(jax.make_jaxpr(run)(*arguments).jaxpr)
        program = functools.partial(jax.jit(run, out_shardings=whole).lower, *arguments)
        steps = generate.network_calls(model, sampler)
        cost = _costs(chip, name, chips, program, in_batch, steps)
    return cost | {
        "batch_size": batch_size,
        "guidance_scale": guidance_scale,
        "thousand_samples": {
            "network_calls": generate.network_calls(model, sampler, guidance_scale=guidance_scale),
            "flops": 1000 * in_batch // batch_size,
            "chip_seconds": 1000 * cost["roofline"]["seconds_per_step"] * chips / batch_size,
        },
    }


def _costs(
    chip: Chip, name: str, chips: int, lower: Callable, flops: float, rounds: int = 1
) -> dict[str, Any]:
    """What compiling the program of `lower()` for a topology tells."""
    start = time.perf_counter()
    options = UNTUNED if CARDS.fullmatch(name) else None
    memory, exchanged = _compiled(lower(), chip.devices, options)
    return {
        "topology": name,
        "chips": chips,
        "memory_per_chip_bytes": memory,
        "chip_memory_bytes": chip.memory,
        "fits": memory["arguments"] is not None and (memory["peak"] or 0) <= chip.memory,
        "collectives": exchanged,
        "roofline": roofline(chip, flops / chips, memory, exchanged, rounds),
        "compile_seconds": time.perf_counter() - start,
    }


def _size(tree: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


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
