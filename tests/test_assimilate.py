"""The command launch.assimilate, with a network of two frames that was trained for a moment."""

import json

import numpy as np
import pytest
import tiny
from commands import call
from PIL import Image

from configs import base
from mclr_jax import main, runs
from mclr_jax.assimilation import observe
from mclr_jax.assimilation.observe import Observations, Operator, Select
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
    def write(frames=slice(0, 10), name="seen.npz", **more):
        x, _ = trajectories("test")[np.arange(3)]
        truth = np.array([1.0, 2.0]) + np.array([3.0, 0.5]) * np.pad(x, ((0, 0), (0, 4), (0, 0)))
        told = Observations(truth[:, frames, :1], Operator(Select((0,))), 0.3, time_step=0.1)
        observe.write(tmp_path / name, told, truth=truth[:, frames], **more)
        return tmp_path / name

    return write


SMALL = ["--ensemble=2", "--plan=steps=3,first_steps=3"]


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
    assert (settings["regime"], settings["plan"]["steps"], settings["step"]) == ("fixed_lag", 3, 12)
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


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--lag=3"], "--lag=3 has no meaning for --regime=filter", 2),
        (["--plan=stepz=3"], "Did you mean 'steps'", 2),
        (["--plan=steps=x"], "--plan: steps is 'x'; expected int", 2),
        (["--plan=steps=0"], "plan.steps is 0; expected an integer of at least 1", 1),
        (["--regime=fixed_lag", "--lag=8"], "lag of 8 frames needs a window", 1),
        (["--continue=missing.npz"], "no file missing.npz", 1),
    ],
)
def test_mistakes_are_explained(workdir, seen, tmp_path, arguments, message, status):
    files = [f"--workdir={workdir}", f"--observations={seen()}", f"--out={tmp_path / 'x.npz'}"]
    log = call("assimilate", *files, *arguments, expect=status)
    assert message in log
    assert "Traceback" not in log
    assert runs.load(workdir).model.data.time_step == 0.1
