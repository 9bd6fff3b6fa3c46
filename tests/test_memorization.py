"""The gap and its warning, against denoisers whose memory is known: exact ones in closed form."""

import dataclasses
import json
from types import SimpleNamespace
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax import generate, hooks, main, runs
from mclr_jax.config import Training
from mclr_jax.data.protocol import Arrays
from mclr_jax.data.sources import Data
from mclr_jax.evaluation import features
from mclr_jax.experiment import Experiment
from mclr_jax.model import DataInfo
from mclr_jax.representation import memorization
from mclr_jax.training.beside import Memorization
from mclr_jax.training.checkpoint import Checkpoints

SHAPE, SD = (4, 4, 1), 0.5
OPTIONS = Memorization(every_steps=1, num_images=64, samples=0)


def source_of(count, seed):
    """Images of independent normal pixels: the best denoiser of new ones is linear."""
    x = SD * np.random.default_rng(seed).normal(size=(count, *SHAPE))
    return Arrays(x.astype(np.float32), np.arange(count, dtype=np.int32) % 3, 3)


TRAIN, HELD_OUT = source_of(64, 0), source_of(80, 1)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """D = (1 - params) linear + params memory; memory is the posterior mean of the training set."""

    data: ClassVar = DataInfo(SHAPE, 3, SD)
    null_label: ClassVar = 3

    def denoise(self, params):
        def run(x, sigma, labels):
            level = sigma[:, None]
            flat, real = x.reshape(len(x), -1), jnp.asarray(TRAIN.images.reshape(64, -1))
            linear = SD**2 / (SD**2 + level**2) * flat
            squared = ((flat[:, None] - real) ** 2).sum(-1)
            memory = jax.nn.softmax(-squared / (2 * level**2)) @ real
            return ((1 - params) * linear + params * memory).reshape(x.shape)

        return run


@dataclasses.dataclass(frozen=True)
class Told:
    """D = params x + the label, in each pixel."""

    def denoise(self, params):
        return lambda x, sigma, labels: params * x + labels[:, None, None, None]


def monitor(tmp_path, held_out=HELD_OUT, start=0, **changes):
    options = dataclasses.replace(OPTIONS, **changes)
    given = options, Mixed(), None, Data(), TRAIN, held_out, tmp_path, start
    return memorization.Monitor(*given, pause=2)


def test_errors_of_denoisers_in_closed_form():
    """Of the label alone, and of the noise, which scales with sigma and is the same each time."""
    x, labels = HELD_OUT.images, HELD_OUT.labels

    def errors(params, sigma, labels, seed=0):
        return memorization.errors(Told(), jnp.asarray(params), x, labels, sigma, seed)

    expected = ((labels[:, None] - x.reshape(80, -1)) ** 2).sum(1)
    np.testing.assert_allclose(errors(0.0, 0.3, labels), expected, rtol=1e-5)
    low, high = (errors(1.0, sigma, 0 * labels) for sigma in (0.1, 0.2))
    np.testing.assert_allclose(high, 4 * low, rtol=1e-4)
    spread = np.sqrt(2 / (16 * 80 * memorization.NOISES))  # of a chi square's mean
    assert low.mean() == pytest.approx(16 * 0.1**2, rel=4 * spread)
    assert abs(errors(1.0, 0.1, 0 * labels, seed=1) - low).min() > 0


def test_the_gap_and_its_standard_error():
    """1 - 1/4 of means 1 and 4; the error is that of a bootstrap over the images."""
    assert memorization.gap(np.array([0.5, 1.5]), np.array([4.0, 4.0]))[0] == 0.75
    rng = np.random.default_rng(0)
    train, held_out = rng.gamma(4, 0.3, 128), rng.gamma(2, 1.5, 100)
    found, error = memorization.gap(train, held_out)
    draws = [
        memorization.gap(rng.choice(train, 128), rng.choice(held_out, 100))[0] for _ in range(4000)
    ]
    assert found == pytest.approx(np.mean(draws), abs=0.01)
    assert error == pytest.approx(np.std(draws), rel=0.06)


@pytest.mark.parametrize(("share", "level"), [(1.01, 1), (0.51, 2), (0.26, 4), (2, 1)])
def test_the_level_climbs_until_the_error_is_the_share_of_the_distance(share, level):
    """Errors with the root mean square `share` sigma, at distance 1 / LEVEL: the level 1 / share,
    rounded up to a power of RISE."""
    sigma, errors = memorization.climb(
        lambda sigma: np.full(3, (share * sigma) ** 2), 1.0, 1 / memorization.LEVEL
    )
    assert sigma == pytest.approx(level, rel=1e-6)
    np.testing.assert_allclose(errors, (share * sigma) ** 2)


def test_a_memory_is_seen_and_a_denoiser_without_one_is_not(tmp_path):
    read = monitor(tmp_path)
    none, whole = (read(step, jnp.array(params)) for step, params in ((1, 0.0), (2, 1.0)))
    assert abs(none["memorization_gap"]) < 3 * none["memorization_error"]
    assert none["memorization_warning"] == 0
    assert whole["memorization_gap"] > 0.9
    assert whole["memorization_warning"] == 2
    # The nearest of 64 images, by brute force; the first level is where noise alone has the error.
    apart = np.linalg.norm((HELD_OUT.images[:, None] - TRAIN.images).reshape(80, 64, -1), axis=-1)
    rows = memorization.drawn(HELD_OUT, 64)
    distance = np.median(apart.min(1)[rows])
    assert read.distance == pytest.approx(distance, rel=1e-5)
    assert read.first_level == pytest.approx(0.4 * distance / 4, rel=1e-5)
    # The linear denoiser's error: the level is the first on the ladder where it is large enough.
    sigma = none["memorization_sigma"]
    ideal = [np.sqrt(16 / (1 / SD**2 + 1 / s**2)) for s in (sigma / memorization.RISE, sigma)]
    assert ideal[0] < 0.4 * distance * 1.02
    assert ideal[1] > 0.4 * distance * 0.98
    assert monitor(tmp_path, sigma=0.3)(1, jnp.zeros(()))["memorization_sigma"] == 0.3


def test_without_held_out_images_one_call_shows_copies(tmp_path, caplog):
    read = monitor(tmp_path, held_out=None)
    none, whole = (read(step, jnp.array(params)) for step, params in ((1, 0.0), (2, 1.0)))
    assert none["memorization_one_call"] < 0.1
    assert whole["memorization_one_call"] > 0.7
    assert [row["memorization_warning"] for row in (none, whole)] == [0, 1]
    assert "less certain" in caplog.text
    apart = np.linalg.norm((TRAIN.images[:, None] - TRAIN.images).reshape(64, 64, -1), axis=-1)
    assert read.distance == pytest.approx(np.median(np.sort(apart)[:, 1]), rel=1e-5)


def test_each_stage_is_told_once_and_a_resumed_run_reads_the_same(tmp_path, caplog, monkeypatch):
    """Copies are counted after the warning alone, at most every 2 steps: half of the samples."""
    copies = np.concatenate([TRAIN.images[:5] + 1e-3, HELD_OUT.images[:5]])
    monkeypatch.setattr(generate, "generate", lambda *_: copies)
    script = {1: 0.0, 2: 0.34, 3: 0.35, 4: 0.7, 5: 0.0, 6: 0.9}
    whole = monitor(tmp_path / "none", samples=10)
    expected = {step: whole(step, jnp.array(params)) for step, params in script.items()}
    stages = [row["memorization_warning"] for row in expected.values()]
    assert stages == [0, 1, 1, 2, 2, 2]  # a stage stays
    counted = {k: x["memorization_copies"] for k, x in expected.items() if len(x) == 5}
    assert counted == {2: 0.5, 4: 0.5, 6: 0.5}
    assert [r.getMessage().count("Memorization at step") for r in caplog.records] == [1, 1]
    assert "no checkpoint is older" in caplog.text

    caplog.clear()
    (tmp_path / "checkpoints").mkdir()
    kept = [{"step": 1, "memorization": 0.0}, {"step": 2, "memorization": 1.0}]
    lines = {"metrics.jsonl": [{"step": k, **x} for k, x in expected.items()],
             "checkpoints/metrics.jsonl": kept}  # fmt: skip
    for name, records in lines.items():
        (tmp_path / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    resumed = monitor(tmp_path, samples=10, start=3)
    assert {step: resumed(step, jnp.array(script[step])) for step in (4, 5, 6)} == {
        step: expected[step] for step in (4, 5, 6)
    }
    (record,) = caplog.records
    assert "Memorization at step 4" in record.getMessage()
    assert "of step 1, is kept (mclr sample --checkpoint=1)" in record.getMessage()
    odd = '{"step": 3, "memorization_warning": "1"}\n{"step": 3, "memorization_sigma": 1e400, '
    (tmp_path / "metrics.jsonl").write_text(odd + '"memorization_warning": 1}\n{"step": 3, "mem')
    assert memorization.past(tmp_path, 9) == []


def test_of_large_images_few_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(memorization, "NUMBERS", 16 * 50)
    monkeypatch.setattr(memorization, "LEAST", 1)
    assert len(monitor(tmp_path, num_images=2).neighbours) in (50, 51, 52)
    assert len(monitor(tmp_path).neighbours) == 64  # those of readings are among them
    monkeypatch.setattr(memorization, "LEAST", 60)
    assert len(monitor(tmp_path, num_images=2).neighbours) >= 60


def test_held_out_images_that_are_training_images_give_no_reading(tmp_path, caplog):
    found = monitor(tmp_path, held_out=TRAIN)
    assert found(1, jnp.zeros(())) == found(2, jnp.zeros(())) == {}
    assert caplog.text.count("most held-out images are training images") == 1


def test_the_period_costs_less_than_a_share_and_meets_the_checkpoints():
    """512 calls; a step of 64 examples costs 192: 2% of 134 steps are 514."""
    auto = Memorization()
    assert auto.period(512, 64, 1000, 500) == 250  # divides 500
    assert auto.period(512, 64, 1000, 134) == 134
    assert auto.period(512, 64, 1000, 100) == 200  # a multiple of 100
    assert auto.period(512, 64, 199, 100) == 0  # a reading would cost more
    assert auto.period(0, 64, 1000, 100) == 1
    assert dataclasses.replace(auto, every_steps=7).period(512, 64, 3, 100) == 7
    assert dataclasses.replace(auto, every_steps=-1).period(1, 64, 1000, 100) == 0


@pytest.mark.parametrize(("shape", "frames", "is_denoiser"), [
    ((2,), (), True), ((16, 3), (16,), True), ((8, 8, 1), (8,), True), ((8, 8, 1), (), False)
])  # fmt: skip
def test_points_trajectories_and_classifiers_have_no_readings(shape, frames, is_denoiser, caplog):
    model = SimpleNamespace(
        is_denoiser=is_denoiser, frames=frames, data=SimpleNamespace(shape=shape)
    )
    for every in (0, 5):
        training = Training.parse(tiny.config(**{"memorization.every_steps": every}))
        experiment = SimpleNamespace(training=training, model=model, source=None)
        assert hooks.memorization(experiment, 0) == []
    assert caplog.text.count("config.memorization is for images and latents") == 1


def test_copies_are_likely_no_earlier_than_the_warning():
    with pytest.raises(ValueError, match=r"likely is 0.5; expected at least .*warning, 0.6"):
        Memorization(likely=0.5)


def test_copies_are_counted_in_the_features_of_an_extractor(tmp_path, monkeypatch):
    """Its features do not change if an image is turned upside down, as 2 of 4 samples are; those
    of the training images are computed once."""
    samples, seen = HELD_OUT.images[:4].copy(), []
    samples[:2] = TRAIN.images[5:7, ::-1]

    def turned(pixels, labels):
        seen.append(len(pixels))
        found = np.sort(np.asarray(pixels, np.float64), axis=1).reshape(len(pixels), -1)
        return features.Features(found, found[:, :0], labels)

    monkeypatch.setattr(features, "load", lambda name: turned)
    monkeypatch.setattr(generate, "generate", lambda *_: samples)
    read = monitor(tmp_path, samples=4, features="turned")
    for step in (1, 3):  # 2 steps apart, the pause
        found = read(step, jnp.ones(()))
        assert found["memorization_copies_by_features"] == 0.5
        assert found["memorization_copies"] == 0
    assert sorted(seen) == [4, 4, 64]


def test_a_mirrored_copy_counts_where_training_shows_mirrored_images(tmp_path, monkeypatch):
    samples = HELD_OUT.images[:4].copy()
    samples[:3] = TRAIN.images[5:8, :, ::-1]
    monkeypatch.setattr(generate, "generate", lambda *_: samples)
    for flip, expected in ((False, 0), (True, 0.75)):
        read = dataclasses.replace(monitor(tmp_path, samples=4), data=Data(flip=flip))
        assert read(1, jnp.ones(()))["memorization_copies"] == expected


def test_readings_begin_by_themselves_where_images_are_held_out(tmp_path, caplog):
    def found(**changes):
        config = tiny.config("digits", num_steps=2000, checkpoint_every=600, **changes)
        return hooks.memorization(Experiment(Training.parse(config), tmp_path), 0)

    (hook,) = found()
    assert hook.every == 600  # 512 calls of a training with 48 a step: at least 534
    assert hook.run.read.pause % 600 == 0
    assert hook.run.read.pause * 48 * 0.02 >= 200 * 5  # calls of 200 samples
    assert found(eval_examples=0) == []
    (hook,) = found(eval_examples=0, **{"memorization.every_steps": 50})
    assert hook.run.read.held_out is None
    assert hook.every == (50, 600)
    assert found(**{"memorization.every_steps": 50, "data.limit": 15}) == []
    assert "of 15 training and 128 held-out images; they need 16 of each kind" in caplog.text


def test_the_checkpoint_before_the_warning_is_kept_across_a_stop(tmp_path, caplog, monkeypatch):
    """A linear network; the errors are scripted by the number of readings."""
    gaps = iter([0.0, 0.61, 0.7, 0.8])  # the second less two errors is below 0.6
    monkeypatch.setattr(memorization, "gap", lambda *_: (next(gaps), 0.01))
    for steps in (4, 8):
        config = tiny.config("digits", num_steps=steps, checkpoint_every=2, keep_checkpoints=1)
        config.network = {"name": "tiny:Linear"}
        config.update_from_flattened_dict({"memorization.every_steps": 2, "eval_examples": 16,
                                           "memorization.samples": 0})  # fmt: skip
        main.train(config, tmp_path)
    readings = [r for r in tiny.records(tmp_path) if "memorization_gap" in r]
    assert [r["memorization_warning"] for r in readings] == [0, 0, 1, 2]
    assert "before the first warning, of step 4, is kept" in caplog.text
    with Checkpoints(tmp_path / "checkpoints", None) as checkpoints:
        assert {4, 8} <= {*checkpoints.steps()}
    assert runs.load(tmp_path).weights(step=4)[1] == 4
