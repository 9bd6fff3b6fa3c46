"""MCLR's rivals against the optimum that theory gives each, on distributions known exactly."""

import dataclasses
import json

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from cases import Level, Observed, answer, error, log_sigmoid

from configs import base
from mclr_jax import guidance, main, noise, runs
from mclr_jax.mixture import toy
from mclr_jax.noise import normal_like
from mclr_jax.objectives.base import perturb
from mclr_jax.objectives.rivals import (
    CCA,
    DDO,
    DPO,
    GFT,
    ContrastiveFlow,
    ModelGuidance,
)
from mclr_jax.problem import Batch
from mclr_jax.training.step import TrainState, example_keys, make_update
from mclr_jax.types import Condition, label_of, with_label

DRAWS = 200_000
RIVALS = ("cca", "contrastive_flow", "ddo", "dpo", "gft", "model_guidance")


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


def gradient_in_standard_errors(objective, ratio):
    """Gradient of the mean loss by each r(x, c), (4, 3), over its standard error."""
    x0, label = draw(jax.random.key(0), DATA)
    parts = 20
    problem = cases.problem(
        Level(WEIGHT**-0.5),
        weight=lambda sigma: jnp.full_like(sigma, WEIGHT),
        class_prior=tuple(PRIOR),
    )

    @jax.jit
    def gradient(x0, label, keys, generated):
        def mean_loss(table):
            def denoise(x, sigma, condition):
                value = jnp.round(x[:, 0] / 10).astype(int)
                offset = jnp.sqrt(1 - table[value, label_of(condition)] / WEIGHT)
                return (10 * value + offset)[:, None]

            models = cases.models(denoise, reference=lambda x, *_: 10 * jnp.round(x / 10) + 1)
            batch = Batch(x0, Condition(label), generated=generated)
            return objective(models, problem, batch, keys)[0].mean()

        return jax.grad(mean_loss)(jnp.asarray(ratio, jnp.float32))

    keys = jax.random.split(jax.random.key(1), DRAWS)
    everything = (x0, label, keys, draw(jax.random.key(2), MODEL))
    pieces = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), everything)
    gradients = np.asarray(jax.lax.map(lambda piece: gradient(*piece), pieces), np.float64)
    return gradients.mean(0) / (gradients.std(0, ddof=1) / np.sqrt(parts))


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("name", ["cca", "ddo", "dpo"])
def test_the_optimal_log_ratio_is_the_papers(name, beta):
    likelihood, marginal = DATA.T, DATA.T @ PRIOR  # (4, 3), (4,)
    if name == "cca":
        objective = CCA(beta, 2.0, label_dropout=0.0)
        optimum = np.log(likelihood / (2.0 * marginal[:, None])) / beta
    elif name == "ddo":
        objective = DDO(beta, 1.5)
        optimum = np.log(likelihood / (1.5 * MODEL.T)) / beta
    else:
        objective = DPO(beta, label_dropout=0.0)
        optimum = 2 / beta * np.log(likelihood / (1 - PRIOR))
    assert np.abs(gradient_in_standard_errors(objective, optimum)).max() < 5
    for wrong in (0 * optimum, 1.3 * optimum):
        assert np.abs(gradient_in_standard_errors(objective, wrong)).max() > 15


# ---- objectives on the denoiser ----------------------------------------------------------------


def slope_in_standard_errors(objective, denoise, mixture, sigma=0.8, **frozen):
    """Slope of the mean loss along D_c - D_0 + 0.3 tanh(x + c) at `denoise`, over its error."""
    k_data, k_other, k_loss = jax.random.split(jax.random.key(3), 3)
    x0, label = mixture.sample(k_data, DRAWS)
    batch = Batch(x0, Condition(label), other=mixture.sample(k_other, DRAWS)[0])

    def loss(epsilon):
        def moved(x, sigma, condition):
            null = with_label(condition, 3)
            direction = mixture.denoise(x, sigma, condition) - mixture.denoise(x, sigma, null)
            direction += 0.3 * jnp.tanh(x + label_of(condition)[:, None])
            return denoise(x, sigma, condition) + epsilon * direction

        keys = jax.random.split(k_loss, DRAWS)
        models = cases.models(moved, **frozen)
        return objective(models, cases.problem(Level(sigma)), batch, keys)[0]

    slopes = np.asarray(jax.jit(lambda: jax.jvp(loss, (0.0,), (1.0,))[1])(), np.float64)
    return abs(slopes.mean()) / (slopes.std() / np.sqrt(DRAWS))


def test_the_optimum_of_gft_is_cfg_of_one_over_b():
    exact = toy()
    beta = 1.5
    objective, frozen = GFT(beta, label_dropout=0.0), {"self": exact.denoise}
    guided = guidance.classifier_free(exact.denoise, 3, 1 + beta)  # b = 1 / (1 + beta)
    assert slope_in_standard_errors(objective, guided, exact, **frozen) < 4
    assert slope_in_standard_errors(objective, exact.denoise, exact, **frozen) > 20


def test_the_fixed_point_of_model_guidance_is_cfg_of_one_over_one_minus_w():
    exact = toy()
    guided = guidance.classifier_free(exact.denoise, 3, 1 / (1 - 0.45))
    objective, frozen = ModelGuidance(label_dropout=0.0), {"average": guided}
    assert slope_in_standard_errors(objective, guided, exact, **frozen) < 4
    weaker = guidance.classifier_free(exact.denoise, 3, 1.45)
    assert slope_in_standard_errors(objective, weaker, exact, **frozen) > 20
    # outside the interval it is plain DSM
    assert slope_in_standard_errors(objective, exact.denoise, exact, 3.5, **frozen) < 4


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
    assert slope_in_standard_errors(objective, optimum, exact) < 4
    assert slope_in_standard_errors(objective, exact.denoise, exact) > 20


# ---- the papers' equations, in NumPy ------------------------------------------------------------
# An objective is observed: what it showed to the networks, by which the paper's equation is
# evaluated again. Labels are dropped, and all answers depend on label, strength and noise level.

NULL = 3


def weight(sigma):
    return 2 + 1 / sigma**2


def observe(objective, dropout=0.4, n=400, strength=(), **frozen):
    """Loss (n,), data, true labels and the observed models of one evaluation of an objective."""
    exact = toy()
    x0, label = exact.sample(jax.random.key(0), n)
    generated = exact.sample(jax.random.key(1), n)
    scales = {"model": 0.8, **frozen}
    models = {name: Observed(scale, name != "model") for name, scale in scales.items()}
    problem = cases.problem(
        noise.LogNormal(), weight=weight, class_prior=(0.5, 0.3, 0.2), strength=strength,
        sigma_data=0.6,
    )  # fmt: skip
    held = cases.models(models["model"], **{name: models[name] for name in frozen})
    objective = dataclasses.replace(objective, label_dropout=dropout)
    batch = Batch(x0, Condition(label), generated[0][::-1], generated)
    loss, _ = objective(held, problem, batch, jax.random.split(jax.random.key(2), n))
    return np.asarray(loss), np.asarray(x0, np.float64), np.asarray(label), models


def check_draws(shown, label, dropout=0.4):
    """Labels are shown or dropped, at the given rate."""
    dropped = shown == NULL
    assert abs(dropped.mean() - dropout) < 4 * np.sqrt(0.25 / len(label))
    np.testing.assert_array_equal(shown[~dropped], label[~dropped])
    return dropped


@pytest.mark.parametrize("second_positives", [False, True])
def test_cca_is_the_papers_equation(second_positives):
    objective = CCA(0.7, 3.0, second_positives=second_positives)
    loss, x0, label, models = observe(objective, reference=0.5)
    right, wrong = models["model"].pairs()
    for a, b in zip((right, wrong), models["reference"].pairs(), strict=True):
        for ours, theirs in zip(a, b, strict=True):  # the reference sees the same, wrong label too
            np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(wrong[0], right[0])

    def ratio(x, sigma, label, strength):
        gain = error(0.5, x0, x, sigma, label) - error(0.8, x0, x, sigma, label)
        return weight(sigma) * 2 * gain

    dropped, negative = check_draws(right[2], label), wrong[2]
    positive_term = -log_sigmoid(0.7 * ratio(*right))
    negative_term = -3.0 * log_sigmoid(-0.7 * ratio(*wrong))
    if second_positives:
        assert abs((negative == NULL).mean() - 0.4) < 0.1
        second = (negative == NULL) | (negative == right[2])
        negative_term = np.where(second, -log_sigmoid(0.7 * ratio(*wrong)), negative_term)
    else:
        assert not (negative == NULL).any()
        negative_term = np.where(dropped, 0, negative_term)
    assert (negative[~dropped] == label[~dropped]).any()  # the prior may give the right label
    np.testing.assert_allclose(loss, (positive_term + negative_term) / 3.0, rtol=1e-4, atol=1e-6)


def test_dpo_is_the_papers_equation_in_the_error_of_the_noise():
    loss, x0, label, models = observe(DPO(0.5), reference=0.5)
    right, wrong = models["model"].pairs()
    for a, b in zip((right, wrong), models["reference"].pairs(), strict=True):
        for ours, theirs in zip(a, b, strict=True):
            np.testing.assert_array_equal(ours, theirs)

    def noise_error(scale, x, sigma, label, strength):
        n = (x - x0) / sigma[:, None]
        predicted = (x - answer(scale, x, sigma, label)) / sigma[:, None]
        return ((predicted - n) ** 2).mean(-1)

    dropped = check_draws(right[2], label)
    assert (wrong[2] != label).all()
    model, reference = (noise_error(s, *right) - noise_error(s, *wrong) for s in (0.8, 0.5))
    expected = -log_sigmoid(-0.25 * (model - reference))
    expected = np.where(dropped, 0.125 * noise_error(0.8, *right), expected)
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strength", [(), (0.25, 4.0)])
def test_gft_is_the_papers_equation(strength):
    loss, x0, label, models = observe(GFT(1.5), strength=strength, self=0.5)
    (shown,), (null,) = models["model"].calls, models["self"].calls
    dropped = check_draws(shown[2], label)
    np.testing.assert_array_equal(null[0], shown[0])
    np.testing.assert_array_equal(null[2:], [np.full(400, NULL), np.zeros(400)])
    drawn = np.full(400, 1.5)
    if strength:  # without dropout the network is shown every drawn strength
        drawn = observe(GFT(), 0.0, strength=strength, self=0.5)[3]["model"].calls[0][3]
        np.testing.assert_array_equal(shown[3], np.where(dropped, 0, drawn))
        share = np.sort(1 / (1 + drawn))  # uniform between 1 / 5 and 1 / 1.25
        assert np.abs(share - np.linspace(0.2, 0.8, 400)).max() < 0.6 * 1.95 / np.sqrt(400)
    b = 1 / (1 + drawn)[:, None]
    combined = b * answer(0.8, *shown) + (1 - b) * answer(0.5, *null)
    expected = weight(shown[1]) * ((combined - x0) ** 2).mean(-1)
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-4)


def test_model_guidance_is_the_papers_equation():
    loss, x0, label, models = observe(ModelGuidance(0.4), average=0.5)
    (shown,), (right, null) = models["model"].calls, models["average"].pairs()
    check_draws(shown[2], label)
    np.testing.assert_array_equal(right[2], shown[2])
    assert (null[2] == NULL).all()
    x, sigma = shown[:2]
    time = sigma / (sigma + 0.6)  # of flow matching, for data scaled to unit variance
    scale = np.where(time < 0.75, 0.4, 0)[:, None]
    assert 20 < (scale == 0).sum() < 380
    # in the paper's terms: the target of the noise moves by scale times the teacher's difference
    n, s = (x - x0) / sigma[:, None], sigma[:, None]
    noise_of = lambda values: (x - values) / s  # noqa: E731
    target = n + scale * (noise_of(answer(0.5, *right)) - noise_of(answer(0.5, *null)))
    difference = ((noise_of(answer(0.8, *shown)) - target) ** 2).mean(-1)
    np.testing.assert_allclose(loss, weight(sigma) * sigma**2 * difference, rtol=1e-3, atol=1e-6)


def test_ddo_is_the_papers_equation():
    loss, x0, label, models = observe(DDO(0.7, 1.5), dropout=0.4, reference=0.5)
    data, generated = models["model"].calls
    for call, frozen in zip((data, generated), models["reference"].calls, strict=True):
        for ours, theirs in zip(call, frozen, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    samples, sample_label = (np.asarray(a) for a in toy().sample(jax.random.key(1), 400))
    check_draws(data[2], label)
    check_draws(generated[2], sample_label)  # samples have their own labels

    def ratio(x0, x, sigma, label, strength):
        gain = error(0.5, x0, x, sigma, label) - error(0.8, x0, x, sigma, label)
        return weight(sigma) * 2 * gain

    expected = -log_sigmoid(0.7 * ratio(x0, *data))
    expected -= 1.5 * log_sigmoid(-0.7 * ratio(samples, *generated))  # log(1 - s(r))
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)


def test_contrastive_flow_is_the_papers_equation():
    loss, x0, label, models = observe(ContrastiveFlow(0.3))
    (shown,) = models["model"].calls
    check_draws(shown[2], label)
    x, sigma, s = *shown[:2], shown[1][:, None]
    velocity = x / s - (1 + 1 / s) * answer(0.8, *shown)
    right = (x - x0) / s - x0  # n - x
    keys = noise.split(jax.random.split(jax.random.key(2), 400), 4)[3]
    other = np.asarray(toy().sample(jax.random.key(1), 400)[0])[::-1]
    wrong = np.asarray(normal_like(keys, jnp.zeros((400, 2)))) - other
    terms = (((velocity - v) ** 2).mean(-1) for v in (right, wrong))
    expected = weight(sigma) / (1 + 1 / sigma) ** 2 * (next(terms) - 0.3 * next(terms))
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-3)


# ---- gradients of what the loop differentiates ---------------------------------------------------


def formula(task, params, teacher, batch, keys):
    """The mean loss of GFT or model guidance with the teacher's weights apart, by its equation."""
    own = noise.split(keys, 4)[3]
    dropout, problem = task.objective.label_dropout, task.problem
    x, sigma, shown, rest = perturb(
        problem, batch["image"], Condition(batch["label"]), own, dropout
    )
    null = Condition(jnp.full_like(batch["label"], NULL))
    model, held = task.model.denoise(params), task.model.denoise(teacher)
    if isinstance(task.objective, GFT):
        uniform = jax.vmap(jax.random.uniform)(rest)
        low, high = (1 / (1 + s) for s in task.problem.strength)
        b = low + uniform * (high - low)
        told = jnp.where(shown.label == NULL, 0.0, 1 / b - 1)
        combined = b[:, None] * model(x, sigma, shown.replace(strength=told))
        combined += (1 - b)[:, None] * held(x, sigma, null)
        difference = combined - batch["image"]
    else:
        inside = (sigma <= 3 * problem.sigma_data)[:, None]
        shift = 0.45 * inside * (held(x, sigma, shown) - held(x, sigma, null))
        difference = model(x, sigma, shown) - batch["image"] - shift
    return (problem.weight(sigma) * (difference**2).mean(-1)).mean()


@pytest.mark.parametrize("case", ["gft strength", "model_guidance"])
def test_no_gradient_flows_through_the_teacher(case):
    """Model and teacher have the same weights; the loop's gradient is by the model's alone."""
    task = cases.task(case, **{"network.dropout": 0.0})
    params, batch = cases.params(task), cases.batch(task, 64)
    keys = jax.random.split(jax.random.key(5), 64)

    def loss(params):
        return task.loss(params, {"average": params}, batch, keys, train=True)[0].mean()

    expected, ours = formula(task, params, params, batch, keys), loss(params)
    np.testing.assert_allclose(ours, expected, rtol=1e-5)
    apart = jax.grad(formula, 1)(task, params, params, batch, keys)
    both = jax.grad(lambda params: formula(task, params, params, batch, keys))(params)
    ours = jax.grad(loss)(params)
    chex.assert_trees_all_close(ours, apart, rtol=1e-3, atol=1e-5)
    size = optax.tree.norm(apart)
    assert optax.tree.norm(jax.tree.map(jnp.subtract, both, apart)) > 0.02 * size


@pytest.mark.parametrize("case", ["cca", "dpo"])
def test_the_reference_keeps_its_weights(case):
    """Where the model is its reference the gain is 0; where it has moved, it is not."""
    task = cases.task(case, **{"network.dropout": 0.0})
    params, batch = cases.params(task), cases.batch(task)
    keys = jax.random.split(jax.random.key(5), 16)
    start = {"reference": params}
    moved = cases.moved(params, 7)
    same, metrics = task.loss(params, start, batch, keys, train=True)
    name = "positive_ratio" if case == "cca" else "accuracy"
    assert float(abs(metrics[name].parts[0]).max()) == 0
    after, metrics = task.loss(moved, start, batch, keys, train=True)
    assert float(abs(metrics[name].parts[0]).max()) > 0
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
    gradients = {
        name: jax.grad(formula, 1)(task, params, weights, batch, keys)
        for name, weights in {"raw": params, **averages}.items()
    }
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


# ---- in the one loop -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A base run on the mixture, and samples of it."""
    folder = tmp_path_factory.mktemp("rivals")
    main.train(tiny.config(), folder / "base")
    images, labels = toy().sample(jax.random.key(0), 200)
    np.savez(folder / "samples.npz", images=np.asarray(images), labels=np.asarray(labels))
    return folder


@pytest.mark.parametrize("name", RIVALS)
def test_every_rival_trains_from_a_base_in_the_one_loop(started, name):
    strength = (0.0, 4.0) if name == "gft" else ()
    config = tiny.config(
        init_from=str(started / "base"), strength=strength, **{"objective.name": name}
    )
    if name == "ddo":
        config.data.generated = f"npz:{started / 'samples.npz'}"
    main.train(config, started / name)
    lines = (started / name / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert len(losses) == 3
    assert np.isfinite(losses).all()
    before, after = (runs.load(started / n).weights("none")[0] for n in ("base", name))
    common = before.keys() & after.keys()  # a strength comes in by weights of its own
    shared = ({key: tree[key] for key in common} for tree in (before, after))
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), *shared)
    assert max(jax.tree.leaves(moved)) > 1e-5
    assert runs.load(started / name).model.strength == strength


def test_ddo_without_samples_is_refused(started, tmp_path):
    config = tiny.config(init_from=str(started / "base"), **{"objective.name": "ddo"})
    with pytest.raises(ValueError, match=r"launch.sample and set config.data.generated"):
        main.train(config, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelGuidance(1.0), "scale is 1.0; expected at least 0 and below 1"),
        (lambda: ModelGuidance(-0.1), "scale is -0.1; expected at least 0 and below 1"),
        (lambda: ContrastiveFlow(1.0), "contrast is 1.0; expected at least 0"),
        (lambda: ContrastiveFlow(-0.1), "contrast is -0.1; expected at least 0"),
    ],
)
def test_strengths_without_an_optimum_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_options_are_the_defaults_of_the_dataclass():
    assert base.options("ddo").to_dict() == {
        "name": "ddo", "beta": 0.05, "negative_weight": 1.0, "label_dropout": 0.0
    }  # fmt: skip
