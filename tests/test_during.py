"""Measures of samples in the middle of a training."""

import chex
import jax
import pytest
import tiny

from mclr_jax import main, runs
from mclr_jax.data import sources
from mclr_jax.evaluation import evaluate


def test_a_training_measures_its_samples_as_the_command_does(evaluated, tmp_path, monkeypatch):
    """In metrics.jsonl, by the same names; off by default, and it changes no step."""
    folder, extractor, _ = evaluated
    monkeypatch.setattr(evaluate, "CACHE", str(tmp_path / "cache"))
    options = {"every_steps": 6, "num_samples": 30, "metrics": ("frechet", "per_class_frechet"),
               "features": f"classifier:{folder / 'classifier'}"}  # fmt: skip
    given = {f"evaluate.{key}": value for key, value in options.items()}
    state = main.train(tiny.config("digits", **tiny.LINEAR, **given), tmp_path / "run")
    plain = main.train(tiny.config("digits", **tiny.LINEAR), tmp_path / "plain")
    chex.assert_trees_all_equal(jax.device_get(state.params), jax.device_get(plain.params))
    assert not [record for record in tiny.records(tmp_path / "plain") if "frechet" in record]
    records = [record for record in tiny.records(tmp_path / "run") if "frechet" in record]
    assert [record["step"] for record in records] == [6, 12]
    real = evaluate.real_statistics(extractor, sources.load("digits"))
    names = options["metrics"]
    (row,) = evaluate.evaluate(
        runs.load(tmp_path / "run"), extractor, real, names=names, num_samples=30
    )
    expected = {name: row[name] for name in names} | {"sample_accuracy": row["accuracy"]}
    assert records[1] == pytest.approx({"step": 12, **expected}, rel=1e-5)
    assert records[0]["frechet"] != records[1]["frechet"]


@pytest.mark.parametrize(("change", "message"), [
    ({"features": ""}, "set config.evaluate.features to an extractor, such as classifier:DIR"),
    ({"metrics": ("fd",)}, "metrics.0. is 'fd'. Known: coverage"),
    ({"num_samples": 19}, "num_samples is 19; expected at least 20, two of each class"),
    ({"features": "clasifier:x"}, "Did you mean 'classifier'"),
])  # fmt: skip
def test_settings_of_measures_are_checked_before_the_first_step(
    evaluated, tmp_path, change, message
):
    options = {"every_steps": 6, "features": f"classifier:{evaluated[0] / 'classifier'}"} | change
    given = {f"evaluate.{key}": value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        main.train(tiny.config("digits", **tiny.LINEAR, **given), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()
