"""MCLR against its theory, on mixtures whose densities and denoisers are exact."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mclr_jax import guidance, noise, posterior
from mclr_jax.mixture import GaussianMixture
from mclr_jax.objectives.dsm import dsm
from mclr_jax.objectives.mclr import mclr

SIGMA, BETA, DRAWS = 0.8, 0.7, 300_000
PRIOR = (0.5, 0.2, 0.3)
EDGES = np.linspace(-2.75, 2.75, 12)
FORMS = {
    "posterior": {},
    "half of the negatives": {"negative_share": 0.5},
    "targets of the reference": {"target": "reference"},
    "prior, weighted": {"negatives": "prior", "weighting": "cfg"},
    "mismatched, weighted": {"negatives": "mismatched", "weighting": "cfg"},
}


class Level(NamedTuple):
    """One noise level, which may be traced."""

    sigma: jax.Array

    def sample(self, key):
        del key
        return self.sigma


def line() -> GaussianMixture:
    """Three classes of two components in one dimension."""
    return GaussianMixture(
        jnp.array([[[-1.5], [1.0]], [[0.0], [2.0]], [[-0.5], [0.7]]]),
        jnp.array([[0.3, 0.4], [0.5, 0.2], [0.4, 0.3]]),
        jnp.array([[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]]),
        jnp.array(PRIOR),
    )


def objective(mixture, **changes):
    """MCLR at one noise level with unit weight, no dropped labels and the exact posterior."""
    options = {
        "noise": Level(SIGMA),
        "weight": jnp.ones_like,
        "null_label": mixture.num_classes,
        "class_prior": mixture.class_prior,
        "beta": BETA,
        "label_dropout": 0.0,
        "posterior": posterior.exact(mixture),
        "reference": mixture.denoise,
    }
    return functools.partial(mclr, **options | changes)


def bins(x):
    return jnp.searchsorted(EDGES, x[:, 0])


def pointwise(mixture, **changes):
    """Optimum and curvature of the mean loss over all tables D(bin of x_s, label), (12, K) each.

    The loss is quadratic in every entry, so that gradients at 0 and at 1 give both.
    """

    @jax.jit
    def gradients(key):
        k_data, k_loss = jax.random.split(key)
        x0, label = mixture.sample(k_data, DRAWS)
        keys = jax.random.split(k_loss, DRAWS)

        def mean_loss(table):
            def denoise(x, sigma, label):
                return table[bins(x), label][:, None]

            return objective(mixture, **changes)(denoise, x0, label, keys)[0].mean()

        table = jnp.zeros((len(EDGES) + 1, mixture.num_classes))
        return jax.grad(mean_loss)(table), jax.grad(mean_loss)(table + 1)

    at_zero, at_one = (np.asarray(g, np.float64) for g in gradients(jax.random.key(0)))
    return -at_zero / (at_one - at_zero), (at_one - at_zero) / 2


@functools.cache
def quadrature():
    """Integrals over each bin: p_c (12, K), p_c D_c (12, K), and the same for all classes (12,)."""
    mixture = line()
    x = jnp.linspace(-12, 12, 240_001)[:, None]
    density = np.exp(np.asarray(mixture.log_prob_given_label(x, SIGMA), np.float64))
    denoised = np.stack(
        [mixture.denoise(x, SIGMA, jnp.full(len(x), c))[:, 0] for c in range(3)], axis=1
    )
    rows = np.asarray(bins(x))

    def integrate(values):
        step = float(x[1, 0] - x[0, 0])
        return np.stack([step * np.bincount(rows, v, len(EDGES) + 1) for v in values.T], axis=1)

    mass, first = integrate(density), integrate(density * denoised)
    prior = np.array(PRIOR)
    return mass, first, mass @ prior, first @ prior


@pytest.mark.parametrize("form", FORMS)
def test_the_optimum_of_each_cfg_equivalent_form_is_cfg(form):
    mass, _, _, _ = quadrature()
    # p(a) [(1 + beta) p_a (D - D_a)^2 - beta p_a (D - D_0)^2], so CFG averaged over a bin by p_a:
    mixture = line()
    x = jnp.linspace(-12, 12, 240_001)[:, None]
    guided = guidance.classifier_free(mixture.denoise, 3, 1 + BETA)
    density = np.exp(np.asarray(mixture.log_prob_given_label(x, SIGMA), np.float64))
    rows = np.asarray(bins(x))
    expected = np.stack(
        [
            np.bincount(rows, density[:, c] * guided(x, SIGMA, jnp.full(len(x), c))[:, 0])
            / np.bincount(rows, density[:, c])
            for c in range(3)
        ],
        axis=1,
    )
    optimum, curvature = pointwise(mixture, **FORMS[form])
    often = mass > 0.03
    # Mismatched negatives keep the closed-form part in the positive term; the sum is the same.
    np.testing.assert_allclose(curvature[often], (mass * PRIOR)[often], rtol=0.05)
    np.testing.assert_allclose(optimum[often], expected[often], atol=0.06)


@pytest.mark.parametrize("negatives", ["prior", "mismatched"])
def test_the_plain_objective_has_the_predicted_optimum_and_is_unbounded_where_predicted(negatives):
    mass, first, mass_all, first_all = quadrature()
    prior = np.array(PRIOR)
    if negatives == "mismatched":  # c~ = a is drawn for the classes c != a, with p(a) / (1 - p(c))
        share = (1 - np.eye(3)) * prior[:, None] / (1 - prior[:, None])  # (c, a) without p(a)
        wrong, wrong_first = mass @ share, first @ share
    else:
        wrong, wrong_first = mass_all[:, None], first_all[:, None]
    expected_curvature = prior * ((1 + BETA) * mass - BETA * wrong)
    expected = ((1 + BETA) * first - BETA * wrong_first) * prior / expected_curvature
    optimum, curvature = pointwise(line(), negatives=negatives, posterior=None)
    scale = prior * (mass + wrong)
    np.testing.assert_allclose(curvature / scale, expected_curvature / scale, atol=0.05)
    clear = np.abs(expected_curvature / scale) > 0.1
    assert (expected_curvature[clear] < 0).sum() >= 5  # the bins without a lower bound
    np.testing.assert_array_equal(np.sign(curvature[clear]), np.sign(expected_curvature[clear]))
    bounded = (expected_curvature / scale > 0.2) & (mass > 0.05)
    assert bounded.sum() >= 8
    np.testing.assert_allclose(optimum[bounded], expected[bounded], atol=0.08)


def test_the_reference_penalty_bounds_the_plain_objective_at_its_predicted_optimum():
    mass, first, mass_all, first_all = quadrature()
    prior, penalty = np.array(PRIOR), 1.0
    # The reference is the constant 0.5; with a penalty of at least beta the curvature is positive.
    curvature = (1 + BETA + penalty) * mass + (penalty - BETA) * mass_all[:, None]
    pull = penalty * 0.5 * (mass + mass_all[:, None])
    expected = ((1 + BETA) * first - BETA * first_all[:, None] + pull) / curvature
    optimum, measured = pointwise(
        line(),
        negatives="prior",
        posterior=None,
        reference_penalty=penalty,
        reference=lambda x, sigma, label: jnp.full_like(x, 0.5),
    )
    np.testing.assert_allclose(measured / (prior * curvature), 1, atol=0.1)
    often = mass > 0.03
    np.testing.assert_allclose(optimum[often], expected[often], atol=0.06)


@functools.partial(jax.jit, static_argnames="form")
def slope(mixture, beta, sigma, key, form):
    """d/d(epsilon) of each example's loss at exact CFG + epsilon tanh(x + label), (n,)."""
    k_data, k_loss = jax.random.split(key)
    x0, label = mixture.sample(k_data, 30_000)
    keys = jax.random.split(k_loss, len(x0))
    guided = guidance.classifier_free(mixture.denoise, mixture.num_classes, 1 + beta)

    def loss(epsilon):
        def denoise(x, s, c):
            return guided(x, s, c) + epsilon * jnp.tanh(x + c[:, None])

        run = objective(mixture, noise=Level(sigma), beta=beta, **FORMS[form])
        return run(denoise, x0, label, keys)[0]

    return jax.jvp(loss, (0.0,), (1.0,))[1]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.05, 3), st.floats(0.1, 3), st.sampled_from(list(FORMS)))
def test_exact_cfg_is_stationary_on_random_mixtures(seed, beta, sigma, form):
    k = jax.random.split(jax.random.key(seed), 4)
    mixture = GaussianMixture(
        1.5 * jax.random.normal(k[0], (3, 2, 2)),
        jax.random.uniform(k[1], (3, 2), minval=0.2, maxval=0.8),
        jax.nn.softmax(jax.random.normal(k[2], (3, 2))),
        jax.nn.softmax(0.5 * jax.random.normal(k[3], (3,))),
    )
    slopes = np.asarray(slope(mixture, beta, sigma, jax.random.key(seed), form), np.float64)
    error = slopes.std() / np.sqrt(len(slopes))
    assert abs(slopes.mean()) < 5 * error + 1e-6


def batch(n=4000, seed=0):
    mixture = line()
    x0, label = mixture.sample(jax.random.key(seed), n)
    return mixture, (x0, label, jax.random.split(jax.random.key(seed + 1), n))


@pytest.mark.parametrize(
    "changes",
    [{"beta": 0.0}, {"sigma_interval": (1.0, 2.0)}, {"label_dropout": 1.0}],
    ids=lambda changes: next(iter(changes)),
)
def test_without_contrast_it_is_dsm(changes):
    mixture, data = batch()
    settings = objective(mixture, **changes)
    loss, _ = jax.jit(functools.partial(settings, mixture.denoise))(*data)
    kept = {k: v for k, v in settings.keywords.items() if k in
            ("noise", "weight", "null_label", "label_dropout")}  # fmt: skip
    expected, _ = jax.jit(functools.partial(dsm, mixture.denoise, **kept))(*data)
    chex.assert_trees_all_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_the_noise_interval_keeps_the_contrast_inside():
    mixture, data = batch()
    run = objective(mixture, noise=noise.LogUniform(0.1, 3.0), negatives="prior", posterior=None)

    @jax.jit
    def losses(*data):
        changes: tuple = ({}, {"sigma_interval": (0.5, 1.0)}, {"beta": 0.0})
        return [run(mixture.denoise, *data, **change)[0] for change in changes]

    everywhere, inside, plain = losses(*data)
    ks = jax.vmap(lambda key: jax.random.split(key, 4))(data[2])[:, 0]
    sigma = jax.vmap(noise.LogUniform(0.1, 3.0).sample)(ks)
    expected = jnp.where((sigma > 0.5) & (sigma <= 1.0), everywhere, plain)
    chex.assert_trees_all_close(inside, expected, rtol=1e-5)
    assert (inside != plain).mean() > 0.1


def test_strengths_may_differ_between_examples():
    mixture, data = batch(1000)
    beta = jnp.linspace(0, 2, 1000)
    loss, low = jax.jit(
        lambda *data: [
            objective(mixture, beta=b)(mixture.denoise, *data)[0] for b in (beta, beta[200])
        ]
    )(*data)
    np.testing.assert_allclose(loss[200], low[200], rtol=1e-5)
    assert not np.allclose(loss, low)


def test_bounded_forms_stay_bounded_where_the_plain_one_does_not():
    """The denoiser is pushed away from wherever the plain objective has no minimum."""
    mixture, data = batch(5000)

    def pushed(size):
        def denoise(x, sigma, label):
            log_p = mixture.log_prob_given_label(x, sigma)
            ratio = jnp.exp(log_p[jnp.arange(len(x)), label] - mixture.log_prob(x, sigma))
            away = jnp.where(ratio < 0.3, size, 0.0)[:, None]
            return mixture.denoise(x, sigma, label) + away

        return denoise

    def mean_loss(size, **changes):
        run = objective(mixture, negatives="prior", posterior=None, **changes)
        return float(jax.jit(lambda *data: run(pushed(size), *data)[0].mean())(*data))

    assert mean_loss(1e3) < -1e4
    for changes in [{"bound": "clip"}, {"bound": "logistic"}, {"reference_penalty": 1.0}]:
        assert mean_loss(1e3, **changes) > -2, changes


def test_the_logistic_bound_starts_as_the_plain_objective():
    """Its gradient is that of the plain objective where the model is the reference."""
    mixture, data = batch()

    def gradient(**changes):
        run = objective(mixture, negatives="prior", posterior=None, **changes)

        def mean_loss(shift):
            return run(lambda x, s, c: mixture.denoise(x, s, c) + shift[c, None], *data)[0].mean()

        return jax.jit(jax.grad(mean_loss))(jnp.zeros(3))

    plain = gradient()
    assert jnp.abs(plain).max() > 0.01
    logistic = gradient(bound="logistic", logistic_scale=7.0)
    chex.assert_trees_all_close(logistic, plain, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(gradient(bound="clip", clip_ratio=1e9), plain)


def test_metrics_say_what_the_weights_and_the_bound_are():
    mixture, data = batch(100_000)
    run = objective(mixture, negatives="prior", weighting="cfg", noise=Level(0.5))
    _, metrics = jax.jit(functools.partial(run, mixture.denoise))(*data)
    # E over c~ of p(c~ | x) / p(c~) is one, and its mean square E over x of sum_c p(c|x)^2 / p(c).
    np.testing.assert_allclose(metrics["weight"].mean(), 1, rtol=0.01)
    x0 = data[0]
    x = x0 + 0.5 * jax.random.normal(jax.random.key(9), x0.shape)
    post = mixture.posterior(x, 0.5)
    square = (post**2 / mixture.class_prior).sum(-1).mean()
    np.testing.assert_allclose(metrics["weight_square"].mean(), square, rtol=0.02)
    # the plain objective has no minimum for (x, c~) where p(c~ | x) / p(c~) < beta / (1 + beta)
    low = (post / mixture.class_prior < BETA / (1 + BETA)) * mixture.class_prior
    np.testing.assert_allclose(metrics["unbounded"].mean(), low.sum(-1).mean(), rtol=0.02)
    assert metrics["margin"].mean() > 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"negatives": "wrong"}, "negatives is 'wrong'; expected one of .*mismatched"),
        ({"weighting": "cfg"}, "CFG-equivalent form already"),
        ({"posterior": None}, "needs a posterior"),
        ({"target": "truth"}, "target is 'truth'; expected one of .*reference"),
        ({"target": "reference", "reference": None}, "frozen reference"),
        ({"bound": "logistic", "reference": None}, "frozen reference"),
        ({"reference_penalty": 0.1, "reference": None}, "frozen reference"),
        ({"negative_share": 0.0}, "negative_share is 0.0; expected above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    mixture, data = batch(8)
    with pytest.raises(ValueError, match=message):
        objective(mixture, **changes)(mixture.denoise, *data)
