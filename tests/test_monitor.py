"""ICR along a run: what is read, when it warns, and that training does not feel it."""

import json

import chex
import jax
import numpy as np
import pytest
import tiny

from mclr_jax import generate, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.data.protocol import drawn
from mclr_jax.evaluation import metrics
from mclr_jax.main import train
from mclr_jax.representation import icr, monitor, perturb, sweep
from mclr_jax.training.checkpoint import Checkpoints

FAST = {"optimizer.learning_rate": 0.03, "optimizer.warmup_steps": 0, "ema.snapshot_every": 0}
READ = FAST | {"icr.every_steps": 6, "icr.num_images": 64, "icr.samples": 10}


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "icr" in record]


def test_the_curve_has_turned_when_enough_readings_lie_above_the_minimum():
    falling = [(10 * i, 0.5 - 0.02 * i) for i in range(1, 6)]
    assert monitor.turned([]) is None
    assert monitor.turned(falling) is None
    up = [*falling, (60, 0.43), (70, 0.44), (80, 0.45)]
    assert monitor.turned(up[:-1]) is None  # two readings only
    assert monitor.turned(up) == 50
    assert monitor.turned([*falling, (60, 0.43), (70, 0.402), (80, 0.45)]) is None  # within 2%
    assert monitor.turned([*up, (90, 0.39)]) is None  # a new minimum


def test_a_run_with_the_monitor_ends_with_the_bits_of_one_without(tmp_path):
    plain = train(tiny.config("digits", **FAST), tmp_path / "plain")
    read = train(tiny.config("digits", **READ), tmp_path / "read")
    chex.assert_trees_all_equal(jax.device_get(read), jax.device_get(plain))

    found = records(tmp_path / "read")
    assert [record["step"] for record in found] == [6, 12]
    run = runs.load(tmp_path / "read")
    params, step = run.weights()
    source = sources.load("digits")
    rows = drawn(source, 64)
    views = sweep.accumulate(
        run.model, params, source, rows, 0.29, ("blocks.0",), perturb.Augmentation(flip=False)
    )["blocks.0"]
    last = found[-1]
    assert step == 12
    assert last["icr"] == pytest.approx(icr.ratio(views, bias_corrected=True), rel=1e-5)
    assert last["icr_residual"] == pytest.approx(icr.traces(views)["residual"], rel=1e-5)
    samples = generate.generate(run.model, params, np.arange(10), run.sampler).clip(-1, 1)
    real = source.images / np.float32(127.5) - 1
    flat = (x.reshape(len(x), -1) for x in (real, samples))
    assert last["icr_memorized"] == metrics.memorized_fraction(*flat)


@pytest.mark.slow
def test_the_best_checkpoint_is_kept_and_the_turn_is_told_once_also_after_a_resume(
    tmp_path, caplog, monkeypatch
):
    """The ratio is scripted by step; each half of the run is a call of its own."""
    script = dict(zip(range(2, 15, 2), [5, 3, 6, 7, 8, 9, 9], strict=True))
    settings = FAST | {"icr.every_steps": 2, "icr.num_images": 32, "keep_checkpoints": 1}
    warnings = []
    for start, end in ((0, 6), (6, 14)):
        steps = iter([step for step in script if start < step <= end])
        monkeypatch.setattr(
            icr, "ratio", lambda views, bias_corrected, steps=steps: script[next(steps)] / 10
        )
        caplog.clear()
        config = tiny.config("digits", **settings, num_steps=end, checkpoint_every=100)
        train(config, tmp_path / "run")
        warnings.append([r.getMessage() for r in caplog.records if "ICR has" in r.getMessage()])
        with Checkpoints(tmp_path / "run" / "checkpoints", None) as checkpoints:
            assert 4 in checkpoints.steps()
    assert warnings[0] == []
    assert len(warnings[1]) == 1
    assert "memorization likely from step 4; best checkpoint kept" in warnings[1][0]
    assert [record["icr"] * 10 for record in records(tmp_path / "run")] == list(script.values())
    assert runs.load(tmp_path / "run").weights(step=4)[1] == 4


def test_features_that_do_not_vary_give_no_reading(tmp_path, caplog):
    """Blocks that start as the identity leave 2 x 2 patches' means: fewer than 16 directions."""
    given = tiny.config("digits", **READ, **{"network.patch_size": 2})
    training, model, source = Training.parse(given), tiny.model_of(given), sources.load("digits")
    read = monitor.Monitor(training.icr, model, training.sampler, source, False, tmp_path, 0)
    assert read(2, model.init(jax.random.key(0))) == {}
    assert "No reading of ICR: The perturbations leave a direction" in caplog.text


def test_bad_settings_are_refused_before_training(tmp_path):
    few = FAST | {"icr.every_steps": 2, "icr.num_images": 31}
    with pytest.raises(ValueError, match=r"31 images for features of length 16; .*least 32"):
        train(tiny.config("digits", **few), tmp_path)
    unknown = FAST | {"icr.every_steps": 2, "icr.layer": "blocks.9"}
    with pytest.raises(ValueError, match=r"Unknown layer 'blocks.9'. Did you mean 'blocks.0'"):
        train(tiny.config("digits", **unknown), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_past_readings_are_those_up_to_the_step_of_the_checkpoint(tmp_path):
    lines = [{"step": 2, "icr": 0.5}, {"step": 2, "loss": 1.0}, {"step": 4, "icr": 0.4}]
    lines.append({"step": 5, "icr": None})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "ic'
    (tmp_path / "metrics.jsonl").write_text(text)
    assert monitor.past(tmp_path, 2) == [(2, 0.5)]
    assert monitor.past(tmp_path, 9) == [(2, 0.5), (4, 0.4)]
    assert monitor.past(tmp_path / "new", 9) == []
