"""Settings that make JAX fast on the CPU: freed memory is kept, and each core is a device.

Also whether a program is for the CPU: convolutions and loops have a form of their own there.
"""

import contextlib
import contextvars
import ctypes
import os
import sys
from collections.abc import Iterator

import jax

_for_others = contextvars.ContextVar("for_others", default=False)


def is_target(backend: str = "cpu") -> bool:
    """Whether programs are for this default backend: not in `programs_for_others`."""
    return jax.default_backend() == backend and not _for_others.get()


@contextlib.contextmanager
def programs_for_others() -> Iterator[None]:
    """Programs traced inside are those of an accelerator, on a machine without one.

    JAX remembers what it has traced: a function that was traced before keeps its form.
    """
    token = _for_others.set(True)
    try:
        yield
    finally:
        _for_others.reset(token)


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
