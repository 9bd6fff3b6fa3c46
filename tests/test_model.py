"""A model is its network behind its preconditioning, with what the network lacks filled in."""

import pickle
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.denoiser import EDM, Epsilon
from mclr_jax.model import DataInfo, Model
from mclr_jax.networks.mlp import MLP
from mclr_jax.types import Condition

VECTORS = DataInfo((2,), 3, 0.7)
TRAJECTORIES = DataInfo((4, 2), 3, 0.7)
SHOWN: list[tuple[jax.Array, jax.Array, Condition]] = []  # what Spy was called with


class Spy(nn.Module):
    """A user's network: keeps what it is shown; its answer is 3 times its input plus its label."""

    gives: str = "denoised"
    augment_dim: int = 0
    takes_strength: bool = False
    per_frame: bool = False

    @nn.compact
    def __call__(self, x, c_noise, condition):
        SHOWN.append((x, c_noise, condition))
        gain = self.param("gain", nn.initializers.constant(3.0), ())
        label = condition.label.reshape(-1, *[1] * (x.ndim - 1))
        answer = gain * x + label
        self.sow("intermediates", "features", 2 * answer.reshape(len(x), -1))
        return jnp.tile(answer[..., :1], 3) if self.gives == "logits" else answer


class Called(NamedTuple):
    """A model's answer and what its network was shown for it."""

    answer: jax.Array
    x: jax.Array
    clock: jax.Array
    condition: Condition


def call(model, ask, *inputs):
    params = model.init(jax.random.key(0))
    SHOWN.clear()
    answer = getattr(model, ask)(params)(*inputs)
    (shown,) = SHOWN
    return Called(answer, *shown)


X, SIGMA = jnp.array([[0.5, -1.0], [2.0, 0.3]]), jnp.array([0.4, 3.0])


def test_a_denoiser_is_the_network_behind_its_preconditioning():
    """EDM's Table 1 written out, for a network whose answer is known."""
    got = call(Model(Spy(), EDM(0.7), VECTORS), "denoise", X, SIGMA, jnp.array([1, 2]))
    sigma = np.asarray(SIGMA, np.float64)[:, None]
    root = np.sqrt(sigma**2 + 0.49)
    raw = 3 * np.asarray(X) / root + np.array([[1], [2]])
    np.testing.assert_allclose(got.answer, 0.49 / root**2 * X + 0.7 * sigma / root * raw, 1e-5)
    np.testing.assert_allclose(got.x, X / root, rtol=1e-6)
    np.testing.assert_allclose(got.clock, np.log(sigma[:, 0]) / 4, rtol=1e-5)


@pytest.mark.parametrize("preconditioning", [EDM(0.7), Epsilon()])
def test_a_classifier_has_only_the_input_half(preconditioning):
    model = Model(Spy("logits"), preconditioning, VECTORS)
    got = call(model, "logits", X, SIGMA, jnp.array([1, 2]))
    scales = preconditioning.scales(SIGMA)
    np.testing.assert_allclose(got.x, scales.c_in[:, None] * X, rtol=1e-6)
    np.testing.assert_allclose(got.clock, scales.c_noise, rtol=1e-6)
    expected = 3 * scales.c_in * X[:, 0] + jnp.array([1, 2])
    np.testing.assert_allclose(got.answer, jnp.tile(expected[:, None], 3), rtol=1e-6)


@pytest.mark.parametrize("condition", [None, [1, 2]])
def test_what_a_condition_lacks_is_filled_in(condition):
    wants = Spy(augment_dim=9, takes_strength=True)
    model = Model(wants, EDM(), VECTORS, strength=(0.0, 2.0))
    shown = call(model, "denoise", X, SIGMA, condition).condition
    np.testing.assert_array_equal(shown.label, [3, 3] if condition is None else [1, 2])
    assert shown.label.dtype == jnp.int32
    np.testing.assert_array_equal(shown.augment, np.zeros((2, 9)))
    np.testing.assert_array_equal(shown.strength, np.zeros(2))
    assert shown.dropout_keys is None
    # a network that has no such inputs is given none
    shown = call(Model(Spy(), EDM(), VECTORS), "denoise", X, SIGMA, condition).condition
    assert (shown.augment, shown.strength) == (None, None)


def test_what_a_condition_has_is_left_as_it_is():
    keys = jax.random.split(jax.random.key(0), 2)
    given = Condition(jnp.array([1, 2]), jnp.array([0.5, 1.0]), jnp.ones((2, 9)), keys)
    model = Model(Spy(augment_dim=9, takes_strength=True), EDM(), VECTORS, (0.0, 2.0))
    found = call(model, "denoise", X, SIGMA, given).condition
    leaves = zip(jax.tree.leaves(found), jax.tree.leaves(given), strict=True)
    assert all(a is b for a, b in leaves)


# ---- frames --------------------------------------------------------------------------------------


def test_a_scalar_level_is_repeated_over_frames():
    model = Model(Spy(per_frame=True), EDM(0.7), TRAJECTORIES)
    assert model.frames == (4,)
    x, label = jax.random.normal(jax.random.key(0), (2, 4, 2)), jnp.array([0, 1])
    by_example = call(model, "denoise", x, SIGMA, label)
    by_frame = call(model, "denoise", x, jnp.tile(SIGMA[:, None], 4), label)
    assert by_example.clock.shape == by_frame.clock.shape == (2, 4)
    np.testing.assert_allclose(by_example.clock, by_frame.clock, rtol=1e-6)
    np.testing.assert_allclose(by_example.answer, by_frame.answer, rtol=1e-6)
    one_by_one = jnp.array([[0.1, 0.5, 1.0, 4.0], [2.0, 0.3, 0.2, 0.1]])
    got = call(model, "denoise", x, one_by_one, label)
    np.testing.assert_allclose(got.clock, np.log(one_by_one) / 4, rtol=1e-5)


@pytest.mark.parametrize("levels", [(2,), (2, 6)])
def test_a_network_may_run_on_more_frames_than_the_data_have(levels):
    model = Model(Spy(per_frame=True), EDM(0.7), TRAJECTORIES)
    x = jax.random.normal(jax.random.key(0), (2, 6, 2))
    got = call(model, "denoise", x, jnp.full(levels, 0.4), jnp.array([0, 1]))
    assert got.clock.shape == (2, 6)
    assert got.answer.shape == x.shape


def test_moments_are_the_answer_and_a_variance_where_the_network_has_one():
    """Spy's channels behind the answer are all alike: s = 3 c_in x + label."""
    plain = Model(Spy("logits"), EDM(0.7), TRAJECTORIES)
    with pytest.raises(ValueError, match="is a classifier"):
        plain.moments({})
    x, sigma = jax.random.normal(jax.random.key(0), (2, 5, 1)), jnp.array([0.4, 3.0])
    data = DataInfo((5, 1), 3, 0.7)

    class Tripled(Spy):
        variance: bool = True

        @nn.compact
        def __call__(self, x, c_noise, condition):
            return jnp.tile(Spy(per_frame=True)(x, c_noise, condition), 3)

    for variance in (True, False):
        model = Model(Tripled(per_frame=True, variance=variance), EDM(0.7), data)
        assert model.has_variance == variance
        params = model.init(jax.random.key(0))
        mean, v = model.moments(params)(x, sigma, None)
        np.testing.assert_allclose(mean, model.denoise(params)(x, sigma, None), rtol=1e-6)
        total = (np.asarray(sigma) ** 2 + 0.49)[:, None, None]
        s = 3 * x / np.sqrt(total) + 3 if variance else 0 * x
        expected = np.asarray(sigma)[:, None, None] ** 2 * 0.49 / total * np.exp(s)
        np.testing.assert_allclose(v, expected, rtol=1e-4)
        assert mean.shape == v.shape == x.shape


def test_levels_by_frame_are_refused_by_a_network_that_takes_one():
    model = Model(Spy(), EDM(), TRAJECTORIES)
    assert model.frames == ()
    params = model.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"levels have shape \(2, 4\); Spy takes \(2,\)"):
        model.denoise(params)(jnp.ones((2, 4, 2)), jnp.ones((2, 4)), None)


# ---- two kinds of model --------------------------------------------------------------------------


def test_each_kind_refuses_what_it_cannot_do():
    denoiser = Model(Spy(), EDM(), VECTORS)
    classifier = Model(Spy("logits"), EDM(), VECTORS)
    assert (denoiser.is_classifier, classifier.is_classifier) == (False, True)
    assert denoiser.null_label == 3
    params = denoiser.init(jax.random.key(0))
    with pytest.raises(ValueError, match="Spy is a classifier: it gives logits and cannot denoise"):
        classifier.denoise(params)
    with pytest.raises(ValueError, match=r"Spy is no classifier\. Expected .*mlp_classifier"):
        denoiser.logits(params)
    label = jnp.array([0, 1])
    for model, possible, impossible in [(denoiser, 0, 1), (classifier, 1, 0)]:
        answers = model.answers(params)  # which must not raise before it is called
        own = getattr(model, answers._fields[possible])(params)(X, SIGMA, label)
        np.testing.assert_array_equal(answers[possible](X, SIGMA, label), own)
        with pytest.raises(ValueError, match="Expected"):
            answers[impossible](X, SIGMA, label)


def test_features_are_the_last_hidden_layer_beside_the_logits():
    model = Model(Spy("logits"), EDM(0.7), VECTORS)
    params = model.init(jax.random.key(0))
    features, logits = model.features(params, X, sigma=0.3)
    np.testing.assert_allclose(logits, model.logits(params)(X, jnp.full(2, 0.3), None), rtol=1e-6)
    expected = 2 * (3 * X / np.sqrt(0.09 + 0.49) + 3)  # at the null label
    np.testing.assert_allclose(features, expected, rtol=1e-5)


# ---- pure functions, compared by value -----------------------------------------------------------


def test_models_compare_and_hash_by_value():
    """So that what is compiled for one is found again for its equal."""

    def make(width=8, sigma_data=0.5, strength=(), prior=()):
        data = DataInfo((2,), 3, 0.7, prior)
        return Model(MLP(2, 3, width, 1), EDM(sigma_data), data, strength)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert pickle.loads(pickle.dumps(make())) == make()
    others = [make(9), make(8, 0.6), make(8, 0.5, (0.0, 1.0)), make(prior=(0.5, 0.3, 0.2))]
    assert len({make(), *others}) == 5
