import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import FrozenConfigDict

from mclr_jax import denoiser
from mclr_jax.data import pipeline
from mclr_jax.experiment import DataInfo, Experiment
from mclr_jax.training import loop, step

CONFIGS = sorted(
    path.stem
    for path in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py")
    if "def get_config" in path.read_text()
)
TOP_LEVEL = {"num_steps", "batch_size", "seed", "parallel", "checkpoint_every", "init_from"}
# Smaller networks and data that is at hand; nothing else of a config is changed.
SHRUNK = {
    "dit": {"width": 16, "depth": 1, "heads": 2},
    "unet": {"channels": 8, "num_blocks": 1},
    "mlp": {"width": 8},
    "mlp_classifier": {"width": 8, "depth": 1},
    "conv_classifier": {"channels": (8, 8)},
}


def experiment_of(**changes):
    return Experiment(
        FrozenConfigDict(tiny.config("digits", **changes)), DataInfo((8, 8, 1), 10, 0.5)
    )


def test_the_loss_is_the_objective_on_scaled_data():
    """An untrained EDM network gives 0, so that the loss is that of c_skip x."""
    experiment = experiment_of()
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    batch = {"image": images, "label": np.arange(4)}
    keys = jax.random.split(jax.random.key(0), 4)
    loss, _ = experiment.loss(experiment.init(), {}, batch, keys, train=True)
    objective_keys = jax.vmap(lambda k: jax.random.split(k, 5)[3])(keys)
    x0 = images / np.float32(127.5) - 1
    expected, _ = experiment.objective(
        denoiser.edm(lambda x, c, y: 0 * x, 0.5), x0, jnp.arange(4), objective_keys
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def shrunk(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    config.batch_size = 8
    config.network.update(SHRUNK[config.network.name])
    return config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_builds_and_takes_a_step(name, tmp_path):
    config = shrunk(name)
    assert set(config.keys()) >= TOP_LEVEL
    shape = (32, 32, 3) if name.startswith("cifar10") else (28, 28, 1)
    data = {
        "images": np.random.default_rng(0).normal(size=(8, *shape)) / 2,
        "labels": np.arange(8) % 3,
    }
    np.savez(tmp_path / "data.npz", **data)
    if config.data.name != "mixture":
        config.data.name = f"npz:{tmp_path / 'data.npz'}"
    source = loop.load_source(config, "train")
    classifier = None
    if config.objective.get("posterior", "") == "classifier":
        classifier = loop.make_experiment(shrunk(name.replace("mclr", "classifier")), source)
    experiment = loop.make_experiment(config, source, classifier)
    # A reference that is not the model: where both are equal MCLR may have nothing to learn.
    frozen = jax.tree.map(lambda x: x + 0.01, experiment.init_frozen())
    state = jax.jit(lambda: step.init_state(experiment))()
    batches = loop.stack(pipeline.stream(source, 8, 0), 1, 1)
    new, metrics = jax.jit(step.make_update(experiment))(state, frozen, batches, 1)
    assert np.isfinite(metrics["loss"][0])
    assert int(new.step) == 1
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, new.params)
    assert max(jax.tree.leaves(moved)) > 0


def test_seeds_decide_parameters_and_keys_differ():
    a, same, b = experiment_of(), experiment_of(), experiment_of(seed=1)
    leaves = [np.asarray(e.init()["x_embedder"]["kernel"]) for e in (a, same, b)]
    np.testing.assert_array_equal(leaves[0], leaves[1])
    assert np.abs(leaves[0] - leaves[2]).max() > 0
    keys = jax.random.key_data(jnp.stack([a.step_key, a.eval_key, b.step_key]))
    assert len({tuple(map(int, key)) for key in keys}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network.name": "dti"}, "Unknown network 'dti'.*Did you mean 'dit'"),
        ({"network.dtype": "float16"}, "Unknown network.dtype 'float16'"),
        ({"objective.name": "dsn"}, "Did you mean 'dsm'"),
        ({"noise.name": "lognormall"}, "Did you mean 'lognormal'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(changes, message):
    experiment = experiment_of(**changes)
    with pytest.raises(ValueError, match=message):
        _ = experiment.network, experiment.objective


def test_an_option_of_another_network_is_refused():
    config = tiny.config("digits")
    with config.unlocked():
        config.network.widht = 3
    experiment = Experiment(FrozenConfigDict(config), DataInfo((8, 8, 1), 10, 0.5))
    with pytest.raises(ValueError, match=r"config.network.widht: .*Did you mean 'width'"):
        _ = experiment.network
