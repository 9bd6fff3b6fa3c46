"""The methods of a run, their settings, and the choice of settings on held-out trajectories."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest

from mclr_jax.assimilation import methods
from mclr_jax.assimilation.ensemble import Limits, Settings
from mclr_jax.assimilation.observe import Observations, Operator, Own, Select
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.data.sources import Data
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.emulator import Emulator
from mclr_jax.networks.trajectory import Trajectory
from mclr_jax.runs import Run
from mclr_jax.samplers import Sampler


def a_run(folder, network=Emulator(), frames=2):  # noqa: B008
    """Of trajectories k + 100 n in coordinate 0 and -k in 1, at frame k of 16 of record n."""
    k, n = np.arange(16), np.arange(20)[:, None]
    np.save(folder / "x.npy", np.stack([k + 100 * n, 0 * n - k], -1).astype(np.float32))
    data = Data(name=f"npy:{folder / 'x.npy'}", options={"frames": frames, "time_step": 0.5})
    units = data.source("train", 0)
    info = DataInfo(units.shape, 1, 1.0, (), units.offset, units.scale, 0.5)
    return Run(folder, Model(network, None, info), Sampler(), data=data)


def test_held_out_trajectories_are_observed_as_those_of_the_file(tmp_path):
    values = np.ones((2, 6, 1))
    values[0, 3], values[1, 4] = np.nan, np.nan
    seen = Observations(values, Operator(Select((1,))), 0.01, initial=np.zeros(2))
    truth, found = methods.held_out(a_run(tmp_path), seen, 3)
    step = np.diff(truth, axis=1)
    np.testing.assert_allclose(step[..., 0], 1, atol=1e-2)
    np.testing.assert_allclose(step[..., 1], -1, atol=1e-2)
    kept = np.isfinite(found.values[..., 0])
    np.testing.assert_array_equal(kept, np.isfinite(values[[0, 1, 0], :, 0]))
    noise = (found.values[..., 0] - truth[..., 1])[kept] / 0.01
    assert 0.5 < noise.std() < 1.5
    np.testing.assert_array_equal(found.initial, np.float32(truth[:, 0]))
    training = a_run(tmp_path).source("train")
    shown = training.offset + training.scale * training[np.arange(len(training))][0][:, 0]
    number_of = lambda states: {*np.floor((states[:, 0] + 0.5) / 100)}  # noqa: E731
    assert not number_of(truth[:, 0]) & number_of(shown)
    every, _ = methods.held_out(a_run(tmp_path), seen, 1000)  # all there are, each once
    assert len(truth) < len(every) == len(np.unique(every[:, 0, 0])) < 1000
    longer = dataclasses.replace(seen, values=np.ones((1, 17, 1)))
    with pytest.raises(ValueError, match="give no trajectories of 17 frames"):
        methods.held_out(a_run(tmp_path), longer, 3)


def test_the_settings_of_the_lowest_crps_are_found_one_key_after_the_other():
    """Diverged settings lose, and none is tried twice. The CRPS of equal members is their error."""
    calls = []

    def solve(seen, settings, lags, **options):
        calls.append((settings.radius, settings.inflation))
        if settings.radius == 9:
            raise FloatingPointError("diverged")
        error = abs(settings.radius - 4) + 10 * abs(settings.inflation - 1.05)
        return types.SimpleNamespace(members=np.full((1, 2, 1, 1), error))

    grid = {"radius": (2.0, 4.0, 9.0), "inflation": (1.0, 1.05)}
    truth = np.zeros((1, 1, 1))
    best, rows = methods.tuned(solve, Settings(inflation=1.0), grid, truth, None, 0)
    assert (best.radius, best.inflation) == (4.0, 1.05)
    assert calls == [(2, 1.0), (4, 1.0), (9, 1.0), (4, 1.05)]
    assert [(row["radius"], row["inflation"]) for row in rows] == calls
    assert rows[2]["crps"] == np.inf
    assert rows[0]["rmse"] == pytest.approx(2.5)


def test_settings_are_those_of_the_run_and_of_the_command(tmp_path):
    """`tune` stores what it has found, beside what it has found for another method."""
    run = a_run(tmp_path)

    def solve(seen, settings, lags, ensemble):
        error = abs(settings.c - 0.5) if isinstance(settings, Scheme) else 1 / settings.inflation
        members = np.full((len(seen.values), ensemble, 4, 2), error) + truth
        return types.SimpleNamespace(members=members)

    seen = Observations(np.ones((1, 4, 2)), Operator(), 1.0)
    truth = methods.held_out(run, seen, 3)[0][:, None]
    assert methods.settings(run, "enkf") == Settings()
    given = seen, np.zeros(4), 3, {"regime": "filter"}
    best, told = methods.tune(run, "enkf", solve, Settings(), *given, ensemble=2)
    assert best == Settings(inflation=1.1)
    assert told.endswith("assimilation.json: --scheme=inflation=1.1,relaxation=0.0")
    methods.tune(run, "trajectory", solve, Scheme(), *given, ensemble=2)
    assert methods.settings(run, "enkf", ["clip=5"]) == Settings(inflation=1.1, clip=5)
    assert methods.settings(run, "enkf", ["inflation=1"]).inflation == 1
    assert methods.settings(run, "trajectory").c == 0.5
    assert methods.settings(run, "particle") == Limits()
    with pytest.raises(ValueError, match=r"scheme has no key 'radius'.* Known: clip\."):
        methods.settings(run, "particle", ["radius=4"])
    with pytest.raises(ValueError, match="--ensemble is 1; expected an integer of at least 2"):
        methods.tune(run, "enkf", solve, Settings(), *given, ensemble=1)
    stored = json.loads((tmp_path / "assimilation.json").read_text())
    assert len(stored["enkf"]["rows"]) == 7
    assert stored["enkf"]["trajectories"] == 3
    assert {"revision", "command", "regime"} <= stored["enkf"].keys()
    (tmp_path / "assimilation.json").write_text("{")
    with pytest.raises(ValueError, match="is no file of mclr assimilate --tune"):
        methods.settings(run, "enkf")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz=3", "scheme has no key 'stepz'. Did you mean 'steps'"),
        ("steps=x", "scheme.steps is 'x'; expected an integer of at least 1"),
    ],
)
def test_words_without_a_meaning_are_refused(tmp_path, text, message):
    run = a_run(tmp_path)
    assert methods.settings(run, "trajectory", ["steps=3", "c=0.5"]) == Scheme(steps=3, c=0.5)
    with pytest.raises(ValueError, match=message):
        methods.settings(run, "trajectory", [text])


def test_a_method_needs_its_model(tmp_path):
    emulator = a_run(tmp_path)
    trajectory = a_run(tmp_path, Trajectory(variance=True), 8)
    assert methods.method_of(emulator) == "enkf"
    assert methods.method_of(trajectory) == "trajectory"
    with pytest.raises(ValueError, match=r"trajectories\.py\. An emulator's methods are enkf and"):
        methods.method_of(emulator, "trajectory")
    with pytest.raises(ValueError, match=r"network Trajectory; method 'enkf' needs the run of an"):
        methods.method_of(trajectory, "enkf")
    with pytest.raises(ValueError, match="an emulator without noise, whose particles become one"):
        methods.method_of(emulator, "particle")


def test_a_filter_knows_states_of_the_training_data_and_errors_of_the_emulator(tmp_path):
    """An emulator of no change errs by what comes next; one with a variance has its own noise."""
    for variance in (False, True):
        emulator = a_run(tmp_path, Emulator(out_channels=2, variance=variance))
        params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes_of(emulator.model))
        step, climate = methods.solver(emulator, params, "enkf").args
        assert climate.shape[1:] == (2,)
        np.testing.assert_allclose(climate[:, 1], -(climate[:, 0] % 100), atol=1e-2)
        if variance:
            assert step.errors is None
        else:
            assert len(step.errors) > 100
            np.testing.assert_allclose(step.errors[:, 0], 1, atol=1e-2)
            np.testing.assert_allclose(step.errors[:, 1], -1, atol=1e-2)


def test_only_settings_with_a_meaning_are_tuned():
    seen = Observations(np.ones((2, 1)), Operator(), 1.0)
    assert "radius" in methods.grid_of("enkf", seen, (40,))
    assert "radius" not in methods.grid_of("enkf", seen, (3,))
    own = dataclasses.replace(seen, operator=Operator(Own(np.sum)))
    assert "radius" not in methods.grid_of("enkf", own, (40,))
    with pytest.raises(ValueError, match="Unknown method with settings that are tuned 'particle'"):
        methods.grid_of("particle", seen, (3,))
