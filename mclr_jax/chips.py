"""TPUs and GPUs: published peaks of their chips, and topologies to compile for without any chip."""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any

import jax
from jax.experimental import topologies

DOCS = "https://docs.cloud.google.com/tpu/docs"
NVIDIA = "https://www.nvidia.com/en-us/data-center"


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
# By `jax.Device.device_kind`.
KINDS_OF_CHIP = {
    "TPU v4": CHIPS["v4"],
    "TPU v5 lite": CHIPS["v5e"],
    "TPU v5": CHIPS["v5p"],
    "TPU v6 lite": CHIPS["v6e"],
    "NVIDIA H200": Chip(int(141e9), 989e12, 4800e9, 450e9, f"{NVIDIA}/h200/"),
    "NVIDIA H100 80GB HBM3": Chip(int(80e9), 989e12, 3350e9, 450e9, f"{NVIDIA}/h100/"),
    "NVIDIA H100 PCIe": Chip(int(80e9), 756e12, 2000e9, 64e9, f"{NVIDIA}/h100/"),
    "NVIDIA A100-SXM4-80GB": Chip(int(80e9), 312e12, 2039e9, 300e9, f"{NVIDIA}/a100/"),
    "NVIDIA A100 80GB PCIe": Chip(int(80e9), 312e12, 1935e9, 32e9, f"{NVIDIA}/a100/"),
    "NVIDIA A100-SXM4-40GB": Chip(int(40e9), 312e12, 1555e9, 300e9, f"{NVIDIA}/a100/"),
    "NVIDIA A100-PCIE-40GB": Chip(int(40e9), 312e12, 1555e9, 32e9, f"{NVIDIA}/a100/"),
    "NVIDIA L4": Chip(int(24e9), 121e12, 300e9, 32e9, f"{NVIDIA}/l4/"),
    # It has no bf16 units: these are the FLOP/s of float16.
    "Tesla T4": Chip(int(16e9), 65e12, 320e9, 16e9, f"{NVIDIA}/tesla-t4/"),
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
    """The kind of chip and all devices of a topology, see `mclr plan`.

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
            f"{what} is not installed: pip install 'mclr_jax[{extra}]', best in an environment of "
            "its own."
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
