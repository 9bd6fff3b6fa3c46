"""Settings of every test, made before JAX starts: 8 virtual CPU devices, and cheap compilation.

A run ends with the CPU seconds of each test file, processes that it started included.
"""

import collections
import ctypes
import gc
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import textwrap

# Tests compile far more than they compute. These flags take the compilation of a training step from
# 2.4 to 0.6 CPU seconds, and a program that several tests or processes use is compiled once: a
# small run has more than a hundred of them, which are a fifth of its CPU time.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib").startswith(("0.9.", "0.10.")):  # later ones abort on it
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
ENVIRONMENT = os.environ.pop("MCLR_JAX_ENVIRONMENT", "")  # not for tests that run tests
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "scipy")
CACHE = pathlib.Path(__file__).parent.parent / ".pytest_cache" / "xla"

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if sys.dont_write_bytecode:  # a dozen processes would compile all of JAX and SciPy each
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(CACHE / "bytecode")}
    sys.dont_write_bytecode, sys.pycache_prefix = False, os.environ["PYTHONPYCACHEPREFIX"]

import jax  # noqa: E402
import pytest  # noqa: E402

# Traced programs have millions of objects, which the collector would go through again and again.
gc.set_threshold(200_000, 50, 1000)


@pytest.fixture(autouse=True, scope="module")
def no_programs_without_end():
    """Compiled programs serve the next modules too; they are dropped beyond 1.5 GB of memory."""
    yield
    path = pathlib.Path("/proc/self/statm")  # of Linux
    pages = int(path.read_text().split()[1]) if path.exists() else math.inf
    if pages * os.sysconf("SC_PAGE_SIZE") > 1.5e9:
        jax.clear_caches()
        gc.collect()
        # Else the memory stays with the process, and the next modules drop their programs, too.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory):
    """Runs `base` and `classifier` of digits in a folder, its features, and those of the digits."""
    import cases
    import tiny

    from mclr_jax.data import sources
    from mclr_jax.evaluation import evaluate, features

    folder = tmp_path_factory.mktemp("evaluated")
    cases.untrained(folder / "base", tiny.config("digits", **tiny.LINEAR))
    cases.untrained(folder / "classifier", tiny.classifier("digits"))
    extractor = features.load(f"classifier:{folder / 'classifier'}")
    real = evaluate.real_statistics(extractor, sources.load("digits"), folder / "cache")
    return folder, extractor, real


# ---- CPU seconds by file -------------------------------------------------------------------------

BY_FILE = collections.Counter()
SO_FAR = [0.0]  # at the end of the test before, in this process
START: list[float] = []  # at the end of the collection, until a test has reported it


def cpu_seconds():
    """CPU seconds of this process and of all that descend from it; other than on Linux, its own."""
    if not pathlib.Path("/proc/self/stat").exists():
        return sum(os.times()[:4])
    parents, ticks = {}, {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # has ended meanwhile
        process = int(path.parent.name)
        parents[process], ticks[process] = int(fields[1]), sum(map(int, fields[11:15]))
    family = {os.getpid()}
    while new := {p for p, parent in parents.items() if parent in family} - family:
        family |= new
    return sum(ticks[process] for process in family) / os.sysconf("SC_CLK_TCK")


def pytest_collection_finish():
    SO_FAR[:] = START[:] = [cpu_seconds()]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item, call):
    """The report of a test's end has the CPU seconds since the end of the test before."""
    if call.when == "teardown":
        now = cpu_seconds()
        item.user_properties.append(("cpu_seconds", now - SO_FAR[0]))
        item.user_properties.append(("start_seconds", START.pop() if START else 0.0))
        SO_FAR[0] = now


def pytest_runtest_logreport(report):
    if report.when == "teardown":
        found, name = dict(report.user_properties), report.nodeid.partition("::")[0]
        BY_FILE[pathlib.Path(name).stem.removeprefix("test_")] += found["cpu_seconds"]
        BY_FILE["start and collection"] += found["start_seconds"]


def pytest_terminal_summary(terminalreporter):
    """A sum over the reports: a process that has left its parent is in no other count.

    With MCLR_JAX_ENVIRONMENT=NAME the numbers of tests and the versions are kept, too.
    """
    if ENVIRONMENT:
        keep_outcome(
            ENVIRONMENT, {key: len(value) for key, value in terminalreporter.stats.items()}
        )
    rows = ", ".join(f"{name}\xa0{seconds:.1f}" for name, seconds in BY_FILE.most_common())
    terminalreporter.section(f"{BY_FILE.total():.0f} CPU seconds")
    for line in textwrap.wrap(rows, 100):
        terminalreporter.write_line(line.replace("\xa0", " "))


def keep_outcome(name, found):
    """Write the outcome of all tests in an environment to benchmarks/results/environments.json."""
    from mclr_jax.files import provenance, write_json

    path = pathlib.Path(__file__).parent.parent / "benchmarks" / "results" / "environments.json"
    told = json.loads(path.read_text()) if path.exists() else {}
    versions = {"python": platform.python_version()}
    versions |= {package: importlib.metadata.version(package) for package in PACKAGES}
    counts = {key: found.get(key, 0) for key in ("passed", "skipped", "failed", "error")}
    write_json(path, told | {name: {**counts, **provenance(), "versions": versions}})
