"""From a config to a model and a task, and from a model to its description and back."""

import dataclasses
import importlib
import json
import pathlib
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from configs import base
from mclr_jax import experiment, runs
from mclr_jax.data import pipeline, sources
from mclr_jax.data.protocol import Lazy
from mclr_jax.denoiser import EDM, Epsilon, V, Velocity
from mclr_jax.model import DataInfo, Model
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.unet import UNet
from mclr_jax.noise import LogUniform
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.posterior import Denoiser
from mclr_jax.training import step

CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
    if "def get_config" in path.read_text()
)
TOP_LEVEL = {"num_steps", "batch_size", "seed", "parallel", "checkpoint_every", "init_from"}
# Smaller networks, and random data; nothing else of a config is changed.
SHRUNK: dict[str, dict[str, Any]] = {
    "dit": {"width": 16, "depth": 1, "heads": 2},
    "unet": {"channels": 8, "num_blocks": 1, "channel_mult": (1,)},
    "mlp": {"width": 8},
    "trajectory": {"width": 16, "depth": 1, "heads": 2},
    "frame_dit": {"width": 16, "depth": 1, "heads": 2, "patch_size": 16},
    "mlp_classifier": {"width": 8, "depth": 1},
    "conv_classifier": {"channels": (8, 8)},
}
TABLES = {
    "objective": experiment.OBJECTIVES,
    "network": experiment.NETWORKS,
    "posterior": experiment.POSTERIORS,
    "preconditioning": experiment.PRECONDITIONINGS,
    "noise": experiment.NOISE_LEVELS,
}
# What no config says, since the data and other sections do, or Flax.
FILLED_IN = {"num_classes", "out_channels", "augment_dim", "takes_strength", "sigma_data",
             "parent", "name"}  # fmt: skip
DATA = DataInfo((8, 8, 1), 10, 0.5)


def shrunk(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.batch_size = 8
    config.network.update(SHRUNK[config.network.name])
    return config


# ---- the configs of the project ------------------------------------------------------------------


@pytest.fixture(scope="module", params=CONFIGS)
def built(request, tmp_path_factory):
    """(config, source, task) of one of the project's configs; companions by their own configs."""
    name, config = request.param, shrunk(request.param)
    if "trajectories" in config.data:
        config.data.trajectories, config.data.length = 2, config.data.frames + 4
        config.data.path = str(tmp_path_factory.mktemp("data"))
    elif config.data.name != "mixture":
        shape = (32, 32, 3) if name.startswith("cifar10") else (28, 28, 1)
        images = np.random.default_rng(0).normal(size=(8, *shape)) / 2
        path = tmp_path_factory.mktemp("data") / "data.npz"
        np.savez(path, images=images, labels=np.arange(8) % 3)
        config.data.name = f"npz:{path}"
    source = sources.from_config(config.data, "train", config.seed)
    data = experiment.data_info(config, source)
    paths = runs.companion_paths(config) | ({"start": config.init_from} if config.init_from else {})
    companions = {
        key: experiment.make_model(shrunk(path.removeprefix("runs/")), data)
        for key, path in paths.items()
    }
    return config, source, experiment.make_task(config, data, companions)


def test_every_config_builds_and_takes_a_step(built):
    config, source, task = built
    assert set(config.keys()) >= TOP_LEVEL
    key = jax.random.key(0)
    # A reference that is not the model: where both are equal MCLR may have nothing to learn.
    frozen = {n: jax.tree.map(lambda x: x + 0.01, m.init(key)) for n, m in task.frozen.items()}
    state = step.init_state(task)
    batches = pipeline.stack(pipeline.stream(source, 8, 0), 1, 1)
    new, metrics = jax.jit(step.make_update(task))(state, frozen, batches, 1)
    assert np.isfinite(metrics["loss"].parts[0][0])
    assert int(new.step) == 1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, new.params)
    assert max(jax.tree.leaves(moved)) > 0
    if config.init_from:  # and its weights are those of its start
        runs.fitted(task.companions["start"].init(key), task.model, config.init_from)


def test_every_model_comes_back_from_its_description(built):
    _, _, task = built
    text = json.dumps(experiment.describe(task.model), allow_nan=False)
    again = experiment.model_of(json.loads(text))
    assert again == task.model
    assert hash(again) == hash(task.model)


# ---- descriptions --------------------------------------------------------------------------------


class Guest(nn.Module):
    """A network from outside the tables, without anything optional."""

    widths: tuple[Any, ...] = (4, 8)

    def __call__(self, x, c_noise, condition):
        return x


@pytest.mark.parametrize(
    "model",
    [
        Model(MLP(2, 3, width=8, dtype="bfloat16"), EDM(0.7), DataInfo((2,), 3, 0.7, (0.3, 0.7))),
        Model(MLP(2, 3, per_frame=True, dtype="float32"), V(tau=0.5), DataInfo((4, 2), 3, 1.0)),
        Model(DiT(dtype="float32"), Velocity(0), DATA),
        Model(
            DiT(dtype="float32", takes_strength=True), Epsilon((1e-3, 0.1), 10), DATA, (0.0, 2.0)
        ),
        Model(UNet(channel_mult=(1, 2), dtype="float32"), Epsilon(), DATA),
        Model(Guest((2, (3, (4,)))), EDM(), DATA),
    ],
)
def test_a_model_is_its_description(model):
    text = json.dumps(experiment.describe(model), allow_nan=False)
    again = experiment.model_of(json.loads(text))
    assert again == model
    assert hash(again) == hash(model)
    assert json.dumps(experiment.describe(again)) == text


def test_descriptions_name_what_they_can_and_say_every_value():
    found = experiment.describe(Model(MLP(2, 3, dtype="float32"), Velocity(), DATA))
    assert found["network"]["name"] == "mlp"
    assert found["network"]["depth"] == 4  # a default
    assert found["preconditioning"] == {"name": "velocity", "data_at": 1}
    guest = experiment.describe(Model(Guest(), EDM(), DATA))
    assert guest["network"] == {"name": f"{__name__}:Guest", "widths": [4, 8]}


@pytest.mark.parametrize("name", experiment.NETWORKS)
def test_a_config_that_leaves_everything_out_describes_its_model_too(name):
    """Among the rest the type of computation, which a description has by its name."""
    config = tiny.config("digits")
    config.network = ConfigDict({"name": name})
    model = experiment.make_model(config, DATA)
    assert experiment.model_of(json.loads(json.dumps(experiment.describe(model)))) == model


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, table in TABLES.items() for name in table]
)
def test_options_are_the_defaults_of_what_they_name(section, name):
    table = TABLES[section]
    given = experiment.options(name)
    assert given.pop("name") == name
    assert not given.keys() & FILLED_IN
    if "dtype" in given:
        assert given["dtype"] == "float32"
        given["dtype"] = table[name]().dtype
    assert table[name](**given) == table[name]()


def test_options_take_values_and_refuse_what_there_is_not():
    given = base.options("mclr", beta=0.4, sigma_interval=(0.1, 2.0))
    assert isinstance(given, ConfigDict)
    assert MCLR(**{k: v for k, v in given.items() if k != "name"}) == MCLR(
        beta=0.4, sigma_interval=(0.1, 2.0)
    )
    with pytest.raises(ValueError, match=r"'mclr' has no option 'bta'\. Did you mean 'beta'\?"):
        experiment.options("mclr", bta=0.4)
    with pytest.raises(ValueError, match=r"Unknown name 'mlcr'\. Did you mean 'mclr' or"):
        experiment.options("mlcr")
    with pytest.raises(ValueError, match="'dit' has no option 'num_classes'"):  # the data say it
        experiment.options("dit", num_classes=3)


@dataclasses.dataclass(frozen=True)
class Needy:
    """An objective with an option that has no default."""

    strange: float
    plain: tuple[int, ...] = (1, 2)

    needs = frozenset({"reference"})


def test_options_of_ones_own():
    name = f"{__name__}:Needy"
    assert experiment.options(name, strange=2.0) == {
        "name": name,
        "strange": 2.0,
        "plain": (1, 2),
    }
    with pytest.raises(ValueError, match=r"Option 'strange' of .* has no default; give it a value"):
        experiment.options(name)
    config = tiny.config()
    config.objective = base.options(name, strange=2.0)
    assert experiment.needs(config) == {"reference"}
    with pytest.raises(ValueError, match="expected a dataclass"):
        experiment.options("json:dumps")


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network.name": "dti"}, "Unknown network 'dti'.*Did you mean 'dit'"),
        ({"network.dtype": "float16"}, "Unknown network.dtype 'float16'"),
        ({"objective.name": "dsn"}, "Unknown objective 'dsn'.*Did you mean 'dsm'"),
        ({"noise.name": "lognormall"}, "Unknown noise 'lognormall'.*Did you mean 'lognormal'"),
        ({"preconditioning.name": "emd"}, "Unknown preconditioning 'emd'.*Did you mean 'edm'"),
        ({"posterior.name": "exakt"}, "Unknown posterior 'exakt'.*Did you mean 'exact'"),
        ({"network.name": "no_such.module:Net"}, "no module 'no_such' can be imported.*PYTHONPATH"),
        ({"objective.name": "mclr"}, r"needs a posterior: set config\.posterior\.name to 'exact'"),
    ],
)
def test_wrong_names_are_refused_with_the_nearest(changes, message):
    config = tiny.config("digits", **changes)
    with pytest.raises(ValueError, match=message):
        experiment.make_task(config, DATA, {})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (
            "network.widht",
            r"config\.network\.widht: 'dit' has no such option.*Did you mean 'width'",
        ),
        ("objective.beta", r"config\.objective\.beta: 'dsm' has no such option"),
        ("noise.sigma_min", r"config\.noise\.sigma_min: 'lognormal' has no such option"),
        ("preconditioning.steps", r"config\.preconditioning\.steps: 'edm' has no such option"),
    ],
)
def test_an_option_that_there_is_not_is_refused(key, message):
    config = tiny.config("digits")
    section, name = key.split(".")
    with config.unlocked():
        config[section][name] = 3
    with pytest.raises(ValueError, match=message):
        experiment.make_task(config, DATA, {})


@pytest.mark.parametrize(
    ("section", "before", "name"),
    [
        ("network", "dit", "unet"),
        ("objective", "mclr", "cca"),
        ("noise", "lognormal", "loguniform"),
    ],
)
def test_the_name_alone_keeps_the_options_of_another_which_is_explained(section, before, name):
    """As --config.SECTION.name=NAME on the command line does."""
    config = tiny.config("digits")
    config[section] = base.options(before)
    config[section]["name"] = name
    message = rf"config\.{section}\.\w+: '{name}' has no such option\. .*Each name has its own "
    message += rf"options: in a config file, base\.options\('{name}'\)"
    with pytest.raises(ValueError, match=message):
        experiment.make_task(config, DATA, {})
    config[section] = base.options(name)
    experiment.make_task(config, DATA, {})


def test_options_of_a_posterior_without_a_name_are_refused():
    config = tiny.config("digits")
    config.posterior = ConfigDict({"name": "", "levels": 4})
    with pytest.raises(ValueError, match=r"config\.posterior without a name has no key 'levels'"):
        experiment.make_task(config, DATA, {})


def test_a_network_without_the_inputs_that_a_config_asks_for_is_refused():
    for changes, field in [
        ({"strength": (0.0, 2.0)}, "takes_strength"),
        ({"data.augment": 0.1}, "augment_dim"),
    ]:
        config = tiny.config("digits", **changes)
        assert getattr(experiment.make_model(config, DATA).network, field)
        config.network = ConfigDict({"name": f"{__name__}:Guest"})
        with pytest.raises(ValueError, match=rf"has no field '{field}', which config\.strength"):
            experiment.make_model(config, DATA)


# ---- tasks ---------------------------------------------------------------------------------------


def test_strengths_by_class_are_for_objectives_that_take_them_and_not_beside_an_input():
    config = tiny.config("mixture", **{"objective.name": "gft"}, class_strengths=(0.5, 1, 0))
    data = DataInfo((2,), 3, 1.0)
    assert experiment.make_task(config, data, {}).problem.class_strengths == (0.5, 1, 0)
    config.objective = base.options("dsm")
    with pytest.raises(ValueError, match=r"DSM reads no config\.class_strengths: leave"):
        experiment.make_task(config, data, {})
    config.objective, config.strength = base.options("gft"), (0.0, 2.0)
    with pytest.raises(ValueError, match=r"leave one of them empty.*--class_strengths"):
        experiment.make_task(config, data, {})


def test_a_task_has_what_the_config_says():
    config = tiny.config("mixture", seed=3, strength=(0.0, 2.0), grad_accumulation=2)
    config.noise = base.options("loguniform", sigma_max=9.0)
    config.objective = base.options("mclr", beta=0.4)
    config.posterior = base.options("denoiser", levels=3)
    data = DataInfo((2,), 3, 0.7, (0.2, 0.3, 0.5))
    companion = experiment.make_model(tiny.config("mixture"), data)
    task = experiment.make_task(config, data, {"reference": companion})
    assert task.objective == MCLR(beta=0.4)
    assert task.posterior == Denoiser(levels=3)
    assert task.problem.levels == LogUniform(sigma_max=9.0)
    assert (task.problem.null_label, task.problem.class_prior) == (3, (0.2, 0.3, 0.5))
    assert (task.problem.sigma_data, task.problem.strength) == (0.7, (0.0, 2.0))
    sigma = np.array([0.1, 1.0], np.float32)  # the weight is the preconditioning's own
    np.testing.assert_allclose(
        task.problem.weight(sigma), (sigma**2 + 0.49) / (0.7 * sigma) ** 2, rtol=1e-5
    )
    assert (task.seed, task.grad_accumulation, next(iter(task.averages))) == (3, 2, "halflife")
    assert task.frozen == {"reference": companion}
    assert task.model.network.takes_strength


def test_the_weight_is_the_natural_one_or_that_of_fused_ratios():
    config = tiny.config("mixture", **{"network.per_frame": True})
    sigma = np.float32([[0.1, 1.0, 3.0]])
    for name, share in [("natural", 1), ("fused_snr", 5 / 101)]:  # of frame 0: min(R, 5) / (R + 1)
        config.weight = name
        weight = experiment.make_task(config, DataInfo((3, 2), 3, 1.0), {}).problem.weight(sigma)
        np.testing.assert_allclose(weight[0, 0], 101 * share, rtol=1e-5)
    config.weight = "fused"
    with pytest.raises(ValueError, match=r"config\.weight 'fused'.*Did you mean 'fused_snr'"):
        experiment.make_task(config, DataInfo((3, 2), 3, 1.0), {})


def test_descriptions_have_units_where_the_data_have_them():
    """And no others, as in the descriptions of runs before there were units."""
    network, units = MLP(2, 3, dtype="float32"), ((0.0, 25.0), (8.0, 9.0), 0.025)
    plain = experiment.describe(Model(network, EDM(), DataInfo((2,), 3, 1.0)))
    assert plain["data"].keys() == {"shape", "num_classes", "sigma_data", "class_prior"}
    model = Model(network, EDM(), DataInfo((2,), 3, 1.0, (), *units))
    found = json.loads(json.dumps(experiment.describe(model)))
    assert found["data"]["offset"] == [0, 25]
    assert experiment.model_of(found) == model


def test_levels_are_one_for_each_frame_of_a_network_that_takes_them():
    config = tiny.config("mixture", **{"network.per_frame": True})
    assert experiment.make_task(config, DataInfo((4, 2), 3, 1.0), {}).problem.frames == (4,)
    config.network.per_frame = False
    assert experiment.make_task(config, DataInfo((4, 2), 3, 1.0), {}).problem.frames == ()


def test_shares_of_classes_are_counted_where_they_are_needed():
    config = tiny.config("mixture", sigma_data=0.0)
    x, labels = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]]), np.int32([0, 2, 2, 2])
    asked = []
    source = Lazy(4, (2,), 3, lambda i: (x[i], labels[i]), lambda: asked.append(1) or labels)
    data = experiment.data_info(config, source)
    assert data == DataInfo((2,), 3, pytest.approx(x.std()), ())
    assert not asked  # it may mean to read the whole set
    config.objective = base.options("cca")
    assert experiment.data_info(config, source).class_prior == (0.25, 0.0, 0.75)
    config.sigma_data = 0.3
    assert experiment.data_info(config, source).sigma_data == 0.3
