"""A training in its directory: each part is made once, from what the config and companions say."""

import collections
import logging
import pathlib

import chex
import jax
import numpy as np
import pytest
import tiny

from mclr_jax import runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.experiment import Experiment
from mclr_jax.samplers import Sampler


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A denoiser of the mixture, as weights without a training, and its parameters."""
    workdir = tmp_path_factory.mktemp("base")
    training = Training.parse(tiny.config("mixture"))
    model = training.model(training.data_info(training.data.source("train", 0)))
    params = model.init(jax.random.key(7))
    runs.publish(workdir, model, params, Sampler(), step=3)
    return workdir, params


def experiment(base, workdir, **changes):
    config = tiny.config(
        "mixture_mclr", **{"init_from": str(base), "objective.target": "reference"}
    )
    config.update_from_flattened_dict(changes)
    return Experiment(Training.parse(config), pathlib.Path(workdir))


@pytest.mark.parametrize("parallel", ["pmap", "data", "fsdp"])
def test_the_first_state_has_the_weights_of_the_reference_and_arrays_of_its_own(
    base, tmp_path, parallel
):
    workdir, params = base
    found = experiment(workdir, tmp_path, parallel=parallel)
    state, origin = found.first_state()
    assert origin == {"run": str(workdir), "step": 3}
    trees = [state.params, *state.ema.values()]
    for tree in trees:
        chex.assert_trees_all_equal(jax.device_get(tree), jax.device_get(params))
    jax.tree.map(lambda x: x.delete(), trees)  # as the donated state of a step is
    chex.assert_trees_all_equal(jax.device_get(found.frozen["reference"]), jax.device_get(params))


def test_data_and_companions_are_opened_once(base, tmp_path, monkeypatch):
    """By all parts of an experiment, whichever is asked for first, and however often."""
    calls = collections.Counter()

    def counted(name, function):
        def call(*arguments, **options):
            calls[name] += 1
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(sources, "load", counted("data", sources.load))
    monkeypatch.setattr(runs.Run, "weights", counted("weights", runs.Run.weights))
    monkeypatch.setattr(runs, "load", counted("runs", runs.load))
    found = experiment(base[0], tmp_path)
    for _ in range(2):
        assert found.description["frozen"]
        assert found.task.frozen.keys() == found.frozen.keys() == {"reference"}
        found.first_state()
    assert calls == {"data": 1, "weights": 1, "runs": 1}
    assert found.held_out.keys() == {""}
    assert calls["data"] == 2


def test_a_published_run_is_fine_tuned_like_one_trained_here(base, tmp_path, caplog):
    """It has no config: whether it has done all of its steps is not known, nor asked."""
    with caplog.at_level(logging.INFO):
        state, _ = experiment(base[0], tmp_path, **{"objective.target": "data"}).first_state()
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(base[1]))
    assert "Weights from step 3 of 3" in caplog.text


def test_samples_of_another_shape_are_no_negatives(base, tmp_path):
    np.savez(tmp_path / "a.npz", images=np.ones((4, 3), np.float32), labels=np.arange(4) % 3)
    config = tiny.config("mixture", **{"objective.name": "ddo"}, init_from=str(base[0]))
    config.data.generated = f"npz:{tmp_path / 'a.npz'}"
    found = Experiment(Training.parse(config), tmp_path / "run")
    with pytest.raises(ValueError, match=r"config\.data\.generated: examples of shape \(3,\)"):
        _ = found.extra
