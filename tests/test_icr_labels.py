"""ICR and a probe at labels: those of the sweep, images under noise, sums by hand."""

import functools
import types

import icr_labels
import jax
import numpy as np
import pytest
import small_bench

from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.experiment import Experiment
from mclr_jax.representation import perturb, sweep


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A run of digits as far as readings need it, with a network of random weights."""
    training = Training.parse(small_bench.config("digits"))
    experiment = Experiment(training, tmp_path_factory.mktemp("digits"))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.3 * rng.normal(size=x.shape).astype(x.dtype),
        experiment.model.init(jax.random.key(0)),
    )
    source = functools.partial(sources.load, "digits")
    run = types.SimpleNamespace(model=experiment.model, data=training.data, source=source)
    return run, params


@pytest.mark.parametrize("told", ["null", "class"])
def test_readings_are_those_of_the_sweep(found, told):
    run, params = found
    (row,) = sweep.sweep(
        run.model, params, run.source("train"), run.source("test"), sigmas=[0.3],
        augmentation=perturb.Augmentation(), at_labels=told == "class",
    )  # fmt: skip
    here = icr_labels.reading(run, params, 0.3, told)
    for name in ("icr", "icr_within_classes"):
        assert here[name] == pytest.approx(row[name], rel=1e-5)
    assert here["probe_accuracy"] == row["probe_accuracy"]
    assert here["icr_within_classes"] > here["icr"]  # what the classes differ in is left out


def test_without_an_image_there_is_the_label_that_was_told_alone(found):
    """At sigma 1000 a probe reads the class if it is told, and ICR within classes is 1."""
    told = {name: icr_labels.reading(*found, 1000.0, name) for name in ("null", "class", "drawn")}
    assert told["class"]["probe_accuracy"] > 0.9
    assert told["null"]["probe_accuracy"] < 0.2
    assert told["drawn"]["probe_accuracy"] < 0.2
    assert told["class"]["icr"] < 0.8
    for name in ("null", "class"):
        assert told[name]["icr_within_classes"] == pytest.approx(1, abs=0.05)
    assert "icr" not in told["drawn"]


def test_differences_are_those_of_the_same_seed():
    values = {"DSM control": (0.5, 0.7), "cca": (0.4, 0.64)}
    rows = [
        {"method": method, "seed": seed, "told": "class", "sigma": 0.3, "probe_accuracy": 1.0,
         "icr": value, "icr_within_classes": 2 * value}
        for method, pair in values.items() for seed, value in enumerate(pair)
    ]  # fmt: skip
    control, cca = icr_labels.summary(rows)
    assert (control["icr"], control["icr_difference"], control["icr_difference_error"]) == (
        pytest.approx(0.6), 0, 0,
    )  # fmt: skip
    assert control["icr_error"] == pytest.approx(0.1)  # 0.1414 / sqrt(2)
    assert cca["icr_difference"] == pytest.approx(-0.08)
    assert cca["icr_difference_error"] == pytest.approx(0.02)
    assert cca["icr_within_classes_difference"] == pytest.approx(-0.16)
    assert (cca["seeds"], cca["method"]) == (2, "cca")


def test_methods_differ_in_their_objective_alone():
    bench = icr_labels.Labels("digits")
    needs = {need for task in bench.tasks((0, 1)) for need in task.needs}
    assert needs == {task.output for task in bench.tasks((0, 1)) if not task.needs}
    configs = [
        bench.fine_tuning(1, options | icr_labels.NOISE) for options in icr_labels.METHODS.values()
    ]
    objectives = {config.objective.name for config in configs}
    assert objectives == {"dsm", "mclr", "mclr_null", "model_guidance"}
    for config in configs:
        config.objective = configs[0].objective
        assert config.to_dict() == configs[0].to_dict()
