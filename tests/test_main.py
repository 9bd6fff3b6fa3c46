"""Training as a user starts it: hooks that a config asks for, where runs start, what they take."""

import json
import logging
import os
import shutil
import signal

import chex
import jax
import numpy as np
import pytest
import tiny

from mclr_jax import main, record, runs
from mclr_jax.config import Training
from mclr_jax.experiment import Experiment
from mclr_jax.training import loop
from mclr_jax.training.loop import Hook


def load(workdir, **arguments):
    """(parameters, step) of a run, on the host."""
    return jax.device_get(runs.load(workdir).weights(**arguments))


def plain(**changes):
    """A run whose network is one linear map."""
    return tiny.config(**tiny.LINEAR | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A finished run; a test that changes it takes a copy."""
    workdir = tmp_path_factory.mktemp("base") / "base"
    main.train(plain(), workdir)
    return workdir


def mclr(base, **changes):
    start = {"init_from": str(base), "eval_examples": 0}
    return tiny.config("mixture_mclr", **tiny.LINEAR | start | changes)


HELD = {"objective.target": "reference", "optimizer.schedule": "constant"}


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory):
    """A finished run that holds the base frozen."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    main.train(mclr(base, **HELD), workdir)
    return workdir


def with_other_weights(run):
    """The run as it was at its checkpoint before the last."""
    shutil.rmtree(run / "checkpoints" / "12")
    return run


# ---- nothing is lost -----------------------------------------------------------------------------


def test_a_wrong_config_leaves_a_finished_run_readable(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "run.json").read_text()
    for changes in (
        {"optimizer.clip_norm": 1.0, "ema.halflife_steps": 0.0},
        {"strength": (0.0, 2.0)},
    ):
        with pytest.raises(
            ValueError, match=r"other values: config.ema|checkpoints of another model"
        ):
            main.train(plain(num_steps=24, **changes, **tiny.POWER), tmp_path)
        assert (tmp_path / "run.json").read_text() == before
    assert load(tmp_path)[1] == 12
    main.train(plain(num_steps=14), tmp_path)
    history = json.loads((tmp_path / "run.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [0, 12]
    assert history[1]["changes"] == {"config.num_steps": [12, 14]}


def contents(workdir):
    return {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}


def test_a_finished_run_stays_as_it_is(base, tmp_path, caplog):
    workdir = shutil.copytree(base, tmp_path / "run")
    before = contents(workdir)
    for changes in ({}, {"num_steps": 6}, {"num_steps": 6, "optimizer.learning_rate": 0.5}):
        caplog.clear()
        state = main.train(plain(**changes), workdir, change=bool(changes))
        assert (int(state.step), contents(workdir)) == (12, before)
        assert "has done 12 steps" in caplog.text
    assert "learning_rate is now 0.5; it was 0.001" in caplog.text


def test_what_decides_the_next_steps_is_changed_if_asked_and_told_by_step(base, tmp_path):
    workdir = shutil.copytree(base, tmp_path / "run")
    before = contents(workdir)
    rate = {"optimizer.learning_rate": 0.002, "optimizer.schedule": "constant"}
    changed = rate | {"num_steps": 18, "checkpoint_every": 3, "keep_checkpoints": 9}
    with pytest.raises(ValueError, match=r"rate is now 0.002; it was 0.001.*Add --change"):
        main.train(plain(**changed), workdir)
    assert contents(workdir) == before
    main.train(plain(**changed), workdir, change=True)
    assert tiny.records(workdir)[-2]["learning_rate"] == pytest.approx(0.002)
    shutil.rmtree(workdir / "checkpoints" / "18")  # step 15 is the last
    main.train(plain(**changed | {"seed": 1}), workdir, change=True)
    key = "config.optimizer.learning_rate"
    spans = json.loads((workdir / "run.json").read_text())["spans"]
    found = [(x["from"], x["config.num_steps"], x[key], x["config.seed"]) for x in spans]
    assert found == [(0, 12, 0.001, 0), (12, 18, 0.002, 0), (15, 18, 0.002, 1)]
    shutil.rmtree(workdir / "checkpoints" / "18")
    shutil.rmtree(workdir / "checkpoints" / "15")  # the last one is of the first span
    main.train(plain(**changed), workdir, change=True)
    spans = json.loads((workdir / "run.json").read_text())["spans"]
    assert [(x["from"], x[key], x["config.seed"]) for x in spans] == [(0, 0.001, 0), (12, 0.002, 0)]


@pytest.mark.parametrize("held_out", [0, 16])
def test_a_checkpoint_from_after_the_divergence_is_not_trained_on(tmp_path, held_out):
    """The loss of step 2 shows what step 1 did to the weights; held-out examples, at once."""
    options = {"eval_examples": held_out, "optimizer.schedule": "constant", "checkpoint_every": 1,
               "steps_per_dispatch": 1}  # fmt: skip
    wild = plain(**options, **{"optimizer.learning_rate": 10.0})
    with pytest.raises(loop.NonFiniteError, match="The last good checkpoint is none"):
        main.train(wild, tmp_path)
    assert (tmp_path / "broken" / "1").exists() == (not held_out)
    tame = plain(**options, **{"optimizer.learning_rate": 1e-3})
    assert int(main.train(tame, tmp_path).step) == 12


def test_a_good_checkpoint_is_kept_when_the_next_step_diverges(base, tmp_path):
    workdir = shutil.copytree(base, tmp_path / "run")
    wild = plain(num_steps=24, steps_per_dispatch=1, **{"optimizer.learning_rate": 1e5})
    with pytest.raises(loop.NonFiniteError, match=r"good checkpoint is of step 12, .*--change"):
        main.train(wild, workdir, change=True)
    assert load(workdir)[1] == 12


def test_an_interrupted_run_stops_its_caller_and_says_so_where_it_is_a_base(tmp_path, caplog):
    """A second trainer, which is refused, takes nothing from it before its first checkpoint."""

    def interrupt(moment):
        with pytest.raises(RuntimeError, match="has trained in"):
            main.train(config, tmp_path / "base")
        os.kill(os.getpid(), signal.SIGTERM)

    config = plain(steps_per_dispatch=1, eval_examples=0)
    with pytest.raises(loop.Interrupted) as stopped:
        main.train(config, tmp_path / "base", [Hook(0, interrupt, at=(3,))])
    assert (stopped.value.code, stopped.value.step) == (143, 4)
    assert not (tmp_path / "base" / "lock").exists()
    tuned = plain(num_steps=2, eval_examples=0, init_from=str(tmp_path / "base"))
    with caplog.at_level(logging.WARNING):
        main.train(tuned, tmp_path / "run")
    assert f"Weights from step 4 of 12 of {tmp_path / 'base'}" in caplog.text
    start = json.loads((tmp_path / "run" / "run.json").read_text())["start"]
    assert start == {"run": str(tmp_path / "base"), "step": 4}


NAN, INF = float("nan"), float("inf")


WRONG = {
    "seed": [-1], "num_steps": [0, 1000.0, 2**31], "log_every": [0], "grad_accumulation": [0, 3],
    "steps_per_dispatch": [-1], "checkpoint_every": [-5], "batch_size": ["16", True],
    "sigma_data": [-0.5], "strength": [(2.0, 0.0), (1.0,), (0.0, NAN), 2.0],
    "class_strengths": [(1.0,), (1.0, -0.5, 1.0), (1.0, 1.0, NAN), 0.5],
    "noise.std": [-1.0], "noise.mean": [NAN], "objective.label_dropout": [1.5, NAN],
    "network.dropout": [1.0], "network.width": [-16], "network.depth": [0],
    "optimizer": [3], "optimizer.learning_rate": [-1e-3, INF], "optimizer.weight_decay": [-0.1],
    "optimizer.clip_norm": [-1.0], "optimizer.eps": [0.0], "optimizer.b1": [1.0],
    "optimizer.b2": [1.5], "optimizer.warmup_steps": [-1], "optimizer.schedule": ["linear"],
    "ema.halflife_steps": [NAN, -1.0],
    "ema.ramp_up": [NAN, 2.0], "ema.power_stds": [(0.5,), 0.1], "ema.snapshot_every": [-1],
    "sampler.num_steps": [0, 10**9], "sampler.rho": [NAN], "sampler.sigma_max": [INF],
    "sampler.method": ["huen"], "require_accelerator": ["no"], "init_from": [3],
    "companions.weak": [3], "posterior.name": [[]], "data.name": [["digits"]], "data.flip": [1],
    "data.augment": [1.5], "data.num_classes": [-1], "icr.num_images": [1], "icr.sigma": [0.0],
    "icr.layer": [None], "profile.start": [-1], "profile.num_steps": [-1],
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_values_that_spoil_a_run_are_refused_before_it_is_written(tmp_path, key):
    """All keys; the whole messages are in tests/test_schema.py."""
    for value in WRONG[key]:
        config = tiny.config(sample_every=6, **{"objective.name": "gft"})
        with config.ignore_type():
            config.update_from_flattened_dict({key: value})
        name = key.rpartition(".")[2]
        with pytest.raises(ValueError, match=rf"{name}\b.*(expected|Did you mean|does not divide)"):
            main.train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()


def test_a_restart_sets_damaged_checkpoints_aside(base, tmp_path):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    for folder in (tmp_path / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(folder / "state")
    with pytest.raises(RuntimeError, match=r"None of the checkpoints .*--restart"):
        main.train(plain(), tmp_path)
    state = main.train(plain(num_steps=3, eval_examples=0), tmp_path, restart=True)
    assert int(state.step) == 3
    assert len(list((tmp_path / "replaced").iterdir())) == 1


def test_damaged_companions_are_not_replaced_by_what_their_run_holds_now(base, tuned, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    shutil.rmtree(run / "frozen" / "reference" / "checkpoints" / "0" / "state")
    with pytest.raises(RuntimeError, match=r"None of the checkpoints .*frozen"):
        main.train(mclr(base, **HELD, num_steps=14), run)


def test_deleted_companions_come_back_from_the_same_weights_only(base, tuned, tmp_path):
    """The run knows the digest of the weights that it was started with."""
    start, run = (shutil.copytree(x, tmp_path / x.name) for x in (base, tuned))
    shutil.rmtree(run / "frozen")
    main.train(mclr(start, **HELD, num_steps=14), run)
    shutil.rmtree(run / "frozen")
    with_other_weights(start)
    with pytest.raises(
        ValueError, match=r"frozen weights of reference have digest .* started with"
    ):
        main.train(mclr(start, **HELD, num_steps=16), run)
    assert runs.load(run).weights()[1] == 14


def test_a_start_without_checkpoints_leaves_nothing_to_another_config(base, tmp_path):
    """Its copy of the frozen weights would be another reference than the start of the training."""
    other = with_other_weights(shutil.copytree(base, tmp_path / "other"))
    with pytest.raises(RuntimeError, match="stopped here"):
        main.train(mclr(base, **HELD), tmp_path / "run", [Hook(1, _raise)])
    main.train(mclr(other, **HELD), tmp_path / "run")
    assert (tmp_path / "run" / "frozen").exists()
    chex.assert_trees_all_equal(load(tmp_path / "run", interpolation=0.0), (load(other)[0], 12))
    (entry,) = record.read(tmp_path / "run")["history"]
    assert entry["changes"] == {}
    assert len(list((tmp_path / "run" / "replaced").iterdir())) == 1


def _raise(moment):
    raise RuntimeError("stopped here")


# ---- fine-tuning: what a run takes from others, and that it needs them only once -----------------


def test_fine_tuning_starts_from_the_average_and_holds_it_frozen(base, tuned, tmp_path):
    """A run that needs its base no more once it has begun goes on without it, to the same bits."""
    copy, parts = shutil.copytree(base, tmp_path / "copy"), tmp_path / "parts"
    main.train(mclr(copy, **HELD, num_steps=6), parts)
    shutil.rmtree(copy)
    main.train(mclr(copy, **HELD), parts)
    for average in ("none", "halflife"):
        whole = load(tuned, average=average)[0]
        chex.assert_trees_all_equal(load(parts, average=average)[0], whole)
    start, _ = load(base)
    chex.assert_trees_all_equal(load(parts, interpolation=0.0)[0], start)
    assert not np.array_equal(whole["Dense_0"]["kernel"], start["Dense_0"]["kernel"])


def test_a_run_starts_as_the_average_of_its_base_at_every_strength(base, tmp_path):
    """With a network that takes the strength, the base's does not."""
    changes = {"strength": (0.0, 2.0), "num_steps": 1, "optimizer.learning_rate": 0.0}
    changes |= {"ema.ramp_up": 0.0}  # else the first step makes the averages new
    state = main.train(mclr(base, **changes), tmp_path / "run")
    average, _ = load(base, average="halflife")
    ours = jax.device_get(state.params)
    chex.assert_trees_all_equal({name: ours[name] for name in average}, average)
    for track in state.ema.values():
        chex.assert_trees_all_close(jax.device_get(track), ours, rtol=1e-6)
    assert not (tmp_path / "run" / "frozen").exists()  # an exact posterior needs no reference
    run, original = runs.load(tmp_path / "run"), runs.load(base)
    x, sigma = np.linspace(-2, 2, 8, dtype=np.float32).reshape(4, 2), np.full(4, 0.7, np.float32)
    condition = original.model.complete(np.array([0, 1, 2, 3]), 4)
    expected = jax.jit(original.model.denoise(original.weights()[0]))(x, sigma, condition)
    params, _ = run.weights()

    @jax.jit
    def at(strength, params):
        return run.model.denoise(params)(x, sigma, condition.replace(strength=strength))

    np.testing.assert_allclose(at(np.float32([0, 0.5, 1, 2]), params), expected, rtol=1e-5)
    start, _ = run.weights(interpolation=0.0)  # of the base, the new input added
    chex.assert_trees_all_equal(start, params)
    moved = jax.tree.map(lambda p: p + 0.1, params)  # strength is read
    low, high = (at(np.full(4, s, np.float32), moved) for s in (0.0, 1.0))
    assert np.abs(low - high).max() > 1e-4


def test_the_posterior_of_a_classifier_run(base, tmp_path):
    """It is copied into the run too, and its model described there."""
    classifier = tmp_path / "classifier"
    _, model = tiny.describe(classifier, given=tiny.classifier())
    weights = jax.device_get(model.init(jax.random.key(0)))
    tiny.with_weights(classifier, {"params": weights, "ema": {"halflife": weights}})
    changes = {"posterior.name": "classifier", "companions.classifier": str(classifier)}
    main.train(mclr(base, **changes, num_steps=4), tmp_path / "run")
    shutil.rmtree(classifier)
    held = runs.load(tmp_path / "run" / "frozen" / "classifier")
    assert held.model.is_classifier
    chex.assert_trees_all_equal(jax.device_get(held.weights()[0]), weights)
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        main.train(mclr(base, **changes), tmp_path / "other")


def test_objectives_that_want_other_examples_get_them(base, tmp_path):
    """Those of the data, and samples of the frozen model."""
    config = plain(**{"objective.name": "contrastive_flow", "num_steps": 6})
    main.train(config, tmp_path / "other")
    config = plain(**{"objective.name": "ddo", "num_steps": 6, "init_from": str(base)})
    with pytest.raises(ValueError, match=r"mclr sample and set config\.data\.generat"):
        main.train(config, tmp_path / "generated")
    for shape in ((20, 3), (20, 2)):
        images = np.random.default_rng(0).normal(size=shape)
        np.savez(tmp_path / f"{shape[1]}.npz", images=images, labels=np.arange(20) % 3)
    config.data.generated = f"npz:{tmp_path / '3.npz'}"
    with pytest.raises(ValueError, match=r"examples of shape \(3,\); expected \(2,\)"):
        main.train(config, tmp_path / "generated")
    config.data.generated = f"npz:{tmp_path / '2.npz'}"
    found = Experiment(Training.parse(config), tmp_path / "generated").held_out
    np.testing.assert_array_equal(found["generated_"][np.arange(20)][0], np.float32(images))
    last = {k: v for record in tiny.records(tmp_path / "other") for k, v in record.items()}
    assert np.isfinite([last["negative_error"], last["eval_negative_error"]]).all()
