import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
import tiny

from mclr_jax import run
from mclr_jax.training import loop
from mclr_jax.training.checkpoint import Checkpoints, MismatchError

ROOT = pathlib.Path(__file__).parent.parent
COMMAND = """
import sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
import tiny
from mclr_jax.training.loop import train
train(tiny.config(**eval(sys.argv[3])), sys.argv[2])
"""
KILLED = {"num_steps": 60, "checkpoint_every": 10, "log_every": 5}


def start(workdir, **changes):
    """The run as a process of its own, on one device, with its log in workdir.log."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    with pathlib.Path(f"{workdir}.log").open("ab") as log:
        command = [sys.executable, "-c", COMMAND, str(ROOT), str(workdir), repr(changes)]
        return subprocess.Popen(command, env=environment, stderr=log)


def wait_for_step(process, workdir, step):
    metrics = workdir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.02)


def final(workdir):
    params, step = run.load_weights(workdir, "none")
    average, _ = run.load_weights(workdir)
    return jax.device_get((params, average)), step


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("loop") / "whole"
    assert start(workdir, **KILLED).wait(timeout=300) == 0
    return workdir


def test_a_run_killed_twice_ends_with_the_same_bits(uninterrupted, tmp_path):
    """SIGKILL at two steps that are no checkpoints; the same command each time."""
    workdir = tmp_path / "run"
    for step in (15, 35):
        process = start(workdir, **KILLED)
        wait_for_step(process, workdir, step)
        process.kill()
        process.wait()
    assert start(workdir, **KILLED).wait(timeout=300) == 0
    expected, got = final(uninterrupted), final(workdir)
    assert got[1] == 60
    chex.assert_trees_all_equal(got[0], expected[0])
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, lines) if "loss" in r]
    assert steps == sorted(set(steps))
    reference = [json.loads(x) for x in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert json.loads(lines[-1]) == reference[-1]


def test_sigterm_saves_and_exits_cleanly_and_the_run_goes_on(uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    process = start(workdir, **KILLED)
    wait_for_step(process, workdir, 20)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert "Stopped by a signal" in pathlib.Path(f"{workdir}.log").read_text()
    with Checkpoints(workdir / "checkpoints", None) as checkpoints:
        stopped = checkpoints.steps()[-1]
    assert 20 <= stopped <= 60
    assert start(workdir, **KILLED).wait(timeout=300) == 0
    chex.assert_trees_all_equal(final(workdir)[0], final(uninterrupted)[0])


def test_a_step_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    """A learning rate that explodes; what was saved before stays."""
    changes = {"optimizer.learning_rate": 1e30, "optimizer.warmup_steps": 0}
    with pytest.raises(
        loop.NonFiniteError, match=r"not finite in step \d+. The last good"
    ) as error:
        loop.train(tiny.config(checkpoint_every=1, eval_examples=0, **changes), tmp_path)
    step = int(str(error.value).split("in step ")[1].split(".")[0])
    assert 0 < step < 12
    with Checkpoints(tmp_path / "checkpoints", None) as checkpoints:
        assert checkpoints.steps()[-1] <= step
    assert f"of step {step}" in str(error.value)


def test_averages_of_any_width_are_reconstructed_from_snapshots(tmp_path):
    """The reconstruction at a width that was kept all along is that track, to rounding."""
    fast = {"optimizer.learning_rate": 0.03, "optimizer.schedule": "constant"}
    loop.train(tiny.config(num_steps=24, **fast), tmp_path)
    kept, _ = run.load_weights(tmp_path, "power_0.1")
    rebuilt, step = run.load_weights(tmp_path, "0.1")
    assert step == 24
    chex.assert_trees_all_close(rebuilt, kept, rtol=1e-3, atol=1e-5)
    between, _ = run.load_weights(tmp_path, "0.075")
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), between, kept)
    assert max(jax.tree.leaves(difference)) > 1e-4
    with pytest.raises(ValueError, match=r"No EMA 'pwer'.*halflife"):
        run.load_weights(tmp_path, "pwer")


def test_init_from_starts_from_the_other_runs_average(tmp_path):
    loop.train(tiny.config(), tmp_path / "base")
    state = loop.train(
        tiny.config(
            num_steps=1, init_from=str(tmp_path / "base"), **{"optimizer.learning_rate": 0.0}
        ),
        tmp_path / "tuned",
    )
    average, _ = run.load_weights(tmp_path / "base", "halflife")
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(average))
    chex.assert_trees_all_equal(jax.device_get(state.ema["power_0.05"]), jax.device_get(average))
    wider = tiny.config(init_from=str(tmp_path / "base"), **{"network.width": 32})
    with pytest.raises(MismatchError, match=r"Parameter .*: expected shape"):
        loop.train(wider, tmp_path / "wider")


def test_a_batch_that_devices_cannot_share_is_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="multiple of 8"):
        loop.train(tiny.config(batch_size=12), tmp_path)


def test_pictures_and_profile_are_written(tmp_path):
    loop.train(
        tiny.config(sample_every=12, **{"profile.start": 4, "profile.num_steps": 4}), tmp_path
    )
    assert (tmp_path / "samples" / "00000012.png").exists()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_constant_data_are_refused(tmp_path):
    np.savez(tmp_path / "flat.npz", images=np.ones((8, 2), np.float32), labels=np.arange(8) % 3)
    config = tiny.config(**{"data.name": f"npz:{tmp_path / 'flat.npz'}", "sigma_data": 0.0})
    with pytest.raises(ValueError, match=r"standard deviation 0.0; expected a positive"):
        loop.train(config, tmp_path)
