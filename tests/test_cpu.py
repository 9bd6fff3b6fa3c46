"""Speed settings of the CPU, each in a process of its own."""

import ctypes
import os
import resource
import subprocess
import sys

import commands
import jax
import pytest

from mclr_jax import cpu
from mclr_jax.training.devices import is_first


def faults(keep):
    """In a new process: the page faults of 5 blocks of 64 MiB."""
    assert not keep or cpu.keep_freed_memory()
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = libc.malloc(64 << 20)
        ctypes.memset(block, 1, 64 << 20)
        libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def count(batch_size, first=lambda: None):
    """In a new process: the number of devices for a batch."""
    os.environ.pop("XLA_FLAGS")
    first()
    cpu.one_device_per_core(batch_size)
    print(jax.device_count())


def three_devices():
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"


def printed(log, target, *arguments):
    """The number that a function prints in a fork, in which JAX has not begun."""
    process = commands.start(target, arguments, log)
    process.join(60)
    assert process.exitcode == 0, log.read_text()
    return int(log.read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_not_faulted_in_again(tmp_path):
    """16,384 pages of 4 KiB each time, or once."""
    given_back, kept = (printed(tmp_path / str(keep), faults, keep) for keep in (False, True))
    assert given_back > 5 * 5000  # some pages may be huge
    assert kept < given_back / 5


def test_a_device_for_each_core_where_the_batch_divides(tmp_path):
    """Asking for the first process, as commands do before, makes no devices."""
    cores = len(os.sched_getaffinity(0))
    assert printed(tmp_path / "divides", count, 8 * cores, is_first) == cores
    assert printed(tmp_path / "does not", count, 8 * cores + 1) == 1  # even on one core


def test_devices_that_are_set_already_stay(tmp_path):
    assert printed(tmp_path / "flag", count, None, three_devices) == 3
    code = (
        "import jax; from mclr_jax import cpu; cpu.one_device_per_core(); print(jax.device_count())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["JAX_NUM_CPU_DEVICES"] = "5"  # is read when JAX is imported
    assert int(subprocess.check_output([sys.executable, "-c", code], env=environment)) == 5


def test_devices_stay_once_they_are_made(tmp_path):
    assert printed(tmp_path / "made", count, None, jax.devices) == 1
