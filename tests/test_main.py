"""Training as a user starts it: hooks that a config asks for, where runs start, what they take."""

import json
import logging
import os
import shutil
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import base as configs_base
from mclr_jax import main, record, reductions, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.training import ema, loop
from mclr_jax.training.checkpoint import Checkpoints, MismatchError
from mclr_jax.training.loop import Hook, NonFiniteError
from mclr_jax.training.step import make_evaluate


def load(workdir, **arguments):
    """(parameters, step) of a run, on the host."""
    return jax.device_get(runs.load(workdir).weights(**arguments))


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# ---- what happens beside the update --------------------------------------------------------------


def test_more_hooks_come_after_ours_and_before_the_checkpoint(tmp_path):
    """They see what ours have found, and what they find ranks the checkpoints."""
    seen = []

    def rank(moment):
        with Checkpoints(tmp_path / "checkpoints", None) as checkpoints:
            seen.append((moment.step, checkpoints.steps(), set(moment.readings)))
        return {"eval_loss": float(moment.step), "mine": 1.0}

    config = tiny.config(num_steps=18, keep_checkpoints=1, sample_every=6)
    main.train(config, tmp_path, more_hooks=[Hook(6, rank)])
    assert [step for step, _, _ in seen] == [6, 12, 18]
    assert all(step not in steps for step, steps, _ in seen)
    assert all(readings >= {"eval_loss", "eval_error"} for _, _, readings in seen)
    with Checkpoints(tmp_path / "checkpoints", None) as checkpoints:
        assert checkpoints.steps() == [6, 18]  # the best by our own measure, and the last
    assert {"step": 12, "eval_loss": 12.0, "mine": 1.0} in records(tmp_path)


def test_pictures_and_profile_are_written(tmp_path):
    profile = {"profile.start": 4, "profile.num_steps": 4}
    main.train(tiny.config(sample_every=12, eval_examples=0, **profile), tmp_path)
    assert (tmp_path / "samples" / "00000012.png").exists()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert not any("eval_loss" in record for record in records(tmp_path))


def test_the_held_out_loss_is_that_of_the_average_on_the_test_split(tmp_path):
    """5 examples in batches of 16: they are repeated; the same noise at each checkpoint."""
    rng = np.random.default_rng(0)
    for name, count in {"train": 40, "test": 5}.items():
        arrays = {"images": rng.normal(size=(count, 2)), "labels": np.arange(count) % 3}
        np.savez(tmp_path / f"{name}.npz", **arrays)
    data = {
        f"data.{k}": f"npz:{tmp_path / n}.npz" for k, n in {"name": "train", "test": "test"}.items()
    }
    config = tiny.config(**data, **{"data.num_classes": 3, "optimizer.learning_rate": 0.03})
    main.train(config, tmp_path / "run")
    images, labels = sources.load(config.data.test)[np.arange(16) % 5]
    batch = {"index": np.arange(16), "image": images, "label": labels}
    training = Training.parse(config)
    task = training.task(training.data_info(training.data.source("train", 0)), {})
    params, _ = runs.load(tmp_path / "run").weights("halflife")
    found = make_evaluate(task)(params, {}, {name: rows[None] for name, rows in batch.items()})
    expected = reductions.report(jax.device_get(found))
    got = {r["step"]: r for r in records(tmp_path / "run") if "eval_loss" in r}
    assert sorted(got) == [6, 12]
    np.testing.assert_allclose(got[12]["eval_loss"], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(got[12]["eval_error"], expected["error"], rtol=1e-4)
    assert got[6]["eval_loss"] != got[12]["eval_loss"]


def test_averages_of_any_width_are_reconstructed_from_snapshots(tmp_path):
    """The reconstruction at a width that was kept all along is that track, to rounding."""
    fast = {"optimizer.learning_rate": 0.03, "optimizer.schedule": "constant"}
    main.train(tiny.config(num_steps=24, **fast, **tiny.POWER), tmp_path)
    kept, _ = load(tmp_path, average="power_0.1")
    rebuilt, step = load(tmp_path, average="0.1")
    assert step == 24
    chex.assert_trees_all_close(rebuilt, kept, rtol=1e-3, atol=1e-5)
    between, _ = load(tmp_path, average="0.075")
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), between, kept)
    assert max(jax.tree.leaves(difference)) > 1e-4
    with pytest.raises(ValueError, match=r"No EMA 'pwer'.*halflife"):
        load(tmp_path, average="pwer")


# ---- nothing is lost -----------------------------------------------------------------------------


def test_a_wrong_config_leaves_a_finished_run_readable(tmp_path):
    main.train(tiny.config(), tmp_path)
    before = (tmp_path / "run.json").read_text()
    for changes in ({"optimizer.clip_norm": 1.0, "ema.halflife_steps": 0.0}, {"network.width": 24}):
        with pytest.raises(ValueError, match=r"expected shape|has checkpoints of another model"):
            main.train(tiny.config(num_steps=24, **changes, **tiny.POWER), tmp_path)
        assert (tmp_path / "run.json").read_text() == before
    assert load(tmp_path)[1] == 12
    main.train(tiny.config(num_steps=14), tmp_path)
    history = json.loads((tmp_path / "run.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [0, 12]
    assert history[1]["changes"] == {"config.num_steps": [12, 14]}


def test_an_interrupted_run_stops_its_caller_and_says_so_where_it_is_a_base(tmp_path, caplog):
    def interrupt(moment):
        os.kill(os.getpid(), signal.SIGTERM)

    config = tiny.config(steps_per_dispatch=1)
    with pytest.raises(loop.Interrupted) as stopped:
        main.train(config, tmp_path / "base", [Hook(0, interrupt, at=(3,))])
    assert (stopped.value.code, stopped.value.step) == (143, 4)
    assert not (tmp_path / "base" / "lock").exists()
    tuned = tiny.config(num_steps=2, init_from=str(tmp_path / "base"))
    with caplog.at_level(logging.WARNING):
        main.train(tuned, tmp_path / "run")
    assert f"Weights from step 4 of 12 of {tmp_path / 'base'}" in caplog.text
    start = json.loads((tmp_path / "run" / "run.json").read_text())["start"]
    assert start == {"run": str(tmp_path / "base"), "step": 4}


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("key", "value", "expected"), [
    ("seed", -1, "of at least 0"),
    ("num_steps", 0, "an integer of at least 1"),
    ("log_every", 0, "of at least 1"),
    ("grad_accumulation", 0, "of at least 1"),
    ("steps_per_dispatch", -1, "of at least 0"),
    ("checkpoint_every", -5, "of at least 0"),
    ("sigma_data", -0.5, "of at least 0"),
    ("strength", (2.0, 0.0), r"strength\[1\] is 0.0; expected a number of at least 2"),
    ("strength", (1.0,), r"expected \(\) or \(low, high\)"),
    ("strength", (0.0, NAN), r"strength\[1\] is nan"),
    ("class_strengths", (1.0,), "has 1 values; expected 3, one per class"),
    ("class_strengths", (1.0, -0.5, 1.0), r"class_strengths\[1\] is -0.5; expected a number of at"),
    ("class_strengths", (1.0, 1.0, NAN), r"class_strengths\[2\] is nan"),
    ("class_strengths", 0.5, "any number of values"),
    ("noise.std", -1.0, "of at least 0"),
    ("noise.mean", NAN, "nan"),
    ("objective.label_dropout", 1.5, "of at least 0 and at most 1"),
    ("objective.label_dropout", NAN, "nan"),
    ("network.dropout", 1.0, "of at least 0 and below 1"),
    ("network.width", -16, "of at least 1"),
    ("network.depth", 0, "of at least 1"),
    ("optimizer.learning_rate", -1e-3, "of at least 0"),
    ("optimizer.learning_rate", INF, "inf"),
    ("optimizer.weight_decay", -0.1, "of at least 0"),
    ("optimizer.clip_norm", -1.0, "of at least 0"),
    ("optimizer.eps", 0.0, "above 0"),
    ("optimizer.b1", 1.0, "of at least 0 and below 1"),
    ("optimizer.b2", 1.5, "of at least 0 and below 1"),
    ("optimizer.warmup_steps", -1, "of at least 0"),
    ("ema.halflife_steps", NAN, "nan"),
    ("ema.halflife_steps", -1.0, "of at least 0"),
    ("ema.ramp_up", NAN, "nan"),
    ("sampler.num_steps", 0, "of at least 1"),
    ("sampler.rho", NAN, "rho is nan"),
    ("sampler.sigma_max", INF, "sigma_max is inf"),
    ("sampler.num_steps", 10**9, "at most 100000"),
    ("num_steps", 1000.0, "an integer of at least 1"),
    ("num_steps", 2**31, "at most 2147483647"),
    ("batch_size", "16", "an integer of at least 1"),
    ("batch_size", True, "an integer of at least 1"),
    ("grad_accumulation", 3, "which does not divide the"),
    ("require_accelerator", "no", "True or False"),
    ("init_from", 3, "a text"),
    ("data.name", ["digits"], "a text"),
    ("data.flip", 1, "True or False"),
    ("data.augment", 1.5, "at most 1"),
    ("data.num_classes", -1, "of at least 0"),
    ("icr.num_images", 1, "of at least 2"),
    ("icr.sigma", 0.0, "above 0"),
    ("icr.layer", None, "a text"),
    ("profile.start", -1, "of at least 0"),
    ("profile.num_steps", -1, "of at least 0"),
    ("strength", 2.0, "any number of values"),
    ("companions.weak", 3, "a text"),
    ("posterior.name", [], "a text"),
    ("optimizer", 3, "a section"),
    ("sampler.method", "huen", "Did you mean 'heun'"),
])  # fmt: skip
def test_values_that_spoil_a_run_are_refused_before_it_is_written(tmp_path, key, value, expected):
    config = tiny.config(sample_every=6)
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=expected) as error:
        main.train(config, tmp_path / "run")
    assert key.rpartition(".")[2].partition("[")[0] in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize(
    ("section", "key"),
    [("", "num_stpes"), ("icr", "sigmas"), ("profile", "stop"), ("optimizer", "lr"),
     ("ema", "halflife"), ("sampler", "steps")],
)  # fmt: skip
def test_keys_that_nothing_reads_are_refused(tmp_path, section, key):
    """A config file that replaces a section can have any keys there."""
    config = tiny.config()
    part = config[section] if section else config
    part[key] = 3
    where = f"config.{section}".rstrip(".")
    with pytest.raises(ValueError, match=rf"^{where} has no key '{key}'\. (Did|Known)"):
        main.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_held_out_set_of_other_classes_or_shape_is_refused(tmp_path):
    for name, shape, count in (("classes", (20, 2), 5), ("shape", (20, 3), 3)):
        path = tmp_path / f"{name}.npz"
        np.savez(path, images=np.ones(shape, np.float32), labels=np.arange(20) % count)
        with pytest.raises(ValueError, match=r"The held-out set .* the training set \(2,\) in 3"):
            main.train(tiny.config(**{"data.test": f"npz:{path}"}), tmp_path / name)


def test_the_last_step_is_always_saved(tmp_path):
    main.train(tiny.config(checkpoint_every=0), tmp_path)
    assert load(tmp_path)[1] == 12
    assert "eval_loss" in records(tmp_path)[-1]  # and measured


def test_damaged_checkpoints_stop_each_call_until_a_restart_is_asked_for(tmp_path):
    main.train(tiny.config(), tmp_path)
    for folder in (tmp_path / "checkpoints").glob("[0-9]*"):
        shutil.rmtree(folder / "state")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"None of the checkpoints .*--restart"):
            main.train(tiny.config(), tmp_path)
    state = main.train(tiny.config(num_steps=3), tmp_path, restart=True)
    assert int(state.step) == 3
    assert len(list((tmp_path / "replaced").iterdir())) == 1


def test_damaged_companions_are_not_replaced_by_what_their_run_holds_now(base, tmp_path):
    config = mclr(base, **{"objective.target": "reference"})
    main.train(config, tmp_path)
    shutil.rmtree(tmp_path / "frozen" / "reference" / "checkpoints" / "0" / "state")
    config.num_steps += 2
    with pytest.raises(RuntimeError, match=r"None of the checkpoints .*frozen"):
        main.train(config, tmp_path)


def test_deleted_companions_come_back_from_the_same_weights_only(base, tmp_path):
    """The run knows the digest of the weights that it was started with."""
    copy = shutil.copytree(base, tmp_path / "base")
    config = mclr(copy, **{"objective.target": "reference"})
    main.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "frozen")
    config.num_steps += 2
    main.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "frozen")
    config.num_steps += 2
    main.train(tiny.config("mixture", num_steps=14), copy)
    with pytest.raises(
        ValueError, match=r"frozen weights of reference have digest .* started with"
    ):
        main.train(config, tmp_path / "run")
    assert runs.load(tmp_path / "run").weights()[1] == 14


def test_a_start_without_checkpoints_leaves_nothing_to_another_config(base, tmp_path):
    """Its copy of the frozen weights would be another reference than the start of the training."""
    other = tmp_path / "other"
    main.train(tiny.config("mixture", seed=1), other)
    config = mclr(base, **{"objective.target": "reference"})
    with pytest.raises(RuntimeError, match="stopped here"):
        main.train(config, tmp_path / "run", [Hook(1, _raise)])
    config = mclr(other, **{"objective.target": "reference"})
    main.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "frozen").exists()
    chex.assert_trees_all_equal(load(tmp_path / "run", interpolation=0.0), (load(other)[0], 12))
    (entry,) = record.read(tmp_path / "run")["history"]
    assert entry["changes"] == {}
    assert len(list((tmp_path / "run" / "replaced").iterdir())) == 1


def _raise(moment):
    raise RuntimeError("stopped here")


# ---- numbers that are not finite -----------------------------------------------------------------


def test_a_held_out_metric_that_is_not_finite_stops_the_run(tmp_path):
    bad = Hook(6, lambda moment: {"eval_mine": float("nan") if moment.step == 12 else 1.0})
    with pytest.raises(
        NonFiniteError, match=r"eval_mine is nan in step 12.*checkpoint is of step 6"
    ):
        main.train(tiny.config(), tmp_path, [bad])
    assert runs.load(tmp_path).weights()[1] == 6


def test_an_average_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    decay = lambda step: jnp.where(step < 8, 0.5, jnp.nan)  # noqa: E731
    monkeypatch.setattr(ema.EMA, "tracks", {"mine": decay})
    config = tiny.config(eval_examples=0)
    with pytest.raises(
        NonFiniteError, match=r"ema/mine/.* is not finite after step 12.* of step 6"
    ):
        main.train(config, tmp_path)
    assert runs.load(tmp_path).weights("none")[1] == 6


# ---- what is refused before training -------------------------------------------------------------


def test_what_cannot_be_trained_is_refused_at_once(tmp_path):
    with pytest.raises(ValueError, match="multiple of 8"):
        main.train(tiny.config(batch_size=12), tmp_path / "batch")
    with pytest.raises(RuntimeError, match="no accelerator"):
        main.train(tiny.config(require_accelerator=True), tmp_path / "accelerator")
    flat = tmp_path / "flat.npz"
    np.savez(flat, images=np.ones((8, 2), np.float32), labels=np.arange(8) % 3)
    config = tiny.config(**{"data.name": f"npz:{flat}", "sigma_data": 0.0})
    with pytest.raises(ValueError, match=r"standard deviation 0.0; expected a positive"):
        main.train(config, tmp_path / "flat")
    assert not list(tmp_path.glob("*/run.json"))


# ---- fine-tuning: what a run takes from others, and that it needs them only once -----------------


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("base") / "base"
    main.train(tiny.config("mixture"), workdir)
    return workdir


def mclr(base, **changes):
    return tiny.config("mixture_mclr", **{"init_from": str(base)} | changes)


def test_init_from_starts_from_the_other_runs_average(base, tmp_path):
    still = {"num_steps": 1, "init_from": str(base), "optimizer.learning_rate": 0.0}
    still |= {"ema.ramp_up": 0.0}  # else the first step makes the averages new
    state = main.train(tiny.config(**still), tmp_path / "tuned")
    average, _ = load(base, average="halflife")
    chex.assert_trees_all_equal(jax.device_get(state.params), average)
    for ours in state.ema.values():
        chex.assert_trees_all_close(jax.device_get(ours), average, rtol=1e-6)
    wider = tiny.config(init_from=str(base), **{"network.width": 32})
    with pytest.raises(MismatchError, match=r"Parameter .*: expected shape"):
        main.train(wider, tmp_path / "wider")


def test_fine_tuning_starts_from_the_average_and_holds_it_frozen(base, tmp_path):
    """A run that needs its base no more once it has begun goes on without it, to the same bits."""
    changes = {"objective.reference_penalty": 0.5, "optimizer.schedule": "constant"}
    copy = shutil.copytree(base, tmp_path / "copy")
    main.train(mclr(copy, **changes), tmp_path / "whole")
    main.train(mclr(copy, **changes, num_steps=6), tmp_path / "parts")
    shutil.rmtree(copy)
    main.train(mclr(copy, **changes), tmp_path / "parts")
    for average in ("none", "halflife"):
        parts, whole = (load(tmp_path / name, average=average)[0] for name in ("parts", "whole"))
        chex.assert_trees_all_equal(parts, whole)
    start, _ = load(base)
    chex.assert_trees_all_equal(load(tmp_path / "parts", interpolation=0.0)[0], start)
    assert not np.array_equal(whole["in_linear"]["kernel"], start["in_linear"]["kernel"])


def test_interpolation_is_a_place_on_the_line_from_the_start_to_the_run(base, tmp_path):
    """Here the start is read from its own run: an exact posterior needs no frozen reference."""
    main.train(mclr(base), tmp_path)
    assert not (tmp_path / "frozen").exists()
    start, tuned = load(base)[0], load(tmp_path)[0]
    assert not np.array_equal(start["in_linear"]["kernel"], tuned["in_linear"]["kernel"])
    for t in (0.0, 0.3, 1.0, 1.5):
        got, step = load(tmp_path, interpolation=t)
        expected = jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, start, tuned)
        chex.assert_trees_all_close(got, expected, atol=1e-6)
        assert step == mclr(base).num_steps


def test_a_network_that_takes_the_strength_starts_as_the_base_at_every_strength(base, tmp_path):
    changes = {"strength": (0.0, 2.0), "num_steps": 1, "optimizer.learning_rate": 0.0}
    main.train(mclr(base, **changes), tmp_path)
    run, original = runs.load(tmp_path), runs.load(base)
    x, sigma = np.linspace(-2, 2, 8, dtype=np.float32).reshape(4, 2), np.full(4, 0.7, np.float32)
    condition = runs.load(base).model.complete(np.array([0, 1, 2, 3]), 4)
    expected = original.model.denoise(original.weights()[0])(x, sigma, condition)
    params, _ = run.weights()

    def at(strength, params):
        return run.model.denoise(params)(x, sigma, condition.replace(strength=strength))

    np.testing.assert_allclose(at(np.float32([0, 0.5, 1, 2]), params), expected, rtol=1e-6)
    start, _ = run.weights(interpolation=0.0)  # of the base, the new input added
    chex.assert_trees_all_equal(start, params)
    moved = jax.tree.map(lambda p: p + 0.1, params)  # strength is read
    low, high = (at(np.full(4, s, np.float32), moved) for s in (0.0, 1.0))
    assert np.abs(low - high).max() > 1e-4


def test_the_posterior_of_a_classifier_run(base, tmp_path):
    """It is copied into the run too, and its model described there."""
    classifier = tmp_path / "classifier"
    main.train(tiny.classifier("mixture"), classifier)
    changes = {"posterior.name": "classifier", "companions.classifier": str(classifier)}
    main.train(mclr(base, **changes, num_steps=4), tmp_path / "run")
    weights = load(classifier)[0]
    shutil.rmtree(classifier)
    main.train(mclr(base, **changes, num_steps=6), tmp_path / "run")  # goes on
    held = runs.load(tmp_path / "run" / "frozen" / "classifier")
    assert held.model.is_classifier
    chex.assert_trees_all_equal(jax.device_get(held.weights()[0]), weights)
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        main.train(mclr(base, **changes), tmp_path / "other")
    with pytest.raises(MismatchError, match="expected shape"):
        main.train(mclr(base, **{"network.width": 24}), tmp_path / "wide")


def test_objectives_that_want_other_examples_get_them(base, tmp_path):
    """Those of the data, and samples of the frozen model, which must be of its shape."""
    config = tiny.config(**{"objective.name": "contrastive_flow", "num_steps": 6})
    main.train(config, tmp_path / "other")
    config = tiny.config(**{"objective.name": "ddo", "num_steps": 6, "init_from": str(base)})
    with pytest.raises(ValueError, match=r"python -m launch\.sample and set config\.data\.generat"):
        main.train(config, tmp_path / "generated")
    for shape in ((20, 3), (20, 2)):
        images = np.random.default_rng(0).normal(size=shape)
        np.savez(tmp_path / f"{shape[1]}.npz", images=images, labels=np.arange(20) % 3)
    config.data.generated = f"npz:{tmp_path / '3.npz'}"
    with pytest.raises(ValueError, match=r"examples of shape \(3,\); expected \(2,\)"):
        main.train(config, tmp_path / "generated")
    config.data.generated = f"npz:{tmp_path / '2.npz'}"
    main.train(config, tmp_path / "generated")
    for name, metric in {"other": "negative_error", "generated": "negative_ratio"}.items():
        last = {k: v for record in records(tmp_path / name) for k, v in record.items()}
        assert np.isfinite([last[metric], last[f"eval_{metric}"]]).all()


def test_the_plain_objective_diverges_and_says_why(base, tmp_path):
    config = mclr(base, **{"num_steps": 2000, "optimizer.learning_rate": 0.02})
    config.objective = configs_base.options("mclr", negatives="prior", beta=3.0)
    config.checkpoint_every = 2000
    with pytest.raises(NonFiniteError, match=r"has no minimum.*= 0\.75.*negatives='posterior'"):
        main.train(config, tmp_path)
