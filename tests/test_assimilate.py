"""The command launch.assimilate, with a network of two frames that was trained for a moment."""

import json
import re

import numpy as np
import pytest
import tiny
from commands import call
from PIL import Image

from configs import base
from mclr_jax import main, runs
from mclr_jax.assimilation import observe, regimes
from mclr_jax.assimilation.observe import Observations, Operator, Select
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.data.protocol import Arrays


def trajectories(split):
    """Random walks of 8 frames in two coordinates, in units of their own."""
    x = np.random.default_rng(split == "test").normal(size=(256, 8, 2)).cumsum(1) / 2
    source = Arrays(x.astype(np.float32), np.zeros(256, np.int32), 1)
    for name, value in {"offset": (1.0, 2.0), "scale": (3.0, 0.5), "time_step": 0.1}.items():
        object.__setattr__(source, name, value)
    return source


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("assimilate") / "run"
    config = tiny.config("mixture", num_steps=12, sigma_data=1.0)
    config.data.name = f"{__name__}:trajectories"
    config.network = base.options("trajectory", width=16, depth=1, heads=2, variance=True)
    main.train(config, path)
    return path


@pytest.fixture
def seen(tmp_path):
    def write(frames=slice(0, 10), name="seen.npz", std=0.3, **more):
        x, _ = trajectories("test")[np.arange(3)]
        truth = np.array([1.0, 2.0]) + np.array([3.0, 0.5]) * np.pad(x, ((0, 0), (0, 4), (0, 0)))
        told = Observations(truth[:, frames, :1], Operator(Select((0,))), std, time_step=0.1)
        observe.write(tmp_path / name, told, **({"truth": truth[:, frames]} | more))
        return tmp_path / name

    return write


SMALL = ["--ensemble=2", "--scheme=steps=3,first_steps=3"]


def arrays(path):
    with np.load(path) as file:
        return dict(file)


def test_members_mean_and_std_in_units_of_the_data(workdir, seen, tmp_path):
    out = tmp_path / "deep" / "x.npz"
    files = [f"--workdir={workdir}", f"--observations={seen()}", f"--out={out}"]
    text = call(
        "assimilate", *files, *SMALL, "--regime=fixed_lag", "--lag=2", "--forecast=2", "--figure"
    )
    for name in ("rmse", "standardised", "crps", "spread_skill"):
        assert name in text
    got = arrays(out)
    assert got["members"].shape == (3, 2, 12, 2)
    np.testing.assert_allclose(got["mean"], got["members"].mean(1))
    np.testing.assert_allclose(got["std"], got["members"].std(1))
    truth = arrays(seen())["truth"]
    rmse = np.sqrt(((got["mean"][:, :10] - truth) ** 2).mean())
    assert f"{rmse:.4g}" in text
    assert abs(got["mean"][..., 1].mean() - 2.0) < 2
    settings = json.loads(str(got["settings_json"]))
    assert (settings["regime"], settings["step"]) == ("fixed_lag", 12)
    assert settings["scheme"]["steps"] == 3
    assert Image.open(out.with_suffix(".png")).size[0] > 300


def test_a_continued_analysis_is_the_whole_one(workdir, seen, tmp_path):
    def run(file, name, *more):
        out = f"--out={tmp_path / name}"
        call("assimilate", f"--workdir={workdir}", f"--observations={file}", out, *SMALL, *more)
        return arrays(tmp_path / name)

    whole = run(seen(), "whole.npz")
    run(seen(slice(0, 6), "a.npz"), "first.npz")
    rest = run(seen(slice(6, 10), "b.npz"), "rest.npz", f"--continue={tmp_path / 'first.npz'}")
    assert rest["first"] == 6
    np.testing.assert_allclose(rest["members"], whole["members"][:, :, 6:], atol=1e-3)
    # Another seed or scheme is told, another model or operator refused.
    again = [f"--workdir={workdir}", "--ensemble=2", f"--continue={tmp_path / 'first.npz'}",
             f"--out={tmp_path / 'x.npz'}"]  # fmt: skip
    log = call("assimilate", *again, f"--observations={tmp_path / 'b.npz'}", "--seed=1",
               "--scheme=steps=2,first_steps=3")  # fmt: skip
    assert "was made with seed 0; this command has 1" in log
    assert "was made with scheme.steps 3; this command has 2" in log
    assert "first_steps" not in log
    # And so in a file of a revision that called the scheme a plan.
    older = arrays(tmp_path / "first.npz")
    older["settings_json"] = str(older["settings_json"]).replace('"scheme"', '"plan"')
    np.savez(tmp_path / "older.npz", **older)
    other = seen(slice(6, 10), "c.npz", std=0.5)
    log = call("assimilate", *again, f"--continue={tmp_path / 'older.npz'}",
               f"--observations={other}", "--scheme=steps=2,first_steps=3", expect=1)  # fmt: skip
    assert "older.npz was made with scheme.steps 3; this command has 2" in log
    assert "first_steps" not in log
    assert "was made with std 0.3" in log
    log = call("assimilate", *again, "--ema=none", f"--observations={tmp_path / 'b.npz'}", expect=1)
    assert re.search("was made with weights [0-9a-f]{16}; this command has [0-9a-f]{16}", log)


def test_a_regime_for_each_segment_of_frames(workdir, seen, tmp_path):
    files = [f"--workdir={workdir}", f"--observations={seen()}", f"--out={tmp_path / 'x.npz'}"]
    call("assimilate", *files, *SMALL, "--regime=fixed_lag", "--lag=0:inf,3:2,8:0")
    run = runs.load(workdir)
    lags = np.array([np.inf] * 3 + [2] * 5 + [0] * 2)
    small = Scheme(steps=3, first_steps=3)
    told = observe.read(tmp_path / "seen.npz")
    want = regimes.assimilate(run.model, run.weights()[0], told, small, lags, ensemble=2)
    np.testing.assert_allclose(arrays(tmp_path / "x.npz")["members"], want.members, atol=1e-3)


@pytest.mark.parametrize("kind", ["points", "classifier"])
def test_other_models_are_refused(seen, tmp_path, kind):
    config = tiny.classifier() if kind == "classifier" else tiny.config("mixture")
    main.train(config, tmp_path / "run")
    files = [f"--workdir={tmp_path / 'run'}", f"--observations={seen()}", "--out=x.npz"]
    log = call("assimilate", *files, expect=1)
    assert "for data of shape (2,); expected a run of a trajectory model" in log


@pytest.mark.parametrize(
    "truth", [np.ones((2, 10, 2)), np.ones((3, 10, 1)), np.ones((10, 2)), np.array("x"),
              np.full((3, 10, 2), np.nan), np.ones((3, 0, 2))]
)  # fmt: skip
def test_a_truth_that_does_not_fit_is_refused_before_the_work(workdir, seen, tmp_path, truth):
    files = [f"--workdir={workdir}", f"--observations={seen(truth=truth)}", "--out=x.npz"]
    assert "expected finite numbers (3, T, 2)" in call("assimilate", *files, expect=1)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(workdir, seen, tmp_path):
    files = [f"--workdir={workdir}", f"--observations={seen()}"]
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    for name, message in {
        tmp_path / "folder.npz": "no file can be written (it is a directory)",
        tmp_path / "file" / "x.npz": "no file can be written (File exists)",
        "x.txt": "expected a name that ends in .npz",
    }.items():
        log = call("assimilate", *files, f"--out={name}", "--ensemble=4096", expect=2)
        assert message in log


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--lag=3"], "--lag=3 has no meaning for --regime=filter", 2),
        (["--scheme=stepz=3"], "Did you mean 'steps'", 2),
        (["--scheme=steps=x"], "--scheme: steps is 'x'; expected int", 2),
        (["--scheme=steps=0"], "scheme.steps is 0; expected an integer of at least 1", 1),
        (["--scheme=revise=maybe"], "--scheme: revise is 'maybe'; expected bool", 2),
        (
            ["--regime=fixed_lag", "--lag=-1"],
            "--lag is '-1'; expected a number of frames or inf",
            2,
        ),
        (["--regime=fixed_lag", "--lag=nan"], "--lag is 'nan'; expected", 2),
        (["--regime=fixed_lag", "--lag=0.5"], "--lag is '0.5'; expected", 2),
        (["--regime=fixed_lag", "--lag=0:2,10:1"], "frames below 10 in rising order", 2),
        (["--regime=fixed_lag", "--lag=0:2,5:1,5:0"], "frames below 10 in rising order", 2),
        (["--regime=fixed_lag", "--lag=2:1"], "segments FRAME:LAG,... from frame 0 on", 2),
        ([f"--seed={2**32}"], "seed is 4294967296; expected an integer of at least 0", 1),
        (["--forecast=10000000000"], "forecast is 10000000000; expected an integer of at", 1),
        (
            ["--ensemble=1000000000", "--forecast=1000000"],
            "1000018 frames need 4.8e+07 GB; this",
            1,
        ),
        (["--regime=fixed_lag", "--lag=8"], "lag of 8 frames needs a window", 1),
        (["--continue=missing.npz"], "no file missing.npz", 1),
        (["--out=SEEN"], "seen.npz', the file of --observations.", 2),
        (["--continue=SEEN"], "is no file of an earlier --out ('settings_json')", 1),
    ],
)
def test_mistakes_are_explained(workdir, seen, tmp_path, arguments, message, status):
    files = [f"--workdir={workdir}", f"--observations={seen()}", f"--out={tmp_path / 'x.npz'}"]
    arguments = [argument.replace("SEEN", str(tmp_path / "seen.npz")) for argument in arguments]
    log = call("assimilate", *files, *arguments, expect=status)
    assert message in log
    assert "Traceback" not in log
    assert runs.load(workdir).model.data.time_step == 0.1
