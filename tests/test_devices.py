import dataclasses
import functools
import json
import mmap
import os
import shutil
import signal
import socket

import cases
import chex
import commands
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.experimental import multihost_utils

from mclr_jax import generate, main, record, reductions, runs
from mclr_jax.config import Training
from mclr_jax.data import pipeline
from mclr_jax.training import step
from mclr_jax.training.devices import MODES, Devices, check_memory, exists, require_accelerator

# ---- every objective -----------------------------------------------------------------------------


def five_steps(task, parallel="data", device_count=1, size=1.0):
    """Metrics of 5 steps of SGD, the gradient of the first, and the last parameters."""
    task = dataclasses.replace(task, optimizer=optax.sgd(0.01, momentum=0.9))
    devices = Devices(parallel, tuple(jax.devices()[:device_count]))
    params = jax.tree.map(lambda x: size * x, cases.params(task))
    averages = {name: cases.moved(params, seed=7) for name in task.averages}
    state = step.TrainState(jnp.int32(0), params, task.optimizer.init(params), averages)
    state, frozen = (devices.put_state(jax.device_get(x)) for x in (state, cases.frozen(task)))
    rows = jax.device_get(cases.batch(task, size=128))
    batch = devices.put_batches(jax.tree.map(lambda x: x[None], rows))
    update = devices.compile(step.make_update(task, devices.axis_name))
    numbers, gradients = [], None
    for _ in range(5):
        state, found = update(state, frozen, batch, devices.put_state(np.int32(1)))
        found = jax.tree.map(lambda x: x[0], jax.device_get(found))
        numbers.append(reductions.report(found))
        if gradients is None:  # momentum has seen nothing else yet
            gradients = jax.device_get(state.opt_state[0].trace)
    return numbers, gradients, jax.device_get(state.params)


def assert_same(got, expected):
    """Within 1e-5 of the largest entry of each array, and of each metric."""

    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())

    chex.assert_trees_all_close(got[0], expected[0], rtol=1e-5, atol=1e-6)
    jax.tree.map(close, got[1:], expected[1:])


# Each kind of row, frozen model and share of the negatives; tests/test_task.py has all cases.
DIVIDED = [
    "dsm", "contrastive_flow", "gft strength", "mclr classifier",
    *(pytest.param(name, marks=pytest.mark.slow)
      for name in ("dsm variance", "ddo", "mclr_null average", *cases.ROWS[::6])),
]  # fmt: skip


@pytest.mark.parametrize("case", DIVIDED)
def test_eight_devices_in_four_parts_each_are_one_device(case, monkeypatch):
    """Each part of the batch has 4 rows, and nothing looks across."""
    if case != "dsm":  # parts in a loop, as on accelerators, which compiles in half of the time
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    task = cases.task(case)
    size = 0.2 if case == "dsm variance" else 1.0  # variances far from the errors diverge
    expected = five_steps(task, size=size)
    assert np.isfinite([*expected[0][-1].values()]).all()
    assert all(map(np.any, jax.tree.leaves(expected[1])))
    parts = dataclasses.replace(task, grad_accumulation=4)
    assert_same(five_steps(parts, "pmap", 8, size), expected)


def test_layouts_of_jit_are_one_device(monkeypatch):
    """Frozen models are sharded beside the state; a batch that is spread is taken in parts, too."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")  # parts in a loop
    task = cases.task(next(name for name in cases.ROWS if "reference 0.25" in name))
    expected = five_steps(task)
    assert_same(five_steps(task, "fsdp", 8), expected)
    in_parts = dataclasses.replace(task, grad_accumulation=4)
    assert_same(five_steps(in_parts, "data", 8), expected)


# ---- a network for images ------------------------------------------------------------------------


def train(parallel, device_count, steps=8):
    """Metrics and final state of 8 steps of digits on the first devices."""
    training = Training.parse(tiny.config("digits"))
    source = training.data.source("train", 0)
    task = training.task(training.data_info(source), {})
    devices = Devices(parallel, tuple(jax.devices()[:device_count]))
    state = devices.initialise(task.init, functools.partial(step.init_state, task))
    update = devices.compile(step.make_update(task, devices.axis_name))
    stream = pipeline.stream(source, training.batch_size, 0)
    data = devices.put_batches(pipeline.stack(stream, steps, steps))
    with jax.transfer_guard("disallow"):
        state, found = update(state, {}, data, devices.put_state(np.int32(steps)))
    found = jax.device_get(found)
    rows = [reductions.report(jax.tree.map(lambda x: x[i], found)) for i in range(steps)]  # noqa: B023
    return rows, state


@pytest.fixture(scope="module")
def one_device():
    found, state = train("data", 1)
    return found, jax.device_get(state)


@pytest.mark.parametrize("parallel", [pytest.param("pmap", marks=pytest.mark.slow), "fsdp"])
def test_eight_devices_train_as_one(parallel, one_device):
    """With dropout, label dropout and random noise: all are addressed by example.

    The program of "data" is that of "fsdp", but for the places of the state.
    """
    found, state = train(parallel, 8)
    chex.assert_trees_all_close(found, one_device[0], rtol=1e-5, atol=1e-5)
    got, expected = jax.device_get(state), one_device[1]
    chex.assert_trees_all_close(got.params, expected.params, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    kernel = state.params["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (parallel != "fsdp")
    if parallel == "fsdp":
        assert kernel.addressable_shards[0].data.size == kernel.size // 8


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", MODES)
def test_a_new_state_has_the_parameters_of_the_seed(parallel):
    """Drawn as one program or, where there are many arrays, one by one."""
    task, devices = cases.task("dsm"), Devices(parallel)
    state = devices.initialise(task.init, functools.partial(step.init_state, task))
    chex.assert_trees_all_close(jax.device_get(state), step.init_state(task), rtol=1e-6)

    def many():
        return [jax.random.normal(jax.random.key(i), (8,)) for i in range(101)]

    found = devices.initialise(many, lambda drawn: (drawn, drawn))
    for drawn in found:
        np.testing.assert_allclose(np.array(drawn), np.array(many()), rtol=1e-6)
        assert drawn[0].sharding.is_fully_replicated == (parallel != "fsdp")


def test_fsdp_divides_the_largest_axis_that_the_devices_divide():
    """And copies what has none; the other layouts copy everything."""
    shapes = {(8, 64): (None, "data"), (64, 8): ("data", None), (24, 16, 90): ("data", None, None),
              (3, 3, 16, 8): (None, None, "data", None), (12, 7): (), (7,): (), (): (),
              (16,): ("data",)}  # fmt: skip
    leaves = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    for parallel in MODES:
        found = Devices(parallel).state_shardings(leaves)
        expected = [*shapes.values()] if parallel == "fsdp" else [()] * len(shapes)
        assert [tuple(sharding.spec) for sharding in found] == expected


def test_what_exceeds_the_memory_of_the_machine_is_refused(monkeypatch):
    """250 pages have room for 256,000 numbers of 4 bytes, if a page has 4,096."""
    monkeypatch.setattr(os, "sysconf", lambda name: 250)
    monkeypatch.setattr(mmap, "PAGESIZE", 4096)
    check_memory("samples", 256_000, "")
    with pytest.raises(ValueError, match=r"samples need 0\.00102 GB; .* has 0\.00102 GB. Fewer"):
        check_memory("samples", 256_001, "Fewer.")


def test_the_old_state_is_donated():
    devices = Devices("pmap")
    state = devices.put_state({"w": np.ones((8, 8), np.float32)})

    def update(state, frozen, batches, count):
        mean = jax.lax.pmean(batches["x"].mean(), devices.axis_name)
        return jax.tree.map(lambda w: w * mean, state), {"n": count}

    data = devices.put_batches({"x": np.full((1, 16, 3), 2.0, np.float32)})
    new, _ = devices.compile(update)(state, {}, data, devices.put_state(np.int32(1)))
    np.testing.assert_allclose(new["w"], 2.0)
    assert new["w"].shape == (8, 8)
    assert state["w"].is_deleted()


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match=r"'pmpa'; expected one of .*fsdp"):
        Devices("pmpa")
    with pytest.raises(ValueError, match="multiple of 8"):
        Devices("pmap").check_batch_size(12)
    with pytest.raises(ValueError, match=r"grad_accumulation is 3, .* the 2 rows .* divisor of 2"):
        Devices("pmap").check_batch_size(16, 3)
    Devices("pmap").check_batch_size(16, 2)
    Devices("data").check_batch_size(24, 12)  # the parts are of the whole batch
    with pytest.raises(RuntimeError, match=r"no accelerator.*cpu"):
        require_accelerator()


# ---- several processes ---------------------------------------------------------------------------


def together(target, arguments, folder):
    """Two processes of 2 devices each, and their logs; `arguments` gets address and number."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    logs = [folder / f"log{number}" for number in range(2)]
    places = [arguments(address, str(number)) for number in range(2)]
    pairs = zip(places, logs, strict=True)
    return [commands.start(target, place, log, devices=2) for place, log in pairs], logs


def end(processes, logs):
    for process, log in zip(processes, logs, strict=True):
        process.join(300)
        assert process.exitcode == 0, log.read_text()[-2000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run by two processes without interruption, by layout."""

    @functools.cache
    def run(parallel):
        folder = tmp_path_factory.mktemp(parallel)
        arguments = lambda *place: [*place, str(folder / "run"), parallel]  # noqa: E731
        end(*together(tiny.train_together, arguments, folder))
        return folder / "run"

    return run


@pytest.mark.parametrize("parallel", [pytest.param("pmap", marks=pytest.mark.slow), "fsdp"])
def test_two_processes_train_as_one_and_their_checkpoint_serves_one(parallel, trained, tmp_path):
    """2 processes of 2 devices through the whole loop, resumed by 1 process of 8 devices."""
    assert (trained(parallel) / "samples" / "00000012.png").exists()
    resumed = main.train(
        tiny.config(**tiny.LINEAR), trained(parallel)
    )  # nothing left to do: reads the end
    alone = main.train(tiny.config(**tiny.LINEAR), tmp_path / "one")
    both = map(jax.device_get, (resumed, alone))
    chex.assert_trees_all_close(*both, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_of_two_is_killed_and_the_same_command_ends_with_the_same_bits(trained, tmp_path):
    def arguments(*place):
        return [*place, str(tmp_path / "run"), "fsdp", "kill"]

    (other, killed), _ = together(tiny.train_together, arguments, tmp_path)
    killed.join(300)
    assert killed.exitcode == -signal.SIGKILL
    other.kill()  # as Slurm and JobSet do
    other.join()
    end(*together(tiny.train_together, lambda *place: arguments(*place)[:-1], tmp_path))
    assert [entry["step"] for entry in record.read(tmp_path / "run")["history"]] == [0, 6]
    states = [
        main.train(tiny.config(**tiny.LINEAR), path) for path in (trained("fsdp"), tmp_path / "run")
    ]
    chex.assert_trees_all_equal(*map(jax.device_get, states))


def by_two(module, out, *options):
    """Two processes run launch.MODULE, and process 0 alone writes `out`."""

    def arguments(address, number):
        where = [f"--coordinator={address}", "--num_processes=2", f"--process_id={number}"]
        return [f"--out={out}", *options, *where]

    processes, logs = together(f"launch.{module}", arguments, out.parent)
    end(processes, logs)
    assert [f"Wrote {out}" in log.read_text() for log in logs] == [True, False]


def test_two_processes_draw_the_samples_of_one(trained, tmp_path):
    run, out = trained("fsdp"), tmp_path / "x.npz"
    by_two("sample", out, f"--workdir={run}", "--num_samples=7")
    found = runs.load(run)
    expected = generate.generate(found.model, found.weights()[0], np.arange(7) % 3, found.sampler)
    with np.load(out) as file:
        np.testing.assert_allclose(file["images"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(trained, tmp_path):
    """Rows and statistics of the real data are stored, read by both, and never half of them."""
    run, out, cache = trained("fsdp"), tmp_path / "x.json", tmp_path / "cache"
    main.train(tiny.classifier(), tmp_path / "classifier")
    options = [
        f"--workdir={run}", f"--features=classifier:{tmp_path / 'classifier'}", f"--cache={cache}",
        "--num_samples=200", "--metrics=frechet,precision,recall", "--memorized",
    ]  # fmt: skip
    by_two("evaluate", out, *options)
    first = json.loads(out.read_text())
    stored = [*cache.glob("*.npz"), *(run / "evaluation").glob("*.json")]
    times = [path.stat().st_mtime_ns for path in stored]
    assert len(times) == 2
    by_two("evaluate", out, *options, "--guidance_scales=1,2")
    assert [path.stat().st_mtime_ns for path in stored] == times
    assert json.loads(out.read_text())["rows"][:1] == first["rows"]
    shutil.rmtree(run / "evaluation")
    commands.call("evaluate", f"--out={out}", *options)
    alone = json.loads(out.read_text())
    measured = [[found["floor"], found["rows"][0]] for found in (first, alone)]
    for got, expected in zip(*measured, strict=True):
        for key in ("accuracy", "frechet", "precision", "recall", "memorized"):
            assert got[key] == pytest.approx(expected[key], abs=1e-3), key


def test_processes_that_see_other_files_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for seen, expected in (([1, 1], True), ([0, 0], False), ([1, 0], None)):
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda x, s=seen: np.array(s))
        path = tmp_path if expected else tmp_path / "none"
        if expected is None:
            with pytest.raises(RuntimeError, match=r"for 1 of 2 processes.*all processes share"):
                exists(path)
        else:
            assert exists(path) == expected
