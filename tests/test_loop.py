"""The loop itself on the smallest of tasks; and runs that are killed, as processes of their own."""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import signal
import time

import chex
import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl import logging

from mclr_jax import main, reductions, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
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
    config = tiny.config()
    source = sources.from_config(config.data, "train", 0)
    task = Training.parse(config).task(Training.parse(config).data_info(source), {})
    task = dataclasses.replace(task, objective=Plain())
    devices = Devices("data", (jax.devices()[0],))
    state = devices.initialise(task.init, functools.partial(init_state, task))
    with Writer(workdir, 0, num_steps) as writer:
        result = loop.run(
            task, state, {}, stream or batches(), hooks, writer, devices=devices,
            num_steps=num_steps, log_every=log_every, steps_per_dispatch=steps_per_dispatch,
        )  # fmt: skip
    return *result, list(map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()))


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


def test_what_a_hook_finds_is_logged_and_seen_by_those_after_it(tmp_path):
    seen = []

    def look(moment):
        seen.append((moment.step, dict(moment.readings), moment.stopping))

    hooks = [
        Hook(5, look),
        Hook(5, lambda moment: {"a": moment.step, "b": 1.0}),
        Hook(2, lambda moment: {"b": moment.step / 2}),
        Hook(5, look),
    ]
    _, _, records = run(tmp_path, *hooks)
    assert seen == [
        (5, {}, False),
        (5, {"a": 5, "b": 1.0}, False),
        (10, {}, False),
        (10, {"a": 10, "b": 5.0}, False),
    ]
    found = [record for record in records if "loss" not in record]
    assert found[:2] == [{"step": 2, "b": 1.0}, {"step": 4, "b": 2.0}]
    assert {"step": 5, "a": 5, "b": 1.0} in found


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
    single, dispatched = tmp_path / "single", tmp_path / "dispatched"
    for folder in (single, dispatched):
        folder.mkdir()
    _, _, each = run(single, log_every=1, steps_per_dispatch=1)
    _, _, reports = run(dispatched, log_every=4, steps_per_dispatch=3)
    assert [record["step"] for record in each] == list(range(1, 11))
    assert [record["step"] for record in reports] == [4, 8, 10]
    for record, part in zip(reports, (each[:4], each[4:8], each[8:]), strict=True):
        expected = np.mean([x["loss"] for x in part])
        np.testing.assert_allclose(record["loss"], expected, rtol=1e-5)
        assert record["largest"] == max(x["largest"] for x in part)
        assert record["learning_rate"] == part[-1]["learning_rate"]
    largest = [batch["image"].max() for batch in itertools.islice(batches(), 10)]
    np.testing.assert_array_equal([record["largest"] for record in each], np.float32(largest))


@pytest.mark.parametrize(
    ("bad_step", "value", "message"),
    [
        (6, np.nan, r"(loss|grad_norm|largest) is nan in step 6"),
        (3, np.inf, r"(loss|grad_norm|largest) is (nan|inf) in step 3"),
        (9, 1e4, r"loss is \S+e\+0\d in step 9"),
    ],
)
def test_the_first_step_that_is_not_finite_is_named_and_nothing_is_saved_after_it(
    bad_step, value, message, tmp_path
):
    calls = []
    hook = Hook(2, lambda moment: calls.append(moment.step), when_stopped=True)
    message += r": the run diverged\. The last good checkpoint is none\. Eat more slowly\."
    with pytest.raises(loop.NonFiniteError, match=message):
        run(tmp_path, hook, stream=batches(bad_step, value), steps_per_dispatch=2)
    assert calls == list(range(2, bad_step + 1, 2))


def test_divergence_of_a_run_names_its_last_checkpoint(tmp_path):
    """A learning rate that explodes; what was saved before stays."""
    changes = {"optimizer.learning_rate": 1e6, "optimizer.warmup_steps": 0}
    with pytest.raises(
        loop.NonFiniteError, match=r"is (nan|inf|\S+e\+\d+) in step \d+: the run diverged. The last"
    ) as error:
        main.train(tiny.config(checkpoint_every=1, eval_examples=0, **changes), tmp_path)
    step = int(str(error.value).split("in step ")[1].split(":")[0])
    assert 0 < step < 12
    with Checkpoints(tmp_path / "checkpoints", None) as checkpoints:
        assert checkpoints.steps()[-1] <= step
        assert f"of step {checkpoints.steps()[-1]}." in str(error.value)


# ---- runs that are killed ------------------------------------------------------------------------

KILLED = {"num_steps": 120, "checkpoint_every": 10, "log_every": 5, **tiny.POWER}


def train_killed(workdir):
    logging.use_absl_handler()
    main.train(tiny.config(**KILLED), workdir)


def start(workdir):
    """The run as a process of its own, with its log in workdir.log."""
    return commands.start(train_killed, [str(workdir)], f"{workdir}.log")


def wait_for_step(process, workdir, step):
    path = workdir / "metrics.jsonl"
    while process.is_alive():
        if path.exists() and f'"step": {step},' in path.read_text():
            return
        time.sleep(0.02)


def final(workdir):
    run = runs.load(workdir)
    params, step = run.weights("none")
    return jax.device_get((params, run.weights()[0])), step


def test_a_run_that_is_killed_and_stopped_ends_with_the_same_bits(tmp_path):
    """SIGKILL and SIGTERM at steps that have no checkpoint; the same call each time."""
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    uninterrupted = start(whole)
    for step, number in ((15, signal.SIGKILL), (35, signal.SIGTERM)):
        process = start(workdir)
        wait_for_step(process, workdir, step)
        os.kill(process.pid, number)
        process.join(60)
        assert process.exitcode == (-number if number == signal.SIGKILL else 143)
    assert "Stopped by a signal" in pathlib.Path(f"{workdir}.log").read_text()
    with Checkpoints(workdir / "checkpoints", None) as checkpoints:
        assert 35 <= checkpoints.steps()[-1] < 120
    last = start(workdir)
    for process in (uninterrupted, last):
        process.join(300)
        assert process.exitcode == 0
    expected, got = final(whole), final(workdir)
    assert got[1] == 120
    chex.assert_trees_all_equal(got[0], expected[0])
    ours, reference = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (workdir, whole)
    )
    steps = [record["step"] for record in ours if "loss" in record]
    assert steps == sorted(set(steps))
    assert ours[-1] == reference[-1]
