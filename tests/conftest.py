"""Settings of every test, made before JAX starts: 8 virtual CPU devices, and cheap compilation."""

import gc
import os
import pathlib

# Tests compile far more than they compute. These flags take the compilation of a training step from
# 2.4 to 0.6 CPU seconds, and a program that several tests or processes use is compiled once: a
# small run has more than a hundred of them, which are a fifth of its CPU time.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax  # noqa: E402
import pytest  # noqa: E402

# Traced programs have millions of objects, which the collector would go through again and again.
gc.set_threshold(200_000, 50, 1000)


@pytest.fixture(autouse=True, scope="module")
def no_programs_of_other_modules():
    """Compiled programs are dropped with their module: those of all tests take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
