"""What happens beside the update: held-out losses, pictures, snapshots, profiles, checkpoints."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax import hooks, main, reductions, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.data.protocol import Arrays
from mclr_jax.training.checkpoint import Checkpoints
from mclr_jax.training.loop import Hook, Moment, NonFiniteError
from mclr_jax.training.step import make_evaluate


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(directory, config, calls of a hook of our own) of a run in which all hooks have work."""
    folder, calls = tmp_path_factory.mktemp("hooks"), []
    rng = np.random.default_rng(0)
    for name, count in {"train": 40, "test": 5}.items():
        arrays = {"images": rng.normal(size=(count, 2)), "labels": np.arange(count) % 3}
        np.savez(folder / f"{name}.npz", **arrays)

    def rank(moment):
        with Checkpoints(folder / "run" / "checkpoints", None) as checkpoints:
            calls.append((moment.step, checkpoints.steps(), dict(moment.readings)))
        return {"eval_loss": float(moment.step), "mine": 1.0}

    config = tiny.config(num_steps=16, keep_checkpoints=1, sample_every=12, **tiny.POWER, **{
        "data.name": f"npz:{folder / 'train.npz'}", "data.test": f"npz:{folder / 'test.npz'}",
        "data.num_classes": 3, "profile.start": 4, "profile.num_steps": 4,
        "optimizer.learning_rate": 0.03, "optimizer.schedule": "constant",
    })  # fmt: skip
    main.train(config, folder / "run", more_hooks=[Hook(6, rank)])
    return folder / "run", config, calls


def test_more_hooks_come_after_ours_and_before_the_checkpoint(run):
    """They see what ours have found, and what they find ranks the checkpoints."""
    workdir, _, calls = run
    assert [step for step, _, _ in calls] == [6, 12, 16]
    assert all(step not in steps for step, steps, _ in calls)
    assert all(readings.keys() >= {"eval_loss", "eval_error"} for _, _, readings in calls)
    with Checkpoints(workdir / "checkpoints", None) as checkpoints:
        assert checkpoints.steps() == [6, 16]  # the best by our own measure, and the last
    found = next(x for x in tiny.records(workdir) if "mine" in x and x["step"] == 12)
    assert (found["eval_loss"], found["mine"]) == (12.0, 1.0)


def test_pictures_and_profile_are_written(run):
    names = {path.name for path in (run[0] / "samples").iterdir()}
    assert names == {"00000012.png", "00000016.png"}
    assert list((run[0] / "profile").rglob("*.xplane.pb"))
    assert Training.parse(tiny.config(checkpoint_every=0)).save_every == 12


def test_the_held_out_loss_is_that_of_the_average_on_the_test_split(run):
    """5 examples in batches of 16: they are repeated; the same noise at each checkpoint."""
    workdir, config, calls = run
    images, labels = sources.load(config.data.test)[np.arange(16) % 5]
    batch = {"index": np.arange(16), "image": images, "label": labels}
    training = Training.parse(config)
    task = training.task(training.data_info(training.data.source("train", 0)), {})
    params, _ = runs.load(workdir).weights("halflife")
    evaluate = jax.jit(make_evaluate(task))
    found = evaluate(params, {}, {name: rows[None] for name, rows in batch.items()})
    expected = reductions.report(jax.device_get(found))
    first, *_, last = [readings for _, _, readings in calls]
    np.testing.assert_allclose(last["eval_loss"], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(last["eval_error"], expected["error"], rtol=1e-4)
    assert first["eval_loss"] != last["eval_loss"]


def test_of_many_held_out_examples_some_of_all_are_drawn():
    """They are stored by class; a companion's are drawn apart, in pairs of all classes."""
    labels = np.repeat(np.arange(5), 100).astype(np.int32)
    source = Arrays(np.arange(500, dtype=np.float32)[:, None], labels, 5)

    def batches(count):
        found = hooks.HeldOut(None, {}, {"": source, "other_": source}, count, 8).batches
        return {name: rows.reshape(-1) for name, rows in found.items()}

    some, whole = batches(100), batches(500)
    assert len(set(some["image"])) == len(some["image"]) == 104
    assert np.bincount(some["label"]).min() > 10  # of 21
    assert (some["label"] == some["other_label"]).mean() < 0.4
    np.testing.assert_array_equal(whole["image"], np.arange(504) % 500)
    np.testing.assert_array_equal(whole["other_image"], np.arange(1, 505) % 500)


def test_averages_of_any_width_are_reconstructed_from_snapshots(run):
    """The reconstruction at a width that was kept all along is that track, to rounding."""
    trained = runs.load(run[0])
    kept, _ = jax.device_get(trained.weights("power_0.1"))
    rebuilt, step = trained.weights("0.1")
    assert step == 16
    chex.assert_trees_all_close(rebuilt, kept, rtol=1e-3, atol=1e-5)
    between = jax.device_get(trained.weights("0.075")[0])
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), between, kept)
    assert max(jax.tree.leaves(difference)) > 1e-4


def test_a_held_out_set_of_other_classes_or_shape_is_refused(tmp_path):
    for name, shape, count in (("classes", (20, 2), 5), ("shape", (20, 3), 3)):
        path = tmp_path / f"{name}.npz"
        np.savez(path, images=np.ones(shape, np.float32), labels=np.arange(20) % count)
        with pytest.raises(ValueError, match=r"The held-out set .* the training set \(2,\) in 3"):
            main.train(tiny.config(**{"data.test": f"npz:{path}"}), tmp_path / name)


def test_a_held_out_metric_that_is_not_finite_stops_the_run(tmp_path):
    bad = Hook(6, lambda moment: {"eval_mine": float("nan") if moment.step == 12 else 1.0})
    with pytest.raises(NonFiniteError, match=r"eval_mine is nan in step 12.*point is of step 6"):
        main.train(tiny.config(eval_examples=0), tmp_path, [bad])
    assert runs.load(tmp_path).weights()[1] == 6


def test_an_average_that_is_not_finite_is_not_saved(tmp_path):
    good = {"params": {"w": jnp.ones(2)}, "ema": {"mine": {"w": jnp.ones(2)}}}
    bad = good | {"ema": {"mine": {"w": jnp.array([1.0, jnp.nan])}}}
    with Checkpoints(tmp_path / "c") as checkpoints:
        save = hooks.Save(checkpoints)
        save(Moment(6, good, {}, False))
        message = "ema/mine/w is not finite after step 12.* of step 6"
        with pytest.raises(NonFiniteError, match=message):
            save(Moment(12, bad, {}, False))
        assert checkpoints.steps() == [6]


@pytest.mark.parametrize(("metrics", "step", "kept"), [
    ({"loss": 1.0}, 6, [3, 6]),
    ({}, 6, [3]),
    ({}, 7, [3, 6]),  # the weights after 6 steps had a loss in reason
])  # fmt: skip
def test_of_a_divergence_only_a_checkpoint_that_was_not_measured_is_suspected(
    tmp_path, metrics, step, kept
):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, {"x": jnp.ones(2)})
        checkpoints.save(6, {"x": jnp.ones(2)}, metrics)
        assert hooks.Save(checkpoints).good(step) == kept[-1]
        assert checkpoints.steps() == kept
