"""Configs that take what they leave open from a run."""

import os
import shutil

import cases
import numpy as np
import pytest
import tiny
from commands import call

from mclr_jax import commandline, inherit, parts, record, runs
from mclr_jax.config import Training
from mclr_jax.configs import finetune, mclr_null
from mclr_jax.samplers import Sampler

OURS = {"network.width": 24, "data.limit": 200, "sampler.sigma_max": 30.0, "batch_size": 32,
        "num_steps": 500, "optimizer.learning_rate": 0.01, "sigma_data": 0.7}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a run of digits with other values than the defaults, and its config."""
    place = tmp_path_factory.mktemp("runs") / "base"
    cases.untrained(place, given := tiny.config("digits", **OURS), step=500)
    return place, Training.parse(given)


def from_run(place, module=finetune, **changes):
    config = module.get_config()
    config.update_from_flattened_dict({"init_from": str(place), **changes})
    return config


def test_a_fine_tuning_takes_all_that_is_left_open_from_its_run(base):
    place, old = base
    new = inherit.training(from_run(place, mclr_null))
    assert (new.data, new.sampler, new.batch_size) == (old.data, old.sampler, 32)
    assert new.model(new.data_info(source := new.data.source("train", 0))) == old.model(
        old.data_info(source)
    )
    assert (new.num_steps, new.optimizer.learning_rate) == (100, pytest.approx(0.002))
    assert (new.optimizer.warmup_steps, new.ema.halflife_steps) == (5, 5.0)
    assert new.objective.teacher == "average"


def test_keys_that_are_set_differ_from_the_run(base):
    new = inherit.training(from_run(base[0], **{
        "num_steps": 40, "batch_size": 8, "sampler.num_steps": 5, "data.limit": 100,
        "sigma_data": 0.2}))  # fmt: skip
    assert (new.num_steps, new.batch_size, new.ema.halflife_steps) == (40, 8, 2.0)
    assert (new.sampler.num_steps, new.sampler.sigma_max) == (5, 30.0)
    assert (new.data.name, new.data.limit, new.sigma_data) == ("digits", 100, 0.2)
    assert new.network.values["width"] == 24


def test_other_data_have_none_of_the_keys_of_the_run(base):
    new = inherit.training(from_run(base[0], **{"data.name": "mixture"}))
    assert (new.data.name, new.data.limit, new.sigma_data) == ("mixture", 0, 0.7)
    assert new.data.resolution == 0
    for given, size in (0, 8), (16, 16):  # of digits
        more = {"data.name": "folder:mine", "data.resolution": given}
        assert inherit.training(from_run(base[0], **more)).data.resolution == size


def test_published_weights_name_no_data_and_get_steps_of_their_own(base, tmp_path):
    model = runs.load(base[0]).model
    runs.publish(tmp_path / "there", model, tiny.weights(model), Sampler("euler", 7))
    config = from_run(tmp_path / "there", **{"data.name": "digits"})
    new = inherit.training(config)
    assert (new.num_steps, new.batch_size, new.optimizer.learning_rate) == (10_000, 256, 1e-5)
    assert (new.optimizer.warmup_steps, new.sampler) == (500, Sampler("euler", 7))
    config.data.name = ""
    with pytest.raises(ValueError, match=r"there names no data: set config.data.name"):
        inherit.completed(config.to_dict())


def test_flags_that_decide_what_is_taken_are_known_before(base, tmp_path):
    """The autoencoder of a published model goes with latents; a key may have its default again."""
    model = runs.load(base[0]).model
    (decoder := tmp_path / "decoder").mkdir()
    runs.publish(tmp_path / "there", model, tiny.weights(model), Sampler(),
                 origin={"autoencoder": str(decoder), "latents": "edm2"})  # fmt: skip
    given = {"config": "finetune", "config.init_from": str(tmp_path / "there"),
             "config.data.name": "zip:x.zip", "config.num_steps": "60"}  # fmt: skip
    assert commandline._config_of(given).data.autoencoder == ""
    config = commandline._config_of(given | {"config.data.latents": "edm2"})
    assert (config.data.autoencoder, config.num_steps) == (str(decoder), 60)
    assert (config.optimizer.warmup_steps, config.ema.halflife_steps) == (3, 3.0)
    assert commandline._config_of({"config": "finetune", "help": ""}).network.name == ""


def test_what_is_left_open_needs_a_run():
    with pytest.raises(
        ValueError, match=r"takes network, preconditioning, data, num_steps, .* set"
    ):
        inherit.completed(finetune.get_config().to_dict())
    given = tiny.config().to_dict()
    assert inherit.completed(given) == given


def test_data_of_a_moved_run_are_found(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    np.savez(data := tmp_path / "a" / "x.npz", images=np.ones((4, 8, 8, 1)), labels=np.arange(4))
    given = tiny.config("digits", **{"data.name": f"npz:{data}"})
    record.write(tmp_path / "a" / "run", {"config": given.to_dict(), "model": {}, "companions": {}})
    assert record.continued(tmp_path / "a" / "run")["data"]["name"] == f"npz:{data}"
    shutil.move(tmp_path / "a", tmp_path / "b")
    found = record.continued(tmp_path / "b" / "run")["data"]["name"].removeprefix("npz:")
    assert os.path.samefile(found, tmp_path / "b" / "x.npz")
    assert record.continued(tmp_path / "c") == {}


def test_a_run_continues_by_its_name_where_it_was_moved_to(base, tmp_path):
    """With its base, which may have gone after the first checkpoint, and its data."""
    cases.untrained(tmp_path / "a" / "base", tiny.config("digits", **tiny.LINEAR), step=12)
    small = ["--config.num_steps=2", "--config.batch_size=8", "--config.checkpoint_every=1",
             "--config.eval_examples=0"]  # fmt: skip
    call("train", "mclr_null", "--config.init_from=base", "--workdir=null", *small,
         folder=tmp_path / "a")  # fmt: skip
    shutil.rmtree(tmp_path / "a" / "base")
    shutil.move(tmp_path / "a", tmp_path / "b")
    log = call("train", f"--workdir={tmp_path / 'b' / 'null'}", "--config.num_steps=3")
    assert "Resumed from the checkpoint of step 2." in log
    assert "step 3/3" in log
    run = runs.load(tmp_path / "b" / "null")
    assert parts.describe(run.model)["network"]["name"] == "tiny:Linear"
    assert run.weights()[1] == 3
    log = call("train", f"--workdir={tmp_path / 'c'}", expect=2)
    assert "has no training to continue; name a config" in log
