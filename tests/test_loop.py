import json
import os
import pathlib
import shutil
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
        loop.NonFiniteError, match=r"is (nan|inf).* in step \d+: the run diverged. The last good"
    ) as error:
        loop.train(tiny.config(checkpoint_every=1, eval_examples=0, **changes), tmp_path)
    step = int(str(error.value).split("in step ")[1].split(":")[0])
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


# Fine-tuning: what a run takes from others, and that it needs them only once.


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "base"
    loop.train(tiny.config("mixture"), workdir)
    return workdir


def mclr(base, **changes):
    return tiny.config("mixture_mclr", **{"init_from": str(base)} | changes)


def test_fine_tuning_starts_from_the_average_and_holds_it_frozen(base, tmp_path):
    """A run that needs its base no more once it has begun goes on without it, to the same bits."""
    changes = {"objective.reference_penalty": 0.5, "optimizer.schedule": "constant"}
    copy = shutil.copytree(base, tmp_path / "copy")
    loop.train(mclr(copy, **changes), tmp_path / "whole")
    loop.train(mclr(copy, **changes, num_steps=6), tmp_path / "parts")
    shutil.rmtree(copy)
    loop.train(mclr(copy, **changes), tmp_path / "parts")
    chex.assert_trees_all_equal(final(tmp_path / "parts")[0], final(tmp_path / "whole")[0])
    start, _ = run.load_weights(base)
    chex.assert_trees_all_equal(run.load_weights(tmp_path / "parts", strength=0.0)[0], start)
    assert not np.array_equal(final(tmp_path / "whole")[0][0]["in_linear"]["kernel"],
                              start["in_linear"]["kernel"])  # fmt: skip


def test_strength_is_a_place_on_the_line_from_the_start_to_the_run(base, tmp_path):
    loop.train(mclr(base), tmp_path)
    start, tuned = run.load_weights(base)[0], run.load_weights(tmp_path)[0]
    assert not np.array_equal(start["in_linear"]["kernel"], tuned["in_linear"]["kernel"])
    for strength in (0.0, 0.3, 1.0, 1.5):
        got, step = run.load_weights(tmp_path, strength=strength)
        expected = jax.tree.map(lambda a, b, s=strength: (1 - s) * a + s * b, start, tuned)
        chex.assert_trees_all_close(got, expected, atol=1e-6)
        assert step == mclr(base).num_steps
    with pytest.raises(ValueError, match=r"was not started from another run.*strength is 1"):
        run.load_weights(base, strength=0.5)


def test_a_network_that_takes_the_strength_starts_as_the_base_at_every_strength(base, tmp_path):
    changes = {"objective.strength": (0.0, 2.0), "num_steps": 1, "optimizer.learning_rate": 0.0}
    loop.train(mclr(base, **changes), tmp_path)
    experiment, original = run.load_experiment(tmp_path), run.load_experiment(base)
    x, sigma = np.linspace(-2, 2, 8, dtype=np.float32).reshape(4, 2), np.full(4, 0.7, np.float32)
    label = np.array([0, 1, 2, 3])
    expected = original.denoiser(run.load_weights(base)[0])(x, sigma, label)
    params, _ = run.load_weights(tmp_path)
    got = experiment.denoiser(params, strength=np.array([0.0, 0.5, 1.0, 2.0]))(x, sigma, label)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    start, _ = run.load_weights(tmp_path, strength=0.0)  # of the base, the new input added
    chex.assert_trees_all_equal(start, params)
    moved = jax.tree.map(lambda p: p + 0.1, params)  # strength is read
    low, high = (experiment.denoiser(moved, strength=s)(x, sigma, label) for s in (0.0, 1.0))
    assert np.abs(low - high).max() > 1e-4


def test_the_posterior_of_a_classifier_run(base, tmp_path):
    """It is copied into the run too, and its experiment described there."""
    classifier = tmp_path / "classifier"
    loop.train(tiny.classifier("mixture"), classifier)
    changes = {"objective.posterior": "classifier", "objective.posterior_from": str(classifier)}
    loop.train(mclr(base, **changes, num_steps=4), tmp_path / "run")
    shutil.rmtree(classifier)
    loop.train(mclr(base, **changes, num_steps=6), tmp_path / "run")  # goes on
    experiment = run.load_experiment(tmp_path / "run")
    assert experiment.classifier.config.objective.name == "classify"
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        loop.train(mclr(base, **changes), tmp_path / "other")
    changes["objective.posterior_from"] = str(base)
    with pytest.raises(ValueError, match=r"expected a run with objective.*'classify'.*it has.*dsm"):
        loop.train(mclr(base, **changes), tmp_path / "other")
    changes["objective.posterior_from"] = ""
    with pytest.raises(ValueError, match=r"needs objective.posterior_from"):
        loop.train(mclr(base, **changes), tmp_path / "other")
    with pytest.raises(ValueError, match=r"needs a frozen reference: set config\.init_from"):
        loop.train(mclr("", **{"objective.reference_penalty": 1.0}), tmp_path / "another")
    with pytest.raises(MismatchError, match="expected shape"):
        loop.train(mclr(base, **{"network.width": 24}), tmp_path / "wide")


def test_the_plain_objective_diverges_and_says_why(base, tmp_path):
    changes = {"objective.negatives": "prior", "objective.beta": 3.0, "num_steps": 2000,
               "optimizer.learning_rate": 0.02, "checkpoint_every": 2000}  # fmt: skip
    with pytest.raises(
        loop.NonFiniteError, match=r"has no minimum.*= 0\.75.*negatives='posterior'"
    ):
        loop.train(mclr(base, **changes), tmp_path)
