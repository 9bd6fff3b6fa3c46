"""benchmarks/accelerator.py: rows of every section with small shapes, and how they are stored."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import accelerator
import accelerator_sections as sections
import alternation
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax import chips
from mclr_jax.config import OBJECTIVES
from mclr_jax.model import shapes_of
from mclr_jax.networks import layers
from mclr_jax.parts import NETWORKS

ROOT = pathlib.Path(__file__).parent.parent
# Sections and beginnings of the names of rows: all that is not another network or objective.
SELECTION = [("parity", "dit"), ("throughput", "MLP"), ("plan", ""), ("torch", ""),
             ("sampling", "MLP"), ("resume", ""), ("objectives", "contrastive"),
             ("layouts", "small"), ("layouts", "MLP"), ("rivals", "MLP")]  # fmt: skip
# What jax, flax, optax, ml_collections, Pillow and NumPy do not bring cannot be imported.
PROGRAM = """
import sys
missing = "sklearn", "matplotlib", "tensorboardX", "tensorflow_datasets", "tqdm", "torch", "chex"
sys.modules |= dict.fromkeys(missing)
import accelerator
for only, row in SELECTION:
    accelerator.main(["--tiny", "--out=OUT", f"--only={only}", f"--row={row}"])
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(section, name) -> row."""
    out = tmp_path_factory.mktemp("accelerator") / "out.json"
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    program = PROGRAM.replace("SELECTION", repr(SELECTION)).replace("OUT", str(out))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return {(row["section"], row["name"]): row for row in json.loads(out.read_text())["rows"]}


@pytest.mark.slow
def test_each_section_has_good_rows_that_name_their_origin(made):
    assert {section for section, _ in made} == {*accelerator.SECTIONS}
    for row in made.values():
        assert accelerator.good(row), row
        assert row["device"] == "cpu"
        assert row["jax"] == jax.__version__
        assert {"command", "revision", "seconds_of_row", "session", "python"} <= row.keys()
    skipped = {key for key, row in made.items() if "skipped" in row}
    assert {section for section, _ in skipped} == {"plan", "torch"}
    assert made["torch", "DiT, eager"]["skipped"] == "torch cannot be imported"


@pytest.mark.slow
def test_the_cpu_equals_itself_but_for_the_type(made):
    """So does a resumed training the whole one."""
    row = made["parity", "dit"]
    assert row["float32"]["output"] == row["float32"]["gradient"] == 0
    assert 1e-4 < row["bfloat16"]["output"] < 3e-2
    step = made["objectives", "contrastive_flow"]
    assert step["update"] == step["metrics"] == 0
    assert len({*made["resume", "small"]["digests"].values()}) == 1


@pytest.mark.slow
def test_recomputation_is_no_work_and_several_steps_are_counted(made):
    row = made["layouts", "MLP"]
    work = {row[name]["flops_per_step"] for name in ("data", "pmap", "recomputed")}
    assert work == {made["throughput", "MLP"]["dsm"]["flops_per_step"]}
    longer = made["layouts", "small, dispatches"]["2 steps"]
    assert longer["seconds_per_step"] == np.median(longer["seconds"])
    sampling = made["sampling", "MLP"]
    assert [sampling[name]["network_calls"] for name in ("CFG", "unguided")] == [6, 3]


# ---- parts ---------------------------------------------------------------------------------------


def test_an_error_is_relative_and_nan_passes_no_tolerance():
    wanted = {"a": np.array([3.0, 0.0]), "b": np.array([4.0])}
    assert sections.error({"a": np.array([3.0, 0.5]), "b": np.array([4.0])}, wanted) == 0.1
    assert not sections.error({"a": np.full(2, np.nan), "b": np.array([4.0])}, wanted) <= 1
    assert sections.error(np.ones(2), np.zeros(2)) == 1  # not 0 / 0


def test_the_networks_have_their_published_sizes():
    """Millions of parameters, of DiT without the channels of the variance and with 4 channels."""
    for name, millions in {"DiT-XL/2": 675, "DiT-B/2": 130}.items():
        leaves = jax.tree.leaves(shapes_of(sections.CASES[name].model()))
        assert sum(leaf.size for leaf in leaves) / 1e6 == pytest.approx(millions, rel=0.01)


def test_every_network_and_objective_is_measured():
    rows = sections.all_rows(sections.FULL)
    assert tuple(rows) == accelerator.SECTIONS
    compared = {case.network for case in sections.families(sections.FULL).values()}
    assert compared == NETWORKS.keys()
    assert rows["objectives"].keys() == OBJECTIVES.keys()
    assert {"dsm", "mclr", "classify", *sections.RIVALS} == OBJECTIVES.keys()


def test_the_attention_of_cudnn_is_asked_for_and_left_again():
    """On a machine without CUDA, JAX says that there is none."""
    q, before = jnp.ones((1, 4, 2, 8), jnp.bfloat16), layers.attention
    with pytest.raises(RuntimeError, match="cuDNN"), alternation.attention_of("cudnn"):
        layers.attention(q, q, q)
    assert layers.attention is before


def test_a_step_that_does_not_fit_or_fails(monkeypatch):
    """The batch is halved until it fits; a step that fails leaves those of others."""
    good = alternation.Candidate(sections.TINY_MLP.task("dsm"))
    limit = alternation.Step(good, 16).needed
    monkeypatch.setattr(alternation, "peak_bytes", lambda key="": limit)
    monkeypatch.setattr(alternation, "seconds_of", lambda run, count: 2.0 * count)
    chip = chips.Chip(1, 16000.0, 1.0, 1.0, "")
    monkeypatch.setattr(alternation, "chip_of_device", lambda: chip)
    several, bad = dataclasses.replace(good, length=4), dataclasses.replace(good, task=None)
    candidates = {"whole": good, "bad": bad, "several": several}
    found = alternation.timed(candidates, 32, sections.TINY)
    assert found["batch_size"] == 16
    assert found["bad"]["error"].startswith("AttributeError: 'NoneType'")
    assert found["whole"]["utilisation"] == found["whole"]["flops_per_step"] / 2.0 / 16000
    assert found["over_first"] == {"whole": 1.0, "several": 0.25}
    assert not accelerator.good(found)


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_that_failed_are_made_again_and_finished_ones_are_not(tmp_path, monkeypatch, capsys):
    functions = {"good": lambda stored: {"value": len(stored)}, "bad": lambda stored: 1 / 0}
    monkeypatch.setattr(sections, "all_rows", lambda size: {"plan": functions})
    # inside a subprocess these are of use
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    out = tmp_path / "out.json"

    def call(*arguments):
        status = accelerator.main(["--tiny", "--only=plan", f"--out={out}", *arguments])
        return status, {row["name"]: row for row in accelerator.read(out)}

    status, found = call()
    assert (status, found["good"]["value"]) == (1, 0)
    assert found["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert "1 of 2 rows have errors: plan, bad" in capsys.readouterr().out
    functions["bad"] = lambda stored: {"value": len(stored), "passed": True}
    status, found = call()
    assert (status, found["good"]["value"]) == (0, 0)
    assert found["bad"]["value"] == 2  # the good row, and the one that failed
    functions["bad"] = functions["third"] = lambda stored: {"passed": False}
    assert call("--row=bad")[1].keys() == {"good", "bad"}
    assert call()[0] == 1


DIES = """
import json, pathlib, sys, time
only, session = (next(a for a in sys.argv if a.startswith(k)).partition("=")[2]
                 for k in ("--only", "--inside"))
if only == "torch":
    sys.exit(5)
if only == "sampling":
    time.sleep(60)
out = pathlib.Path("OUT")
rows = json.loads(out.read_text())["rows"] if out.exists() else []
name = f"second of {only}" if rows else "first"
rows.append({"section": only, "name": name, "session": session})
out.write_text(json.dumps({"rows": rows}))
sys.exit(0 if len(rows) > 1 else -9)
"""


def test_a_process_that_dies_leaves_the_other_rows(tmp_path, monkeypatch, capsys):
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(DIES.replace("OUT", str(out)))
    monkeypatch.setattr(accelerator, "SCRIPT", str(script))
    assert accelerator.main([f"--out={out}", "--only=parity,plan,torch"]) == 0
    names = [row["name"] for row in accelerator.read(out)]
    assert names == ["first", "second of parity", "second of plan"]
    assert "torch ended with status 5" in capsys.readouterr().out
    assert accelerator.main([f"--out={out}", "--only=sampling", "--minutes=0.01"]) == 1
    assert "0.01 minutes are over" in capsys.readouterr().out


def test_the_silent_cpu_and_bad_arguments_are_refused(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert accelerator.inside(["parity"], out, False, "", "now") == accelerator.NO_DEVICE
    assert capsys.readouterr().err.startswith("JAX found no accelerator, only the CPU. Install")
    assert not out.exists()
    for arguments, message in {
        ("--out=x.txt",): "ends in .json",
        ("--out=x.json", "--only=party"): "no section 'party'. Did you mean 'parity'",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            accelerator.main(arguments)
        assert message in capsys.readouterr().err
