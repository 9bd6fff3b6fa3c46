"""docs/extending.md as a user follows it: its code in files outside the package, its commands."""

import json
import os
import pathlib
import shlex
import subprocess
import sys

import commands as processes
import numpy as np
import pytest
import tiny

ROOT = pathlib.Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
# Behind the page's own flags: the last value of a flag counts.
SMALLER = {
    "train": "--config.batch_size=8 --config.eval_examples=8 --config.data.count=40 "
    "--config.data.size=8 --config.checkpoint_every=4",
    "sample": "--num_samples=6 --steps=2",
    "evaluate": "--num_samples=20 --metrics=frechet,inception_score",
}
OURS = ["--config.network.width=8", "--config.network.depth=1"]
TRAININGS = ["--config.num_steps=4", *OURS], ["--config.num_steps=8", *OURS], [
    "--config.num_steps=2", "--config.network.channels=8,8"]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The folder that has my_project, after the page's trainings; and what they printed."""
    folder = tmp_path_factory.mktemp("extension")
    for code in processes.blocks(PAGE, "python"):
        path = folder / code.splitlines()[0].removeprefix("# ")
        path.parent.mkdir(exist_ok=True)
        path.write_text(code)
    lines = processes.lines(PAGE, "train")
    logs = [call(folder, line, *more) for line, more in zip(lines, TRAININGS, strict=True)]
    return folder, logs


def call(folder, command, *arguments, expect=0):
    """Output of a command of the page, made smaller."""
    program, module, *words = command
    if program == "mclr":
        arguments = [*words, *shlex.split(SMALLER[module]), *arguments]
        return processes.call(module, *arguments, expect=expect, path=[folder], folder=folder)
    result = subprocess.run(
        [sys.executable, module, *words], cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
    )  # fmt: skip
    assert result.returncode == expect, result.stderr
    return result.stdout + result.stderr


def test_the_page_trains_and_resumes(project):
    folder, logs = project
    assert len(logs) == 3
    assert "40 examples of shape (8, 8, 1) in 2 classes" in logs[0]
    assert "Resumed from the checkpoint of step 4" in logs[1]
    records = tiny.records(folder / "run")
    assert records[-1]["step"] == 8
    last = {name: value for record in records for name, value in record.items()}
    assert np.isfinite([last[name] for name in ("loss", "eval_loss", "error")]).all()
    assert last["error_max"] > last["error"]
    model = json.loads((folder / "run" / "run.json").read_text())["model"]
    values = {"out_channels": 1, "num_classes": 2, "width": 8, "depth": 1}
    assert model["network"] == {"name": "my_project.network:ConvNet"} | values


def test_the_page_samples_and_evaluates_without_the_objective(project):
    folder, _ = project
    (folder / "my_project" / "objective.py").unlink()
    (sample,) = processes.lines(PAGE, "sample")
    call(folder, sample)
    with np.load(folder / "shapes.npz") as file:
        assert file["images"].shape == (6, 8, 8, 1)
        assert np.isfinite(file["images"]).all()
    assert (folder / "shapes.png").exists()
    (evaluate,) = processes.lines(PAGE, "evaluate")
    call(folder, evaluate, f"--cache={folder / 'cache'}")
    found = json.loads((folder / "shapes.json").read_text())
    assert {"frechet", "inception_score", "accuracy"} <= found["rows"][0].keys()
    printed = call(folder, ["python", "my_project/sampling.py", "run"])
    assert printed.splitlines()[0] == "8 (4, 8, 8, 1)"
