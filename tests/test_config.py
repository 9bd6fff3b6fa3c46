"""From a config to typed values, a model and a task; mistakes in a config."""

import dataclasses
import functools
import importlib
import json
import pathlib
from typing import Any

import chex
import jax
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict

from mclr_jax import config as configuration
from mclr_jax import inherit, parts, runs, schema
from mclr_jax.assimilation import dynamics
from mclr_jax.config import NOISE_LEVELS, OBJECTIVES, POSTERIORS, Training
from mclr_jax.configs import base
from mclr_jax.data import pipeline
from mclr_jax.data.protocol import Lazy
from mclr_jax.model import DataInfo
from mclr_jax.noise import LogUniform
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.posterior import Classifier
from mclr_jax.samplers import Sampler
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
    "objective": OBJECTIVES,
    "network": parts.NETWORKS,
    "posterior": POSTERIORS,
    "preconditioning": parts.PRECONDITIONINGS,
    "noise": NOISE_LEVELS,
}
# What no config says, since the data and other sections do, or Flax.
FILLED_IN = {"num_classes", "out_channels", "augment_dim", "takes_strength", "sigma_data",
             "parent", "name"}  # fmt: skip
DATA = DataInfo((8, 8, 1), 10, 0.5)


def shrunk(name):
    config = importlib.import_module(f"mclr_jax.configs.{name}").get_config()
    config.batch_size = 8
    config.network.update(SHRUNK.get(config.network.name, {}))
    return config


# ---- the configs of the project ------------------------------------------------------------------


def build(name, folder):
    """(config, source, task) of one of the project's configs; companions by their own configs."""
    config = shrunk(name)
    if "trajectories" in config.data:
        config.data.trajectories, config.data.length = 2, config.data.frames + 4
        config.data.path = str(folder)
    elif config.data.name.startswith("npy:"):
        values = np.random.default_rng(0).normal(size=(2, config.data.frames + 16, 2))
        np.save(folder / "data.npy", values)
        config.data.name = f"npy:{folder / 'data.npy'}"
    elif config.data.name != "mixture":
        shape = (32, 32, 3) if name.startswith("cifar10") else (28, 28, 1)
        images = np.random.default_rng(0).normal(size=(8, *shape)) / 2
        np.savez(folder / "data.npz", images=images, labels=np.arange(8) % 3)
        config.data.name = f"npz:{folder / 'data.npz'}"
    if not config.network.name:  # that of a run
        config.init_from = str(folder / "base")
        base = Training.parse(tiny.config("digits")).model(DataInfo((28, 28, 1), 3, 0.5))
        runs.publish(folder / "base", base, tiny.weights(base), Sampler())
    training = inherit.training(config)
    source = training.data.source("train", training.seed)
    data = training.data_info(source)
    if config.init_from and (folder / "base").exists():
        return config, source, training.task(data, {"start": base, "reference": base})
    paths = training.runs | ({"start": config.init_from} if config.init_from else {})
    companions = {
        key: Training.parse(shrunk(path.removeprefix("runs/"))).model(data)
        for key, path in paths.items()
    }
    return config, source, training.task(data, companions)


# A step of each is traced, and computed for an image and a trajectory; all: ALL=1.
COMPUTED = {"digits_mclr", "lorenz63_forcing"}


@pytest.mark.parametrize(
    ("name", "computed"),
    [pytest.param(name, name in COMPUTED, id=name) for name in CONFIGS]
    + [pytest.param(name, True, marks=pytest.mark.slow, id=f"{name}-computed")
       for name in CONFIGS if name not in COMPUTED],
)  # fmt: skip
def test_every_config_builds_a_model_that_has_a_description_and_takes_a_step(
    name, computed, tmp_path, monkeypatch
):
    monkeypatch.setattr(dynamics.NavierStokes, "spin_up_steps", 1)
    config, source, task = build(name, tmp_path)
    assert set(config.keys()) >= TOP_LEVEL
    again = parts.model_of(json.loads(json.dumps(parts.describe(task.model), allow_nan=False)))
    assert again == task.model
    assert hash(again) == hash(task.model)
    # Not initial ones, which take longer to compile than the step. The reference is another model:
    # where both are equal MCLR may have nothing to learn.
    frozen = {name: tiny.weights(model, 1) for name, model in task.frozen.items()}
    run = jax.jit if computed else lambda function: functools.partial(jax.eval_shape, function)
    state = run(functools.partial(step.init_state, task))(tiny.weights(task.model, 0))
    batches = pipeline.stack(pipeline.stream(source, 8, 0), 1, 1)
    new, metrics = run(step.make_update(task))(state, frozen, batches, 1)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
    assert "loss" in metrics
    if computed:
        assert np.isfinite(metrics["loss"].parts[0][0])
        assert int(new.step) == 1
        assert not all(jax.tree.leaves(jax.tree.map(np.array_equal, state.params, new.params)))
    if config.init_from:  # and its weights are those of its start
        runs.fitted(tiny.weights(task.companions["start"], 0), task.model, config.init_from)


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section, table in TABLES.items() for name in table]
)
def test_options_are_the_defaults_of_what_they_name(section, name):
    table = TABLES[section]
    given = configuration.options(name)
    assert given.pop("name") == name
    assert not given.keys() & FILLED_IN
    if "dtype" in given:
        assert given["dtype"] == "float32"
        given["dtype"] = table[name]().dtype
    assert table[name](**given) == table[name]()


def test_options_take_values_and_refuse_what_there_is_not():
    given = base.options("mclr", beta=0.4, sigma_interval=(0.1, 2.0))
    made = MCLR(**{k: v for k, v in given.items() if k != "name"})
    assert made == MCLR(beta=0.4, sigma_interval=(0.1, 2.0))
    with pytest.raises(ValueError, match=r"'mclr' has no option 'bta'\. Did you mean 'beta'\?"):
        configuration.options("mclr", bta=0.4)
    with pytest.raises(ValueError, match="'dit' has no option 'num_classes'"):  # the data say it
        configuration.options("dit", num_classes=3)


@dataclasses.dataclass(frozen=True)
class Needy:
    """An objective with an option that has no default."""

    strange: float
    plain: tuple[int, ...] = (1, 2)

    needs = frozenset({"teacher"})


def test_options_of_ones_own():
    name = f"{__name__}:Needy"
    found = configuration.options(name, strange=2.0)
    assert found == {"name": name, "strange": 2.0, "plain": (1, 2)}
    with pytest.raises(ValueError, match=r"Option 'strange' of .* has no default; give it a value"):
        configuration.options(name)
    config = tiny.config()
    config.objective = base.options(name, strange=2.0)
    assert Training.parse(config).needs == {"teacher"}
    with pytest.raises(ValueError, match=r"run 'teacher': set config\.companions\.teacher"):
        _ = Training.parse(config).runs
    config.companions.teacher = "runs/teacher"
    assert Training.parse(config).runs == {"teacher": "runs/teacher"}
    with pytest.raises(ValueError, match="expected a dataclass"):
        configuration.options("json:dumps")


# ---- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    ({"network.name": "dti"}, "Unknown config.network.name 'dti'.*Did you mean 'dit'"),
    ({"network.dtype": "float16"}, r"config\.network\.dtype is 'float16'.*bfloat16, float32"),
    ({"network.name": "no_such.module:Net"}, "no module 'no_such' can be imported.*PYTHONPATH"),
    ({"objective.name": "mclr"}, r"needs a posterior: set config\.posterior\.name to 'exact'"),
])  # fmt: skip
def test_wrong_names_are_refused_with_the_nearest(changes, message):
    with pytest.raises(ValueError, match=message):
        Training.parse(tiny.config("digits", **changes))


def test_a_switched_section_keeps_what_both_names_have():
    config = tiny.config("digits", **{"network.dropout": 0.3, "network.dtype": "bfloat16"})
    found = schema.switched(Training, config, "network", "unet")
    assert found == configuration.options("unet", dropout=0.3, dtype="bfloat16")
    with pytest.raises(ValueError, match=r"Unknown config\.network\.name 'uent'.*'unet'"):
        schema.switched(Training, config, "network", "uent")


def test_a_network_without_the_inputs_that_a_config_asks_for_is_refused():
    inputs = {"takes_strength": {"strength": (0.0, 2.0)}, "augment_dim": {"data.augment": 0.1}}
    for field, changes in inputs.items():
        config = tiny.config("digits", **changes)
        assert getattr(Training.parse(config).model(DATA).network, field)
        config.network = ConfigDict({"name": "test_parts:Guest"})
        with pytest.raises(ValueError, match=rf"has no field '{field}', which config\.strength"):
            Training.parse(config).model(DATA)


# ---- tasks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ({"method": "sde_euler"}, "'sde_euler' needs a network of the preconditioning velocity"),
        ({"spacing": "even"}, "spacing is 'even' with 18 steps; the model's process has 0"),
    ],
)
def test_a_sampler_that_the_model_cannot_have_is_refused_before_the_training(sampler, message):
    training = Training.parse(tiny.config("digits", sampler=sampler))
    with pytest.raises(ValueError, match=message):
        training.model(DataInfo((8, 8, 1), 10, 1.0))


def test_strengths_by_class_are_for_objectives_that_take_them_and_not_beside_an_input():
    config = tiny.config("mixture", **{"objective.name": "gft"}, class_strengths=(0.5, 1, 0))
    data = DataInfo((2,), 3, 1.0)
    assert Training.parse(config).task(data, {}).problem.class_strengths == (0.5, 1, 0)
    config.class_strengths = (1.0,)
    with pytest.raises(ValueError, match="has 1 values; expected 3, one per class"):
        Training.parse(config).task(data, {})
    config.objective, config.class_strengths = base.options("dsm"), (0.5, 1, 0)
    with pytest.raises(ValueError, match=r"DSM reads no config\.class_strengths: leave"):
        Training.parse(config).task(data, {})
    config.objective, config.strength = base.options("gft"), (0.0, 2.0)
    with pytest.raises(ValueError, match=r"leave one of them empty.*--class_strengths"):
        Training.parse(config).task(data, {})


def test_a_task_has_what_the_config_says():
    config = tiny.config("mixture", seed=3, strength=(0.0, 2.0), grad_accumulation=2)
    config.noise = base.options("loguniform", sigma_max=9.0)
    config.objective = base.options("mclr", beta=0.4)
    config.posterior = base.options("classifier")
    data = DataInfo((2,), 3, 0.7, (0.2, 0.3, 0.5))
    companion = Training.parse(tiny.config("mixture")).model(data)
    task = Training.parse(config).task(data, {"classifier": companion})
    assert task.objective == MCLR(beta=0.4)
    assert task.posterior == Classifier()
    assert task.problem.levels == LogUniform(sigma_max=9.0)
    assert (task.problem.null_label, task.problem.class_prior) == (3, (0.2, 0.3, 0.5))
    assert (task.problem.sigma_data, task.problem.strength) == (0.7, (0.0, 2.0))
    sigma = np.array([0.1, 1.0], np.float32)  # the weight is the preconditioning's own
    expected = (sigma**2 + 0.49) / (0.7 * sigma) ** 2
    np.testing.assert_allclose(task.problem.weight(sigma), expected, rtol=1e-5)
    assert (task.seed, task.grad_accumulation, next(iter(task.averages))) == (3, 2, "halflife")
    assert task.frozen == {"classifier": companion}
    assert task.model.network.takes_strength


def test_the_weight_is_the_natural_one_or_that_of_fused_ratios():
    config = tiny.config("mixture", **{"network.per_frame": True})
    sigma = np.float32([[0.1, 1.0, 3.0]])
    for name, share in [("natural", 1), ("fused_snr", 5 / 101)]:  # of frame 0: min(R, 5) / (R + 1)
        config.weight = name
        weight = Training.parse(config).task(DataInfo((3, 2), 3, 1.0), {}).problem.weight(sigma)
        np.testing.assert_allclose(weight[0, 0], 101 * share, rtol=1e-5)
    config.weight = "fused"
    with pytest.raises(ValueError, match=r"config\.weight is 'fused'.*Did you mean 'fused_snr'"):
        Training.parse(config).task(DataInfo((3, 2), 3, 1.0), {})


def test_shares_of_classes_are_counted_where_they_are_needed():
    config = tiny.config("mixture", sigma_data=0.0)
    x, labels = np.float32([[1, 2], [3, 4], [5, 6], [7, 8]]), np.int32([0, 2, 2, 2])
    asked = []
    source = Lazy(4, (2,), 3, lambda i: (x[i], labels[i]), lambda: asked.append(1) or labels)
    data = Training.parse(config).data_info(source)
    assert data == DataInfo((2,), 3, pytest.approx(x.std()), ())
    assert not asked  # it may mean to read the whole set
    config.objective = base.options("cca")
    assert Training.parse(config).data_info(source).class_prior == (0.25, 0.0, 0.75)
    config.sigma_data = 0.3
    assert Training.parse(config).data_info(source).sigma_data == 0.3
    config.sigma_data, x[:] = 0.0, 1.0
    with pytest.raises(ValueError, match=r"standard deviation 0.0; expected a positive"):
        Training.parse(config).data_info(source)
