"""Benchmarks of methods on images, ICR and the mixture, at a size of seconds."""

import functools
import json

import figures
import guidance_free
import icr
import image_bench
import memorization
import mixture_mclr
import numpy as np
import pytest
import small_bench
import tables
import tasks
import two_digits
from small_bench import MADE_BY, TRAINED

from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.evaluation import features
from mclr_jax.model import DataInfo

SETTINGS = {"samples": 80, "one_base": True, "judge_steps": {"features": 2, "accuracy": 2}}
JUDGE = {"network": {"name": "mlp_classifier", "width": 16, "depth": 1}, "weight_decay": 0.1}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The folder of all runs and results."""
    monkeypatch.setattr(image_bench.Bench, "root", tmp_path)
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    return tmp_path


def test_the_config_of_the_null_contrast_is_that_of_its_row():
    bench = guidance_free.Comparison("fashion_mnist")
    changes = bench.methods()["mclr null, beta 1"][1.0].changes
    row = bench.fine_tuning(0, changes)
    places = {"init_from", "companions.classifier", "posterior.name", "seed", "sample_every"}
    assert tasks.differences(row, "fashion_mnist_mclr_null").keys() == places


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
def test_every_task_has_what_it_needs_and_every_objective_makes_a_task(data, root):
    factors = (0.5,) * 10
    for method in guidance_free.BY_CLASS:
        file = root / guidance_free.strengths_of(method)
        file.write_text(json.dumps({"class_strengths": factors}))
    bench = guidance_free.Comparison(data)
    listed = bench.tasks((0, 1))
    made = [task.output for task in listed]
    assert len(set(made)) == len(made)
    assert {need for task in listed for need in task.needs} <= set(made)
    shape = (8, 8, 1) if data == "digits" else (28, 28, 1)
    info = DataInfo(shape, 10, 0.5, (0.1,) * 10)
    for model in bench.models().values():
        task = Training.parse(bench.fine_tuning(1, model.changes)).task(info, {})
        assert bool(task.model.strength) == ("strength" in model.changes)
        known = factors if "class_strengths" in model.changes else ()
        assert task.problem.class_strengths == known


def test_another_base_has_files_of_its_own_beside_the_judges(tmp_path, monkeypatch):
    monkeypatch.setattr(image_bench, "ROOT", tmp_path)
    own, long = (image_bench.Bench("fashion_mnist", steps) for steps in (0, 40_000))
    own.write("classifier/done", {"steps": 3})
    for _ in range(2):
        long.share()
    assert long.read("classifier/done") == {"steps": 3}
    assert not (long.root / "judge_features").exists()  # to be made
    assert long.fine_tuning(0, {}).init_from == str(long.root / "base") != str(own.root / "base")


def test_the_second_judge_measures_the_distances_of_its_own_features(root, monkeypatch):
    """Its features are the pixels here: the distance of a set moved by 10 / 127.5 is known."""
    monkeypatch.setattr(image_bench, "SECOND_REFERENCE", 400)

    def apply(weights, images):
        pixels = images.astype(float) / 127.5 if images.dtype == np.uint8 else images
        return pixels.reshape(len(images), -1), np.zeros((len(images), 3))

    monkeypatch.setattr(features, "load", lambda name: features.Extractor("pixels", {}, apply))
    bench = image_bench.Bench("digits")
    images = np.random.default_rng(0).integers(0, 245, (400, 2, 2, 1), np.uint8)
    (root / "sets").mkdir()
    for name, pixels in [("real_train", images), ("moved", images + np.uint8(10))]:
        np.savez(root / "sets" / f"{name}.npz", images=pixels, labels=np.arange(400) % 4)
        bench.second(name)
    bench.write("sets/moved", {"frechet": 1.0})
    row = bench.row("moved")
    found, expected = row[image_bench.SECOND], pytest.approx(4 * (10 / 127.5) ** 2, rel=1e-3)
    assert found.keys() == MADE_BY | {"samples", "frechet", "per_class_frechet"}
    assert (row["frechet"], found["frechet"], found["per_class_frechet"]) == (1, expected, expected)


# ---- the mixture ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_mixture_distance_of_trained_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture_mclr, "config_of", small_bench.config)
    changes = {"strength": (0.0, 2.0), "objective.negative_share": 0.25}
    monkeypatch.setattr(mixture_mclr, "VARIANTS", {"strength as an input": changes})
    bench = mixture_mclr.Bench(tmp_path)
    for task in bench.tasks():
        if task.name != "classifier":
            task.run()
    distance = functools.partial(bench.distance, beta=1.0, draws=1000)
    base, name = distance("base"), "strength as an input"
    assert distance(name, interpolation=0.0) == pytest.approx(base) != 0
    assert len({base, *(distance(name, strength=s) for s in (0.0, 1.0))}) == 3


# ---- digits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """benchmarks/guidance_free.py from its first task to its last, with one row of each kind."""
    root = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(image_bench.SETTINGS, "digits", SETTINGS)
        patch.setattr(image_bench, "JUDGES", dict.fromkeys(image_bench.JUDGES, JUDGE))
        patch.setattr(image_bench, "config_of", small_bench.config)
        patch.setattr(image_bench.Bench, "root", root)
        patch.setattr(figures, "ROOT", root)
        patch.setitem(guidance_free.GAMMAS, "digits", (0.5,))
        patch.setattr(guidance_free, "INTERPOLATIONS", (0.5,))
        patch.setattr(guidance_free, "INPUTS", {"mclr": {}})
        once = {name: guidance_free.ONCE[name] for name in ("ddo", "mclr weak, beta 0.5")}
        patch.setattr(guidance_free, "ONCE", once)
        patch.setattr(guidance_free, "BY_CLASS", ())
        patch.setattr(guidance_free, "SEARCHED", ())
        bench = guidance_free.Comparison("digits", base_steps=6, batch=16)
        left = [task for task in bench.tasks((0,)) if not task.name.startswith("second")]
        while left:
            ready = [t for t in left if all((root / need).exists() for need in t.needs)]
            left.remove(ready[0])
            ready[0].run()
            assert (root / ready[0].output).exists()
        result = guidance_free.collect(bench, (0,), {})
        figures.pareto(bench, result, image_bench.SECOND)
    return root, json.loads(json.dumps(result))


@pytest.mark.slow
def test_rows_of_digits_say_how_they_were_made(digits):
    root, result = digits
    assert result["methods"].keys() == {
        "DSM control", "CFG", "CFG in an interval", "autoguidance", "mclr", "ddo",
        "mclr weak, beta 0.5",
    }  # fmt: skip
    for (row,) in result["methods"].values():
        assert row.keys() >= MADE_BY | {"frechet", "accuracy", "recall", "samples", "run"}
        assert row["run"].keys() == TRAINED
        assert row["run"]["config"] == "configs/digits_mclr.py"
        assert row["training_steps"] == row["run"]["steps"] == 3
    (control,), (guided,) = result["methods"]["DSM control"], result["methods"]["CFG"]
    assert control["run"]["changes"]["objective.name"] == "dsm"
    assert control["run"]["changes"]["init_from"] == str(root / "base")
    assert (control["network_calls"], guided["network_calls"]) == (3, 6)
    assert control["step_flops_relative_to_dsm"] == 1
    assert 1 < result["methods"]["mclr"][0]["step_flops_relative_to_dsm"] < 3
    assert {"base", "classifier", "judge_features", "weak"} <= result["other_runs"].keys()
    assert result["parameters"] == result["other_runs"]["base"]["parameters"]
    assert result["floor"].keys() >= MADE_BY
    names = {path.name for path in (root / "docs").iterdir()}
    assert names == {"equal_noise_digits_6.png"}


def test_rows_of_other_noise_and_seeds_are_kept_beside_new_ones(root):
    bench, row = guidance_free.Comparison("digits"), {"frechet": 0.5, "network_calls": 3}
    for task in bench.tasks((0,)):
        if task.output.endswith("/done.json"):
            bench.write(task.output.removesuffix(".json"), {"steps": 7, "parameters": 5})
    models = bench.methods()["cca"].values()
    for model in models:
        bench.write(f"sets/{model.samples(0)}", row, root / model.workdir(0))
    bench.write("sets/real_test", row)
    bench.write(guidance_free.FLOPS, {model.tuned: 2.5 for model in models})
    old = [
        {**row, "strength": 1.0, "seed": seed, "noise": noise}
        for seed, noise in [(0, [*guidance_free.NOISE.values()]), (0, [0.3, 1.2]), (1, [0.8, 1.5])]
    ]
    before = {"floor": {"frechet": 0.5}, "methods": {"cca": old}}
    (_, kept, seed_1), again = old, guidance_free.collect(bench, (0,), before)["methods"]["cca"]
    assert again[:2] == [kept, seed_1]  # the first was made again
    assert len(again) == 2 + len(models)
    assert (again[2]["training_steps"], again[2]["step_flops_relative_to_dsm"]) == (7, 2.5)
    assert again[2]["run"]["name"] == "equal_cca_0"
    with pytest.raises(SystemExit, match="judges"):
        guidance_free.collect(bench, (0,), {"floor": {"frechet": 0.6}, "methods": {}})


def test_a_strength_with_fewer_seeds_is_not_compared_with_the_others():
    """Seeds differ by more than strengths do."""
    row = lambda strength, fd: {"frechet": fd, "strength": strength, "noise": [0.3, 1.2]}  # noqa: E731
    rows = [row(0.5, 0.2), row(1.0, 0.3), row(1.0, 0.5), row(2.0, 0.3), row(2.0, 0.4)]
    result = {"floor": row(0, 0.1), "methods": {"cca": rows}}
    _, best = tables.rivals(result)
    assert (best["method"], best["strength"]) == ("cca", 2)
    assert tables.quality(best, "frechet") == "0.350 ± 0.071"
    _, *both = tables.rivals(result, every=True)
    assert [row["strength"] for row in both] == [1, 2]
    assert len(tables.rivals(result, equal=True)) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_two_digits_are_digits_of_their_split(split):
    data, digits = two_digits.pairs(split), sources.load("digits", split)
    label_of = {image.tobytes(): label for image, label in zip(*digits[:], strict=True)}
    images, labels = data[np.arange(500)]
    assert images.shape[1:] == (8, 16, 1)
    halves = np.split(images, 2, axis=2)
    tens, ones = ([label_of[image.tobytes()] for image in half] for half in halves)
    np.testing.assert_array_equal(labels, 10 * np.array(tens) + ones)
    assert len(np.unique(data.labels)) == 100
    assert len({image.tobytes() for image in images}) > 490


def test_curves_have_the_strengths_that_were_judged_for_all_seeds_of_the_control():
    def row(strength, seed, value, second=None):
        found = {"strength": strength, "seed": seed, "frechet": value, "network_calls": 35}
        return found | ({"judge": {"frechet": second}} if second else {})

    methods = {
        "DSM control": [row(0, 0, 4.0, 9.0), row(0, 1, 6.0)],
        "cca": [row(1, 0, 1.0, 3.0), row(1, 1, 2.0), row(0.5, 1, 0.1, 0.1)],
        "gft": [row(1, 0, 1.0), row(1, 1, 1.0)],  # not shown
    }
    found = figures.curves(methods, "frechet", "frechet", "judge")
    assert {words: points for words, (points, _) in found.items()} == {
        "no guidance": [(5.0, 5.0, 35, 0)], "CCA": [(1.5, 1.5, 35, 1)],
    }  # fmt: skip
    found = figures.curves(methods, "second.frechet", "second.frechet", "judge")
    assert {words: points[0][0] for words, (points, _) in found.items()} == {
        "no guidance": 9.0, "CCA": 3.0,
    }  # fmt: skip
    assert not figures.curves({"cca": methods["cca"]}, "frechet", "frechet", "judge")


# ---- memorization and ICR ------------------------------------------------------------------------


def test_the_curve_has_turned_when_enough_readings_lie_above_the_minimum():
    falling = [(10 * i, 0.5 - 0.02 * i) for i in range(1, 6)]
    assert icr.turned([]) is None
    assert icr.turned(falling) is None
    up = [*falling, (60, 0.43), (70, 0.44), (80, 0.45)]
    assert icr.turned(up[:-1]) is None  # two readings only
    assert icr.turned(up) == 50
    assert icr.turned([*falling, (60, 0.43), (70, 0.402), (80, 0.45)]) is None  # within 2%
    assert icr.turned([*up, (90, 0.39)]) is None  # a new minimum


def test_a_run_is_judged_by_its_first_warning_and_its_first_copies():
    """Ten readings: warned in the seventh, copies in the eighth; the ICR rises after the fourth."""
    ratios = [9, 8, 7, 6, 6.2, 6.2, 6.2, 8, 9, 9]  # all three are above 1.02 times 6 in the seventh
    rows = [
        {"step": 10 * n, "memorization_gap": n / 10, "memorization_error": 0.01,
         "memorization_sigma": 0.5, "copies": 0.01 * (n >= 8), "eval_loss": abs(n - 3.0),
         "frechet": 2.0 ** (10 - n), "icr": ratios[n - 1],
         **{f"one_call_{factor}": n / 10 / factor for factor in memorization.FACTORS}}
        for n in range(1, 11)
    ]  # fmt: skip
    rows[5]["memorization_gap"] = 0.619  # less two errors it is below the threshold
    rows[6]["memorization_gap"] = 0.66
    rows[9]["copies"] = 0.06
    found = memorization.judged(memorization.Case("images_9", 9, 100), rows)
    expected = {"warning": 70, "earlier": 80, "likely": 80, "first_copies": 80,
                "many_copies": 100, "warning_by_first_copies": 0.875, "copies_at_warning": 0.0,
                "lowest_loss": 30, "gap_at_first_copies": 0.8, "copies_at_the_end": 0.06,
                "icr_warning": 70}  # fmt: skip
    assert expected.items() <= found.items()
    assert found["one_call"] == {1.4: 40, 2.0: 50, 2.8: 70, 4.0: 100}
    assert found["frechet_kept"] == pytest.approx(2**4)  # geometric mean of three in a row
    assert found["frechet_best"] == pytest.approx(2**3)
    never = memorization.judged(memorization.CASES[5], rows[:1])
    assert (never["warning"], never["warning_by_first_copies"]) == (None, None)
    assert (never["images"], never["one_call"][4.0]) == (1437, None)


@pytest.mark.slow
def test_icr_along_the_base_of_digits(digits, tmp_path, monkeypatch):
    root, _ = digits
    monkeypatch.setattr(icr, "config_of", lambda file, changes: small_bench.config("digits"))
    for name, value in {"STEPS": {256: 6}, "SAMPLES": 20, "IMAGES": 256, "DISPATCHES": 1}.items():
        monkeypatch.setattr(icr, name, value)
    bench = icr.Bench(tmp_path, root)
    (tmp_path / "images_256").symlink_to(root / "base")
    with (root / "base" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "icr": 0.5}) + "\n")
    bench.curve(256)
    bench.sweep("base", root / "base", True)
    bench.cost()
    result = icr.collect(bench)
    icr.figure(result, tmp_path / "icr.png")
    (row,) = result["curves"]["images_256"]
    assert row["icr_in_training"] == 0.5
    assert 0 < row["icr"]
    assert {row["layer"] for row in result["sweeps"]["base"]} == {"blocks.0"}
    assert result["made_by"].keys() == {"curves/images_256", "sweeps/base", "cost"}
    assert all(made["run"]["steps"] == 6 for made in result["made_by"].values())
    assert len(result["claims"]) == 4
    outputs = {task.output for task in bench.tasks()}
    assert {"images_256/done.json", "curves/images_256.json", "cost.json"} <= outputs
