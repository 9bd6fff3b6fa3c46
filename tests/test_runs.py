import dataclasses
import json
import logging
import multiprocessing
import os
import pathlib
import socket

import chex
import jax
import numpy as np
import pytest
import tiny

from configs import base
from mclr_jax import parts, record, runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.objectives.dsm import DSM
from mclr_jax.samplers import Sampler
from mclr_jax.training import lock
from mclr_jax.training.checkpoint import Checkpoints, MismatchError


def source_of(config):
    return sources.from_config(config.data, "train", config.seed)


def model_of(config):
    return Training.parse(config).model(Training.parse(config).data_info(source_of(config)))


def describe(workdir, companions=(), **changes):
    config = tiny.config(**changes)
    model = model_of(config)
    description = record.describe(config, model, dict(companions), source_of(config))
    record.write(workdir, description, record.changes(workdir, description), 0)
    return config, model


# ---- descriptions --------------------------------------------------------------------------------


def test_a_run_comes_back_from_its_directory(tmp_path):
    judge = model_of(tiny.classifier())
    config, model = describe(tmp_path, {"classifier": judge}, **{"sampler.method": "euler"})
    loaded = runs.load(str(tmp_path))
    assert loaded.model == model
    assert hash(loaded.model) == hash(model)  # what is compiled for one serves the other
    assert loaded.companions == {"classifier": judge}
    assert loaded.companions["classifier"].is_classifier
    assert json.dumps(loaded.config.to_dict()) == json.dumps(config.to_dict())
    assert loaded.sampler == Sampler("euler", 3, sigma_min=0.01, sigma_max=20.0)
    json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)  # no Infinity


def test_changed_values_are_named(tmp_path, caplog):
    describe(tmp_path)
    with caplog.at_level(logging.WARNING):
        describe(tmp_path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        describe(tmp_path, num_steps=24, **{"optimizer.learning_rate": 0.5, "network.width": 24})
    assert "config.num_steps is now 24; it was 12, when this run was started" in caplog.text
    assert "config.optimizer.learning_rate is now 0.5" in caplog.text
    assert "model.network.width is now 24; it was 16" in caplog.text
    assert len(caplog.records) == 4  # config.network.width, too


def test_harmless_changes_are_history_and_others_are_refused_where_weights_are(tmp_path):
    _, model = describe(tmp_path)
    with_weights(tmp_path, {"params": model.init(jax.random.key(0))})
    describe(tmp_path, num_steps=24)
    before = (tmp_path / "run.json").read_text()
    first, second = json.loads(before)["history"]
    assert first["changes"] == {}
    assert second["changes"] == {"config.num_steps": [12, 24]}
    assert second.keys() >= {"time", "step", "command", "version", "revision", "device"}
    for changes, message in [
        ({"network.width": 24}, "model.network.width is now 24; it was 16"),
        ({"strength": (0.0, 2.0)}, "model.strength"),
        ({"data.limit": 100}, "data.number is now 100; it was 65536"),
        ({"sigma_data": 0.7}, "model.data.sigma_data is now 0.7"),
    ]:
        with pytest.raises(ValueError, match=f"has checkpoints of another model.*{message}"):
            describe(tmp_path, **changes)
        assert (tmp_path / "run.json").read_text() == before


def test_data_are_told_by_their_content_not_by_their_place(tmp_path, caplog):
    """A renamed copy of a data set is the same data; another set of that name is not."""
    points, labels = sources.load("mixture")[np.arange(64)]
    np.savez(tmp_path / "a.npz", images=points, labels=labels)
    np.savez(tmp_path / "b.npz", images=points, labels=labels)
    changes = {"sigma_data": 1.0, "data.name": f"npz:{tmp_path}/a.npz"}
    _, model = describe(tmp_path / "run", **changes)
    with_weights(tmp_path / "run", {"params": model.init(jax.random.key(0))})
    describe(tmp_path / "run", **changes | {"data.name": f"npz:{tmp_path}/b.npz"})
    assert "config.data.name is now" in caplog.text
    points[63] += 0.01
    np.savez(tmp_path / "a.npz", images=points, labels=labels)
    with pytest.raises(ValueError, match=r"other data: data\.digest is now"):
        describe(tmp_path / "run", **changes)


def test_a_run_and_its_data_are_found_where_they_were_moved(tmp_path, monkeypatch):
    """Runs and data named relative to one directory, read from another, moved, and moved apart."""
    monkeypatch.chdir(tmp_path)
    points, labels = sources.load("mixture")[np.arange(64)]
    (tmp_path / "old").mkdir()
    np.savez("old/data.npz", images=points, labels=labels)
    describe(pathlib.Path("old/base"))
    names = {
        "data.name": "npz:old/data.npz",
        "init_from": "old/base",
        "data.generated": "zip:g.zip",
    }
    describe(pathlib.Path("old/tuned"), **names)
    with_weights(
        pathlib.Path("old/tuned"), {"params": model_of(tiny.config()).init(jax.random.key(0))}
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = runs.load("../old/tuned")
    assert run.config.data.name == f"npz:{tmp_path}/old/data.npz"
    assert run.config.init_from == f"{tmp_path}/old/base"
    assert run.config.data.generated == f"zip:{tmp_path}/g.zip"  # nowhere
    np.testing.assert_array_equal(run.source("train")[np.arange(64)][0], points)

    (tmp_path / "old").rename(tmp_path / "new")
    run = runs.load(tmp_path / "new" / "tuned")
    np.testing.assert_array_equal(run.source("train")[np.arange(64)][0], points)
    assert runs.load(run.config.init_from).model == run.model

    (tmp_path / "new" / "tuned").rename(tmp_path / "elsewhere" / "tuned")
    run = runs.load("tuned")
    with pytest.raises(
        FileNotFoundError, match=r"trained on npz:/.*/old/data\.npz; give .* --data"
    ):
        run.source("train")
    with pytest.raises(FileNotFoundError, match=r"started from /.*/old/base; give .* --init_from"):
        run.weights("none", interpolation=0.0)
    moved = runs.load("tuned", init_from=str(tmp_path / "new/base"), data="npz:../new/data.npz")
    np.testing.assert_array_equal(moved.source("train")[np.arange(64)][0], points)
    with pytest.raises(FileNotFoundError, match="new/base has no checkpoint yet"):
        moved.weights("none", interpolation=0.0)
    assert runs.load("tuned", data="mixture").source("test").shape == (2,)
    assert runs.load("tuned", data="folder").config.data.path == "folder"


@pytest.mark.parametrize("content", ["", "{", '{"config": ', "[3]"])
def test_a_broken_description_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json (is no JSON|was written by an older)"):
        runs.load(tmp_path)


@pytest.mark.parametrize(("keys", "value"), [
    (["config"], None), (["config"], ()), (["config"], 3), (["companions"], None),
    (["companions"], [1]),
    (["model"], {}), (["model"], 3), (["model", "network"], "x"), (["model", "strength"], True),
    (["model", "data", "sigma_data"], {}), (["model", "data", "num_classes"], {"a": 1}),
    (["config", "data"], 3), (["paths"], 3),
])  # fmt: skip
def test_a_description_with_values_of_other_types_is_named(tmp_path, keys, value):
    describe(tmp_path, init_from="x")
    content = json.loads((tmp_path / "run.json").read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    if value == ():
        part[keys[-1]] = None
    elif value is None:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"run\.json(:| is damaged)|older version"):
        runs.load(tmp_path)


# ---- one trainer ---------------------------------------------------------------------------------


def hold(workdir, held, done):
    with lock.locked(pathlib.Path(workdir)):
        held.set()
        done.wait(60)


def test_a_second_trainer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    context = multiprocessing.get_context("forkserver")
    held, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(tmp_path), held, done))
    process.start()
    assert held.wait(60)
    where = f"Process {process.pid} on {socket.gethostname()} has trained in .* since"
    with pytest.raises(RuntimeError, match=where), lock.locked(tmp_path):
        pass
    process.kill()
    process.join()
    assert (tmp_path / "lock").exists()
    with lock.locked(tmp_path), pytest.raises(RuntimeError, match=f"Process {os.getpid()} "):
        with lock.locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_lock_of_another_host_is_respected(tmp_path):
    holder = {"host": "elsewhere", "pid": 1, "since": "today", "born": "7"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with pytest.raises(RuntimeError, match=r"on elsewhere .*delete .*lock"), lock.locked(tmp_path):
        pass
    assert json.loads((tmp_path / "lock").read_text()) == holder


def test_a_lock_of_another_host_is_taken_over_without_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "BEAT", 0.02)
    monkeypatch.setattr(runs, "SILENCE", 0.3)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    with lock.locked(tmp_path):
        held = (tmp_path / "lock").read_text()
        monkeypatch.setattr(socket, "gethostname", lambda: "here")
        with pytest.raises(RuntimeError, match="on elsewhere"), lock.locked(tmp_path):
            pass
    (tmp_path / "lock").write_text(held)  # as if that host had lost its power
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["host"] == "here"
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["", "{", "[3]", "{}"])
def test_a_lock_that_nobody_can_read_is_respected(tmp_path, content):
    (tmp_path / "lock").write_text(content)
    with pytest.raises(RuntimeError, match=r"unknown .*delete .*lock"), lock.locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == content


def test_a_lock_needs_no_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError("Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    with lock.locked(tmp_path), pytest.raises(RuntimeError, match=f"Process {os.getpid()} "):
        with lock.locked(tmp_path):
            pass
    assert not any(tmp_path.iterdir())


def test_a_number_that_another_process_has_got_is_no_holder(tmp_path):
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": "then", "born": "7"}
    (tmp_path / "lock").write_text(json.dumps(holder))
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["born"] != "7"


def test_a_run_is_set_aside_whole(tmp_path):
    _, model = describe(tmp_path)
    with_weights(tmp_path, {"params": model.init(jax.random.key(0))})
    (tmp_path / "samples").mkdir()
    record.set_aside(tmp_path)
    (moved,) = (tmp_path / "replaced").iterdir()
    assert {path.name for path in moved.iterdir()} == {"run.json", "checkpoints"}
    assert {path.name for path in tmp_path.iterdir()} == {"replaced", "samples"}
    assert runs.load(moved).weights("none")[1] == 1


def test_what_is_missing_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run.json"):
        runs.load(tmp_path)
    describe(tmp_path)
    run = runs.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"):
        run.weights()
    with_weights(tmp_path, {"params": run.model.init(jax.random.key(0))})
    with pytest.raises(ValueError, match=r"not started from another run.*interpolation is 1"):
        run.weights("none", interpolation=0.5)
    (tmp_path / "run.json").write_text('{"config": {}, "data": {}}')
    with pytest.raises(ValueError, match="written by an older version; train that run again"):
        runs.load(tmp_path)


# ---- weights -------------------------------------------------------------------------------------


def with_weights(workdir, state, step=1):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(step, state)


def test_weights_of_any_average_and_step(tmp_path):
    _, model = describe(tmp_path, **tiny.POWER)
    trees = [model.init(jax.random.key(seed)) for seed in range(4)]
    for step, (params, average) in {1: trees[:2], 2: trees[2:]}.items():
        others = {"power_0.05": params, "power_0.1": params}
        with_weights(tmp_path, {"params": params, "ema": {"halflife": average} | others}, step)
    run = runs.load(tmp_path)
    for arguments, expected, step in [
        ({}, trees[3], 2),
        ({"average": "halflife"}, trees[3], 2),
        ({"average": "none"}, trees[2], 2),
        ({"average": "none", "step": 1}, trees[0], 1),
        ({"average": "power_0.1", "step": 1}, trees[0], 1),
    ]:
        params, found = run.weights(**arguments)
        assert found == step
        chex.assert_trees_all_equal(params, expected)
    model_too, params = runs.load_model(tmp_path)
    assert model_too == model
    chex.assert_trees_all_equal(params, trees[3])
    with pytest.raises(ValueError, match=r"No EMA 'halfife' in .*The run has \['halflife'"):
        run.weights("halfife")
    with pytest.raises(RuntimeError, match=r"No checkpoint of step 3 .*\[1, 2\]"):
        run.weights(step=3)


def test_a_run_without_averages_gives_its_parameters(tmp_path):
    _, model = describe(tmp_path, **{"ema.halflife_steps": 0.0})
    params = model.init(jax.random.key(0))
    with_weights(tmp_path, {"params": params, "ema": {}})
    chex.assert_trees_all_equal(runs.load(tmp_path).weights()[0], params)


def test_weights_lie_on_the_line_from_where_the_run_started(tmp_path):
    _, model = describe(tmp_path / "start", **{"ema.halflife_steps": 0.0})
    start, tuned = (model.init(jax.random.key(seed)) for seed in range(2))
    with_weights(tmp_path / "start", {"params": start, "ema": {}})
    describe(tmp_path / "run", init_from=str(tmp_path / "start"))
    with_weights(tmp_path / "run", {"params": start, "ema": {"halflife": tuned}})
    run = runs.load(tmp_path / "run")
    for t in (0.0, 0.3, 1.0, 1.5):
        params, _ = run.weights(interpolation=t)
        expected = jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, start, tuned)
        chex.assert_trees_all_close(params, expected, atol=1e-6)
        chex.assert_trees_all_equal(runs.load_model(tmp_path / "run", t)[1], params)


# ---- weights of another model --------------------------------------------------------------------


def test_optional_inputs_are_added_as_zeros_and_left_out(caplog):
    """Both ways the network stays the same; the sampled model had no augmentation, strength 0."""
    plain = model_of(tiny.config())
    taught = model_of(tiny.config(strength=(0.0, 2.0), **{"data.augment": 0.1}))
    weights = plain.init(jax.random.key(0))
    more = runs.fitted(weights, taught, "here")
    assert set(more) - set(weights) == {"map_strength", "map_augment"}
    assert not any(map(np.any, jax.tree.leaves((more["map_strength"], more["map_augment"]))))
    chex.assert_trees_all_equal(runs.fitted(more, plain, "here"), weights)
    x, sigma = np.ones((2, 2), np.float32), np.float32([0.5, 2.0])
    np.testing.assert_array_equal(
        taught.denoise(more)(x, sigma, None), plain.denoise(weights)(x, sigma, None)
    )


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            {},
            {"network.width": 24},
            r"Parameter block0/affine/bias: expected shape \(48,\), but there has shape \(32,\)",
        ),
        ({"network.depth": 1}, {"network.depth": 2}, "block1.*but there has no such parameter"),
        ({"network.depth": 2}, {"network.depth": 1}, "block1.*the network of this run has no such"),
    ],
)
def test_other_differences_are_refused(before, after, message):
    weights = model_of(tiny.config(**before)).init(jax.random.key(0))
    with pytest.raises(MismatchError, match=message):
        runs.fitted(weights, model_of(tiny.config(**after)), "there")


# ---- companions ----------------------------------------------------------------------------------


@pytest.fixture
def others(tmp_path):
    """Directories of a denoiser and of a classifier for the mixture, without weights."""
    describe(tmp_path / "denoiser")
    config = tiny.classifier()
    description = record.describe(config, model_of(config), {}, source_of(config))
    record.write(tmp_path / "classifier", description, {}, 0)
    return tmp_path


def mclr(**changes):
    config = tiny.config("mixture")
    config.objective = base.options("mclr", reference_penalty=0.5)
    config.posterior = base.options("classifier")
    config.update_from_flattened_dict(changes)
    return config


def test_companions_are_the_runs_that_the_objective_and_its_posterior_read(others):
    paths = {"reference": str(others / "denoiser"), "classifier": str(others / "classifier")}
    config = mclr(**{"init_from": paths["reference"], "companions.classifier": paths["classifier"]})
    data = model_of(config).data
    assert runs.companion_paths(config) == paths
    found = runs.companions(config, data, others / "new")
    assert found == {name: runs.load(path).model for name, path in paths.items()}
    assert runs.companion_paths(tiny.config(init_from=paths["reference"])) == {}


def test_a_companion_that_nothing_reads_is_told(others, caplog):
    config = tiny.config(**{"companions.weak": str(others / "denoiser")})
    assert runs.companions(config, model_of(config).data, others / "new") == {}
    assert "config.companions.weak is not used: this objective reads no companion." in caplog.text


def test_numbers_of_numpy_are_described_as_those_of_python():
    config = tiny.config()
    config.noise.std = np.float64(1.5)
    with config.ignore_type():
        config.num_steps, config.network.width = np.int64(7), np.int64(16)
    source = sources.load("mixture")
    found = record.describe(config, model_of(config), {}, source)
    assert (found["config"]["num_steps"], found["model"]["network"]["width"]) == (7, 16)
    assert parts.model_of(found["model"]) == model_of(tiny.config())


def test_what_is_wrong_with_companions_is_said(others):
    data = model_of(tiny.config()).data
    denoiser, classifier = str(others / "denoiser"), str(others / "classifier")

    def companions(data=data, **changes):
        return runs.companions(mclr(**changes), data, others / "new")

    with pytest.raises(ValueError, match=r"needs a classifier: set config\.companions\.classifier"):
        companions(init_from=denoiser)
    with pytest.raises(ValueError, match=r"needs a frozen reference: set config\.init_from"):
        companions(**{"companions.classifier": classifier})
    with pytest.raises(ValueError, match=r"'classifier' in .*expected a classifier.*it is a den"):
        companions(**{"init_from": denoiser, "companions.classifier": denoiser})
    with pytest.raises(ValueError, match=r"'reference' in .*expected a denoiser.*is a classifier"):
        companions(**{"init_from": classifier, "companions.classifier": classifier})
    images = model_of(tiny.config("digits")).data
    with pytest.raises(
        ValueError, match=r"\(\(8, 8, 1\), 10\), those of .*; it is a classifier of \(\(2,\), 3"
    ):
        companions(images, **{"init_from": denoiser, "companions.classifier": classifier})
    with pytest.raises(FileNotFoundError, match="not the directory of a run"):
        companions(**{"init_from": denoiser, "companions.classifier": str(others)})


@dataclasses.dataclass(frozen=True)
class Taught(DSM):
    """An objective that reads a run of a name of its own."""

    needs = frozenset({"teacher", "average"})


def test_an_objective_of_ones_own_names_its_companions(others, tmp_path):
    config = tiny.config()
    config.objective = base.options(f"{__name__}:Taught")
    data = model_of(config).data
    with pytest.raises(
        ValueError, match=r"companion run 'teacher': set config\.companions\.teacher"
    ):
        runs.companions(config, data, tmp_path / "new")
    config.companions.teacher = str(others / "denoiser")
    found = runs.companions(config, data, tmp_path / "new")
    assert found == {"teacher": runs.load(others / "denoiser").model}


def test_a_run_that_holds_its_companions_needs_their_directories_no_more(others, tmp_path):
    config = mclr(**{"init_from": "gone", "companions.classifier": "gone too"})
    model, judge = model_of(tiny.config()), model_of(tiny.classifier())
    held = {"reference": model, "classifier": judge}
    record.write(tmp_path / "run", record.describe(config, model, held, source_of(config)), {}, 0)
    (tmp_path / "run" / "checkpoints" / "3").mkdir(parents=True)
    found = runs.companions(config, model.data, tmp_path / "run")
    assert found == {"reference": model, "classifier": judge}
