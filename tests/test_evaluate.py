"""Evaluation of a run, against the same numbers computed apart."""

import dataclasses
import json
import shutil

import cases
import jax
import numpy as np
import pytest
import tiny
from commands import call
from PIL import Image

from mclr_jax import files, generate, images, runs
from mclr_jax.data import sources
from mclr_jax.data.protocol import drawn
from mclr_jax.evaluation import evaluate, features, metrics, report
from mclr_jax.generate import Guidance

NAMES = evaluate.METRICS
COUNT = 60


def test_features_are_those_of_the_classifier_whatever_the_batch(evaluated):
    folder, extractor, _ = evaluated
    digits, labels = sources.load("digits")[np.arange(700)]  # more than one batch
    found = extractor(digits, labels)
    model, params = runs.load_model(folder / "classifier")
    some = np.array([0, 511, 512, 699])
    expected, logits = model.features(params, digits[some] / np.float32(127.5) - 1)
    np.testing.assert_allclose(found.features[some], expected, rtol=1e-4, atol=1e-5)
    log_probs = jax.nn.log_softmax(logits)
    np.testing.assert_allclose(found.log_probs[some], log_probs, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.labels, labels)


def test_the_reference_is_the_moments_of_all_examples_and_is_cached_by_content(evaluated):
    folder, extractor, real = evaluated
    source = sources.load("digits")
    everything = extractor(*source[np.arange(len(source))])
    whole = metrics.moments(everything.features)
    np.testing.assert_allclose(real.moments.cov, whole.cov, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(real.kept.labels, source.labels)  # fewer than KEPT
    assert len(list((folder / "cache").iterdir())) == 1
    again = evaluate.real_statistics(extractor, source, folder / "cache")
    np.testing.assert_array_equal(again.moments.mean, real.moments.mean)
    np.testing.assert_array_equal(again.kept.features, real.kept.features)
    other = evaluate.real_statistics(extractor, sources.load("digits", "test"), folder / "cache")
    assert other.digest != real.digest
    assert len(list((folder / "cache").iterdir())) == 2


def test_a_row_is_what_the_metrics_say_of_the_samples(evaluated):
    folder, extractor, real = evaluated
    seen = []
    run = runs.load(folder / "base")
    rows = evaluate.evaluate(
        run, extractor, real, names=["frechet"], num_samples=COUNT, guidance_scales=(1.0, 2.0),
        progress=seen.append,
    )  # fmt: skip
    assert [row["guidance_scale"] for row in rows] == [1.0, 2.0]
    assert [row["network_calls"] for row in rows] == [5, 10]  # Heun with 3 steps
    assert sum(seen) == 2 * COUNT
    params, step = run.weights()
    labels = np.arange(COUNT) % 10
    samples = generate.generate(run.model, params, labels, run.sampler, guided=Guidance(2.0))
    rounded = np.clip(np.round((samples + 1) * 127.5), 0, 255).astype(np.uint8)
    fake = extractor(rounded, labels)
    expected = metrics.frechet_distance(metrics.moments(fake.features), real.moments)
    np.testing.assert_allclose(rows[1]["frechet"], expected, rtol=1e-4)
    assert rows[1]["accuracy"] == (fake.log_probs.argmax(1) == labels).mean()
    for row in rows:
        assert files.provenance().items() <= row.items()
        assert row["step"] == step
        first = dataclasses.asdict(run.sampler)  # without the keys of later versions
        assert row["sampler"] == {k: first[k] for k in [*first][:5]}


def test_autoguidance_and_copies_are_rows_of_their_own(evaluated):
    folder, extractor, real = evaluated
    training = sources.load("digits")
    run = runs.load(folder / "base")
    params, _ = run.weights()
    weak = run.model, jax.tree.map(lambda x: x + 0.05, params)
    arguments = {"names": ["frechet"], "num_samples": COUNT, "guidance_scales": [2.0]}

    def row(**more):
        run = runs.load(folder / "base")
        (row,) = evaluate.evaluate(run, extractor, real, **arguments | more)
        return row

    plain, auto, copies = row(), row(guided=Guidance(weak=weak)), row(training=training)
    assert "interpolation" not in plain
    factors = [0.0] * 10  # no class is guided
    none, unguided = row(guided=Guidance(class_strengths=factors)), row(guidance_scales=[1.0])
    assert none["class_strengths"] == factors
    assert none["network_calls"] == unguided["network_calls"] == 5
    np.testing.assert_allclose(none["frechet"], unguided["frechet"], rtol=1e-4)
    assert set(copies) - set(plain) == {"memorized", "copy_ratio", "picture", "memorized_from"}
    assert auto["network_calls"] == plain["network_calls"] == 10
    assert auto["autoguidance"] == files.digest(weak[1])
    samples = images.as_8_bits(generate.generate(
        run.model, params, np.arange(COUNT) % 10, run.sampler, guided=Guidance(2.0, weak=weak)
    ))  # fmt: skip
    fake = extractor(samples, np.arange(COUNT) % 10).features
    expected = metrics.frechet_distance(metrics.moments(fake), real.moments)
    np.testing.assert_allclose(auto["frechet"], expected, rtol=1e-4)
    assert abs(auto["frechet"] - plain["frechet"]) > 1e-3 * expected

    assert copies["memorized"] == 0
    mixed = np.concatenate([samples[:5], training[np.arange(15)][0] / np.float32(127.5) - 1])
    assert evaluate.memorized(mixed, training) == 0.75
    mirrored = mixed[:, :, ::-1]
    assert evaluate.memorized(mirrored, training) == 0
    for some in (mirrored, mixed):
        ratios, nearest = evaluate.copies(some, training, flip=True)
        assert (ratios < metrics.COPY).mean() == 0.75
        np.testing.assert_array_equal(nearest[5:, 0], np.arange(15))
    found = metrics.copy_measures(np.linspace(0, 1, 101))
    assert found == pytest.approx({"memorized": 34 / 101, "copy_ratio": 0.01})
    ratios, nearest = evaluate.copies(mixed, training)
    assert (ratios[5:] == 0).all()
    np.testing.assert_array_equal(nearest[5:, 0], np.arange(15))
    shown = evaluate.copies_picture(mixed, training, ratios, nearest)
    sample, real = shown[22 + 4 : 22 + 4 + 40], training[np.array([0])][0][0]  # the first copy
    pixels = real.repeat(5, 0).repeat(5, 1)  # at 40 pixels a side
    found = [(sample[:, x : x + 40] == pixels).all() for x in range(shown.shape[1] - 40)]
    assert sum(found) == 2  # the sample and its nearest image
    assert (folder / "base" / "evaluation" / copies["picture"]).stat().st_size > 1000
    assert evaluate.copies_picture(np.zeros((3, 2)), training, ratios[:3], nearest[:3]) is None


def test_rows_of_other_settings_are_computed_anew(evaluated, monkeypatch):
    folder, extractor, real = evaluated
    drawn, draw, weights = [], generate.generate, runs.Run.weights
    monkeypatch.setattr(generate, "generate", lambda *a, **k: drawn.append(1) or draw(*a, **k))

    def on_a_line(self, average="", interpolation=1.0):  # as of a run that has a start
        params, step = weights(self, average)
        return jax.tree.map(lambda x: interpolation * x, params), step

    monkeypatch.setattr(runs.Run, "weights", on_a_line)
    run = runs.load(folder / "base")
    slower = dataclasses.replace(run, sampler=dataclasses.replace(run.sampler, num_steps=4))
    other = dataclasses.replace(real, digest="0" * 16)
    settings = [
        {}, {"seed": 1}, {"run": slower}, {"num_samples": 26},
        {"names": ["frechet", "inception_score"]},
        {"real": other}, {"guided": Guidance(interval=(0.1, 1.0))}, {"averages": ["none"]},
        {"guidance_scales": [1.5]}, {"training": sources.load("digits")}, {"interpolations": [0.5]},
    ]  # fmt: skip

    def row(run=run, real=real, **changes):
        options = {"names": ["frechet"], "num_samples": 24} | changes
        (found,) = evaluate.evaluate(run, extractor, real, **options)
        return found

    rows = [row(**changes) for changes in settings]
    assert len(drawn) == len(settings)
    assert all(rows[i]["frechet"] != rows[0]["frechet"] for i in (1, 2, -1))
    assert (rows[0].get("interpolation"), rows[-1]["interpolation"]) == (None, 0.5)
    stored = [row(**changes) for changes in settings]
    assert stored == json.loads(json.dumps(rows))
    assert len(drawn) == len(settings)
    written = {*(folder / "base" / "evaluation").iterdir()}
    monkeypatch.setattr(evaluate, "is_first", lambda: False)  # other processes store nothing
    row(seed=2)
    assert {*(folder / "base" / "evaluation").iterdir()} == written


def test_one_device_evaluates_as_eight_do(evaluated, monkeypatch, tmp_path):
    """Batch shapes show in the last bits of samples; rounded to 8 bits they are the same."""
    (folder, _, _), training, rows = evaluated, sources.load("digits"), []
    for count in (8, 1):
        workdir, devices = tmp_path / str(count), jax.devices()[:count]
        shutil.copytree(folder / "base", workdir, ignore=shutil.ignore_patterns("evaluation"))
        generate.compiled.cache_clear()  # what it has compiled is for other devices
        with monkeypatch.context() as patch:
            patch.setattr(jax, "devices", lambda devices=devices: devices)
            patch.setattr(jax, "device_count", lambda count=count: count)
            extractor = features.load(f"classifier:{folder / 'classifier'}")
            real = evaluate.real_statistics(extractor, training)
            rows += evaluate.evaluate(
                runs.load(workdir), extractor, real, names=NAMES, num_samples=COUNT,
                guidance_scales=[2.0], training=training,
            )  # fmt: skip
    generate.compiled.cache_clear()
    eight, one = rows
    assert "8 device(s)" in eight["device"]
    assert "1 device(s)" in one["device"]
    for name in eight.keys() - {"device", "samples_per_second"}:
        if isinstance(eight[name], float):
            np.testing.assert_allclose(eight[name], one[name], rtol=1e-6, atol=1e-6)
        else:
            assert eight[name] == one[name]


def test_a_training_without_held_out_images_has_no_row_of_them(tmp_path, caplog):
    for number in range(4):
        (tmp_path / "few" / str(number % 2)).mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(np.full((8, 8), number, np.uint8))
        picture.save(tmp_path / "few" / str(number % 2) / f"{number}.png")
    name = f"folder:{tmp_path / 'few'}"
    changes = {"data.name": name, "data.held_out": 0.0, "data.resolution": 8}
    for count in (0, 64):
        cases.untrained(tmp_path / "run", tiny.config("digits", eval_examples=count, **changes))
        run = runs.load(tmp_path / "run")
        if count:
            with pytest.raises(ValueError, match="has no 'test' split"):
                evaluate.real_data(run)
        else:
            train, test = evaluate.real_data(run)
            assert (len(train), test) == (4, None)
            assert "No row of held-out images" in caplog.text
        shutil.rmtree(tmp_path / "run")


def test_measures_take_samples_and_real_data_in_their_places():
    """Of other numbers of samples than real features, which are sorted by class."""
    rng = np.random.default_rng(0)

    def drawn(count, shift):
        labels = np.sort(np.arange(count) % 3)
        logits = rng.normal(size=(count, 3))
        probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        x = rng.normal(size=(count, 4)) * (1 + shift) + labels[:, None] + shift
        return features.Features(x, np.log(probs), labels)

    kept, fake, judged = drawn(60, 0.0), drawn(30, 0.4), drawn(30, 0.4)
    whole = metrics.moments(rng.normal(size=(99, 4)))  # of more examples than those kept
    x, labels = fake.features, fake.labels
    some = kept.features[np.random.default_rng(0).permutation(60)[:30]]
    precision, recall = metrics.precision_recall(some, x)
    density, coverage = metrics.density_coverage(some, x)
    by_class = metrics.per_class_frechet(x, labels, kept.features, kept.labels)
    expected = {
        "accuracy": (judged.log_probs.argmax(1) == judged.labels).mean(),
        "frechet": metrics.frechet_distance(metrics.moments(x), whole),
        "per_class_frechet": by_class.mean(),
        "inter_class_frechet": metrics.inter_class_frechet(x, labels),
        "inception_score": metrics.inception_score(np.exp(fake.log_probs)),
        "kernel": metrics.kernel_distance(some, x),
        "precision": precision, "recall": recall, "density": density, "coverage": coverage,
    }  # fmt: skip
    assert precision != recall
    found = evaluate.measure(fake, evaluate.RealStatistics(whole, kept, "0"), NAMES, judged)
    assert found == pytest.approx(expected, rel=1e-9)
    own = evaluate.measure(fake, evaluate.RealStatistics(whole, kept, "0"), ["frechet"])
    assert own["accuracy"] == (fake.log_probs.argmax(1) == labels).mean() != found["accuracy"]
    one = fake._replace(labels=np.zeros(30, int))  # of an unconditional model
    alone = evaluate.measure(one, evaluate.RealStatistics(whole, one, "0"), NAMES)
    assert alone.keys() == expected.keys() - {"inter_class_frechet"}
    without = fake._replace(log_probs=np.zeros((30, 0)))
    assert (
        evaluate.measure(without, evaluate.RealStatistics(whole, kept, "0"), ["inception_score"])
        == {}
    )


def test_errors_say_what_to_do(evaluated):
    folder, extractor, real = evaluated
    with pytest.raises(ValueError, match=r"feature extractor .*Did you mean"):
        features.load("clasifier:x")
    with pytest.raises(ValueError, match="is a run of Linear, which is no classifier; expected"):
        features.load(f"classifier:{folder / 'base'}")
    with pytest.raises(ValueError, match=r"metric .*Did you mean"):
        evaluate.evaluate(
            runs.load(folder / "base"), extractor, real, names=("frechett",), num_samples=20,
            progress=lambda count: pytest.fail("samples were drawn"),
        )  # fmt: skip


def test_calibrate_writes_strengths_and_says_how_to_use_them(evaluated, tmp_path):
    folder, _, _ = evaluated
    strengths = tmp_path / "strengths.json"
    log = call(
        "calibrate", f"--workdir={folder / 'base'}", f"--classifier={folder / 'classifier'}",
        "--grid=2", "--samples_per_class=3", "--max_strength=0.5", f"--out={strengths}",
    )  # fmt: skip
    found = json.loads(strengths.read_text())
    factors = found["class_strengths"]
    assert len(factors) == 10
    assert f"--guidance_scale=1.5 --class_strengths={strengths}" in log
    assert f"--config.class_strengths={','.join(f'{factor:g}' for factor in factors)}\n" in log
    run, judge = runs.load(folder / "base"), runs.load_model(folder / "classifier")
    assert found["weights"] == files.digest(run.weights()[0])
    assert found["classifier_weights"] == files.digest(judge[1])
    assert (found["held_out"], found["network_calls"]) == (300, 30 * (5 + 10))
    with pytest.raises(ValueError, match=r"'classifier' in 'base': expected a classifier, data sh"):
        runs.check_companion("classifier", "base", run.model, run.model.data, "digits")


def test_the_command_writes_rows_and_the_floor(evaluated, tmp_path):
    """The floor is of held-out digits, measured as samples are."""
    folder, extractor, real = evaluated
    strengths = tmp_path / "strengths.json"
    strengths.write_text(json.dumps({"class_strengths": [0.5] * 10}))
    log = call(
        "evaluate", f"--workdir={folder / 'base'}", f"--out={tmp_path / 'x.json'}",
        f"--features=classifier:{folder / 'classifier'}", f"--num_samples={COUNT}",
        "--guidance_scales=1,2", "--metrics=frechet,precision,recall",
        f"--cache={folder / 'cache'}",
        "--memorized", f"--autoguidance={folder / 'base'}", f"--class_strengths={strengths}",
    )  # fmt: skip
    result = json.loads((tmp_path / "x.json").read_text())
    assert set(result["floor"]) == {"samples", "accuracy", "frechet", "precision", "recall",
                                    "memorized", "copy_ratio"}  # fmt: skip
    test = sources.load("digits", "test")
    held_out, labels = test[drawn(test, COUNT, by_class=True)]
    expected = evaluate.measure(
        extractor(held_out, labels), real, ["frechet", "precision", "recall"]
    )
    expected |= metrics.copy_measures(evaluate.copies(held_out, sources.load("digits"))[0])
    assert result["floor"] == pytest.approx({"samples": COUNT, **expected}, rel=1e-6)
    assert expected["memorized"] < 0.5  # of the training set all are
    for row in result["rows"]:
        assert row["floor"] == result["floor"]  # for the report
        assert {"memorized", "autoguidance", "step", "revision"} < row.keys()
        assert row["class_strengths"] == [0.5] * 10
        assert row["command"].startswith(f"python -m launch.evaluate --workdir={folder / 'base'}")
    assert [row["guidance_scale"] for row in result["rows"]] == [1.0, 2.0]
    assert "scale 2" in log
    assert "real, held out" in log
    assert log.count("Nearest training images") == 2


def test_a_classifier_takes_its_own_images_and_judges_its_own_classes(evaluated, caplog):
    _, extractor, real = evaluated
    with pytest.raises(ValueError, match=r"of shape \(8, 8, 1\); got \(8, 12, 3\). Name a"):
        extractor(np.zeros((2, 8, 12, 3)), np.arange(2))
    images, labels = sources.load("digits")[np.arange(30)]
    assert "accuracy" in evaluate.judged(images, labels, extractor, real, ["frechet"])
    of_imagenet = dataclasses.replace(
        extractor, apply=lambda weights, x: (extractor.apply(weights, x)[0], np.zeros((len(x), 12)))
    )
    assert evaluate.judged(images, labels, of_imagenet, real, ["frechet"]).keys() == {"frechet"}
    assert "knows 12 classes, the data have 10; name another --judge" in caplog.text


def test_frechet_distances_are_told_with_the_number_of_samples():
    row = {"samples": 150, "feature_length": 1280, "frechet": 9.0}
    text = evaluate.remark([row], {"samples": 4000, "frechet": 1.0})
    assert "depend on the number of samples, 150, of the floor 4,000: compare equal ones" in text
    assert "150 samples are too few for 1,280 features: their bias is large below 2,560" in text
    assert "4,000 samples" not in text
    older = {"samples": 9000, "per_class_frechet": 1.0}
    assert "9,000: compare" in evaluate.remark([older])
    assert evaluate.remark([row | {"samples": 2560}]).endswith("compare equal ones.")
    assert evaluate.remark([{"samples": 10, "feature_length": 99, "precision": 1.0}]) == ""
    column = report.Column("a", {}, {}, [row | {"average": "", "guidance_scale": 1.0}], {})
    assert "150 samples are too few for 1,280 features" in report.page([column])
