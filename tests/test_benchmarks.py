"""benchmarks/: tasks, rows of results, robustness and several processes, at a size of seconds."""

import importlib
import json
import pathlib
import subprocess
import sys
import time

import compiled
import hosts
import mixture_mclr
import numpy as np
import outcomes
import pytest
import robustness_commands
import robustness_values
import tasks
from ml_collections import ConfigDict
from small_bench import MADE_BY, TRAINED
from small_bench import config as small

from mclr_jax import plan, runs
from mclr_jax.config import Training
from mclr_jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
NEEDS_MORE = {"dapper_baselines": "dapper", "torch_models": "torch", "torch_dit": "diffusers"}


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda p: p.stem)
def test_every_script_can_be_imported(path):
    if missing := NEEDS_MORE.get(path.stem):
        pytest.importorskip(missing)
    importlib.import_module(path.stem)


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


def schedule(root, needs):
    """Run the tasks of these names and of what they need; each makes the file made_NAME."""
    (root / "script.py").write_text(SCRIPT.replace("ROOT", str(root)))
    listed = [
        tasks.Task(name, lambda: None, f"made_{name}", tuple(f"made_{n}" for n in some))
        for name, some in needs.items()
    ]
    tasks.schedule(root, listed, [sys.executable, str(root / "script.py")], 2)


def test_tasks_run_once_each_after_what_they_need(tmp_path):
    (tmp_path / "made_b").write_text("kept")
    schedule(tmp_path, {"c": ["a", "b"], "a": [], "b": []})
    assert (tmp_path / "made_c").read_text() == "made_a made_b"
    assert (tmp_path / "made_b").read_text() == "kept"


@pytest.mark.parametrize("name", ["bad", "idle"])
def test_a_task_that_fails_or_makes_nothing_stops_all(tmp_path, name):
    with pytest.raises(SystemExit, match=f"{name} failed"):
        schedule(tmp_path, {name: [], "endless": []})


def test_a_row_is_made_once_and_others_are_kept(tmp_path, capsys):
    path, calls = tmp_path / "rows.json", []
    rows = tasks.Rows(path)

    def make():
        calls.append(1)
        return {"value": len(calls)}

    first = rows.row({"name": "a", "pair": (1, 2)}, make)
    path.write_text(json.dumps(rows.content() | {"other": 3}))  # by another process
    assert rows.row({"name": "a", "pair": (1, 2)}, make) == rows.content()["rows"][0]
    rows.row({"name": "b"}, make)
    content = rows.content()
    assert [row["value"] for row in content["rows"]] == [1, 2]
    assert content["other"] == 3
    assert first.keys() == MADE_BY | {"name", "pair", "value", "device"}
    assert "'value': 2" in capsys.readouterr().out


def test_only_a_training_that_came_to_an_end_is_marked(tmp_path):
    config, bench = small("mixture"), mixture_mclr.Bench(tmp_path)
    config.network = ConfigDict({"name": "tiny:Linear"})
    config.optimizer.learning_rate = 1e6
    with pytest.raises(loop.NonFiniteError):
        bench.train("run", "mixture", config)
    assert not (tmp_path / "run" / "done.json").exists()
    bench.train("run", "mixture", config, may_diverge=True)
    done = tasks.training(tmp_path / "run")
    assert done.keys() == TRAINED | {"diverged"}
    assert done["steps"] in (1, 2)
    assert f"in step {done['steps']}: the run diverged" in done["diverged"]


def test_changes_of_a_config_are_told_apart_by_key():
    changes = {"posterior.name": "classifier", "noise.std": 4.0, "strength": (0.0, 2.0)}
    base = {"init_from": str(tasks.ROOT / "runs" / "base")}
    told = changes | {"strength": [0.0, 2.0], "init_from": "runs/base"}
    config = tasks.config_of("mixture_mclr", changes | base)
    assert tasks.differences(config, "mixture_mclr") == told


def test_parameters_are_those_of_the_configs():
    rows = json.loads((ROOT / "benchmarks" / "results" / "parameters.json").read_text())["rows"]
    files = {path.stem for path in (ROOT / "configs").glob("*.py")} - compiled.NO_NETWORK
    assert {pathlib.Path(row["config"]).stem for row in rows} == files
    for row in rows:
        if row["data"] != "tfds:cifar10":  # a U-Net takes seconds to trace
            expected = row | {"shape": tuple(row["shape"])}
            assert compiled.count(pathlib.Path(row["config"]).stem) == expected


def test_the_compiled_cases_have_the_flops_of_their_rows():
    """Their frozen models, too: half of a step of MCLR is theirs."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "compiled.json").read_text())["rows"]
    flops = {row["name"]: row["flops_per_step"] for row in stored}
    for name in ("digits", "digits, MCLR", "fashion_mnist, MCLR"):
        case = compiled.Case(name)
        task = case.training.task(case.data, case.models)
        assert plan.step_flops(task, case.training.batch_size) == flops[name]


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
    for name, call in outcome.items():
        assert outcomes.attempt(call)[0] == name
    assert outcomes.attempt(warns) == ("works", "", 3)  # a warning, but not of this project
    wrong = object.__new__(Training)  # without fields: an AttributeError of ours
    assert outcomes.attempt(lambda: wrong.task(0, {}))[0] == "FOREIGN"
    assert outcomes.attempt(lambda: time.sleep(9), 0.01)[1] == "no end within 0.01 s"


def test_two_thousand_odd_configs_are_parsed_or_refused_in_words_of_this_project():
    found = outcomes.summary(robustness_values.cases(1, 2000, use=Training.parse))
    assert found["bad"] == []
    assert found["works"] > 300
    assert found["refused"] > 1000


def test_a_config_value_that_is_accepted_wrongly_is_found():
    config = robustness_values.small("mixture", {})
    defaults = robustness_values.flat(config.to_dict())

    def judged(use, **mutations):
        own = {key.replace("__", "."): value for key, value in mutations.items()}
        copy = config.copy_and_resolve_references()
        return robustness_values.judge("", copy, own, defaults, use)

    for use in (robustness_values.trace, Training.parse):
        assert judged(use, seed=1).outcome == "works"
        assert judged(use, icr__layer=3).outcome == "refused"
    lax = lambda config: None  # noqa: E731
    assert judged(lax, icr__layer=3)[1:] == ("SILENT", "icr.layer of kind '' accepts 3")
    assert judged(lax, icr__lyaer="")[1:] == ("SILENT", "icr.lyaer is no key, and is ignored")
    strict = lambda config: int(config.log_every)  # noqa: E731
    assert judged(strict, log_every="x").outcome == "FOREIGN"


def test_odd_fine_tunings_are_traced_without_the_runs_that_they_name():
    robustness_values.trace(robustness_values.small("mixture_mclr", {}))


def test_every_command_is_tried_with_mistakes(tmp_path):
    files = (ROOT / "launch").glob("*.py")
    commands = {path.stem for path in files if "common.run(main" in path.read_text()}
    assert robustness_commands.valid(tmp_path).keys() == commands
    assert len(commands) > 12


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


# ---- several processes ---------------------------------------------------------------------------


def test_the_input_is_compared_with_the_peak_of_the_chips(monkeypatch):
    """All examples of a stream are counted; four chips of 197 TFLOP/s."""
    monkeypatch.setattr(hosts, "EXAMPLES", 48)
    monkeypatch.setattr(hosts, "SECONDS", 0.1)
    monkeypatch.setattr(hosts, "INPUT", {"small": ("digits", {"network.depth": 1}, (8, 8, 3), 5)})
    found = hosts.feed("small", in_memory=True)
    assert found["trained_per_second_at_most"] * found["flops_per_example"] == 4 * 197e12
    assert found["ratio"] == found["read_per_second"] / found["trained_per_second_at_most"]


def test_states_are_compared_relative_to_the_largest_entry():
    one = {"a": np.array([0.5, -4.0]), "n": np.array([3])}
    assert hosts.difference(one, one | {"a": np.array([0.5, -4.1])}) == pytest.approx(0.025)
    assert hosts.difference(one, one | {"a": np.array([0.6, -4.0])}) == pytest.approx(0.025)
