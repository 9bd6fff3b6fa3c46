import logging

import chex
import jax
import pytest
import tiny

from mclr_jax import run
from mclr_jax.training import loop, step


def make(**changes):
    config = tiny.config(**changes)
    return loop.make_experiment(config, loop.load_source(config, "train"))


def test_an_experiment_comes_back_from_its_directory(tmp_path):
    experiment = make()
    run.describe(tmp_path, experiment)
    loaded = run.load_experiment(tmp_path)
    assert loaded.data == experiment.data
    assert loaded.config.to_dict() == experiment.config.to_dict()
    chex.assert_trees_all_equal(
        jax.eval_shape(lambda: step.init_state(loaded)),
        jax.eval_shape(lambda: step.init_state(experiment)),
    )


def test_changed_values_are_named(tmp_path, caplog):
    run.describe(tmp_path, make())
    with caplog.at_level(logging.WARNING):
        run.describe(tmp_path, make(num_steps=24, **{"optimizer.learning_rate": 0.5}))
    assert "config.num_steps is now 24; this run was started with 12" in caplog.text
    assert "config.optimizer.learning_rate is now 0.5" in caplog.text
    assert len(caplog.records) == 2


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run.json"):
        run.load_experiment(tmp_path)
    run.describe(tmp_path, make())
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        run.load_weights(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    run.write_atomically(tmp_path / "a", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        run.write_atomically(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
