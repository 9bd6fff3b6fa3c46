"""MCLR's rivals against the optimum that theory gives each, on distributions known exactly."""

import dataclasses

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from cases import Level

from mclr_jax import guidance, noise
from mclr_jax.mixture import toy
from mclr_jax.noise import normal_like
from mclr_jax.objectives.base import Batch, perturb
from mclr_jax.objectives.rivals import CCA, DDO, DPO, GFT, ContrastiveFlow, ModelGuidance
from mclr_jax.training.step import TrainState, example_keys, make_update
from mclr_jax.types import Condition, label_of

DRAWS = 200_000


# ---- objectives on the log ratio r = log p_theta / p_ref ---------------------------------------
# Data take the values 0, 10, 20, 30. A model that answers x0 + sqrt(1 - r / WEIGHT), beside a
# reference that answers x0 + 1, has r(x, c) as its ratio. At the level below, 1 / sigma^2, which is
# the weight of DPO's noise error, is WEIGHT too.

WEIGHT = 100.0
PRIOR = np.array([0.5, 0.2, 0.3])
DATA = np.array([[0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4], [0.25, 0.15, 0.35, 0.25]])  # p(x|c)
MODEL = np.array([[0.3, 0.3, 0.2, 0.2], [0.2, 0.2, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]])


def draw(key, table):
    k_label, k_value = jax.random.split(key)
    label = jax.random.categorical(k_label, jnp.log(jnp.asarray(PRIOR)), shape=(DRAWS,))
    value = jax.random.categorical(k_value, jnp.log(jnp.asarray(table))[label])
    return 10.0 * value[:, None], label


def gradients_in_standard_errors(objective, ratios):
    """The largest gradient of the mean loss by an r(x, c), over its standard error, at each ratio.

    A ratio is a table (4, 3).
    """
    parts = 20
    problem = cases.problem(
        Level(WEIGHT**-0.5),
        weight=lambda sigma: jnp.full_like(sigma, WEIGHT),
        class_prior=tuple(PRIOR),
    )

    def gradient(ratio, x0, label, keys, generated):
        def mean_loss(table):
            def denoise(x, sigma, condition):
                value = jnp.round(x[:, 0] / 10).astype(int)
                offset = jnp.sqrt(1 - table[value, label_of(condition)] / WEIGHT)
                return (10 * value + offset)[:, None]

            models = cases.models(denoise, reference=lambda x, *_: 10 * jnp.round(x / 10) + 1)
            batch = Batch(x0, Condition(label), generated=generated)
            return objective(models, problem, batch, keys)[0].mean()

        return jax.grad(mean_loss)(ratio)

    @jax.jit
    def gradients(ratios):
        keys = jax.random.split(jax.random.key(1), DRAWS)
        everything = *draw(jax.random.key(0), DATA), keys, draw(jax.random.key(2), MODEL)
        pieces = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), everything)

        def of_piece(piece):
            return jax.lax.map(lambda ratio: gradient(ratio, *piece), ratios)

        return jax.lax.map(of_piece, pieces)

    found = np.asarray(gradients(jnp.asarray(ratios, jnp.float32)), np.float64)
    errors = found.std(0, ddof=1) / np.sqrt(parts)
    return np.abs(found.mean(0) / errors).max((1, 2))


@pytest.mark.parametrize(
    ("objective", "optimum"),
    [
        (CCA(0.5, 2.0, 0.0), np.log(DATA.T / (2.0 * (DATA.T @ PRIOR)[:, None])) / 0.5),
        (DDO(0.5, 1.5), np.log(DATA.T / (1.5 * MODEL.T)) / 0.5),
        (DPO(0.5, 0.0), 2 / 0.5 * np.log(DATA.T / (1 - PRIOR))),
    ],
    ids=["cca", "ddo", "dpo"],
)
def test_the_optimal_log_ratio_is_the_papers(objective, optimum):
    ratios = np.stack([optimum, 0 * optimum, 1.3 * optimum])
    right, *wrong = gradients_in_standard_errors(objective, ratios)
    assert right < 5
    assert min(wrong) > 15


# ---- objectives on the denoiser ----------------------------------------------------------------


def test_the_optimum_of_gft_is_cfg_of_one_over_b():
    exact, beta = toy(), 1.5
    guided = guidance.classifier_free(exact.denoise, 3, 1 + beta)  # b = 1 / (1 + beta)
    objective = GFT(beta, label_dropout=0.0)
    at_optimum, elsewhere = cases.slopes_in_standard_errors(
        objective, [guided, exact.denoise], self=exact.denoise
    )
    assert at_optimum < 4
    assert elsewhere > 20


def test_the_fixed_point_of_model_guidance_is_cfg_of_one_over_one_minus_w():
    exact, objective = toy(), ModelGuidance(label_dropout=0.0)
    guided = guidance.classifier_free(exact.denoise, 3, 1 / (1 - 0.45))
    weaker = guidance.classifier_free(exact.denoise, 3, 1.45)
    at_fixed_point, elsewhere = cases.slopes_in_standard_errors(
        objective, [guided, weaker], average=guided
    )
    assert at_fixed_point < 4
    assert elsewhere > 20


@pytest.mark.parametrize(("sigma", "guided"), [(0.5, False), (0.625, True), (1.5, True)])
def test_model_guidance_guides_at_the_upper_end_of_its_interval_alone(sigma, guided):
    """Levels of 1 and 3 times sigma_data, which are exact in float32."""
    x0, label = jnp.linspace(-2, 2, 12).reshape(6, 2), jnp.arange(6) % 3
    keys = jax.random.split(jax.random.key(0), 6)
    models = cases.models(
        lambda x, s, c: 0.3 * x, average=lambda x, s, c: x / 2 + 0.1 * label_of(c)[:, None]
    )

    def loss(interval):
        problem = cases.problem(Level(sigma), sigma_data=0.5)
        given = problem, Batch(x0, Condition(label)), keys
        return ModelGuidance(0.4, interval, 0.0)(models, *given)[0]

    everywhere, nowhere = loss((0.0, 99.0)), loss((90.0, 99.0))
    assert np.abs(everywhere - nowhere).max() > 1e-3
    expected = everywhere if guided else nowhere
    np.testing.assert_array_equal(loss((1.0, 3.0)), expected)


def test_the_optimum_of_contrastive_flow_matching():
    exact, share = toy(), 0.2
    mean = jnp.einsum("k,kc,kcd->d", exact.class_prior, exact.weights, exact.means)

    def optimum(x, sigma, condition):
        """(v_c - lambda E v~) / (1 - lambda) as a denoiser; E v~ is minus the data's mean."""
        s = sigma[:, None]
        velocity = x / s - (1 + 1 / s) * exact.denoise(x, sigma, condition)
        velocity = (velocity + share * mean) / (1 - share)
        return (x / s - velocity) / (1 + 1 / s)

    objective = ContrastiveFlow(share, label_dropout=0.0)
    at_optimum, elsewhere = cases.slopes_in_standard_errors(objective, [optimum, exact.denoise])
    assert at_optimum < 4
    assert elsewhere > 20


# ---- gradients of what the loop differentiates ---------------------------------------------------


def formula(task, params, teacher, batch, keys):
    """The mean loss of GFT or model guidance with the teacher's weights apart, by its equation."""
    own = noise.split(keys, 4)[3]
    dropout, problem = task.objective.label_dropout, task.problem
    x, sigma, shown, rest = perturb(
        problem, batch["image"], Condition(batch["label"]), own, dropout
    )
    null = Condition(jnp.full_like(batch["label"], 3))
    model, held = task.model.denoise(params), task.model.denoise(teacher)
    if isinstance(task.objective, GFT):
        uniform = jax.vmap(jax.random.uniform)(rest)
        low, high = (1 / (1 + s) for s in task.problem.strength)
        b = low + uniform * (high - low)
        told = jnp.where(shown.label == 3, 0.0, 1 / b - 1)
        combined = b[:, None] * model(x, sigma, shown.replace(strength=told))
        combined += (1 - b)[:, None] * held(x, sigma, null)
        difference = combined - batch["image"]
    else:
        inside = (sigma <= 3 * problem.sigma_data)[:, None]
        shift = 0.45 * inside * (held(x, sigma, shown) - held(x, sigma, null))
        difference = model(x, sigma, shown) - batch["image"] - shift
    return (problem.weight(sigma) * (difference**2).mean(-1)).mean()


def test_no_gradient_flows_through_the_teacher():
    """GFT's model and teacher have the same weights; the loop's gradient is by the model's."""
    task = cases.task("gft strength", **{"network.dropout": 0.0})
    params, batch = cases.params(task), cases.batch(task, 64)
    keys = jax.random.split(jax.random.key(5), 64)

    def loss(params):
        return task.loss(params, {}, batch, keys, train=True)[0].mean()

    @jax.jit
    def found(params):
        by_each = jax.value_and_grad(formula, (1, 2))(task, params, params, batch, keys)
        return *by_each, jax.value_and_grad(loss)(params)

    expected, (by_model, by_teacher), (value, ours) = found(params)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    chex.assert_trees_all_close(ours, by_model, rtol=1e-3, atol=1e-5)
    assert optax.tree.norm(by_teacher) > 0.02 * optax.tree.norm(by_model)


def test_the_reference_keeps_its_weights():
    """Where the model is its reference CCA's gain is 0; where it has moved, it is not."""
    task = cases.task("cca", **{"network.dropout": 0.0})
    params, batch = cases.params(task), cases.batch(task)
    keys = jax.random.split(jax.random.key(5), 16)
    run = jax.jit(lambda *params: task.loss(params[0], {"reference": params[1]}, batch, keys, True))
    same, metrics = run(params, params)
    assert float(abs(metrics["positive_ratio"].parts[0]).max()) == 0
    after, metrics = run(cases.moved(params, 7), params)
    assert float(abs(metrics["positive_ratio"].parts[0]).max()) > 0
    assert float(abs(after - same).max()) > 1e-3


def test_the_teacher_of_model_guidance_is_the_first_average():
    """One step of SGD, against the equation with the weights of the first track as the teacher."""
    task = cases.task("model_guidance", **{"network.dropout": 0.0}, **tiny.POWER)
    task = dataclasses.replace(task, optimizer=optax.sgd(1.0))
    assert list(task.averages) == ["halflife", "power_0.05", "power_0.1"]
    params, batch = cases.params(task), cases.batch(task, 64)
    averages = {n: cases.moved(params, 20 + i, 0.3) for i, n in enumerate(task.averages)}
    state = TrainState(jnp.int32(3), params, task.optimizer.init(params), averages)
    stacked = jax.tree.map(lambda x: x[None], batch)
    new, _ = make_update(task)(state, {}, stacked, 1)
    keys = example_keys(task.step_key, jnp.int32(3), batch["index"])
    taken = jax.tree.map(jnp.subtract, params, new.params)
    of = jax.jit(lambda weights: jax.grad(formula, 1)(task, params, weights, batch, keys))
    gradients = {name: of(weights) for name, weights in {"raw": params, **averages}.items()}
    chex.assert_trees_all_close(taken, gradients.pop("halflife"), rtol=1e-3, atol=1e-5)
    for name, other in gradients.items():
        off = optax.tree.norm(jax.tree.map(jnp.subtract, taken, other))
        assert off > 0.02 * optax.tree.norm(taken), name


# ---- frames --------------------------------------------------------------------------------------


class ByFrame:
    """The levels 0.5, 1 and 2, one for each frame."""

    def sample(self, key, shape):
        assert shape == (3,)
        return jnp.array([0.5, 1.0, 2.0])


def test_frames_have_weights_intervals_and_slopes_of_their_own():
    """Against each paper's formula, from what the network was shown."""
    x0 = jax.random.normal(jax.random.key(0), (5, 3, 2))
    other = jax.random.normal(jax.random.key(1), (5, 3, 2))
    batch = Batch(x0, Condition(jnp.zeros(5, jnp.int32)), other)
    keys = jax.random.split(jax.random.key(2), 5)
    problem = cases.problem(ByFrame(), weight=lambda sigma: 1 + sigma, frames=(3,))
    level, seen = np.array([0.5, 1.0, 2.0]), []

    def denoise(x, sigma, condition):
        np.testing.assert_array_equal(sigma, np.broadcast_to(level, (len(x), 3)))
        seen.append(x)
        return 0.7 * x + label_of(condition)[:, None, None]

    models = cases.models(denoise, average=denoise)

    def by_frame(values):  # (5, 3, 2) -> (5,)
        return ((1 + level) * (values**2).mean(-1)).mean(-1)

    loss, _ = ModelGuidance(0.4, (1.0, 3.0), 0.0)(models, problem, batch, keys)
    guided = np.array([0.0, 1.0, 0.0])[:, None]  # 0.5 < sigma <= 1.5
    target = x0 + 0.4 * guided * (0.0 - 3.0)
    np.testing.assert_allclose(loss, by_frame(0.7 * seen[-1] - target), rtol=1e-5)

    loss, _ = ContrastiveFlow(0.3, 0.0)(models, problem, batch, keys)
    x, s = seen[-1], level[:, None]
    velocity = x / s - (1 + 1 / s) * 0.7 * x
    wrong = normal_like(noise.split(keys, 4)[3], x0) - other
    expected = by_frame(0.7 * x - x0) - 0.3 * by_frame((velocity - wrong) / (1 + 1 / s))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
    # flow matching's own form, |v - (n - x)|^2 with n = (x_s - x) / s, has the same first term
    np.testing.assert_allclose(
        by_frame((velocity - ((x - x0) / s - x0)) / (1 + 1 / s)), by_frame(0.7 * x - x0), rtol=1e-4
    )
