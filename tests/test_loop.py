"""The loop itself on the smallest of tasks; and runs that are killed, as processes of their own."""

import dataclasses
import functools
import itertools
import os
import signal
import time

import chex
import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax import main, reductions, runs
from mclr_jax.config import Training
from mclr_jax.training import loop
from mclr_jax.training.checkpoint import Checkpoints
from mclr_jax.training.devices import Devices
from mclr_jax.training.log import Writer
from mclr_jax.training.loop import Hook
from mclr_jax.training.step import init_state


@dataclasses.dataclass(frozen=True)
class Plain:
    """The error at one noise level, and the largest number of the batch."""

    needs = frozenset[str]()

    def __call__(self, models, problem, batch, keys):
        x = batch.x0
        loss = ((models.denoise(x, jnp.ones(len(x)), batch.condition) - x) ** 2).mean(-1)
        return loss, {"largest": reductions.maximum(x.max(-1))}

    def advice(self):
        return "Eat more slowly."


def batches(bad_step=None, value=np.nan):
    """Step n has numbers around n / 10, but for one bad number in a bad step."""
    for n in itertools.count():
        image = np.random.default_rng(n).normal(n / 10, 0.1, (8, 2)).astype(np.float32)
        if n == bad_step:
            image[3, 1] = value
        yield {"index": np.arange(8, dtype=np.int32), "image": image, "label": np.zeros(8, int)}


def run(workdir, *hooks, stream=None, num_steps=10, log_every=5, steps_per_dispatch=4):
    """Result of `loop.run` on one device, and the records that it has written."""
    training = Training.parse(tiny.config(**tiny.LINEAR))
    task = training.task(training.data_info(training.data.source("train", 0)), {})
    task = dataclasses.replace(task, objective=Plain())
    devices = Devices("data", (jax.devices()[0],))
    state = devices.initialise(task.init, functools.partial(init_state, task))
    with Writer(workdir, 0, num_steps) as writer:
        result = loop.run(
            task, state, {}, stream or batches(), hooks, writer, devices=devices,
            num_steps=num_steps, log_every=log_every, steps_per_dispatch=steps_per_dispatch,
        )  # fmt: skip
    return *result, tiny.records(workdir)


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks_are_called_when_they_are_due_and_in_their_order(tmp_path):
    """And after the last step, but for hooks without a period."""
    calls = []

    def note(name):
        return lambda moment: calls.append((moment.step, name, int(moment.state.step)))

    hooks = [
        Hook(3, note("threes")),
        Hook((4, 5), note("fours and fives")),
        Hook(0, note("marked"), at=(2, 5, 9)),
        Hook(0, note("never"), when_stopped=True),
        Hook((0, 6), note("sixes")),
    ]
    state, stopped, _ = run(tmp_path, *hooks)
    due = {"threes": (3, 6, 9, 10), "fours and fives": (4, 5, 8, 10), "marked": (2, 5, 9),
           "sixes": (6, 10)}  # fmt: skip
    expected = [
        (step, name, step) for step in range(11) for name, steps in due.items() if step in steps
    ]
    assert calls == expected
    assert (int(state.step), stopped) == (10, False)


def test_a_signal_ends_the_run_after_a_step_and_hooks_can_tell(tmp_path):
    before, calls = signal.getsignal(signal.SIGTERM), []

    def note(name):
        return lambda moment: calls.append((moment.step, name, moment.stopping))

    hooks = [
        Hook(0, lambda moment: os.kill(os.getpid(), signal.SIGTERM), at=(3,)),
        Hook(100, note("not now")),
        Hook(100, note("saves"), when_stopped=True),
        Hook(0, note("saves, too"), when_stopped=True),
    ]
    state, stopped, records = run(tmp_path, *hooks, num_steps=50)
    assert stopped
    assert calls == [(5, "saves", True), (5, "saves, too", True)]  # 5 is the end of a dispatch
    assert int(state.step) == 5
    assert records[-1]["step"] == 5  # what was not yet reported is
    assert signal.getsignal(signal.SIGTERM) == before


# ---- metrics -------------------------------------------------------------------------------------


def test_a_report_is_over_all_steps_since_the_last(tmp_path):
    _, _, each = run(tmp_path, log_every=1, steps_per_dispatch=1)
    _, _, reports = run(tmp_path, log_every=4, steps_per_dispatch=3)
    assert [record["step"] for record in each] == list(range(1, 11))
    assert [record["step"] for record in reports] == [4, 8, 10]
    for record, part in zip(reports, (each[:4], each[4:8], each[8:]), strict=True):
        expected = np.mean([x["loss"] for x in part])
        np.testing.assert_allclose(record["loss"], expected, rtol=1e-5)
        assert record["largest"] == max(x["largest"] for x in part)
        assert record["learning_rate"] == part[-1]["learning_rate"]
    largest = [batch["image"].max() for batch in itertools.islice(batches(), 10)]
    np.testing.assert_array_equal([record["largest"] for record in each], np.float32(largest))


@pytest.mark.parametrize(("bad_step", "value", "message"), [
    (6, np.nan, r"(loss|grad_norm|largest) is nan in step 6"),
    (3, np.inf, r"(loss|grad_norm|largest) is (nan|inf) in step 3"),
    (9, 1e4, r"loss is \S+e\+0\d in step 9"),
])  # fmt: skip
def test_the_first_step_that_is_not_finite_is_named_and_nothing_is_saved_after_it(
    bad_step, value, message, tmp_path
):
    calls = []
    hook = Hook(2, lambda moment: calls.append(moment.step), when_stopped=True)
    message += r": the run diverged\. The last good checkpoint is none\. Eat more slowly\."
    with pytest.raises(loop.NonFiniteError, match=message):
        run(tmp_path, hook, stream=batches(bad_step, value), steps_per_dispatch=2)
    assert calls == list(range(2, bad_step + 1, 2))


# ---- runs that are killed ------------------------------------------------------------------------

KILLED = {"num_steps": 120, "checkpoint_every": 20, "log_every": 5, "eval_examples": 0,
          **tiny.LINEAR, **tiny.POWER, "ema.snapshot_every": 40}  # fmt: skip


def train_killed(workdir):
    main.train(tiny.config(**KILLED), workdir)


def final(workdir):
    run = runs.load(workdir)
    params, step = run.weights("none")
    return jax.device_get((params, run.weights()[0])), step


def test_a_run_that_is_killed_and_stopped_ends_with_the_same_bits(tmp_path, caplog):
    """SIGKILL and SIGTERM at steps that have no checkpoint; the same call each time."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    process = commands.start(train_killed, [str(workdir)], tmp_path / "log", devices=8)
    log = workdir / "metrics.jsonl"
    while process.is_alive() and not (log.exists() and '"step": 25,' in log.read_text()):
        time.sleep(0.02)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    stop = Hook(0, lambda moment: os.kill(os.getpid(), signal.SIGTERM), at=(55,))
    with pytest.raises(loop.Interrupted):
        main.train(tiny.config(**KILLED), workdir, [stop])
    assert "Stopped by a signal" in caplog.text
    with Checkpoints(workdir / "checkpoints", None) as checkpoints:
        assert 55 <= checkpoints.steps()[-1] < 60
    for path in (workdir, whole):
        main.train(tiny.config(**KILLED), path)
    expected, got = final(whole), final(workdir)
    assert got[1] == 120
    chex.assert_trees_all_equal(got[0], expected[0])
    ours, reference = map(tiny.records, (workdir, whole))
    steps = [record["step"] for record in ours if "loss" in record]
    assert steps == sorted(set(steps))
    assert ours[-1] == reference[-1]
