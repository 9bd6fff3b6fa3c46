"""The scripts of benchmarks/, at a size of seconds."""

import functools
import itertools
import json
import pathlib
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from mclr_jax import main, runs
from mclr_jax.data import sources
from mclr_jax.evaluation import features
from mclr_jax.experiment import make_task
from mclr_jax.model import DataInfo
from mclr_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import guidance_free  # noqa: E402
import hosts  # noqa: E402
import icr  # noqa: E402
import linear_gaussian  # noqa: E402
import lorenz63_animation  # noqa: E402
import mclr_figures  # noqa: E402
import mclr_images  # noqa: E402
import mclr_probes  # noqa: E402
import mixture_mclr  # noqa: E402
import navier_stokes  # noqa: E402
import outcomes  # noqa: E402
import parameters  # noqa: E402
import robustness_values  # noqa: E402
import tables  # noqa: E402
import tasks  # noqa: E402
import two_digits  # noqa: E402

SMALL = {
    "num_steps": 3,
    "batch_size": 32,  # 4 for each device: a quarter of the negatives needs as many
    "steps_per_dispatch": 1,
    "log_every": 1,
    "checkpoint_every": 3,
    "eval_examples": 0,
    "sample_every": 0,
    "sampler.num_steps": 2,
    "optimizer.warmup_steps": 0,
    "network.width": 16,
    "network.depth": 1,
}
SETTINGS = {
    "samples": 80,
    "one_base": True,
    "cfg": (0.5,),
    "beta": (1.0,),
    "strength": (),
    "interpolation": (0.5,),
    "judge_steps": {"features": 2, "accuracy": 2},
}
JUDGE = {"network": {"name": "mlp_classifier", "width": 16, "depth": 1}, "weight_decay": 0.1}
MADE_BY = {"command", "revision"}
TRAINED = MADE_BY | {"name", "config", "changes", "steps", "parameters"}


def small(file, changes=()):
    """`tasks.config_of` with a network of no size and a few steps."""
    config = tasks.config_of(file, dict(changes))
    config.update_from_flattened_dict(SMALL)
    if config.network.name == "dit":
        config.network.update({"heads": 2, "patch_size": 4})
    return config


# ---- tasks ---------------------------------------------------------------------------------------

SCRIPT = """
import pathlib, sys, time
name = sys.argv[-1].removeprefix("--task=")
if name == "bad":
    sys.exit(3)
if name == "endless":
    time.sleep(100)
if name != "idle":
    there = sorted(path.name for path in pathlib.Path("ROOT").glob("made_*"))
    pathlib.Path("ROOT", f"made_{name}").write_text(" ".join(there))
"""


@pytest.fixture
def schedule(tmp_path):
    """Names of tasks, with what they need -> they have been run; each makes the file made_NAME."""
    (tmp_path / "script.py").write_text(SCRIPT.replace("ROOT", str(tmp_path)))

    def run(needs, jobs=2):
        listed = [
            tasks.Task(name, lambda: None, f"made_{name}", tuple(f"made_{n}" for n in some))
            for name, some in needs.items()
        ]
        tasks.schedule(tmp_path, listed, [sys.executable, str(tmp_path / "script.py")], jobs)

    run.root = tmp_path
    return run


def test_tasks_run_once_each_after_what_they_need(schedule):
    schedule({"c": ["a", "b"], "a": [], "b": []})
    assert (schedule.root / "made_c").read_text() == "made_a made_b"
    (schedule.root / "made_b").write_text("kept")
    (schedule.root / "made_c").unlink()
    schedule({"c": ["a", "b"], "a": [], "b": []})
    assert (schedule.root / "made_b").read_text() == "kept"


@pytest.mark.parametrize("name", ["bad", "idle"])
def test_a_task_that_fails_or_makes_nothing_stops_all(schedule, name):
    with pytest.raises(SystemExit, match=f"{name} failed"):
        schedule({name: [], "endless": []})


def test_the_config_of_the_null_contrast_is_that_of_its_row():
    bench = guidance_free.Comparison("fashion_mnist")
    changes = bench.methods((0,))["mclr null, beta 1"][1.0].changes
    row = bench.fine_tuning(0, changes)
    places = {"init_from", "companions.classifier", "posterior.name", "seed", "sample_every"}
    assert tasks.differences(row, "fashion_mnist_mclr_null").keys() == places


def test_only_a_training_that_came_to_an_end_is_marked(tmp_path, monkeypatch):
    config, bench = small("mixture"), mixture_mclr.Bench(tmp_path)
    config.optimizer.learning_rate = 1e6
    with monkeypatch.context() as signalled:
        signalled.setattr(loop.Interrupt, "requested", lambda self, sync: 15)
        with pytest.raises(loop.Interrupted, match="143"):
            bench.train("run", "mixture", config)
    assert not (tmp_path / "run" / "done.json").exists()
    with pytest.raises(loop.NonFiniteError):
        bench.train("run", "mixture", config)  # goes on
    assert not (tmp_path / "run" / "done.json").exists()
    bench.train("run", "mixture", config, may_diverge=True)
    done = tasks.training(tmp_path / "run")
    assert done.keys() == TRAINED | {"diverged"}
    assert done["steps"] in (1, 2)
    assert f"in step {done['steps']}: the run diverged" in done["diverged"]


def test_changes_of_a_config_are_told_apart_by_key():
    config = tasks.config_of("mixture_mclr", {
        "posterior.name": "denoiser",
        "posterior.levels": 4,
        "strength": (0.0, 2.0),
        "init_from": str(tasks.ROOT / "runs" / "base"),
    })  # fmt: skip
    assert tasks.differences(config, "mixture_mclr") == {
        "posterior.name": "denoiser",
        "posterior.levels": 4,
        "strength": [0.0, 2.0],
        "init_from": "runs/base",
    }


def test_parameters_are_those_of_the_configs():
    rows = json.loads((ROOT / "benchmarks" / "results" / "parameters.json").read_text())["rows"]
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - {"__init__", "base"}
    assert {pathlib.Path(row["config"]).stem for row in rows} == files
    for row in rows:
        if row["data"] != "tfds:cifar10":  # a U-Net takes seconds to trace
            assert parameters.count(pathlib.Path(row["config"]).stem) == row | {
                "shape": tuple(row["shape"])
            }


@pytest.mark.parametrize("data", ["digits", "fashion_mnist"])
@pytest.mark.parametrize("kind", [mclr_images.Bench, guidance_free.Comparison])
def test_every_task_has_what_it_needs_and_every_objective_makes_a_task(
    data, kind, tmp_path, monkeypatch
):
    monkeypatch.setattr(mclr_images.Bench, "root", tmp_path)
    factors = (0.5,) * 10
    for method in guidance_free.BY_CLASS:
        file = tmp_path / guidance_free.strengths_of(method)
        file.write_text(json.dumps({"class_strengths": factors}))
    bench = kind(data)
    listed = bench.tasks((0, 1))
    made = [task.output for task in listed]
    assert len(set(made)) == len(made)
    assert {need for task in listed for need in task.needs} <= set(made)
    shape = (8, 8, 1) if data == "digits" else (28, 28, 1)
    info = DataInfo(shape, 10, 0.5, (0.1,) * 10)
    for model in bench.models((0, 1)).values():
        task = make_task(bench.fine_tuning(1, model.changes), info, {})
        changes = model.changes or {}
        assert bool(task.model.strength) == ("strength" in changes)
        assert task.problem.class_strengths == (factors if "class_strengths" in changes else ())


def test_another_base_has_the_judges_of_the_config_s_own_and_files_of_its_own(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(mclr_images, "ROOT", tmp_path)
    own, long = mclr_images.Bench("fashion_mnist"), mclr_images.Bench("fashion_mnist", 40_000)
    own.write("classifier/done", {"steps": 3})
    long.share()
    long.share()  # again
    assert long.read("classifier/done") == {"steps": 3}
    assert not (long.root / "judge_features").exists()  # to be made
    trained = []
    monkeypatch.setattr(
        mclr_images.Bench, "train", lambda self, *arguments: trained.append(arguments)
    )
    long.train_base(0)
    assert trained[0][2].num_steps == 40_000
    assert long.fine_tuning(0, None).init_from == str(long.root / "base")
    assert long.root != own.root


def test_the_second_judge_measures_the_distances_of_its_own_features(tmp_path, monkeypatch):
    """Its features are the pixels here: the distance of a set moved by 10 / 127.5 is known."""
    monkeypatch.setattr(mclr_images.Bench, "root", tmp_path)
    monkeypatch.setattr(mclr_images, "SECOND_REFERENCE", 400)

    def apply(weights, images):
        pixels = images.astype(float) / 127.5 if images.dtype == np.uint8 else images
        return pixels.reshape(len(images), -1), np.zeros((len(images), 3))

    judge = features.Extractor("pixels", {}, apply)
    monkeypatch.setattr(mclr_images.features, "load", lambda name: judge)
    bench = mclr_images.Bench("digits")
    images = np.random.default_rng(0).integers(0, 245, (400, 2, 2, 1), np.uint8)
    (tmp_path / "sets").mkdir()
    for name, pixels in [("real_train", images), ("moved", images + np.uint8(10))]:
        np.savez(tmp_path / "sets" / f"{name}.npz", images=pixels, labels=np.arange(400) % 4)
        bench.second(name)
    bench.write("sets/moved", {"frechet": 1.0})
    row = bench.row("moved")
    assert row["frechet"] == 1.0
    found = row[mclr_images.SECOND]
    assert found.keys() == MADE_BY | {"samples", "frechet", "per_class_frechet"}
    assert [found["frechet"], found["per_class_frechet"]] == pytest.approx(
        [4 * (10 / 127.5) ** 2] * 2, rel=1e-3
    )


# ---- the mixture ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_mixture_distance_of_trained_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(mixture_mclr, "config_of", small)
    changes = {"strength": (0.0, 2.0), "objective.negative_share": 0.25}
    monkeypatch.setattr(mixture_mclr, "VARIANTS", {"strength as an input": changes})
    bench = mixture_mclr.Bench(tmp_path)
    for task in bench.tasks():
        if task.name != "classifier":
            task.run()
    done = tasks.training(tmp_path / "strength_as_an_input")
    assert done.keys() == TRAINED
    assert done["steps"] == 3
    assert done["config"] == "configs/mixture_mclr.py"
    assert done["changes"]["strength"] == [0.0, 2.0]
    assert "data.name" not in done["changes"]
    params = runs.load_model(tmp_path / "strength_as_an_input")[1]
    assert done["parameters"] == sum(x.size for x in jax.tree.leaves(params))

    distance = functools.partial(bench.distance, beta=1.0, draws=1000)
    base = distance("base")
    assert base > 0
    assert distance("strength as an input", interpolation=0.0) == pytest.approx(base)
    told = {distance("strength as an input", strength=s) for s in (0.0, 1.0)}
    assert len(told | {base}) == 3


def test_mixture_rows_say_how_they_were_trained(tmp_path, monkeypatch):
    bench = mixture_mclr.Bench(tmp_path)
    for number, task in enumerate(bench.tasks()):
        value = {"steps": number, "parameters": 5}
        bench.write(
            f"{task.name}/done", value | ({"diverged": "!"} if task.name == "plain" else {})
        )
    monkeypatch.setattr(mixture_mclr.Bench, "distance", lambda *_, **__: 0.5)
    result = mixture_mclr.collect(bench)
    assert result["runs"].keys() == {"base", "classifier", *mixture_mclr.VARIANTS}
    assert [run["steps"] for run in result["runs"].values()] == list(range(17))
    assert all(run.keys() >= MADE_BY for run in result["runs"].values())
    assert result["parameters"] == 5
    assert result["distance_to_cfg"]["plain"] == "!"
    assert result["distance_to_cfg"]["a quarter of the negatives"] == 0.5
    assert result["by_strength"]["1.5"].keys() == {"base", "input", "share"}


# ---- digits --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """benchmarks/mclr_images.py from its first task to its last, with one row of each kind."""
    root = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(mclr_images.SETTINGS, "digits", SETTINGS)
        patch.setattr(mclr_images, "JUDGES", dict.fromkeys(mclr_images.JUDGES, JUDGE))
        patch.setattr(mclr_images, "VARIANTS", {})
        patch.setattr(mclr_images, "config_of", small)
        patch.setattr(mclr_images.Bench, "root", root)
        patch.setattr(mclr_figures, "ROOT", root)
        bench = mclr_images.Bench("digits", batch=16)
        for task in bench.tasks((0,)):
            if task.name != "step_cost":
                task.run()
                assert (root / task.output).exists()
        cost = mclr_probes.step_cost(bench, {"mclr": {}}, seed=0, steps=1, rounds=1)
        bench.write("step_cost", cost)
        assert 1 < mclr_probes.step_flops(bench, {"mclr": {}}, seed=0)["mclr"] < 3
        result = mclr_images.collect(bench, (0,))
        mclr_figures.picture(bench, result["summary"], 0)
        mclr_figures.figure(bench, result)
    return root, json.loads(json.dumps(result))


@pytest.mark.slow
def test_digits_rows_say_how_they_were_made(digits):
    root, result = digits
    assert result["rows"].keys() == {
        "control_0_at_0",
        "control_0_at_0.5",
        "posterior_beta1_0_at_0",
        "posterior_beta1_0_at_0_share_0.5",
    }
    for name, row in result["rows"].items():
        assert row.keys() >= MADE_BY | {"frechet", "accuracy", "recall", "samples", "run"}
        assert row["run"].keys() == TRAINED
        assert row["run"]["config"] == "configs/digits_mclr.py"
        assert row["run"]["steps"] == 3
        assert name.startswith(row["run"]["name"])
    changed = result["rows"]["control_0_at_0"]["run"]["changes"]
    assert changed["objective.name"] == "dsm"
    assert changed["init_from"] == str(root / "base")
    assert result["rows"]["control_0_at_0.5"]["network_calls"] == 6
    assert {"base", "classifier", "judge_features"} <= result["other_runs"].keys()
    assert result["parameters"] == result["other_runs"]["base"]["parameters"]
    assert result["floor"].keys() >= MADE_BY
    assert all(made.keys() == MADE_BY for made in result["probes_made_by"].values())


@pytest.mark.slow
def test_digits_table_figures_and_probes(digits):
    root, result = digits
    assert result["table"].keys() == {"base", "cfg 0.5", "mclr 1", "mclr share 0.5"}
    assert "command" not in result["table"]["base"]
    assert result["summary"]["mclr"]["network_calls"] == 3
    names = {path.name for path in (root / "docs").iterdir()}
    assert names == {"digits_mclr.png", "digits_mclr_curve.png"}
    assert set(result["step_cost_relative_to_dsm"]) == {"dsm", "mclr"}
    for split in ("train", "test"):
        assert 0 <= result["calibration"][split]["1"]["accuracy"] <= 1
    assert np.isfinite(list(result["guidance_by_noise_level"]["by_sigma"]["1"].values())).all()


def test_guidance_free_collects_what_its_tasks_have_written(tmp_path, monkeypatch):
    monkeypatch.setattr(mclr_images.Bench, "root", tmp_path)
    monkeypatch.setattr(mclr_figures, "ROOT", tmp_path)
    bench = guidance_free.Comparison("digits")
    keys = ("frechet", "per_class_frechet", "accuracy", "precision", "recall")
    measured = {key: 0.5 for key in keys}
    done = {"steps": 7, "parameters": 5}
    methods = bench.methods((0,))
    for task in bench.tasks((0,)):
        name = task.output.removesuffix(".json")
        if name.endswith("/done"):
            bench.write(name, done)
    for rows in methods.values():
        for model in rows.values():
            row = {**measured, "network_calls": 3}
            bench.write(f"sets/{model.samples(0)}", row, tmp_path / model.workdir(0))
    bench.write("sets/real_test", measured)
    costs = {model.workdir(0): 1.5 for rows in methods.values() for model in rows.values()}
    bench.write("guidance_free_cost", costs)
    bench.write("guidance_free_flops", {name: 2.5 for name in costs})
    floor = {"frechet": 0.5}
    old = [
        {**measured, "strength": 1.0, "seed": seed, "noise": noise, "network_calls": 9}
        for seed, noise in [(0, [*guidance_free.NOISE.values()]), (0, [0.3, 1.2]), (1, [0.8, 1.5])]
    ]
    result = guidance_free.collect(bench, (0,), {"floor": floor, "methods": {"cca": old}})
    (_, kept, seed_1), again = old, result["methods"]["cca"]
    assert again[:2] == [kept, seed_1]  # the first was made again
    assert len(again) == 2 + len(methods["cca"])
    with pytest.raises(SystemExit, match="judges"):
        guidance_free.collect(bench, (0,), {"floor": {"frechet": 0.6}, "methods": {}})
    mclr_figures.pareto(bench, result, mclr_images.SECOND)
    assert (tmp_path / "docs" / "equal_noise_digits.png").exists()
    assert result["parameters"] == 5
    assert "weak" in result["other_runs"]
    row = again[2]
    assert row["training_steps"] == 7
    assert row["run"]["name"] == "equal_cca_0"
    assert row["step_cost_relative_to_dsm"] == 1.5
    assert row["step_flops_relative_to_dsm"] == 2.5


def test_a_strength_with_fewer_seeds_is_not_compared_with_the_others():
    """Seeds differ by more than strengths do."""
    keys = [key for key in tables.QUALITY if key != "network_calls"]
    row = lambda strength, fd: {  # noqa: E731
        **dict.fromkeys(keys, 0.5), "frechet": fd, "strength": strength, "network_calls": 3,
        "step_cost_relative_to_dsm": None, "step_flops_relative_to_dsm": 2.0,
    }  # fmt: skip
    rows = [row(0.5, 0.2), row(1.0, 0.3), row(1.0, 0.5), row(2.0, 0.3), row(2.0, 0.4)]
    result = {"floor": row(0, 0.1)}
    _, best = tables._rival_rows(result, {"cca": rows}, keys, every=False)
    assert (best[0], best[1], best[2]) == ("`cca`", "2", "0.350 ± 0.071")
    _, *both = tables._rival_rows(result, {"cca": rows}, keys, every=True)
    assert [cells[1] for cells in both] == ["1", "2"]
    assert both[0][-2] == "2.0"


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
    found = mclr_figures.curves(methods, "frechet", "frechet", "judge")
    assert {words: points for words, (points, _) in found.items()} == {
        "no guidance": [(5.0, 5.0, 35, 0)], "CCA": [(1.5, 1.5, 35, 1)],
    }  # fmt: skip
    found = mclr_figures.curves(methods, "second.frechet", "second.frechet", "judge")
    assert {words: points[0][0] for words, (points, _) in found.items()} == {
        "no guidance": 9.0, "CCA": 3.0,
    }  # fmt: skip
    assert not mclr_figures.curves({"cca": methods["cca"]}, "frechet", "frechet", "judge")


def test_names_beside_a_panel_are_apart_and_in_the_order_of_their_points():
    panel = Figure().subplots()
    panel.set_ylim(0, 2)
    places = {"above": (0.1, 1.4), "first": (0.2, 0.4), "near": (0.3, 0.42), "equal": (0.4, 0.42)}
    mclr_figures.beside(panel, {name: (at, "black") for name, at in places.items()})
    heights = {text.get_text(): text.xyann[1] for text in panel.texts}
    assert heights == pytest.approx({"first": 0.2, "near": 0.25, "equal": 0.3, "above": 0.7})


# ---- ICR -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_icr_along_the_base_of_digits(digits, tmp_path, monkeypatch):
    root, _ = digits
    monkeypatch.setattr(icr, "config_of", lambda file: small("digits"))
    monkeypatch.setattr(icr, "STEPS", {256: 3})
    bench = icr.Bench(tmp_path, root, scale=0.01)
    (tmp_path / "images_256").symlink_to(root / "base")
    with (root / "base" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, "icr": 0.5}) + "\n")
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
    assert all(made["run"]["steps"] == 3 for made in result["made_by"].values())
    assert len(result["claims"]) == 4
    outputs = {task.output for task in bench.tasks("abc")}
    assert {"images_256/done.json", "curves/images_256.json", "cost.json"} <= outputs


# ---- robustness ----------------------------------------------------------------------------------


def test_an_outcome_tells_whose_words_an_error_has():
    def warns():
        runs.logging.warning("odd")
        return 3

    outcome = {
        "works": lambda: 3,
        "refused": lambda: runs.load("nowhere"),
        "FOREIGN": lambda: np.linspace(0, 1, 10**20),
    }
    assert {name: outcomes.attempt(call)[0] for name, call in outcome.items()} == {
        name: name for name in outcome
    }
    assert outcomes.attempt(warns) == ("works", "", 3)  # a warning, but not of this project
    assert outcomes.attempt(lambda: make_task(0, 0, 0))[0] == "FOREIGN"  # AttributeError of ours
    assert outcomes.attempt(lambda: time.sleep(9), 0.01)[1] == "no end within 0.01 s"


def test_a_config_value_that_is_accepted_wrongly_is_found(tmp_path, monkeypatch):
    config = robustness_values.small("mixture", {}, tmp_path)
    defaults = robustness_values.flat(config.to_dict())

    def judged(**mutations):
        own = {key.replace("__", "."): value for key, value in mutations.items()}
        with robustness_values.traced_only():
            return robustness_values.judge("", config.copy_and_resolve_references(), own, defaults)

    assert judged(seed=1).outcome == "works"
    assert judged(icr__layer=3).outcome == "refused"
    monkeypatch.setattr(main, "check", lambda config: None)
    assert judged(icr__layer=3)[1:] == ("SILENT", "icr.layer of kind '' accepts 3")
    assert judged(icr__lyaer="")[1:] == ("SILENT", "icr.lyaer is no key, and is ignored")
    assert judged(log_every="3").outcome == "FOREIGN"


@pytest.mark.slow
def test_robustness_counts_its_sections(tmp_path):
    """Those without processes of their own, which tests of commands and runs start, too."""
    out, sections = tmp_path / "out.json", ["values", "files"]
    command = [sys.executable, "benchmarks/robustness.py", "--quick", f"--out={out}"]
    command += ["--sections", *sections]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    result = json.loads(out.read_text())
    assert list(result) == sections, done.stderr[-2000:]
    for part in result.values():
        assert part["cases"] > 3
        assert part.keys() >= MADE_BY
        assert part["LOST"] == part["SILENT"] == 0, part["bad"]
        assert part["bad"] == []
    assert done.returncode == 0


def test_the_animation_shows_a_frame_and_those_before_it():
    rng = np.random.default_rng(0)
    seen, truths = rng.normal(size=(4, 1)), rng.normal(size=(2, 4, 3))
    members = {name: rng.normal(size=(3, 4, 3)) for name in ("filter", "batch")}

    def shown(k, changed=0):
        """Frame k, with other members and observations from frame `changed` on."""
        later = np.arange(4) >= changed
        other = {name: x + 5 * later[:, None] for name, x in members.items()}
        return lorenz63_animation.picture(k, seen + 5 * later[:, None], truths, other).tobytes()

    assert shown(1, 2) == shown(1, 4)
    assert shown(1, 1) != shown(1, 4)
    assert shown(1, 4) != shown(2, 4)


def test_interpolation_in_space_and_time_is_the_conditional_gaussian():
    """Against one dense solve for each frame, with any frames ahead and with single frames."""
    rng, count, frames = np.random.default_rng(0), 5, 4
    half, rows = rng.normal(size=(count, count)), rng.normal(size=(count, 2))
    space, course = half @ half.T, 0.6 ** np.arange(frames)
    values = rng.normal(size=(3, frames, 2))
    apart = abs(np.subtract.outer(np.arange(frames), np.arange(frames)))
    for ahead in (None, np.array([0, 1, 0, 2])):
        mean, std = navier_stokes.interpolated(values, rows, 0.3, space, course, ahead)
        for k in range(frames):
            seen = [k] if ahead is None else list(range(min(frames, k + ahead[k] + 1)))
            seen_rows = np.kron(np.eye(frames)[:, seen], rows)
            whole = np.kron(course[apart], space)
            inverse = np.linalg.inv(seen_rows.T @ whole @ seen_rows + 0.09 * np.eye(2 * len(seen)))
            gain = whole[k * count : (k + 1) * count] @ seen_rows @ inverse
            np.testing.assert_allclose(mean[:, k], values[:, seen].reshape(3, -1) @ gain.T)
            left = space - gain @ seen_rows.T @ whole[:, k * count : (k + 1) * count]
            np.testing.assert_allclose(std[0, k], np.sqrt(np.diag(left)))


def test_the_linear_process_has_the_covariance_of_its_oracle():
    """Of two successive states, x' = A x + noise with x ~ N(0, I)."""
    system, covariance = linear_gaussian.Linear(), linear_gaussian.PROCESS.covariance(2)
    step = np.asarray(system.advance(np.eye(2, dtype=np.float32))).T
    np.testing.assert_allclose(step, covariance[2:, :2], atol=1e-6)
    later = step @ step.T + system.noise**2 * np.eye(2)
    np.testing.assert_allclose(later, covariance[2:, 2:], atol=1e-6)


def test_the_input_is_compared_with_the_peak_of_the_chips(monkeypatch):
    """All examples of a stream are counted; four chips of 197 TFLOP/s."""
    monkeypatch.setattr(hosts, "EXAMPLES", 48)
    monkeypatch.setattr(hosts, "SECONDS", 0.1)
    monkeypatch.setattr(hosts, "INPUT", {"small": ("digits", {"network.depth": 1}, (8, 8, 3), 5)})
    found = hosts.feed("small", in_memory=True)
    assert found["trained_per_second_at_most"] * found["flops_per_example"] == 4 * 197e12
    assert found["ratio"] == found["read_per_second"] / found["trained_per_second_at_most"]

    clock = iter(range(1000))
    monkeypatch.setattr(hosts, "SECONDS", 10)
    monkeypatch.setattr(hosts.time, "perf_counter", lambda: next(clock))
    batches = itertools.repeat({"index": range(8)})
    assert hosts.rate(batches) == 8 * 9 / 10  # of ten readings of the clock, one ends


def test_states_are_compared_relative_to_the_largest_entry():
    one = {"a": np.array([0.5, -4.0]), "n": np.array([3])}
    assert hosts.difference(one, one | {"a": np.array([0.5, -4.1])}) == pytest.approx(0.025)
    assert hosts.difference(one, one | {"a": np.array([0.6, -4.0])}) == pytest.approx(0.025)
