"""ICR along a run: what is read, and that training does not feel it."""

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
from mclr_jax.representation import icr, perturb, sweep

FAST = {"optimizer.learning_rate": 0.03, "optimizer.warmup_steps": 0, "ema.snapshot_every": 0}
READ = FAST | {"icr.every_steps": 6, "icr.num_images": 64, "icr.samples": 10}


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "icr" in record]


def test_a_run_with_the_monitor_ends_with_the_bits_of_one_without(tmp_path):
    plain = train(tiny.config("digits", **FAST), tmp_path / "plain")
    gap = {"memorization.every_steps": 6, "memorization.samples": 0}
    read = train(tiny.config("digits", **READ, **gap), tmp_path / "read")
    assert [r["step"] for r in tiny.records(tmp_path / "read") if "memorization_gap" in r] == [
        6,
        12,
    ]
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


def test_features_that_do_not_vary_give_no_reading(tmp_path, caplog):
    """Blocks that start as the identity leave 2 x 2 patches' means: fewer than 16 directions."""
    given = tiny.config("digits", **READ, **{"network.patch_size": 2})
    training, model, source = Training.parse(given), tiny.model_of(given), sources.load("digits")
    read = sweep.Monitor(training.icr, model, training.sampler, source, False)
    assert read(2, model.init(jax.random.key(0))) == {}
    assert "No reading of ICR at step 2: The perturbations leave a direction" in caplog.text


def test_bad_settings_are_refused_before_training(tmp_path):
    few = FAST | {"icr.every_steps": 2, "icr.num_images": 31}
    with pytest.raises(ValueError, match=r"31 images for features of length 16; .*least 32"):
        train(tiny.config("digits", **few), tmp_path)
    unknown = FAST | {"icr.every_steps": 2, "icr.layer": "blocks.9"}
    with pytest.raises(ValueError, match=r"Unknown layer 'blocks.9'. Did you mean 'blocks.0'"):
        train(tiny.config("digits", **unknown), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()
