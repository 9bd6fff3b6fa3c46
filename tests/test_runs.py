import dataclasses
import functools
import json
import pathlib

import chex
import jax
import numpy as np
import pytest
import tiny

from mclr_jax import parts, record, runs
from mclr_jax.config import Training
from mclr_jax.configs import base
from mclr_jax.data import sources
from mclr_jax.networks.emulator import Emulator
from mclr_jax.samplers import Sampler
from mclr_jax.training import ema
from mclr_jax.training.checkpoint import Checkpoints, MismatchError

# ---- descriptions --------------------------------------------------------------------------------


def test_a_run_comes_back_from_its_directory(tmp_path):
    judge = tiny.model_of(tiny.classifier())
    config, model = tiny.describe(tmp_path, {"classifier": judge}, **{"sampler.method": "euler"})
    loaded = runs.load(str(tmp_path))
    assert loaded.model == model
    assert hash(loaded.model) == hash(model)  # what is compiled for one serves the other
    assert parts.model_of(record.read(tmp_path)["companions"]["classifier"]) == judge
    assert loaded.averages == ("halflife",)
    assert Training.parse(loaded.config) == Training.parse(config)
    assert json.dumps(loaded.config) == json.dumps(record.read(tmp_path)["config"])
    assert loaded.sampler == Sampler("euler", 3, sigma_min=0.01, sigma_max=20.0)
    json.loads((tmp_path / "run.json").read_text(), parse_constant=pytest.fail)  # no Infinity


def test_keys_of_earlier_versions_are_left_out_if_they_have_their_default(tmp_path):
    """A run of MCLR whose config has options that were removed; another value is an error."""
    config, _ = tiny.describe(tmp_path, given=tiny.config("mixture_mclr"))
    path = tmp_path / "run.json"
    older = json.loads(path.read_text())
    older["config"]["objective"] |= {"logistic_scale": 10.0, "reference_penalty": 0.0}
    path.write_text(json.dumps(older))
    found = record.read(tmp_path)["config"]
    assert found["objective"] == Training.parse(config).config["objective"]
    Training.parse(runs.load(tmp_path).config)
    older["config"]["objective"]["reference_penalty"] = 0.5
    path.write_text(json.dumps(older))
    with pytest.raises(ValueError, match="reference_penalty: 'mclr' has no such option"):
        Training.parse(runs.load(tmp_path).config)


def test_a_run_and_its_data_are_found_where_they_were_moved(tmp_path, monkeypatch):
    """Runs and data named relative to one directory, read from another, moved, and moved apart."""
    monkeypatch.chdir(tmp_path)
    points, labels = sources.load("mixture")[np.arange(64)]
    (tmp_path / "old").mkdir()
    np.savez("old/data.npz", images=points, labels=labels)
    tiny.describe(pathlib.Path("old/base"))
    tiny.describe(pathlib.Path("old/judge"))
    names = {"data.name": "npz:old/data.npz", "data.generated": "zip:g.zip",
             "evaluate.features": "classifier:old/judge"}  # fmt: skip
    _, model = tiny.describe(pathlib.Path("old/tuned"), init_from="old/base", **names)
    tiny.with_weights(pathlib.Path("old/tuned"), {"params": tiny.weights(model)})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = runs.load("../old/tuned")
    assert run.data.name == f"npz:{tmp_path}/old/data.npz"
    assert run.config["init_from"] == f"{tmp_path}/old/base"
    assert run.data.generated == f"zip:{tmp_path}/g.zip"  # nowhere
    np.testing.assert_array_equal(run.source("train")[np.arange(64)][0], points)

    (tmp_path / "old").rename(tmp_path / "new")
    run = runs.load(tmp_path / "new" / "tuned")
    np.testing.assert_array_equal(run.source("train")[np.arange(64)][0], points)
    assert runs.load(run.config["init_from"]).model == run.model
    assert run.config["evaluate"]["features"] == f"classifier:{tmp_path}/new/tuned/../judge"

    (tmp_path / "new" / "tuned").rename(tmp_path / "elsewhere" / "tuned")
    run = runs.load("tuned")
    with pytest.raises(FileNotFoundError, match=r"trained on npz:/.*/old/data\.npz; .* --data"):
        run.source("train")
    with pytest.raises(FileNotFoundError, match=r"started from /.*/old/base; give .* --init_from"):
        run.weights("none", interpolation=0.0)
    moved = runs.load("tuned", init_from=str(tmp_path / "new/base"), data="npz:../new/data.npz")
    np.testing.assert_array_equal(moved.source("train")[np.arange(64)][0], points)
    with pytest.raises(FileNotFoundError, match="new/base has no checkpoint yet"):
        moved.weights("none", interpolation=0.0)
    assert runs.load("tuned", data="mixture").source("test").shape == (2,)
    assert runs.load("tuned", data="folder").data.path == "folder"


@pytest.mark.parametrize(("key", "value"), [
    ("config", ...), ("config", None), ("config", 3), ("companions", ...), ("companions", [1]),
    ("model", {}), ("model", 3), ("model.network", "x"), ("model.strength", True),
    ("model.data.sigma_data", {}), ("model.data.num_classes", {"a": 1}), ("config.data", 3),
    ("paths", 3),
])  # fmt: skip
def test_a_description_with_values_of_other_types_is_named(tmp_path, key, value):
    tiny.describe(tmp_path, init_from="x")
    content = json.loads((tmp_path / "run.json").read_text())
    *above, last = key.split(".")
    part = functools.reduce(dict.get, above, content)
    del part[last]
    if value is not ...:
        part[last] = value
    (tmp_path / "run.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"run\.json(:| is damaged)|older version"):
        runs.load(tmp_path)


# ---- weights -------------------------------------------------------------------------------------


def test_weights_of_any_average_and_step(tmp_path):
    _, model = tiny.describe(tmp_path, **tiny.POWER)
    trees = [tiny.weights(model, seed) for seed in range(4)]
    for step, (params, average) in {1: trees[:2], 2: trees[2:]}.items():
        others = {"power_0.05": params, "power_0.1": params}
        tiny.with_weights(tmp_path, {"params": params, "ema": {"halflife": average} | others}, step)
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
    assert runs.load_model(tmp_path)[0] == model
    with pytest.raises(ValueError, match=r"No EMA 'halfife' in .*The run has \['halflife'"):
        run.weights("halfife")


def test_weights_lie_on_the_line_from_where_the_run_started(tmp_path):
    _, model = tiny.describe(tmp_path / "start", **{"ema.halflife_steps": 0.0})
    start, tuned = (tiny.weights(model, seed) for seed in range(2))
    tiny.with_weights(tmp_path / "start", {"params": start, "ema": {}})
    chex.assert_trees_all_equal(runs.load(tmp_path / "start").weights()[0], start)  # no averages
    tiny.describe(tmp_path / "run", init_from=str(tmp_path / "start"))
    tiny.with_weights(tmp_path / "run", {"params": start, "ema": {"halflife": tuned}})
    run = runs.load(tmp_path / "run")
    for t in (0.0, 0.3, 1.0, 1.5):
        params, _ = run.weights(interpolation=t)
        expected = jax.tree.map(lambda a, b, t=t: (1 - t) * a + t * b, start, tuned)
        chex.assert_trees_all_close(params, expected, atol=1e-6)
        chex.assert_trees_all_equal(runs.load_model(tmp_path / "run", t)[1], params)


def test_a_width_is_reconstructed_from_the_snapshots_up_to_a_step(tmp_path):
    _, model = tiny.describe(tmp_path, **tiny.POWER)
    stored = [(s, std) for s in (6, 12) for std in (0.05, 0.1)]
    trees = {pair: tiny.weights(model, seed) for seed, pair in enumerate(stored)}
    with Checkpoints(tmp_path / "snapshots", keep=None) as store:
        for s in (6, 12):
            store.save(s, {f"power_{std}": trees[s, std] for std in (0.05, 0.1)})
    for step, used in [(None, (6, 12)), (12, (6, 12)), (11, (6,)), (6, (6,))]:
        found, last = runs.load(tmp_path).weights("0.07", step)
        assert last == used[-1]
        pairs = [pair for pair in stored if pair[0] in used]
        weights = ema.posthoc_coefficients(*zip(*pairs, strict=True), last, 0.07)
        parts = zip(pairs, weights, strict=True)
        tree = [jax.tree.map(lambda x, w=w: w * np.asarray(x), trees[pair]) for pair, w in parts]
        chex.assert_trees_all_close(found, jax.tree.map(lambda *x: sum(x), *tree), atol=1e-5)


# ---- weights of another model --------------------------------------------------------------------


def test_optional_inputs_are_added_as_zeros_and_left_out(caplog):
    """Both ways the network stays the same; the sampled model had no augmentation, strength 0."""
    plain = tiny.model_of(tiny.config())
    taught = tiny.model_of(tiny.config(strength=(0.0, 2.0), **{"data.augment": 0.1}))
    weights = tiny.weights(plain, 0)
    more = runs.fitted(weights, taught, "here")
    assert set(more) - set(weights) == {"map_strength", "map_augment"}
    assert not any(map(np.any, jax.tree.leaves((more["map_strength"], more["map_augment"]))))
    chex.assert_trees_all_equal(runs.fitted(more, plain, "here"), weights)
    x, sigma = np.ones((2, 2), np.float32), np.float32([0.5, 2.0])
    np.testing.assert_array_equal(
        taught.denoise(more)(x, sigma, None), plain.denoise(weights)(x, sigma, None)
    )


@pytest.mark.parametrize(("before", "after", "message"), [
    ({}, {"network.width": 24}, r"block0/affine/bias: expected shape \(48,\), but there has .*32,"),
    ({"network.depth": 1}, {"network.depth": 2}, "block1.*but there has no such parameter"),
    ({"network.depth": 2}, {"network.depth": 1}, "block1.*the network of this run has no such"),
])  # fmt: skip
def test_other_differences_are_refused(before, after, message):
    weights = tiny.weights(tiny.model_of(tiny.config(**before)))
    with pytest.raises(MismatchError, match=message):
        runs.fitted(weights, tiny.model_of(tiny.config(**after)), "there")


def test_values_that_differ_are_named_even_if_all_shapes_fit(caplog):
    """Two heads and four have the same shapes, and weights of one are of no use to the other."""
    two, four, wide = (tiny.model_of(tiny.config("digits", **changes)) for changes in (
        {}, {"network.heads": 4, "network.dropout": 0.5}, {"network.width": 24}))  # fmt: skip
    weights = tiny.weights(two)
    runs.fitted(weights, two, "there", two)
    assert not caplog.messages
    runs.fitted(weights, four, "there", two)
    assert caplog.messages == ["The model of there has other values: network.heads is 2 there and "
                               "4 here."]  # fmt: skip
    with pytest.raises(
        MismatchError, match=r"another one: network.width is 16 there and 24 here. "
    ):
        runs.fitted(weights, wide, "there", two)


# ---- companions ----------------------------------------------------------------------------------


@pytest.fixture
def others(tmp_path):
    """Directories of a denoiser and of a classifier for the mixture, without weights."""
    tiny.describe(tmp_path / "denoiser")
    tiny.describe(tmp_path / "classifier", given=tiny.classifier())
    return tmp_path


def companions_of(config, workdir, data=None):
    training = Training.parse(config)
    return runs.companions(training, data or tiny.model_of(config).data, workdir)


def mclr(**changes):
    config = tiny.config("mixture")
    config.objective = base.options("mclr", target="reference")
    config.posterior = base.options("classifier")
    config.update_from_flattened_dict(changes)
    return config


def test_companions_are_the_runs_that_the_objective_and_its_posterior_read(others, caplog):
    paths = {"reference": str(others / "denoiser"), "classifier": str(others / "classifier")}
    config = mclr(**{"init_from": paths["reference"], "companions.classifier": paths["classifier"]})
    assert Training.parse(config).runs == paths
    found = companions_of(config, others / "new")
    assert found == {name: runs.load(path) for name, path in paths.items()}
    unused = tiny.config(init_from=paths["reference"], **{"companions.weak": paths["reference"]})
    assert companions_of(unused, others / "new") == Training.parse(unused).runs == {}
    assert "config.companions.weak is not used: this objective reads no companion." in caplog.text


def test_what_is_wrong_with_companions_is_said(others):
    data = tiny.model_of(tiny.config()).data
    denoiser, classifier = str(others / "denoiser"), str(others / "classifier")

    def companions(data=data, **changes):
        return companions_of(mclr(**changes), others / "new", data)

    with pytest.raises(ValueError, match=r"needs a classifier: set config\.companions\.classifier"):
        companions(init_from=denoiser)
    with pytest.raises(ValueError, match=r"needs a frozen reference: set config\.init_from"):
        companions(**{"companions.classifier": classifier})
    with pytest.raises(ValueError, match=r"'classifier' in .*expected a classifier.*it is a den"):
        companions(**{"init_from": denoiser, "companions.classifier": denoiser})
    with pytest.raises(ValueError, match=r"'reference' in .*expected a denoiser.*is a classifier"):
        companions(**{"init_from": classifier, "companions.classifier": classifier})
    images = tiny.model_of(tiny.config("digits")).data
    message = r"classes \(8, 8, 1\), 10, as of config\.data\.name='.*'; .* class.* of \(2,\), 3"
    with pytest.raises(ValueError, match=message):
        companions(images, **{"init_from": denoiser, "companions.classifier": classifier})
    model = tiny.model_of(tiny.config())
    emulator = dataclasses.replace(model, network=Emulator())
    message = r"classes \(2,\), 3, as of .*; it is an emulator of \(2,\), 3\."
    with pytest.raises(ValueError, match=message):
        runs.check_companion("autoguidance", "other", emulator, data, "toy")
    message = r"a denoiser, data shape \(8, 8, 1\), as of .*; it is a denoiser of \(2,\)\."
    with pytest.raises(ValueError, match=message):
        runs.check_companion("domain_guidance", "other", model, images, "digits")


@pytest.mark.parametrize("old", [False, True])
def test_a_run_that_holds_its_companions_needs_their_directories_no_more(others, tmp_path, old):
    """In frozen/NAME or, as version 0.1 kept them, in one tree of all."""
    config = mclr(**{"init_from": "gone", "companions.classifier": "gone too"})
    configs = {"reference": tiny.config(), "classifier": tiny.classifier()}
    held = {name: tiny.model_of(given) for name, given in configs.items()}
    trees = {name: tiny.weights(model, 4) for name, model in held.items()}
    workdir = tmp_path / "run"
    tiny.describe(workdir, held, config)
    if old:
        with Checkpoints(workdir / "frozen", keep=None) as store:
            store.save(0, trees)
    else:
        for name, model in held.items():
            runs.publish(workdir / "frozen" / name, model, trees[name], Sampler())
    with pytest.raises(FileNotFoundError, match="gone"):  # without checkpoints these are no copies
        companions_of(config, workdir)
    (workdir / "checkpoints" / "3").mkdir(parents=True)
    found = companions_of(config, workdir)
    assert {name: run.model for name, run in found.items()} == held
    for name, run in found.items():
        chex.assert_trees_all_equal(run.weights()[0], trees[name])
    runs.keep(found, {name: run.weights()[0] for name, run in found.items()}, workdir)
    for name, model in held.items():
        again = runs.load(workdir / "frozen" / name)
        assert again.model == model
        chex.assert_trees_all_equal(again.weights()[0], trees[name])


# ---- runs without a training ---------------------------------------------------------------------


def test_weights_without_a_training_are_a_run(tmp_path):
    model = tiny.model_of(tiny.config())
    params = tiny.weights(model, 0)
    runs.publish(tmp_path, model, params, Sampler("euler", 7), step=5)
    run = runs.load(tmp_path)
    assert (run.model, run.sampler, run.averages) == (model, Sampler("euler", 7), ())
    assert "config" not in record.read(tmp_path)
    found, step = run.weights()
    assert step == 5
    chex.assert_trees_all_equal(found, params)
    with pytest.raises(ValueError, match=r"names no data; name them by --data"):
        run.source("train")
    assert runs.load(tmp_path, data="mixture").source("train").shape == (2,)
    with pytest.raises(ValueError, match="not started from another run"):
        run.weights(interpolation=0.5)
    tiny.describe(tmp_path / "tuned", init_from=str(tmp_path))
    tiny.with_weights(tmp_path / "tuned", {"params": params, "ema": {"halflife": params}})
    chex.assert_trees_all_equal(runs.load_model(tmp_path / "tuned", 0.0)[1], params)


def test_a_reader_leaves_no_folder_behind(tmp_path):
    tiny.describe(tmp_path)
    for average, error in [("", FileNotFoundError), ("0.1", ValueError)]:
        with pytest.raises(error):
            runs.load(tmp_path).weights(average)
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
