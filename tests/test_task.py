"""The loss of a task: what the objective and frozen models get; rows are on their own."""

import dataclasses
import itertools
from typing import Any, ClassVar

import cases
import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mclr_jax import reductions
from mclr_jax.config import OBJECTIVES, Training
from mclr_jax.data.augment import augment
from mclr_jax.data.pixels import random_flip
from mclr_jax.denoiser import EDM, Scales, denoiser
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.noise import LogNormal
from mclr_jax.objectives.base import Batch, Problem, split
from mclr_jax.objectives.dsm import DSM
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.objectives.rivals import CCA, DDO, DPO, GFT, ModelGuidance
from mclr_jax.posterior import Classifier, Exact
from mclr_jax.task import Task
from mclr_jax.types import Condition


def test_the_loss_is_the_objective_on_scaled_and_flipped_data():
    """A network without weights gives 0, so that the loss is that of c_skip x."""
    data = DataInfo((8, 8, 1), 10, 0.5)
    task = Training.parse(tiny.config("digits", **{"data.flip": True})).task(data, {})
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    batch = {"image": images, "label": jnp.arange(4)}
    keys = jax.random.split(jax.random.key(0), 4)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes_of(task.model))
    loss, _ = jax.jit(lambda: task.loss(zeros, {}, batch, keys, train=True))()
    k_flip, _, _, k_objective = split(keys, 4)
    scaled = jnp.asarray(images / np.float32(127.5) - 1)
    x0 = random_flip(scaled, k_flip)
    assert np.any(x0 != scaled)
    models = cases.models(denoiser(EDM(0.5), lambda x, c_noise, condition: 0 * x))
    given = Batch(x0, Condition(jnp.arange(4)))
    expected, _ = DSM()(models, task.problem, given, k_objective)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# ---- rows are on their own -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name in cases.ROWS[1::2]))
    for name in cases.CASES
])  # fmt: skip
def test_the_loss_of_some_rows_ignores_the_others(name):
    """And metrics of the parts of a batch add up: devices and accumulation agree.

    Two batches have the same parts as two others with the partners exchanged.
    """
    task = cases.task(name)
    params, frozen, batch = cases.params(task), cases.frozen(task), cases.batch(task)
    if "average" in task.needs:
        frozen["average"] = cases.moved(params, 9)
    keys = jax.random.split(jax.random.key(8), 16)

    @jax.jit
    def run(rows):
        own, own_keys = jax.tree.map(lambda x: x[rows], (batch, keys))
        loss, found = task.loss(params, frozen, own, own_keys, train=True)
        return loss, reductions.over_rows({**found, "loss": reductions.mean(loss)})

    # parts of 4 rows, the fewest that every negative_share divides
    parts = np.arange(16).reshape(4, 4)
    pairs = {(i, j): run(np.r_[parts[i], parts[j]]) for i in (0, 1) for j in (2, 3)}
    losses = {pair: np.split(loss, 2) for pair, (loss, _) in pairs.items()}
    for i, j in [(0, 1), (1, 0)]:
        np.testing.assert_allclose(losses[i, 2][0], losses[i, 3][0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(losses[i, 2][1], losses[j, 2][1], rtol=1e-5, atol=1e-6)
    totals = [
        reductions.over_rows(jax.tree.map(lambda *x: jnp.stack(x), pairs[0, j][1], pairs[1, k][1]))
        for j, k in [(2, 3), (3, 2)]
    ]
    chex.assert_trees_all_close(*totals, rtol=1e-5, atol=1e-6)
    assert len(np.unique([losses[0, 2], losses[1, 3]])) == 16
    report = reductions.report(totals[0])
    assert np.isfinite(list(report.values())).all()
    assert name.startswith("mclr") == ("margin" in report)  # some rows have a contrast


def test_the_cases_have_every_pair_of_mclrs_options():
    values = [sorted({row[i] for row in cases.MCLR}, key=repr) for i in range(7)]
    assert list(map(len, values)) == [3, 2, 2, 2, 3, 2, 2]
    for i, j in itertools.combinations(range(7), 2):
        wanted = set(itertools.product(values[i], values[j])) - {("posterior", "cfg")}
        assert {(row[i], row[j]) for row in cases.MCLR} == wanted
    assert {changes["objective.name"] for changes in cases.CASES.values()} == set(OBJECTIVES)


# ---- what the models are shown -------------------------------------------------------------------

CALLS: list[tuple[str, Any, Condition]] = []  # (tag, own parameter, condition) of every call


@dataclasses.dataclass(frozen=True)
class Plain:
    """The network's answer is the denoiser's."""

    levels: ClassVar[tuple[float, float]] = (0.0, float("inf"))

    def scales(self, sigma):
        one = jnp.ones_like(sigma)
        return Scales(one, 0 * one, one, sigma)


class Spy(nn.Module):
    """Keeps the conditions that it is shown; its answer depends on all of them."""

    tag: str
    gives: str = "denoised"
    augment_dim: int = 9
    dropout: float = 0.5

    @nn.compact
    def __call__(self, x, c_noise, condition):
        own = self.param("own", nn.initializers.ones, ())
        CALLS.append((self.tag, own, condition))
        shown = condition.label + condition.augment.sum(-1)
        if condition.strength is not None:
            shown += 10 * condition.strength
        if condition.dropout_keys is not None:
            shown += 100 * jax.vmap(jax.random.uniform)(condition.dropout_keys)
        answer = own * (1 + x + shown[:, None, None, None])
        return answer.reshape(len(x), -1)[:, :3] if self.gives == "logits" else answer


DATA = DataInfo((4, 4, 1), 3, 0.5, (0.5, 0.3, 0.2))
REFERENCE = Model(Spy("reference"), Plain(), DATA, (0.0, 2.0))
CLASSIFIER = Model(Spy("classifier", "logits"), Plain(), DATA)
NUMBERS = {"reference": 2.0, "average": 3.0, "classifier": 4.0}  # own parameters; the model's is 1
LABEL = jnp.arange(6, dtype=jnp.int32) % 3
KEYS = jax.random.split(jax.random.key(0), 6)


IMAGES = np.random.default_rng(0).integers(0, 256, (3, 6, 4, 4, 1), np.uint8)
BATCH = {
    "image": IMAGES[0], "label": LABEL, "other_image": IMAGES[1], "other_label": LABEL,
    "generated_image": IMAGES[2], "generated_label": (LABEL + 1) % 3,
}  # fmt: skip


def make(objective, strength=(), **fields: Any) -> Task:
    """A task of a spy, on images with augmentation."""
    defaults = {
        "model": Model(Spy("model"), Plain(), DATA, strength),
        "optimizer": optax.sgd(1.0),
        "learning_rate": lambda step: 1.0,
        "averages": {},
        "companions": {"reference": REFERENCE, "classifier": CLASSIFIER},
        "augment": 0.7,
    }
    levels, prior = LogNormal(0.0, 0.5), DATA.class_prior
    problem = Problem(levels, jnp.ones_like, 3, prior, 0.5, strength=strength)
    return Task(objective=objective, problem=problem, **defaults | fields)


def loss(task, numbers=NUMBERS, own=1.0, train=True):
    frozen = {name: {"own": jnp.asarray(number, jnp.float32)} for name, number in numbers.items()}
    return task.loss({"own": jnp.float32(own)}, frozen, BATCH, KEYS, train)


def calls(task, train=True):
    """(tag, own parameter, condition) of the calls that the loss of one batch makes."""
    CALLS.clear()
    loss(task, train=train)
    return [(tag, float(own), condition) for tag, own, condition in CALLS]


def augment_label(task):
    """What augmentation tells the network, (6, 9)."""
    return augment(jnp.zeros((6, 4, 4, 1)), split(KEYS, 4)[1], task.augment)[1]


FROZEN = {
    "gft": (GFT(), None, 1.0),
    "model_guidance": (ModelGuidance(), None, 3.0),
    "cca": (CCA(), None, 2.0),
    "dpo": (DPO(), None, 2.0),
    "mclr_null": (NullMCLR(), None, 2.0),
    "mclr_null average": (NullMCLR(teacher="average"), None, 3.0),
    "mclr target": (MCLR(target="reference", negatives="prior"), None, 2.0),
    "mclr classifier": (MCLR(), Classifier(), 4.0),
}


@pytest.mark.parametrize("strength", [(), (0.5, 2.0)], ids=["", "strength"])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_models_are_told_of_augmentation_but_have_no_dropout_and_strength_0(name, strength):
    objective, its_posterior, own = FROZEN[name]
    task = make(objective, strength, posterior=its_posterior)
    label = augment_label(task)
    assert np.abs(label).max() > 0
    found = calls(task)
    held = [call for call in found if call[2].dropout_keys is None]
    trained = [call for call in found if call[2].dropout_keys is not None]
    assert [number for _, number, _ in held] == [own]
    assert [(tag, number) for tag, number, _ in trained] == [("model", 1.0)]
    for tag, _, condition in found:  # a call may be for several labels of the same rows
        times = len(condition.label) // 6
        np.testing.assert_array_equal(condition.augment, np.tile(label, (times, 1)), err_msg=tag)
    shown = held[0][2].strength
    assert shown is None or not np.asarray(shown).any()
    told = trained[0][2].strength
    if not strength:
        assert told is None
    elif name in ("cca", "dpo", "model_guidance"):  # they draw none
        assert not np.asarray(told).any()
    else:
        assert np.all((told >= 0.5) & (told <= 2.0))


@pytest.mark.parametrize("classes", [3, 7])
def test_the_source_is_asked_at_its_own_null_label(classes):
    source = Model(Spy("reference"), Plain(), DataInfo((4, 4, 1), classes, 0.5))
    found = calls(make(NullMCLR(wrong="source", teacher="average"),
                       companions={"reference": source}))  # fmt: skip
    shown = [condition.label for tag, _, condition in found if tag == "reference"]
    np.testing.assert_array_equal(shown, np.full((1, 6), classes))


def test_samples_of_the_frozen_model_are_not_augmented():
    task = make(DDO())
    found = calls(task)
    assert [tag for tag, _, _ in found] == ["model", "reference"] * 2
    for i, (tag, _, condition) in enumerate(found):
        np.testing.assert_array_equal(condition.augment, augment_label(task) * (i < 2))
        np.testing.assert_array_equal(condition.label, LABEL if i < 2 else (LABEL + 1) % 3)
        assert (condition.dropout_keys is None) == (tag == "reference")


def test_evaluation_neither_augments_nor_flips_nor_drops_out():
    task = make(DSM(label_dropout=0.0), flip=True)
    ((_, _, condition),) = calls(task, train=False)
    assert condition.dropout_keys is None
    assert not np.asarray(condition.augment).any()
    plain = loss(make(DSM(label_dropout=0.0), augment=0.0), train=False)[0]
    np.testing.assert_array_equal(loss(task, train=False)[0], plain)
    assert np.abs(loss(task)[0] - plain).min() > 0


def test_dropout_keys_differ_by_example_and_a_network_without_dropout_gets_none():
    ((_, _, condition),) = calls(make(DSM()))
    keys = jax.random.key_data(condition.dropout_keys)
    assert len(np.unique(keys, axis=0)) == 6
    model = Model(Spy("model", dropout=0.0), Plain(), DATA)
    ((_, _, condition),) = calls(make(DSM(), model=model))
    assert condition.dropout_keys is None


@dataclasses.dataclass(frozen=True)
class AskAll:
    """The sum of all answers of one kind of model."""

    trained: bool = False
    needs = frozenset({"self", "average", "reference", "classifier", "posterior"})

    def __call__(self, models, problem, batch, keys):
        inputs = batch.x0, jnp.ones(6), batch.condition
        if self.trained:
            return models.denoise(*inputs).sum((1, 2, 3)), {}
        assert set(models.frozen) == self.needs - {"posterior"}
        denoisers = ("self", "average", "reference")
        total = sum(models.frozen[name].denoise(*inputs).sum((1, 2, 3)) for name in denoisers)
        total += models.frozen["classifier"].logits(*inputs).sum(-1)
        return total + models.posterior(*inputs, keys).sum(-1), {}


def test_only_the_model_in_training_has_a_gradient():
    for trained in (False, True):
        task = make(AskAll(trained), posterior=Classifier())

        def mean_loss(own, numbers, task=task):
            return loss(task, numbers, own)[0].mean()

        own, others = jax.jit(jax.grad(mean_loss, argnums=(0, 1)))(1.0, NUMBERS)
        assert (own != 0) == trained
        assert not any(others.values())


# ---- what the objective is given -----------------------------------------------------------------


def test_companion_examples_are_scaled_and_given_where_they_are_needed():
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Keep:
        needs: frozenset = frozenset({"other", "generated"})

        def __call__(self, models, problem, batch, keys):
            seen.append(batch)
            return jnp.zeros(6), {}

    loss(make(Keep()))
    np.testing.assert_allclose(seen[0].other, IMAGES[1] / 127.5 - 1, rtol=1e-5, atol=1e-6)
    x, label = seen[0].generated
    np.testing.assert_allclose(x, IMAGES[2] / 127.5 - 1, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(label, (LABEL + 1) % 3)
    np.testing.assert_array_equal(seen[0].condition.label, LABEL)
    loss(make(Keep(frozenset())))
    assert seen[1].other is None
    assert seen[1].generated is None


@pytest.mark.parametrize(("objective", "its_posterior", "names"), [
    (DSM(), None, set()),
    (ModelGuidance(), None, set()),
    (CCA(), None, {"reference"}),
    (MCLR(), Exact(), set()),
    (MCLR(), Classifier(), {"classifier"}),
    (MCLR(negatives="prior"), Classifier(), set()),  # which asks no posterior
    (MCLR(negatives="prior", target="reference"), Classifier(), {"reference"}),
    (MCLR(negatives="prior", weighting="cfg"), Classifier(), {"classifier"}),
])  # fmt: skip
def test_companions_are_held_where_they_are_needed(objective, its_posterior, names):
    """By the objective or by its posterior."""
    task = make(objective, posterior=its_posterior)
    assert set(task.frozen) == names
    assert all(task.frozen[name] is task.companions[name] for name in names)


def test_sampling_takes_the_first_average_or_the_parameters():
    averages = {"second": lambda step: 0.0, "first": lambda step: 0.0}
    kept = {"first": 1, "second": 2}  # a mapping of another order, as JAX returns it
    assert make(DSM(), averages=averages).default(0, kept) == 2
    assert make(DSM()).default(0, {}) == 0


def test_parameters_and_keys_follow_from_the_seed():
    tasks = [cases.task("dsm"), cases.task("dsm"), cases.task("dsm", seed=1)]
    one, same, other = (task.init() for task in tasks)
    chex.assert_trees_all_equal(one, same)
    kernels = [np.asarray(tree["in_linear"]["kernel"]) for tree in (one, other)]
    assert np.abs(kernels[0] - kernels[1]).min() > 0
    keys = [key for task in tasks[1:] for key in (task.step_key, task.eval_key)]
    assert len(np.unique(jax.random.key_data(jnp.stack(keys)), axis=0)) == 4
    chex.assert_trees_all_equal(*(jax.random.key_data(task.step_key) for task in tasks[:2]))
