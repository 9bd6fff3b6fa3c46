"""Warnings of answers at labels that no training has shown, by configs of runs that never begin."""

import dataclasses

import numpy as np
import pytest
import tiny

from mclr_jax import labels, runs
from mclr_jax.config import Training
from mclr_jax.generate import Guidance

OTHER = "benchmarks.nowhere:Objective"


def of(dropout, **more):
    objective = {"name": "dsm"} | ({} if dropout is None else {"label_dropout": dropout})
    return {"objective": objective, **more}


@pytest.mark.parametrize(
    ("config", "label", "words"),
    [
        (of(0.0), "null", "was trained with objective.label_dropout=0.0, and so was not shown the"),
        (of(0.0, init_from="runs/a"), "null", "was trained, from runs/a, with"),
        (of(1.0), "class", "not shown the classes"),
        ({"objective": {"name": OTHER}}, "null", f"{OTHER!r}, which has no label_dropout"),
        (of(0.1), "", ""),
        ({}, "", ""),  # published weights
    ],
)
def test_a_config_tells_what_its_training_has_not_shown(config, label, words):
    for asked in ("null", "class"):
        found = labels.untrained(config, [asked])
        assert bool(found) == (asked == label)
        assert not found or words in found


@pytest.mark.parametrize(
    ("dropout", "asked", "guided", "warned"),
    [
        (0.0, [0, 1], Guidance(2.0), True),
        (0.0, [0, 1], Guidance(2.0, class_strengths=[0.0] * 3), False),
        (0.0, [0, 3], Guidance(1.0), True),
        (0.0, [0, 1], Guidance(1.0), False),
        (0.1, [3], Guidance(2.0), False),
        (1.0, [0], Guidance(1.0), True),
        (1.0, [3], Guidance(1.0), False),
    ],
)
def test_samples_that_ask_for_an_untrained_label_are_warned_of(
    dropout, asked, guided, warned, tmp_path, caplog
):
    tiny.describe(tmp_path / "run", **{"objective.label_dropout": dropout})
    run = runs.load(tmp_path / "run")
    assert run.model.null_label == 3
    labels.warn_untrained(run, np.array(asked), guided)
    assert (f"{tmp_path / 'run'} was trained with objective.label_dropout" in caplog.text) == warned
    caplog.clear()
    weak = run.model, None
    labels.warn_untrained(run, [1] if dropout < 1 else [3], Guidance(2.0, weak=weak))
    assert not caplog.text


def test_a_classifier_is_asked_for_no_label(tmp_path, caplog):
    tiny.describe(tmp_path / "run", given=tiny.classifier())
    labels.warn_untrained(runs.load(tmp_path / "run"), [0, 3])
    assert not caplog.text


@pytest.mark.parametrize(
    ("changes", "base", "warned"),
    [
        ({"objective.name": "mclr_null"}, 0.0, "base, which this objective reads, was trained"),
        ({"objective.name": "mclr_null"}, 0.1, ""),
        ({"objective.name": "mclr_null"}, 1.0, "not shown the classes"),
        ({"objective.name": "ddo", "data.generated": "mixture"}, 0.0, ""),
        ({"objective.name": "cca"}, 0.0, "base, which this objective reads, was trained"),
        ({"objective.name": "cca", "objective.label_dropout": 0.0}, 0.0, ""),
        ({"objective.name": "gft", "objective.label_dropout": 0.0}, 0.1, ""),
        ({"objective.name": "gft", "objective.label_dropout": 0.0}, 0.0, "base, which this"),
        ({"objective.name": "gft", "objective.label_dropout": 0.0, "init_from": ""}, 0.1,
         "The model in training is trained with objective.label_dropout=0.0"),
        ({"objective.name": "model_guidance", "init_from": ""}, 0.1, ""),
    ],
)  # fmt: skip
def test_an_objective_that_reads_untrained_answers_is_warned_of(
    changes, base, warned, tmp_path, caplog
):
    start = str(tmp_path / "base")
    tiny.describe(tmp_path / "base", **{"objective.label_dropout": base})
    caplog.clear()
    labels.warn_of_companions(Training.parse(tiny.config(**{"init_from": start} | changes)))
    assert warned in caplog.text
    assert bool(caplog.text) == bool(warned)


# ---- labels by their names -----------------------------------------------------------------------


def named(tmp_path, names):
    tiny.describe(tmp_path)
    return dataclasses.replace(runs.load(tmp_path), class_names=names)


@pytest.mark.parametrize(("names", "texts", "found"), [
    (("cat", "dog", "ox"), None, [0, 1, 2]),
    (("cat", "dog", "ox"), ["dog", "null", "0", "cat"], [1, 3, 0, 0]),
    (("tench, Tinca", "shark, great", "ox"), ["shark", "tench, Tinca", "ox"], [1, 0, 2]),
    (("10", "0", "1"), ["0", "10", "1"], [1, 0, 2]),  # names before numbers
    ((), ["2", "null"], [2, 3]),
])  # fmt: skip
def test_labels_are_chosen_by_names_and_numbers(tmp_path, names, texts, found):
    assert labels.chosen(texts, named(tmp_path, names)) == found


@pytest.mark.parametrize(("names", "text", "message"), [
    (("cat", "dog", "ox"), "dgo", "--labels has 'dgo', .* Did you mean 'dog'\\? Known: cat, dog,"),
    (("cat", "dog", "ox"), "3", "--labels has 3, which is no class; for samples of none write"),
    (tuple(f"cat {i}" for i in range(999)), "x", "^.{,300}Known: null. Classes.{,50}$"),
    ((), "cat", "no class of .* Known: null. Classes have numbers, too, from 0"),
    ((), "-1", "--labels has '-1', which is no class"),
])  # fmt: skip
def test_labels_that_no_class_has_are_refused(tmp_path, names, text, message):
    with pytest.raises(ValueError, match=message):
        labels.chosen(["0", text], named(tmp_path, names))
