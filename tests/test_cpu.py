"""Speed settings of the CPU, each in a process of its own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
from mclr_jax import cpu
if sys.argv[1] == "keep":
    assert cpu.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
DEVICES = """
import sys, jax
from mclr_jax import cpu
cpu.one_device_per_core(eval(sys.argv[1]))
print(jax.device_count())
"""


def output(code, argument, **environment):
    command = [sys.executable, "-c", code, argument]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | environment
    return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_freed_memory_is_not_faulted_in_again():
    """20 blocks of 64 MiB: 16,384 pages of 4 KiB each time, or once."""
    given_back, kept = output(FAULTS, ""), output(FAULTS, "keep")
    assert given_back > 20 * 5000  # some pages may be huge
    assert kept < given_back / 5


def test_a_device_for_each_core_where_the_batch_divides():
    """Asking for the first process, as commands do before, makes no devices."""
    cores = len(os.sched_getaffinity(0))
    asked = "from mclr_jax.training.devices import is_first; assert is_first()"
    assert output(asked + DEVICES, str(8 * cores)) == cores
    assert output(DEVICES, str(8 * cores + 1)) == 1  # even on one core


def test_devices_that_are_set_already_stay():
    flags = "--xla_force_host_platform_device_count=3"
    assert output(DEVICES, "None", XLA_FLAGS=flags) == 3
    assert output(DEVICES, "None", JAX_NUM_CPU_DEVICES="5") == 5


def test_devices_stay_once_they_are_made():
    assert output("import jax; jax.devices()" + DEVICES, "None") == 1
