"""The losses of MCLR and its rivals against the papers' equations, evaluated in NumPy.

An objective is observed: the equation is evaluated at the inputs that it showed to the networks.
Labels are dropped, and all answers depend on label, strength and noise level.
"""

import dataclasses

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Observed, answer, error, log_sigmoid

from mclr_jax import noise, posterior
from mclr_jax.mixture import toy
from mclr_jax.noise import normal_like
from mclr_jax.objectives.base import Batch
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.objectives.rivals import CCA, DDO, DPO, GFT, ContrastiveFlow, ModelGuidance
from mclr_jax.types import Condition

NULL = 3
FACTORS = (0.5, 0.0, 1.5)  # of the strength, by class
BY_CLASS = pytest.mark.parametrize("factors", [(), FACTORS], ids=["", "by class"])


def factor(factors, label):
    return np.array([*(factors or (1, 1, 1)), 1])[label.astype(int)]


def weight(sigma):
    return 2 + 1 / sigma**2


def observe(objective, dropout=0.4, n=400, strength=(), class_strengths=(), **frozen):
    """Loss (n,), data, true labels and the observed models of one evaluation of an objective."""
    exact = toy()
    x0, label = exact.sample(jax.random.key(0), n)
    generated = exact.sample(jax.random.key(1), n)
    scales = {"model": 0.8, **frozen}
    models = {name: Observed(scale, name != "model") for name, scale in scales.items()}
    problem = cases.problem(
        noise.LogNormal(), weight=weight, class_prior=(0.5, 0.3, 0.2), strength=strength,
        sigma_data=0.6, class_strengths=class_strengths,
    )  # fmt: skip
    held = {name: models[name] for name in frozen}
    held = cases.models(models["model"], posterior.exact(exact), **held)
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


@BY_CLASS
@pytest.mark.parametrize("second_positives", [False, True])
def test_cca_is_the_papers_equation(second_positives, factors):
    objective = CCA(0.7, 3.0, second_positives=second_positives)
    loss, x0, label, models = observe(objective, class_strengths=factors, reference=0.5)
    right, wrong = models["model"].pairs()
    # the reference sees the same, wrong label too
    chex.assert_trees_all_equal([right, wrong], list(models["reference"].pairs()))
    np.testing.assert_array_equal(wrong[0], right[0])

    def ratio(x, sigma, label, strength):
        gain = error(0.5, x0, x, sigma, label) - error(0.8, x0, x, sigma, label)
        return weight(sigma) * 2 * gain

    dropped, negative = check_draws(right[2], label), wrong[2]
    positive_term = -log_sigmoid(0.7 * ratio(*right))
    negative_term = -3.0 * factor(factors, negative) * log_sigmoid(-0.7 * ratio(*wrong))
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
    chex.assert_trees_all_equal([right, wrong], list(models["reference"].pairs()))

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


@pytest.mark.parametrize(
    ("strength", "factors"), [((), ()), ((0.25, 4.0), ()), ((), FACTORS)],
    ids=["fixed", "input", "by class"],
)  # fmt: skip
def test_gft_is_the_papers_equation(strength, factors):
    loss, x0, label, models = observe(
        GFT(1.5), strength=strength, class_strengths=factors, self=0.5
    )
    (shown,), (null,) = models["model"].calls, models["self"].calls
    dropped = check_draws(shown[2], label)
    np.testing.assert_array_equal(null[0], shown[0])
    np.testing.assert_array_equal(null[2:], [np.full(400, NULL), np.zeros(400)])
    drawn = 1.5 * factor(factors, shown[2])
    if strength:  # without dropout the network is shown every drawn strength
        drawn = observe(GFT(), 0.0, strength=strength, self=0.5)[3]["model"].calls[0][3]
        np.testing.assert_array_equal(shown[3], np.where(dropped, 0, drawn))
        share = np.sort(1 / (1 + drawn))  # uniform between 1 / 5 and 1 / 1.25
        assert np.abs(share - np.linspace(0.2, 0.8, 400)).max() < 0.6 * 1.95 / np.sqrt(400)
    b = 1 / (1 + drawn)[:, None]
    combined = b * answer(0.8, *shown) + (1 - b) * answer(0.5, *null)
    expected = weight(shown[1]) * ((combined - x0) ** 2).mean(-1)
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-4)


@BY_CLASS
def test_model_guidance_is_the_papers_equation(factors):
    loss, x0, label, models = observe(ModelGuidance(0.4), class_strengths=factors, average=0.5)
    (shown,), (right, null) = models["model"].calls, models["average"].pairs()
    check_draws(shown[2], label)
    np.testing.assert_array_equal(right[2], shown[2])
    assert (null[2] == NULL).all()
    x, sigma = shown[:2]
    time = sigma / (sigma + 0.6)  # of flow matching, for data scaled to unit variance
    gamma = 0.4 / (1 - 0.4) * factor(factors, shown[2])  # of the fixed point
    scale = np.where(time < 0.75, gamma / (1 + gamma), 0)[:, None]
    assert 20 < (scale == 0).sum() < 380
    # in the paper's terms: the target of the noise moves by scale times the teacher's difference
    n, s = (x - x0) / sigma[:, None], sigma[:, None]
    noise_of = lambda values: (x - values) / s  # noqa: E731
    target = n + scale * (noise_of(answer(0.5, *right)) - noise_of(answer(0.5, *null)))
    difference = ((noise_of(answer(0.8, *shown)) - target) ** 2).mean(-1)
    np.testing.assert_allclose(loss, weight(sigma) * sigma**2 * difference, rtol=1e-3, atol=1e-6)


NULL_EQUATIONS = {
    "mixed": {},
    "data": {"target": "data", "sigma_interval": (0.3, 1.0)},
    "reference": {"target": "reference", "wrong_label": 0.6, "wrong_label_scale": 0.5},
    "weak": {"wrong": "weak"},
    "weak, data": {"wrong": "weak", "target": "data"},
    "source": {"wrong": "source", "teacher": "average", "sigma_interval": (0.3, 1.0)},
    "average": {"teacher": "average", "wrong_label": 0.6, "negative_share": 0.25},
}


@pytest.mark.parametrize("strength", [(), (0.25, 4.0)], ids=["fixed", "input"])
@pytest.mark.parametrize("form", NULL_EQUATIONS)
def test_mclr_null_is_its_equation(form, strength):
    objective, n = NullMCLR(0.7, **NULL_EQUATIONS[form]), 400
    factors = () if strength else FACTORS
    scales = {"reference": 0.5, "average": 0.6, "weak": 0.3}
    loss, x0, true, models = observe(
        objective, strength=strength, class_strengths=factors,
        **{name: scales[name] for name in objective.needs if name in scales},
    )  # fmt: skip
    ((x, sigma, shown, told),) = models["model"].calls
    own, sigma_own, x_own = shown[:n].astype(int), sigma[:n], x[:n]
    dropped = check_draws(own, true)
    beta = told[:n] if strength else 0.7
    low, high = objective.sigma_interval or (0, np.inf)
    gamma = np.where(
        dropped | (sigma_own <= low) | (sigma_own > high), 0, beta * factor(factors, own)
    )
    if objective.teacher == "average" and not strength:
        gamma = gamma / (1 + gamma)
    # the contrast as it is defined, and the constant that makes it a square
    scale = scales[objective.teacher]
    right = answer(scale, x_own, sigma_own, own)
    wrong = answer(scale, x_own, sigma_own, np.full(n, NULL))
    if objective.wrong != "null":
        of = {"weak": (0.3, own), "source": (0.5, np.full(n, NULL))}[objective.wrong]
        wrong = answer(of[0], x_own, sigma_own, of[1])
    towards = x0 if objective.target == "data" else right
    clean = right if objective.target == "reference" else x0
    given = answer(0.8, x_own, sigma_own, own, told[:n])
    square = lambda a, b: ((a - b) ** 2).mean(-1)  # noqa: E731
    constant = gamma * (square(clean, wrong) - square(clean, towards))
    constant += gamma**2 * square(towards, wrong)
    contrast = square(given, towards) - square(given, wrong)
    expected = weight(sigma_own) * (square(given, clean) + gamma * contrast + constant)
    if objective.wrong_label:
        every = round(1 / objective.negative_share)
        rows, other = np.arange(0, n, every), shown[n:].astype(int)
        assert (other == true[rows]).any()  # the prior may give the right label
        ((_, _, other_shown, _),) = models["reference"].calls[-1:]
        np.testing.assert_array_equal(other_shown[-len(rows) :], other)
        at = x[n:], sigma[n:], other
        np.testing.assert_array_equal(x[n:], x_own[rows])
        gain = error(0.5, x0[rows], *at) - error(0.8, x0[rows], *at, told[n:])
        u = (beta * np.ones(n))[rows] * factor(factors, other)
        there = ~dropped[rows] & (other != true[rows]) & (u > 0)
        assert 0.1 < there.mean() < 0.9
        a = objective.wrong_label_scale / np.where(there, u, 1)
        term = 0.6 * u * 2 / (2 * a) * np.logaddexp(0, a * 2 * weight(sigma[n:]) * gain)
        expected[rows] += every * np.where(there, term, 0)
    np.testing.assert_allclose(loss, expected, rtol=1e-3, atol=1e-4)


def test_ddo_is_the_papers_equation():
    loss, x0, label, models = observe(DDO(0.7, 1.5), dropout=0.4, reference=0.5)
    data, generated = models["model"].calls
    chex.assert_trees_all_equal([data, generated], models["reference"].calls)
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


EQUATIONS = {
    "reference": {"target": "reference"},
    "clip": {"negative_share": 0.5, "bound": "clip", "clip_ratio": 1.5},
    "prior": {"negatives": "prior", "weighting": "cfg", "negative_share": 0.25},
    "mismatched": {"negatives": "mismatched", "weighting": "cfg"},
    "plain": {"negatives": "prior", "target": "reference"},
    "interval": {"sigma_interval": (0.3, 1.0)},
}


@pytest.mark.parametrize("options", EQUATIONS.values(), ids=EQUATIONS)
def test_mclr_is_its_equation(options):
    objective, n = MCLR(0.7, **options), 400
    loss, x0, true, models = observe(objective, reference=0.5)
    ((x, sigma, shown, _),) = models["model"].calls
    every, own, wrong = round(1 / objective.negative_share), shown[:n].astype(int), shown[n:]
    rows, wrong = np.arange(0, n, every), wrong.astype(int)
    assert len(wrong) == len(rows)
    np.testing.assert_array_equal(x[n:], x[:n][rows])
    np.testing.assert_array_equal(sigma[n:], sigma[:n][rows])
    x, sigma, dropped = x[:n], sigma[:n], check_draws(own, true)
    target = answer(0.5, x, sigma, own) if objective.target == "reference" else x0

    def weighted(scale, labels, rows):
        return weight(sigma[rows]) * error(scale, target[rows], x[rows], sigma[rows], labels)

    prior, every_row = np.array([0.5, 0.3, 0.2]), np.arange(n)
    chance = np.asarray(toy().posterior(jnp.asarray(x), jnp.asarray(sigma)))
    right, left = chance[every_row, true], chance[rows, wrong]
    right_weight, wrong_weight = np.ones(len(rows)), np.ones(len(rows))
    if objective.negatives == "posterior":
        right_weight = wrong_weight = 1 - right[rows]
    elif objective.weighting == "cfg":
        wrong_weight = left / prior[wrong]
        if objective.negatives == "mismatched":
            right_weight, wrong_weight = 1 - right[rows], wrong_weight * (1 - prior[true[rows]])
    assert objective.negatives == "prior" or not (wrong == true[rows]).any()
    low, high = options.get("sigma_interval", (0, np.inf))
    beta = np.where(dropped | (sigma <= low) | (sigma > high), 0, 0.7)[rows]
    positive, negative = weighted(0.8, own[rows], rows), weighted(0.8, wrong, rows)
    if objective.bound == "clip":
        assert (negative > 1.5 * positive).any()
        negative = np.minimum(negative, 1.5 * positive)
    contrast = beta * (right_weight * positive - wrong_weight * negative)
    expected = weighted(0.8, own, every_row)
    expected[rows] += every * contrast
    np.testing.assert_allclose(loss, expected, rtol=2e-3, atol=1e-4)
