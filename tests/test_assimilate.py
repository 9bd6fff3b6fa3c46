"""The command launch.assimilate, with an untrained network of two frames."""

import json
import re

import cases
import numpy as np
import pytest
import tiny
from commands import call
from PIL import Image

from mclr_jax import runs
from mclr_jax.assimilation import observe, regimes
from mclr_jax.assimilation.observe import Observations, Operator, Select
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.configs import base


def trajectories(count, seed):
    """Random walks of 8 frames in two coordinates, about (1, 2)."""
    x = np.random.default_rng(seed).normal(size=(count, 8, 2)).cumsum(1) / 2
    return np.array([1.0, 2.0]) + np.array([3.0, 0.5]) * x


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("assimilate")
    np.save(folder / "walks.npy", trajectories(256, 0))
    config, path = tiny.config("mixture", num_steps=12, sigma_data=1.0), folder / "run"
    config.data.update({"name": f"npy:{folder / 'walks.npy'}", "frames": 8, "time_step": 0.1})
    config.network = base.options("trajectory", width=16, depth=1, heads=2, variance=True)
    cases.untrained(path, config)
    return path


@pytest.fixture
def seen(tmp_path):
    def write(frames=slice(0, 10), name="seen.npz", std=0.3, **more):
        truth = np.pad(trajectories(3, 1), ((0, 0), (0, 4), (0, 0)), "edge")
        told = Observations(truth[:, frames, :1], Operator(Select((0,))), std, time_step=0.1)
        observe.write(tmp_path / name, told, **({"truth": truth[:, frames]} | more))
        return tmp_path / name

    return write


@pytest.fixture(scope="module")
def emulator(workdir):
    """An untrained emulator with noise, of the same data."""
    config, path = tiny.config("mixture", num_steps=12, sigma_data=1.0), workdir.parent / "emulator"
    walks = f"npy:{workdir.parent / 'walks.npy'}"
    config.data.update({"name": walks, "frames": 2, "time_step": 0.1})
    config.network = base.options("mclr_jax.networks.emulator:Emulator", variance=True)
    config.objective = base.options("mclr_jax.objectives.emulate:Emulate")
    cases.untrained(path, config)
    return path


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
    # Another seed or scheme is told, another model or operator refused; older files have a plan.
    first = arrays(tmp_path / "first.npz")
    settings = json.loads(str(first["settings_json"]))
    with pytest.raises(ValueError, match=r"was made with std 0\.3.*; this command has 0\.5"):
        regimes.earlier(tmp_path / "first.npz", settings | {"std": 0.5})
    first["settings_json"] = str(first["settings_json"]).replace('"scheme"', '"plan"')
    np.savez(tmp_path / "older.npz", **first)
    log = call("assimilate", f"--workdir={workdir}", "--ensemble=2", f"--out={tmp_path / 'x.npz'}",
               f"--observations={tmp_path / 'b.npz'}", f"--continue={tmp_path / 'older.npz'}",
               "--scheme=steps=2,first_steps=3", "--seed=1", "--ema=none", expect=1)  # fmt: skip
    assert "older.npz was made with scheme.steps 3; this command has 2" in log
    assert "first_steps" not in log
    assert "was made with seed 0; this command has 1" in log
    assert re.search("was made with weights [0-9a-f]{16}; this command has [0-9a-f]{16}", log)


def test_a_regime_for_each_segment_of_frames(workdir, seen, tmp_path):
    files = [f"--workdir={workdir}", f"--observations={seen()}", f"--out={tmp_path / 'x.npz'}"]
    call("assimilate", *files, *SMALL, "--regime=fixed_lag", "--lag=0:inf,3:2,8:0")
    run = runs.load(workdir)
    lags = np.array([np.inf] * 3 + [2] * 5 + [0] * 2)
    small = Scheme(steps=3, first_steps=3)
    told = observe.parse(observe.load(path := tmp_path / "seen.npz"), path)
    want = regimes.assimilate(run.model, run.weights()[0], told, small, lags, ensemble=2)
    np.testing.assert_allclose(arrays(tmp_path / "x.npz")["members"], want.members, atol=1e-3)


def test_an_emulator_in_classical_filters(emulator, seen, tmp_path):
    """Settings are chosen once and then used, the particle filter's are the defaults."""
    seen(slice(0, 8))

    def run(name, *more, expect=0):
        files = f"--workdir={emulator}", f"--observations={tmp_path / 'seen.npz'}"
        return call("assimilate", *files, f"--out={tmp_path / name}", *more, expect=expect)

    text = run("a.npz", "--ensemble=5", "--tune=2")
    assert "--scheme=inflation=" in text
    run("b.npz", "--ensemble=5", "--figure")
    a, b = arrays(tmp_path / "a.npz"), arrays(tmp_path / "b.npz")
    np.testing.assert_array_equal(a["members"], b["members"])
    settings, chosen = (json.loads(str(x["settings_json"]))["scheme"] for x in (a, b))
    assert settings == chosen
    assert a["members"].shape == (3, 5, 8, 2)
    assert (tmp_path / "b.png").exists()
    run("c.npz", "--method=particle", "--ensemble=32", "--regime=fixed_lag", "--lag=2")
    assert arrays(tmp_path / "c.npz")["members"].shape == (3, 32, 8, 2)
    again = ["--ensemble=5", f"--continue={tmp_path / 'c.npz'}", "--method=enkf"]
    assert "was made with method particle; this command has enkf" in run("d.npz", *again, expect=1)


@pytest.mark.parametrize("given", [tiny.config("mixture"), tiny.classifier()])
def test_other_models_are_refused(seen, tmp_path, given):
    tiny.describe(tmp_path / "run", given=given)
    files = [f"--workdir={tmp_path / 'run'}", f"--observations={seen()}", "--out=x.npz"]
    log = call("assimilate", *files, expect=1)
    assert "for data of shape (2,); expected a run of a trajectory model" in log


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        (["--lag=3"], "--lag=3 has no meaning for --regime=filter", 2),
        (["--scheme=stepz=3"], "scheme has no key 'stepz'. Did you mean 'steps'", 2),
        (["--regime=fixed_lag", "--lag=8"], "lag of 8 frames needs a window", 1),
        (["--continue=missing.npz"], "no file missing.npz", 1),
        (["--out=SEEN"], "seen.npz', the file of --observations.", 2),
        (["--continue=SEEN"], "is no file of an earlier --out ('settings_json')", 1),
        (["--out=FOLDER", "--ensemble=4096"], "no file can be written (it is a directory)", 2),
    ],
)
def test_mistakes_are_explained(workdir, seen, tmp_path, arguments, message, status):
    (tmp_path / "folder.npz").mkdir()
    names = {"SEEN": str(tmp_path / "seen.npz"), "FOLDER": str(tmp_path / "folder.npz")}
    for name, path in names.items():
        arguments = [argument.replace(name, path) for argument in arguments]
    files = [f"--workdir={workdir}", f"--observations={seen()}", f"--out={tmp_path / 'x.npz'}"]
    log = call("assimilate", *files, *arguments, expect=status)
    assert message in log
    assert "Traceback" not in log


def test_a_truth_that_does_not_fit_is_refused_before_the_work(workdir, seen):
    files = [f"--workdir={workdir}", "--out=x.npz"]
    path = seen(truth=np.ones((2, 10, 2)))
    log = call("assimilate", *files, f"--observations={path}", "--ensemble=4096", expect=1)
    assert "expected finite numbers (3, T, 2)" in log
    for truth in (np.ones((3, 10, 1)), np.ones((10, 2)), np.array("x"), np.full((3, 10, 2), np.nan),
                  np.ones((3, 0, 2))):  # fmt: skip
        with pytest.raises(ValueError, match="expected finite numbers"):
            observe.truth_of({"truth": truth}, 3, (2,), "seen.npz")
