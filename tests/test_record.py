"""`run.json`: what it says of a run, and what it refuses."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import tiny

from mclr_jax import parts, record, runs
from mclr_jax.assimilation import methods
from mclr_jax.config import Training
from mclr_jax.data import sources


def test_changed_values_are_named(tmp_path, caplog):
    tiny.describe(tmp_path)
    with caplog.at_level(logging.WARNING):
        tiny.describe(tmp_path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        tiny.describe(
            tmp_path, num_steps=24, **{"optimizer.learning_rate": 0.5, "network.width": 24}
        )
    assert "config.num_steps is now 24; it was 12, when this run was started" in caplog.text
    assert "config.optimizer.learning_rate is now 0.5" in caplog.text
    assert "model.network.width is now 24; it was 16" in caplog.text
    assert len(caplog.records) == 4  # config.network.width, too


def test_harmless_changes_are_history_and_others_are_refused_where_weights_are(tmp_path):
    _, model = tiny.describe(tmp_path)
    tiny.with_weights(tmp_path, {"params": tiny.weights(model)})
    tiny.describe(tmp_path, num_steps=24)
    before = (tmp_path / "run.json").read_text()
    first, second = json.loads(before)["history"]
    assert first["changes"] == {}
    assert second["changes"] == {"config.num_steps": [12, 24]}
    assert second.keys() >= {"time", "step", "command", "version", "revision", "device"}
    for changes, message in [
        ({"network.width": 24}, "model.network.width is now 24; it was 16"),
        ({"strength": (0.0, 2.0)}, "model.strength"),
        ({"data.limit": 100}, "data.number is now 100; it was 65536"),
        ({"sigma_data": 0.7}, "model.data.sigma_data is now 0.7"),
    ]:
        with pytest.raises(ValueError, match=f"has checkpoints of another model.*{message}"):
            tiny.describe(tmp_path, **changes)
        assert (tmp_path / "run.json").read_text() == before


def test_data_are_told_by_their_content_not_by_their_place(tmp_path, caplog):
    """A renamed copy of a data set is the same data; another set of that name is not."""
    points, labels = sources.load("mixture")[np.arange(64)]
    np.savez(tmp_path / "a.npz", images=points, labels=labels)
    np.savez(tmp_path / "b.npz", images=points, labels=labels)
    changes = {"sigma_data": 1.0, "data.name": f"npz:{tmp_path}/a.npz"}
    _, model = tiny.describe(tmp_path / "run", **changes)
    tiny.with_weights(tmp_path / "run", {"params": tiny.weights(model)})
    tiny.describe(tmp_path / "run", **changes | {"data.name": f"npz:{tmp_path}/b.npz"})
    assert "config.data.name is now" in caplog.text
    points[63] += 0.01
    np.savez(tmp_path / "a.npz", images=points, labels=labels)
    with pytest.raises(ValueError, match=r"other data: data\.digest is now"):
        tiny.describe(tmp_path / "run", **changes)


def test_numbers_of_numpy_are_described_as_those_of_python():
    config = tiny.config()
    config.noise.std = np.float64(1.5)
    with config.ignore_type():
        config.num_steps, config.network.width = np.int64(7), np.int64(16)
    found = record.describe(
        Training.parse(config), tiny.model_of(config), {}, tiny.source_of(config)
    )
    assert (found["config"]["num_steps"], found["model"]["network"]["width"]) == (7, 16)
    assert parts.model_of(found["model"]) == tiny.model_of(tiny.config())


def test_a_run_is_set_aside_whole(tmp_path):
    _, model = tiny.describe(tmp_path)
    tiny.with_weights(tmp_path, {"params": tiny.weights(model)})
    (tmp_path / "samples").mkdir()
    (tmp_path / methods.FILE).write_text("{}")  # settings that were tuned for the old weights
    record.set_aside(tmp_path)
    (moved,) = (tmp_path / "replaced").iterdir()
    assert {path.name for path in moved.iterdir()} == {"run.json", "checkpoints", methods.FILE}
    assert {path.name for path in tmp_path.iterdir()} == {"replaced", "samples"}
    assert runs.load(moved).weights("none")[1] == 1


@pytest.mark.parametrize("content", ["", "{", '{"config": ', "[3]", '{"config": {}}'])
def test_a_broken_description_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json (is no JSON|was written by an older)"):
        runs.load(tmp_path)


def test_names_of_classes_are_those_of_the_data_or_published_with_the_weights(tmp_path):
    named = {"data.name": f"{__name__}:Named"}
    tiny.describe(tmp_path, **named)
    assert runs.load(tmp_path).class_names == ("a", "b", "c")
    description = record.read(tmp_path)
    published = {"id2label": {"0": "x", "1": "y", "2": "z"}}
    assert record.class_names({**description, "origin": published}) == ("a", "b", "c")
    del description["data"]["class_names"]
    assert record.class_names(description) == ()  # of an older version
    assert record.class_names({**description, "origin": published}) == ("x", "y", "z")
    del published["id2label"]["1"]
    assert record.class_names({**description, "origin": published}) == ()
    (tmp_path / "run.json").write_text(json.dumps(description))
    tiny.describe(tmp_path, **named)  # is continued


def Named(split):
    source = sources.load("mixture", split)
    return dataclasses.replace(source, class_names=("a", "b", "c"))
