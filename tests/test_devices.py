import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax.data import pipeline
from mclr_jax.training import loop, step
from mclr_jax.training.devices import Devices, require_accelerator

ROOT = pathlib.Path(__file__).parent.parent


def train(parallel, device_count, steps=20, name="digits", **changes):
    """Metrics (20,) and final state of 20 steps on the first devices."""
    config = tiny.config(name, **changes)
    source = loop.load_source(config, "train")
    experiment = loop.make_experiment(config, source)
    devices = Devices(parallel, tuple(jax.devices()[:device_count]))
    state = devices.initialise(lambda: step.init_state(experiment))
    frozen = devices.put_state(jax.device_get(experiment.init_frozen()))
    update = devices.compile(step.make_update(experiment, devices.axis_name))
    stream = pipeline.stream(source, config.batch_size, config.seed)
    data = devices.put_batches(loop.stack(stream, steps, steps))
    with jax.transfer_guard("disallow"):
        state, metrics = update(state, frozen, data, devices.put_scalar(steps))
    return jax.device_get(metrics), state


@pytest.fixture(scope="module")
def one_device():
    metrics, state = train("data", 1)
    return metrics, jax.device_get(state)


@pytest.mark.parametrize("parallel", ["pmap", "data", "fsdp"])
def test_eight_devices_train_as_one(parallel, one_device):
    """With dropout, label dropout and random noise: all are addressed by example."""
    metrics, state = train(parallel, 8)
    chex.assert_trees_all_close(metrics, one_device[0], rtol=1e-5, atol=1e-5)
    got, expected = jax.device_get(state), one_device[1]
    chex.assert_trees_all_close(got.params, expected.params, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)
    kernel = state.params["blocks"]["fc1"]["kernel"]
    assert kernel.sharding.is_fully_replicated == (parallel != "fsdp")
    if parallel == "fsdp":
        assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_mclr_with_a_frozen_reference_on_eight_devices():
    """Sharded, beside the state: negatives, strengths and the maximal weight are those of one."""
    changes = {"objective.posterior": "exact", "objective.negatives": "prior", "steps": 6,
               "objective.weighting": "cfg", "objective.reference_penalty": 0.5,
               "objective.strength": (0.0, 2.0), "name": "mixture_mclr"}  # fmt: skip
    expected, state = train("data", 1, **changes)
    assert expected["weight_max"].max() > 1.5
    for parallel in ("pmap", "fsdp"):
        metrics, got = train(parallel, 8, **changes)
        chex.assert_trees_all_close(metrics, expected, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(jax.device_get(got.params), state.params, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parallel", ["pmap", "fsdp"])
def test_accumulation_on_eight_devices(parallel, one_device):
    metrics, _ = train(parallel, 8, **{"grad_accumulation": 2})
    np.testing.assert_allclose(metrics["loss"], one_device[0]["loss"], rtol=1e-4)


def test_the_old_state_is_donated():
    devices = Devices("pmap")
    state = devices.initialise(lambda: {"w": jnp.ones((8, 8))})

    def update(state, frozen, batches, count):
        mean = jax.lax.pmean(batches["x"].mean(), devices.axis_name)
        return jax.tree.map(lambda w: w * mean, state), {"n": count}

    data = devices.put_batches({"x": np.full((1, 16, 3), 2.0, np.float32)})
    new, _ = devices.compile(update)(state, {}, data, devices.put_scalar(1))
    np.testing.assert_allclose(new["w"], 2.0)
    assert new["w"].shape == (8, 8)
    assert state["w"].is_deleted()


def test_bad_layouts_are_refused():
    with pytest.raises(ValueError, match=r"'pmpa'; expected one of .*fsdp"):
        Devices("pmpa")
    with pytest.raises(ValueError, match="multiple of 8"):
        Devices("pmap").check_batch_size(12)
    with pytest.raises(RuntimeError, match=r"no accelerator.*cpu"):
        require_accelerator()


WORKER = """
import sys, jax
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
port, number, parallel, workdir = sys.argv[2:]
jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(number))
import tiny
from mclr_jax.training.loop import train
train(tiny.config(parallel=parallel, sample_every=12), workdir)
"""


@pytest.mark.parametrize("parallel", ["pmap", "fsdp"])
def test_two_processes_train_as_one_and_their_checkpoint_serves_one(parallel, tmp_path):
    """2 processes of 2 devices through the whole loop, resumed by 1 process of 8 devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"XLA_FLAGS": flags}
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER,
                str(ROOT),
                port,
                str(n),
                parallel,
                str(tmp_path / "two"),
            ],
            env=environment,
            stderr=subprocess.PIPE,
        )
        for n in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors.decode()[-2000:]
    assert (tmp_path / "two" / "samples" / "00000012.png").exists()
    resumed = loop.train(tiny.config(), tmp_path / "two")  # nothing left to do: reads the end
    alone = loop.train(tiny.config(), tmp_path / "one")
    chex.assert_trees_all_close(
        jax.device_get(resumed), jax.device_get(alone), rtol=1e-4, atol=1e-5
    )
