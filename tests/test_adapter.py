"""Parts of a run in training: low-rank updates, frozen layers, and rows of new labels."""

import functools
import re
import shutil

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import traverse_util

from mclr_jax import adapter, generate, main, runs
from mclr_jax.adapter import Adapter
from mclr_jax.config import Training
from mclr_jax.data.protocol import Arrays
from mclr_jax.denoiser import EDM
from mclr_jax.experiment import Experiment
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.edm2 import EDM2, MPLinear
from mclr_jax.networks.layers import Linear
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.unet import UNet
from mclr_jax.training.checkpoint import Checkpoints
from mclr_jax.types import Condition

SHAPES = {
    "blocks": {"qkv": {"kernel": (2, 9, 12), "bias": (2, 12)}},  # of two blocks
    "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)},
    "dense": {"kernel": (10, 7)},
    "narrow": {"kernel": (10, 2)},  # no larger than factors of rank 2
    "map_label": {"embedding": (5, 6)},
}


def drawn(shapes, seed):
    draw = np.random.default_rng(seed).normal
    leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda x: np.float32(draw(size=x)), shapes, is_leaf=leaf)


def started(given, shapes=SHAPES, base=None, new=(), seed=0):
    base = drawn(SHAPES if base is None else base, 1)
    return given.start(jax.random.key(seed), drawn(shapes, 0), base, new)


def paths(tree):
    return {"/".join(path): x.shape for path, x in traverse_util.flatten_dict(tree).items()}


# ---- the weights in training ---------------------------------------------------------------------


def test_each_block_and_kernel_has_factors_of_the_rank():
    assert paths(started(Adapter(rank=2))) == {
        "blocks/qkv/kernel/down": (2, 9, 2), "blocks/qkv/kernel/up": (2, 2, 12),
        "conv/kernel/down": (36, 2), "conv/kernel/up": (2, 8),
        "dense/kernel/down": (10, 2), "dense/kernel/up": (2, 7), "narrow/kernel": (10, 2),
    }  # fmt: skip
    assert paths(started(Adapter(rank=2, match="qkv|conv", freeze="^conv"))).keys() == {
        "blocks/qkv/kernel/down", "blocks/qkv/kernel/up"}  # fmt: skip
    shapes = {"dense": {"kernel": (900, 400)}}
    wide = started(Adapter(rank=2), shapes, shapes)["dense"]["kernel"]
    assert wide["down"].std() == pytest.approx(1 / 30, rel=0.05)
    assert not wide["up"].any()


def test_without_a_rank_all_is_trained_but_frozen_layers():
    found = started(Adapter(freeze="bias|^dense"))
    assert paths(found).keys() == {
        "blocks/qkv/kernel", "conv/kernel", "narrow/kernel", "map_label/embedding"}  # fmt: skip
    assert not Adapter().used


def test_what_the_base_does_not_have_is_trained_as_it_is():
    base = SHAPES | {"map_label": {"embedding": (3, 6)}}
    more = SHAPES | {"map_strength": {"kernel": (8, 40)}}
    found = paths(started(Adapter(rank=2, match="qkv", freeze="map"), more, base))
    assert found.keys() - paths(started(Adapter(rank=2, match="qkv"))).keys() == {
        "map_label/embedding", "map_strength/kernel"}  # fmt: skip
    assert "map_label/embedding" in paths(started(Adapter(rank=2), new=["map_label"]))


@pytest.mark.parametrize("given", [{"match": "qvk"}, {"freeze": "."}])
def test_nothing_to_train_is_an_error(given):
    with pytest.raises(ValueError, match="leave nothing to train; the paths are blocks/qkv/bias,"):
        started(Adapter(rank=2, **given))
    with pytest.raises(ValueError, match=r"config.adapter.match is '\('; expected a regular exp"):
        Adapter(match="(")


# ---- merged --------------------------------------------------------------------------------------


def by_numpy(base, trained, scale):
    """The merged kernels by path: sums over the rank, one block and one tap at a time."""
    (qkv, conv), old = (trained[name] for name in ("blocks", "conv")), base
    qkv, conv = qkv["qkv"]["kernel"], conv["kernel"]
    blocks = np.array(old["blocks"]["qkv"]["kernel"], np.float64)
    for block in range(2):
        for r in range(2):
            blocks[block] += scale * np.outer(qkv["down"][block, :, r], qkv["up"][block, r])
    taps = np.array(old["conv"]["kernel"], np.float64)
    for i in range(3):
        for j in range(3):
            here = conv["down"].reshape(3, 3, 4, 2)[i, j]
            taps[i, j] += scale * np.einsum("cr,rd->cd", here, conv["up"])
    return {"blocks/qkv/kernel": blocks, "conv/kernel": taps}


def moved(tree, seed):
    return jax.tree.map(lambda x, y: x + y, tree, drawn(jax.tree.map(jnp.shape, tree), seed))


def test_merged_kernels_are_the_sum():
    given, base = Adapter(rank=2, scale=0.5), drawn(SHAPES, 1)
    start = started(given)
    shapes = jax.tree.map(np.asarray, base)
    first = given.merged(shapes, base, given.of(start, base))
    chex.assert_trees_all_equal(first, base)  # bit for bit
    assert {x.dtype for x in jax.tree.leaves((start, first))} == {np.dtype(np.float32)}
    trained = moved(start, 2)
    merged = traverse_util.flatten_dict(given.merged(shapes, base, trained), sep="/")
    for path, expected in by_numpy(base, trained, 0.5).items():
        np.testing.assert_allclose(merged.pop(path), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(merged.pop("narrow/kernel"), trained["narrow"]["kernel"])
    del merged["dense/kernel"]
    old = traverse_util.flatten_dict(base, sep="/")
    chex.assert_trees_all_equal(merged, {path: old[path] for path in merged})


def test_the_gradient_of_the_factors_is_that_of_the_kernel_projected():
    given, base = Adapter(rank=2, scale=0.5), drawn(SHAPES, 1)
    trained, target = moved(started(given), 2), drawn(SHAPES, 3)

    def loss(params):
        return sum(jnp.vdot(jnp.sin(x), y) for x, y in
                   zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))  # fmt: skip

    merge = functools.partial(given.merged, base, base)
    full, got = jax.grad(loss)(merge(trained)), jax.grad(lambda x: loss(merge(x)))(trained)
    slope, factors = full["blocks"]["qkv"]["kernel"], trained["blocks"]["qkv"]["kernel"]
    expected = {"down": 0.5 * slope @ factors["up"].swapaxes(1, 2),
                "up": 0.5 * factors["down"].swapaxes(1, 2) @ slope}  # fmt: skip
    chex.assert_trees_all_close(got["blocks"]["qkv"]["kernel"], expected, rtol=1e-5, atol=1e-5)
    slope, factors = full["conv"]["kernel"].reshape(36, 8), trained["conv"]["kernel"]
    expected = {"down": 0.5 * slope @ factors["up"].T, "up": 0.5 * factors["down"].T @ slope}
    chex.assert_trees_all_close(got["conv"]["kernel"], expected, rtol=1e-5, atol=1e-5)


X = np.random.default_rng(3).normal(size=(2, 4, 4, 6)).astype(np.float32)
LAYERS = {
    "dense": (Linear(8), (X,)),
    "convolution": (Linear(8, kernel_size=3, stride=2), (X,)),
    "bfloat16": (Linear(8, dtype=jnp.bfloat16), (X,)),
    "normalised": (MPLinear(8, kernel_size=3), (X,)),
    "blocks": (DiT(num_classes=3, width=8, depth=2, heads=1, out_channels=6, scan_blocks=True),
               (X, np.float32([0.1, 0.2]), Condition(np.int32([0, 3])))),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_an_update_is_that_of_the_merged_kernel(name):
    network, inputs = LAYERS[name]
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    base = drawn(jax.tree.map(lambda x: x.shape, shapes), 1)
    given = Adapter(rank=2, scale=0.5)
    trained = moved(given.start(jax.random.key(0), base, base), 2)
    answer = jax.jit(lambda params: network.apply({"params": params}, *inputs))
    expected = answer(given.merged(shapes, base, trained))
    found = answer(given.merged(shapes, base, trained, in_layers=True))
    assert found.dtype == expected.dtype
    limit = 0.02 if name == "bfloat16" else 1e-4
    scale = np.abs(np.float32(expected)).max()
    np.testing.assert_allclose(np.float32(found) / scale, np.float32(expected) / scale, atol=limit)
    assert not np.allclose(answer(base), expected, rtol=0.1)


# ---- rows of new labels --------------------------------------------------------------------------

# A network of each kind of label embedding: tables, of one and of all blocks; kernels of one-hots.
LABELLED = {
    "mlp": lambda n: (MLP(num_classes=n, width=8, depth=1), (2,)),
    "own_embeddings": lambda n: (DiT(num_classes=n, width=8, depth=2, heads=1, out_channels=1,
                                     own_embeddings=True), (4, 4, 1)),
    "ddpmpp": lambda n: (UNet(num_classes=n, channels=4, channel_mult=(1,), num_blocks=1,
                              attention_resolutions=(), out_channels=1), (4, 4, 1)),
    "edm2": lambda n: (EDM2(num_classes=n, channels=4, channel_mult=(1,), num_blocks=1,
                            attention_resolutions=(), out_channels=1), (4, 4, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", LABELLED)
def test_the_null_answer_of_a_base_is_kept_for_other_classes(name):
    """Bit for bit, whether rows are drawn anew, as initial weights have them, or the null label's.

    The new classes are not those of the base, and differ unless all begin at the null label.
    """

    def model(classes):
        network, shape = LABELLED[name](classes)
        return Model(network, EDM(0.5), DataInfo(shape, classes, 0.5))

    old, new = model(5), model(3)
    base, fresh = tiny.weights(old, 1), tiny.weights(new, 2)
    levels = np.full((4, *old.frames), 0.7, np.float32)
    x = np.random.default_rng(3).normal(size=(4, *old.data.shape)).astype(np.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def answers(model, params):
        each = [np.full(4, label, np.int32) for label in range(model.null_label + 1)]
        return jax.lax.map(lambda label: model.denoise(params)(x, levels, label), np.stack(each))

    *_, null = answers(old, base)
    for at_null in (False, True):
        params = adapter.relabelled(base, fresh, new.label_inputs, at_null)
        params = runs.fitted(params, new, "base", old)
        *classes, kept = answers(new, params)
        np.testing.assert_array_equal(kept, null)
        for one in classes:
            assert np.array_equal(one, null) == at_null
        assert np.array_equal(*classes[:2]) == at_null


# ---- a training ----------------------------------------------------------------------------------


def others(split="train", count=5, names=()):
    """Points of other classes than those of the mixture."""
    draw = np.random.default_rng(split == "test")
    points = draw.normal(size=(40, 2)).astype(np.float32)
    return Arrays(points, np.arange(40, dtype=np.int32) % count, count, class_names=names)


def named(split="train"):
    return others(split, 3, ("ant", "bee", "cat"))


def renamed(split="train"):
    return others(split, 3, ("eel", "fox", "gnu"))


WIDE = {"network.width": 256, "network.dropout": 0.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The directory of a run with random weights."""
    place = tmp_path_factory.mktemp("runs") / "base"
    cases.untrained(place, tiny.config(**WIDE), size=0.06)
    return place


def tuning(base, steps=4, **changes):
    return tiny.config(**WIDE | {
        "init_from": str(base), "num_steps": steps, "checkpoint_every": 2, "log_every": 2,
        "objective.name": "mclr_null", "adapter.rank": 2, "optimizer.schedule": "constant",
        "optimizer.learning_rate": 0.01, "eval_examples": 0, **changes})  # fmt: skip


def raw(workdir, step=4):
    with Checkpoints(workdir / "checkpoints", keep=None) as store:
        return jax.device_get(store._manager.restore(step)["state"])


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_an_adapter_is_a_run_whose_checkpoints_have_its_factors_alone(base, tmp_path, monkeypatch):
    shown = []

    def generate_none(model, params, labels, sampler):
        shown.append(params)
        return np.zeros((len(labels), 2), np.float32)

    monkeypatch.setattr(generate, "generate", generate_none)
    here = shutil.copytree(base, tmp_path / "base")
    tuned = functools.partial(tuning, here, parallel="fsdp")
    state = main.train(tuned(sample_every=4, eval_examples=16), tmp_path / "whole")
    assert state.params["block0"]["affine"]["kernel"]["up"].sharding.spec == jax.P(None, "data")
    run, start = runs.load(tmp_path / "whole"), runs.load(base).weights()[0]
    stored = raw(tmp_path / "whole")
    expected = paths(Adapter(rank=2).start(jax.random.key(0), start, start))
    assert paths(stored["params"]) == paths(stored["ema"]["halflife"]) == expected
    assert "block0/affine/kernel/up" in expected
    assert "map_label/embedding" not in expected
    whole, saved = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (start, state))
    assert saved < whole / 10  # with both moments and the average
    assert 4 * saved < size(tmp_path / "whole" / "checkpoints" / "4") < 4 * whole / 2  # in 8 shards

    # Merged, wherever weights are asked for.
    params, _ = run.weights()
    chex.assert_trees_all_equal_shapes_and_dtypes(params, shapes_of(run.model))
    chex.assert_trees_all_close(jax.device_get(shown), [params], rtol=1e-5, atol=1e-6)
    factors = stored["ema"]["halflife"]["block0"]["affine"]["kernel"]
    old, new = (tree["block0"]["affine"]["kernel"] for tree in (start, params))
    np.testing.assert_allclose(new, old + factors["down"] @ factors["up"], rtol=1e-5, atol=1e-6)
    assert np.abs(new - old).max() > 1e-3
    chex.assert_trees_all_equal(params["map_label"], start["map_label"])
    chex.assert_trees_all_equal(run.weights(interpolation=0.0)[0], start)
    half = jax.tree.map(lambda a, b: (a + b) / 2, start, params)
    chex.assert_trees_all_close(run.weights(interpolation=0.5)[0], half, atol=1e-6)

    # Resumed, without the base, to the same bits.
    main.train(tuned(2), tmp_path / "parts")
    shutil.rmtree(here)
    chex.assert_trees_all_equal(main.train(tuned(), tmp_path / "parts"), state)
    chex.assert_trees_all_equal(runs.load(tmp_path / "parts").weights()[0], params)
    with pytest.raises(
        ValueError, match=r"other model or other data: config\.adapter\.rank is now 3"
    ):
        main.train(tuned(6, **{"adapter.rank": 3}), tmp_path / "parts")


def test_objectives_see_the_merged_models_and_the_base(base):
    """The reference is the base; the model in training, itself and its average are merged."""
    training = Training.parse(tuning(base, **{"objective.teacher": "average"}))
    model = runs.load(base).model
    task = training.task(model.data, {"reference": model})
    assert training.runs == {"reference": str(base)}
    assert task.frozen == {"reference": model}
    start = task.init()
    params, average = (jax.tree.map(lambda x: 0.1 * x, moved(start, seed)) for seed in (1, 2))
    frozen = {"reference": tiny.weights(model, 3), "average": average}
    models = task._models(params, frozen)
    inputs = np.float32([[0.3, -0.2]]), np.float32([0.5]), np.int32([1])
    chex.assert_trees_all_equal(task.shapes, jax.eval_shape(lambda: params))
    for answer, weights in [
        (models.denoise, task.merged(params, frozen)),
        (models.frozen["average"].denoise, task.merged(average, frozen)),
        (models.frozen["reference"].denoise, frozen["reference"]),
    ]:
        expected = model.denoise(weights)(*inputs)
        np.testing.assert_allclose(answer(*inputs), expected, rtol=1e-4)
        assert not np.allclose(expected, models.denoise(*inputs[:2], np.int32([3])), rtol=1e-3)


def test_a_base_is_tuned_to_other_classes_with_frozen_layers(base, tmp_path, caplog):
    """Frozen layers stay bit for bit in all averages, and new rows are trained nonetheless."""
    changes = {"data.name": f"{__name__}:others", "adapter.rank": 0, "optimizer.weight_decay": 0.1,
               "adapter.freeze": "map|_linear"}  # fmt: skip
    message = r"at its classes, and the data have other ones: 3 there, 5 here\..*teacher='average'"
    with pytest.raises(ValueError, match=message):
        main.train(tuning(base, 2, **changes), tmp_path / "run")
    changes |= {"objective.wrong": "source", "objective.teacher": "average"}
    main.train(tuning(base, 2, **changes), tmp_path / "run")
    assert re.search("The classes of .* are drawn anew; the null label's is kept", caplog.text)
    start, run = runs.load(base).weights()[0], runs.load(tmp_path / "run")
    assert raw(tmp_path / "run", 2)["params"].keys() == {"block0", "map_label"}
    for average in run.averages[0], "none":
        tuned, first = (run.weights(average, interpolation=place)[0] for place in (1.0, 0.0))
        for name in start.keys() - {"block0", "map_label"}:
            chex.assert_trees_all_equal(tuned[name], start[name])
        for a, b in zip(*(jax.tree.leaves(x["block0"]) for x in (tuned, start)), strict=True):
            assert not np.array_equal(a, b)
        rows, new = (x.pop("map_label")["embedding"] for x in (first, tuned))
        assert rows.shape == (6, WIDE["network.width"])
        np.testing.assert_array_equal(rows[:5], new[:5])
        np.testing.assert_array_equal(rows[5], start["map_label"]["embedding"][3])
        assert not np.array_equal(new[5], rows[5])
        chex.assert_trees_all_equal(first, {name: start[name] for name in first})
    main.train(tuning(base, 4, **changes), tmp_path / "run")


@pytest.mark.parametrize(("asked", "found"), [("auto", "drawn"), ("keep", ""), ("null", "null")])
def test_classes_of_other_names_are_others_unless_they_are_kept(asked, found, tmp_path):
    tiny.describe(tmp_path / "base", **{"data.name": f"{__name__}:named"})

    def new_labels(function, **more):
        changes = {"init_from": str(tmp_path / "base"), "data.name": f"{__name__}:{function}"}
        given = Training.parse(tiny.config(**changes, **more))
        return Experiment(given, tmp_path / "run").new_labels

    assert new_labels("renamed", new_labels=asked) == found
    assert new_labels("named") == ""
    with pytest.raises(
        ValueError, match=r"another number of classes: 3 \(ant, bee, cat\) there, 5 "
    ):
        new_labels("others", new_labels="keep")
