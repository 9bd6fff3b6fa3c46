"""What happens beside the update: held-out losses, pictures, snapshots, profiles, checkpoints."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax import main, reductions, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.training import ema
from mclr_jax.training.checkpoint import Checkpoints
from mclr_jax.training.loop import Hook, NonFiniteError
from mclr_jax.training.step import make_evaluate


def load(workdir, **arguments):
    """(parameters, step) of a run, on the host."""
    return jax.device_get(runs.load(workdir).weights(**arguments))


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


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


def test_pictures_and_profile_are_written_and_the_last_step_is_always_saved(tmp_path):
    profile = {"profile.start": 4, "profile.num_steps": 4}
    main.train(tiny.config(sample_every=12, checkpoint_every=0, **profile), tmp_path)
    assert (tmp_path / "samples" / "00000012.png").exists()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert load(tmp_path)[1] == 12
    assert "eval_loss" in records(tmp_path)[-1]  # and measured


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
    main.train(tiny.config(num_steps=24, eval_examples=0, **fast, **tiny.POWER), tmp_path)
    kept, _ = load(tmp_path, average="power_0.1")
    rebuilt, step = load(tmp_path, average="0.1")
    assert step == 24
    chex.assert_trees_all_close(rebuilt, kept, rtol=1e-3, atol=1e-5)
    between, _ = load(tmp_path, average="0.075")
    difference = jax.tree.map(lambda a, b: np.abs(a - b).max(), between, kept)
    assert max(jax.tree.leaves(difference)) > 1e-4
    with pytest.raises(ValueError, match=r"No EMA 'pwer'.*halflife"):
        load(tmp_path, average="pwer")


def test_a_held_out_set_of_other_classes_or_shape_is_refused(tmp_path):
    for name, shape, count in (("classes", (20, 2), 5), ("shape", (20, 3), 3)):
        path = tmp_path / f"{name}.npz"
        np.savez(path, images=np.ones(shape, np.float32), labels=np.arange(20) % count)
        with pytest.raises(ValueError, match=r"The held-out set .* the training set \(2,\) in 3"):
            main.train(tiny.config(**{"data.test": f"npz:{path}"}), tmp_path / name)


def test_a_held_out_metric_that_is_not_finite_stops_the_run(tmp_path):
    bad = Hook(6, lambda moment: {"eval_mine": float("nan") if moment.step == 12 else 1.0})
    with pytest.raises(
        NonFiniteError, match=r"eval_mine is nan in step 12.*checkpoint is of step 6"
    ):
        main.train(tiny.config(eval_examples=0), tmp_path, [bad])
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
    assert not any("eval_loss" in record for record in records(tmp_path))
