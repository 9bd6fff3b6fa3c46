"""MCLR against its theory, on mixtures whose densities and denoisers are exact."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Level
from hypothesis import given, settings
from hypothesis import strategies as st

from mclr_jax import guidance, noise, posterior, reductions
from mclr_jax.mixture import GaussianMixture, toy
from mclr_jax.objectives.base import perturb
from mclr_jax.objectives.dsm import DSM
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.problem import Batch
from mclr_jax.types import Condition, label_of

SIGMA, BETA, DRAWS = 0.8, 0.7, 300_000
PRIOR = (0.5, 0.2, 0.3)
EDGES = np.linspace(-2.75, 2.75, 12)
FORMS = {
    "posterior": {},
    "half of the negatives": {"negative_share": 0.5},
    "a quarter of the negatives": {"negative_share": 0.25},
    "targets of the reference": {"target": "reference"},
    "prior, weighted": {"negatives": "prior", "weighting": "cfg"},
    "mismatched, weighted": {"negatives": "mismatched", "weighting": "cfg"},
    "mismatched, weighted, a quarter": {
        "negatives": "mismatched",
        "weighting": "cfg",
        "negative_share": 0.25,
    },
}


def line() -> GaussianMixture:
    """Three classes of two components in one dimension."""
    return GaussianMixture(
        jnp.array([[[-1.5], [1.0]], [[0.0], [2.0]], [[-0.5], [0.7]]]),
        jnp.array([[0.3, 0.4], [0.5, 0.2], [0.4, 0.3]]),
        jnp.array([[0.6, 0.4], [0.5, 0.5], [0.3, 0.7]]),
        jnp.array(PRIOR),
    )


def run(mixture, denoise, data, *, levels=None, reference=None, strength=(), **options):
    """MCLR at one noise level with unit weight, no dropped labels and the exact posterior.

    data: x0 (B, d), label (B,) and keys (B,). Forms that need no posterior get none.
    """
    objective = MCLR(**{"beta": BETA, "label_dropout": 0.0} | options)
    x0, label, keys = data
    problem = cases.problem(
        levels or Level(SIGMA), class_prior=mixture.class_prior, strength=strength
    )
    its_posterior = posterior.exact(mixture) if "posterior" in objective.needs else None
    models = cases.models(denoise, its_posterior, reference=reference or mixture.denoise)
    return objective(models, problem, Batch(x0, Condition(label)), keys)


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
            def denoise(x, sigma, condition):
                return table[bins(x), label_of(condition)][:, None]

            return run(mixture, denoise, (x0, label, keys), **changes)[0].mean()

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
    optimum, curvature = pointwise(line(), negatives=negatives)
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
        reference_penalty=penalty,
        reference=lambda x, sigma, condition: jnp.full_like(x, 0.5),
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
            return guided(x, s, c) + epsilon * jnp.tanh(x + label_of(c)[:, None])

        options = {"levels": Level(sigma), "beta": beta} | FORMS[form]
        return run(mixture, denoise, (x0, label, keys), **options)[0]

    return jax.jvp(loss, (0.0,), (1.0,))[1]


@settings(max_examples=20, deadline=None)
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


def draw(n=4000, seed=0):
    """The mixture, and data, labels and keys of n examples."""
    mixture = line()
    x0, label = mixture.sample(jax.random.key(seed), n)
    return mixture, (x0, label, jax.random.split(jax.random.key(seed + 1), n))


def losses(mixture, denoise, data, **options):
    return jax.jit(lambda *data: run(mixture, denoise, data, **options)[0])(*data)


def plain(mixture, denoise, data, levels=None, label_dropout=0.0):
    """The loss of denoising score matching on the same draws."""
    x0, label, keys = data
    given = cases.problem(levels or Level(SIGMA)), Batch(x0, Condition(label)), keys
    return jax.jit(lambda: DSM(label_dropout)(cases.models(denoise), *given)[0])()


# ---- where there is a contrast, and how strong it is ---------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.0},
        {"beta": 0.0, "bound": "logistic", "negative_share": 0.25},
        {"sigma_interval": (1.0, 2.0)},
        {"sigma_interval": (1.0, 2.0), "reference_penalty": 1.0, "reference": jnp.negative},
        {"label_dropout": 1.0},
        {"label_dropout": 1.0, "negatives": "mismatched", "weighting": "cfg"},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_without_contrast_it_is_dsm(changes):
    mixture, data = draw()
    if changes.get("reference"):
        changes = changes | {"reference": lambda x, sigma, condition: -x}
    loss = losses(mixture, mixture.denoise, data, **changes)
    expected = plain(
        mixture, mixture.denoise, data, label_dropout=changes.get("label_dropout", 0.0)
    )
    chex.assert_trees_all_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_the_noise_interval_keeps_the_contrast_inside():
    mixture, data = draw()
    levels = noise.LogUniform(0.1, 3.0)
    options = {"levels": levels, "negatives": "prior"}
    everywhere, inside, none = (
        losses(mixture, mixture.denoise, data, **options, **change)
        for change in ({}, {"sigma_interval": (0.5, 1.0)}, {"beta": 0.0})
    )
    sigma = perturb(cases.problem(levels), data[0], Condition(data[1]), data[2], 0.0).sigma
    expected = jnp.where((sigma > 0.5) & (sigma <= 1.0), everywhere, none)
    chex.assert_trees_all_close(inside, expected, rtol=1e-5)
    assert (inside != none).mean() > 0.1


def test_frames_are_weighted_by_their_own_levels_and_contrasted_where_all_are_inside():
    """By hand from what the network was shown: one call, for c and for c~."""
    mixture, (values, label, keys) = draw(400)
    x0 = jnp.stack([values, values + 0.3, -values], axis=1)  # (B, 3, 1)
    seen = []

    def denoise(x, sigma, condition):
        flat = x.reshape(-1, 1), sigma.reshape(-1), jnp.repeat(label_of(condition), 3)
        seen.append((sigma, condition, mixture.denoise(*flat).reshape(x.shape)))
        return seen[-1][-1]

    problem = cases.problem(
        noise.LogUniform(0.4, 1.2), weight=lambda sigma: 1 / sigma, class_prior=PRIOR, frames=(3,)
    )
    objective = MCLR(BETA, 0.2, "mismatched", sigma_interval=(0.5, 1.1))
    loss, _ = objective(cases.models(denoise), problem, Batch(x0, Condition(label)), keys)
    ((sigma, condition, answers),) = seen
    assert sigma.shape == (800, 3)
    np.testing.assert_array_equal(sigma[:400], sigma[400:])
    shown, wrong = np.split(np.asarray(label_of(condition)), 2)
    assert np.all(wrong != label)
    right_error, wrong_error = (
        ((answer - x0)[..., 0] ** 2 / sigma[:400]).mean(1) for answer in np.split(answers, 2)
    )
    contrasted = np.all((sigma[:400] > 0.5) & (sigma[:400] <= 1.1), axis=1) & (shown != 3)
    assert 0.2 < contrasted.mean() < 0.6
    expected = right_error + BETA * contrasted * (right_error - wrong_error)
    np.testing.assert_allclose(loss, expected, rtol=1e-4, atol=1e-5)


def test_a_network_that_takes_the_strength_is_told_the_one_that_its_loss_has():
    mixture, data = draw(1000)
    seen = []

    def denoise(x, sigma, condition):
        seen.append(condition.strength)
        return mixture.denoise(x, sigma, condition)

    loss, _ = run(mixture, denoise, data, strength=(0.5, 2.0))
    strength, at_wrong = jnp.split(seen[0], 2)
    np.testing.assert_array_equal(strength, at_wrong)
    assert strength.min() >= 0.5
    assert strength.max() <= 2.0
    # the law has a third of all in the outer 7% at either end: arcsin(sqrt(1/15)) 2 / pi
    ends = (strength < 0.6) | (strength > 1.9)
    assert abs(ends.mean() - 0.3331) < 4 * np.sqrt(0.222 / 1000)
    same, _ = run(mixture, mixture.denoise, data, beta=strength)
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    assert not np.allclose(loss, losses(mixture, mixture.denoise, data), rtol=1e-2)


# ---- a share of the negatives --------------------------------------------------------------------


def biased(x, sigma, condition):
    """A denoiser that is far from any optimum."""
    return 0.5 * x + 0.3 * label_of(condition)[:, None] - 0.2


@pytest.mark.parametrize("share", [0.5, 0.25])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"negatives": "prior", "bound": "clip", "target": "reference"},
        {"negatives": "mismatched", "weighting": "cfg", "bound": "logistic"},
        {"negatives": "prior", "reference_penalty": 0.5, "sigma_interval": (0.5, 1.0)},
        {"reference_penalty": 0.5, "target": "reference"},
    ],
    ids=["posterior", "clip", "logistic", "penalty", "penalty, target"],
)
def test_a_share_of_the_negatives_is_unbiased(share, options):
    """Every k-th row has k times its contrast, the others none; the mean over draws is the same."""
    every = round(1 / share)
    mixture, data = draw(40_000)
    options = options | {"label_dropout": 0.1}
    whole, part, none = (
        np.asarray(losses(mixture, biased, data, **options | change), np.float64)
        for change in ({}, {"negative_share": share}, {"beta": 0.0, "negative_share": share})
    )
    rows = np.arange(len(whole)) % every == 0
    expected = np.where(rows, none + every * (whole - none), none)
    np.testing.assert_allclose(part, expected, rtol=1e-4, atol=1e-5)
    error = (part - whole).std() / np.sqrt(len(whole))
    assert abs(part.mean() - whole.mean()) < 4 * error
    assert abs(whole.mean() - none.mean()) > 6 * error  # what leaving them out does


@pytest.mark.parametrize(("share", "rows", "every"), [(0.5, 7, 2), (0.25, 6, 4), (0.25, 7, 4)])
def test_a_part_of_a_batch_that_the_share_does_not_divide_is_refused(share, rows, every):
    mixture, data = draw(rows)
    message = f"every {every}th row, but a part of the batch has {rows} rows; expected a multiple"
    with pytest.raises(ValueError, match=message + r".*batch_size.*grad_accumulation"):
        run(mixture, mixture.denoise, data, negative_share=share)


# ---- bounds --------------------------------------------------------------------------------------


def test_bounded_forms_stay_bounded_where_the_plain_one_does_not():
    """The denoiser is pushed away from wherever the plain objective has no minimum."""
    mixture, data = draw(5000)

    def pushed(size):
        def denoise(x, sigma, condition):
            log_p = mixture.log_prob_given_label(x, sigma)
            own = log_p[jnp.arange(len(x)), label_of(condition)]
            ratio = jnp.exp(own - mixture.log_prob(x, sigma))
            away = jnp.where(ratio < 0.3, size, 0.0)[:, None]
            return mixture.denoise(x, sigma, condition) + away

        return denoise

    def mean_loss(size, **changes):
        return float(losses(mixture, pushed(size), data, negatives="prior", **changes).mean())

    assert mean_loss(1e3) < -1e4
    for changes in [{"bound": "clip"}, {"bound": "logistic"}, {"reference_penalty": 1.0}]:
        assert mean_loss(1e3, **changes) > -2, changes


def test_the_logistic_bound_starts_as_the_plain_objective():
    """Its gradient is that of the plain objective where the model is the reference."""
    mixture, data = draw()

    def gradient(**changes):
        def mean_loss(shift):
            def denoise(x, sigma, condition):
                return mixture.denoise(x, sigma, condition) + shift[label_of(condition), None]

            return run(mixture, denoise, data, negatives="prior", **changes)[0].mean()

        return jax.jit(jax.grad(mean_loss))(jnp.zeros(3))

    unbounded = gradient()
    assert jnp.abs(unbounded).max() > 0.01
    logistic = gradient(bound="logistic", logistic_scale=7.0)
    chex.assert_trees_all_close(logistic, unbounded, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(gradient(bound="clip", clip_ratio=1e9), unbounded)


def test_a_clipped_negative_error_has_no_gradient():
    """Not even by the error at the right label, which it is clipped to."""
    mixture, (x0, label, keys) = draw(500)
    data = x0, 0 * label, keys

    def total(shift, **options):
        def denoise(x, sigma, condition):
            return shift * x + 20.0 * (label_of(condition) != 0)[:, None]

        return run(mixture, denoise, data, negatives="mismatched", **options)[0].sum()

    value, slope = jax.jit(jax.value_and_grad(lambda s: total(s, bound="clip", clip_ratio=0.4)))(
        0.9
    )
    plain_value, plain_slope = jax.jit(jax.value_and_grad(lambda s: total(s, beta=0.0)))(0.9)
    np.testing.assert_allclose(value, (1 + BETA - 0.4 * BETA) * plain_value, rtol=1e-4)
    np.testing.assert_allclose(slope, (1 + BETA) * plain_slope, rtol=1e-4)


# ---- metrics, options ----------------------------------------------------------------------------


def test_metrics_say_what_the_weights_and_the_bound_are():
    mixture, data = draw(100_000)
    options = {"negatives": "prior", "weighting": "cfg", "levels": Level(0.5)}

    @jax.jit
    def found(*data):
        return run(mixture, mixture.denoise, data, **options)[1]

    by_row = found(*data)
    report = reductions.report(reductions.over_rows(by_row))
    # E over c~ of p(c~ | x) / p(c~) is one, and its mean square E over x of sum_c p(c|x)^2 / p(c).
    np.testing.assert_allclose(report["weight"], 1, rtol=0.01)
    x0 = data[0]
    x = x0 + 0.5 * jax.random.normal(jax.random.key(9), x0.shape)
    post = mixture.posterior(x, 0.5)
    square = (post**2 / mixture.class_prior).sum(-1).mean()
    np.testing.assert_allclose(report["weight_ess"], report["weight"] ** 2 / square, rtol=0.02)
    np.testing.assert_allclose(report["weight_max"], (post / mixture.class_prior).max(), rtol=0.05)
    assert report["weight_max"] == by_row["weight"].parts[0].max()
    # the plain objective has no minimum for (x, c~) where p(c~ | x) / p(c~) < beta / (1 + beta)
    low = (post / mixture.class_prior < BETA / (1 + BETA)) * mixture.class_prior
    np.testing.assert_allclose(report["unbounded"], low.sum(-1).mean(), rtol=0.02)
    assert report["margin"] > 0.01


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_errors_are_unweighted_and_the_margin_is_of_the_rows_that_have_a_contrast(share):
    mixture, data = draw(400)
    x0, seen = data[0], []

    def denoise(x, sigma, condition):
        seen.append((label_of(condition), biased(x, sigma, condition)))
        return seen[-1][1]

    options = {"negatives": "mismatched", "beta": 0.01, "negative_share": share}
    _, found = run(mixture, denoise, data, label_dropout=0.3, **options)
    report = reductions.report(reductions.over_rows(found))
    ((shown, answers),) = seen
    rows = np.arange(0, 400, round(1 / share))
    right = np.asarray((answers[:400] - x0) ** 2)[:, 0]
    wrong = np.asarray((answers[400:] - x0[rows]) ** 2)[:, 0]
    np.testing.assert_allclose(report["error"], right.mean(), rtol=1e-5)
    np.testing.assert_allclose(report["negative_error"], wrong.mean(), rtol=1e-5)
    kept = np.asarray(shown[rows] != 3)
    margin = (wrong - right[rows])[kept].mean()
    np.testing.assert_allclose(report["margin"], margin, rtol=1e-4)
    assert "unbounded" not in report


def test_the_penalty_does_not_depend_on_the_posterior():
    """Where the posterior is sure of the class, 1 - p(c | x_s) is 0 in float32."""
    apart = toy().replace(means=4 * toy().means)
    x0, label = apart.sample(jax.random.key(0), 100)
    data = x0, label, jax.random.split(jax.random.key(1), 100)

    def away(x, sigma, condition):
        return apart.denoise(x, sigma, condition) + 1

    held, free = (
        run(apart, apart.denoise, data, levels=Level(0.2), reference=away, reference_penalty=p)[0]
        for p in (1.0, 0.0)
    )
    np.testing.assert_allclose(held - free, 2.0, atol=0.1)
