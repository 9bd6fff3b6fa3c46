"""What makes JAX fast on the CPU: memory that is kept, and a device for each core."""

import contextlib
import ctypes
import os
import sys

import jax


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees; True where that is possible.

    XLA allocates the temporaries of a program anew at each call, and glibc returns large blocks to
    the kernel at once: page faults then take a quarter to a third of a training step. Linux with
    glibc only.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    options = {-8: 1, -4: 0, -1: 2**31 - 1}  # M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
    return all([mallopt(option, value) for option, value in options.items()])


def one_device_per_core(batch_size: int | None = None) -> None:
    """Make every core that this process may use a JAX device; call it before JAX is used.

    XLA:CPU runs a small convolution on one thread, so that several cores need a device each, with
    its part of the batch; matrix products gain nothing. Nothing is done where JAX has been used,
    the number of devices is set already or the cores cannot share the batch equally.

    Args:
      batch_size: of the program; None where batches are padded.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if (
        given
        or getattr(jax.config, "jax_num_cpu_devices", -1) > 0
        or (batch_size or 0) % (cores or 1)
    ):
        return
    with contextlib.suppress(RuntimeError):  # its devices are made already
        jax.config.update("jax_num_cpu_devices", cores)
