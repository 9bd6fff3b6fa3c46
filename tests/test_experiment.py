"""A training in its directory: each part is made once, from what the config and companions say."""

import logging

import chex
import jax
import pytest
import tiny

from mclr_jax import runs
from mclr_jax.config import Training
from mclr_jax.experiment import Experiment
from mclr_jax.samplers import Sampler


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A denoiser of the mixture, as weights without a training, and its parameters."""
    workdir = tmp_path_factory.mktemp("base")
    training = Training.parse(tiny.config("mixture", **tiny.LINEAR))
    model = training.model(training.data_info(training.data.source("train", 0)))
    params = tiny.weights(model, 7)
    runs.publish(workdir, model, params, Sampler(), step=3)
    return workdir, params


def experiment(base, workdir, **changes):
    changes = tiny.LINEAR | {"init_from": str(base), "objective.target": "reference"} | changes
    return Experiment(Training.parse(tiny.config("mixture_mclr", **changes)), workdir)


@pytest.mark.parametrize("parallel", ["pmap", "data", "fsdp"])
def test_the_first_state_has_the_weights_of_the_reference_and_arrays_of_its_own(
    base, tmp_path, parallel, caplog
):
    """A published run has no config: whether it has done all of its steps is not asked."""
    workdir, params = base
    found = experiment(workdir, tmp_path, parallel=parallel)
    with caplog.at_level(logging.INFO):
        state, origin = found.first_state()
    assert "Weights from step 3 of 3" in caplog.text
    assert origin == {"run": str(workdir), "step": 3}
    trees = [state.params, *state.ema.values()]
    for tree in trees:
        chex.assert_trees_all_equal(jax.device_get(tree), jax.device_get(params))
    jax.tree.map(lambda x: x.delete(), trees)  # as the donated state of a step is
    chex.assert_trees_all_equal(jax.device_get(found.frozen["reference"]), jax.device_get(params))
