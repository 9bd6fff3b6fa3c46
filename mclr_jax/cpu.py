"""Settings that make JAX fast on the CPU: freed memory is kept, and each core is a device."""

import contextlib
import ctypes
import os
import pathlib
import sys
from typing import Any

import jax


def keep_freed_memory() -> bool:
    """Make glibc keep the memory that this process frees; False without glibc on Linux.

    XLA allocates the temporaries of a program at each call, and glibc returns large blocks to the
    kernel immediately: page faults then take a quarter to a third of a training step.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    options = {-8: 1, -4: 0, -1: 2**31 - 1}  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
    return all([mallopt(option, value) for option, value in options.items()])


def keep_compiled() -> None:
    """Keep compiled programs between runs, in ~/.cache unless JAX_COMPILATION_CACHE_DIR is set."""
    if not jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        cache = pathlib.Path.home() / ".cache" / "mclr_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def one_device_per_core(batch_size: int | None = None) -> None:
    """Make every core that this process may use a JAX device; call it before JAX is used.

    XLA:CPU runs a small convolution on one thread. With one device per core, each core computes its
    part of the batch; matrix products gain nothing. Nothing changes if JAX was used before, the
    number of devices is set, or the cores cannot share batch_size rows equally (None: they can).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    given = given or getattr(jax.config, "jax_num_cpu_devices", -1) > 0
    if given or (batch_size or 0) % (cores or 1):
        return
    with contextlib.suppress(RuntimeError):  # JAX has created its devices
        jax.config.update("jax_num_cpu_devices", cores)


def use_cores(network: Any, batch_size: int | None = None) -> None:
    """`one_device_per_core`, if the network, or its class, asks for it."""
    if getattr(network, "cpu_device_per_core", False):
        one_device_per_core(batch_size)
