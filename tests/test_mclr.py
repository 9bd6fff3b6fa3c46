"""MCLR against its theory, on mixtures whose densities and denoisers are exact."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Level

from mclr_jax import guidance, noise, posterior, reductions
from mclr_jax.mixture import GaussianMixture
from mclr_jax.objectives.base import Batch
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.types import Condition, label_of

SIGMA, BETA, DRAWS = 0.8, 0.7, 300_000
PRIOR = (0.5, 0.2, 0.3)
EDGES = np.linspace(-2.75, 2.75, 12)
FORMS = {
    "posterior": {},
    "a quarter of the negatives": {"negative_share": 0.25},
    "targets of the reference": {"target": "reference"},
    "prior, weighted": {"negatives": "prior", "weighting": "cfg"},
    "mismatched, weighted": {"negatives": "mismatched", "weighting": "cfg"},
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
    """Integrals over each bin: p_c (12, K), p_c D_c (12, K), and the same for all classes (12,).

    And the mean over each bin, by p_c, of guided denoising (12, K).
    """
    mixture, classes = line(), jnp.arange(3)[:, None]
    x = jnp.linspace(-12, 12, 24_001)[:, None]
    guided = guidance.classifier_free(mixture.denoise, 3, 1 + BETA)

    @jax.jit
    def answers():
        labels = jnp.broadcast_to(classes, (3, len(x)))
        each = [jax.vmap(lambda c, f=f: f(x, SIGMA, c)[:, 0])(labels).T
                for f in (mixture.denoise, guided)]  # fmt: skip
        return mixture.log_prob_given_label(x, SIGMA), *each

    log_density, denoised, answer = (np.asarray(a, np.float64) for a in answers())
    density, rows = np.exp(log_density), np.asarray(bins(x))

    def integrate(values):
        step = 24 / (len(x) - 1)
        return np.stack([step * np.bincount(rows, v, len(EDGES) + 1) for v in values.T], axis=1)

    mass, first = integrate(density), integrate(density * denoised)
    prior = np.array(PRIOR)
    return mass, first, mass @ prior, first @ prior, integrate(density * answer) / mass


@pytest.mark.parametrize("form", FORMS)
def test_the_optimum_of_each_cfg_equivalent_form_is_cfg(form):
    # p(a) [(1 + beta) p_a (D - D_a)^2 - beta p_a (D - D_0)^2], so CFG averaged over a bin by p_a:
    mass, _, _, _, expected = quadrature()
    optimum, curvature = pointwise(line(), **FORMS[form])
    often = mass > 0.03
    # Mismatched negatives keep the closed-form part in the positive term; the sum is the same.
    np.testing.assert_allclose(curvature[often], (mass * PRIOR)[often], rtol=0.05)
    np.testing.assert_allclose(optimum[often], expected[often], atol=0.06)


@pytest.mark.parametrize("negatives", ["prior", "mismatched"])
def test_the_plain_objective_has_the_predicted_optimum_and_is_unbounded_where_predicted(negatives):
    mass, first, mass_all, first_all, _ = quadrature()
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


@functools.cache
def draw(n=4000):
    """The mixture, and data, labels and keys of n examples."""
    mixture = line()

    @jax.jit
    def data():
        return *mixture.sample(jax.random.key(0), n), jax.random.split(jax.random.key(1), n)

    return mixture, data()


def losses(mixture, denoise, data, **options):
    return jax.jit(lambda *data: run(mixture, denoise, data, **options)[0])(*data)


def losses_and_inputs(denoise, ask, data):
    """The losses ask(watched, data), and (x, sigma, condition, answer) of its only call."""

    @jax.jit
    def found(data):
        seen = []

        def watched(*inputs):
            seen.append((*inputs, denoise(*inputs)))
            return seen[-1][-1]

        loss, _ = ask(watched, data)
        (call,) = seen
        return loss, call

    return found(data)


# ---- where there is a contrast, and how strong it is ---------------------------------------------


def test_frames_are_weighted_by_their_own_levels_and_contrasted_where_all_are_inside():
    """By hand from what the network was shown: one call, for c and for c~."""
    mixture, (values, label, keys) = draw(400)
    x0 = jnp.stack([values, values + 0.3, -values], axis=1)  # (B, 3, 1)
    problem = cases.problem(
        noise.LogUniform(0.4, 1.2), weight=lambda sigma: 1 / sigma, class_prior=PRIOR, frames=(3,)
    )
    objective = MCLR(BETA, 0.2, "mismatched", sigma_interval=(0.5, 1.1))

    def denoise(x, sigma, condition):
        flat = x.reshape(-1, 1), sigma.reshape(-1), jnp.repeat(label_of(condition), 3)
        return mixture.denoise(*flat).reshape(x.shape)

    def ask(watched, data):
        return objective(cases.models(watched), problem, *data)

    data = Batch(x0, Condition(label)), keys
    loss, (_, sigma, condition, answers) = losses_and_inputs(denoise, ask, data)
    sigma, answers = np.asarray(sigma), np.asarray(answers)
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

    def ask(watched, data):
        return run(mixture, watched, data, strength=(0.5, 2.0))

    loss, (_, _, condition, _) = losses_and_inputs(mixture.denoise, ask, data)
    strength, at_wrong = np.split(np.asarray(condition.strength), 2)
    np.testing.assert_array_equal(strength, at_wrong)
    assert strength.min() >= 0.5
    assert strength.max() <= 2.0
    # the law has a third of all in the outer 7% at either end: arcsin(sqrt(1/15)) 2 / pi
    ends = (strength < 0.6) | (strength > 1.9)
    assert abs(ends.mean() - 0.3331) < 4 * np.sqrt(0.222 / 1000)
    same = losses(mixture, mixture.denoise, data, beta=jnp.asarray(strength))
    np.testing.assert_allclose(loss, same, rtol=1e-5)
    assert not np.allclose(loss, losses(mixture, mixture.denoise, data), rtol=1e-2)


# ---- a share of the negatives --------------------------------------------------------------------


def biased(x, sigma, condition):
    """A denoiser that is far from any optimum."""
    return 0.5 * x + 0.3 * label_of(condition)[:, None] - 0.2


@pytest.mark.parametrize(
    ("share", "options"),
    [
        (0.5, {}),
        (0.25, {"negatives": "prior", "bound": "clip", "target": "reference"}),
        (0.25, {"negatives": "mismatched", "weighting": "cfg"}),
    ],
    ids=["posterior", "clip", "mismatched"],
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


def test_a_part_of_a_batch_that_the_share_does_not_divide_is_refused():
    mixture, data = draw(6)
    message = "every 4th row, but a part of the batch has 6 rows; expected a multiple of 4"
    with pytest.raises(ValueError, match=message + r".*batch_size.*grad_accumulation"):
        run(mixture, mixture.denoise, data, negative_share=0.25)


# ---- bounds --------------------------------------------------------------------------------------


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


def test_errors_are_unweighted_and_the_margin_is_of_the_rows_that_have_a_contrast():
    mixture, data = draw(400)
    x0, seen = data[0], []

    def denoise(x, sigma, condition):
        seen.append((label_of(condition), biased(x, sigma, condition)))
        return seen[-1][1]

    options = {"negatives": "mismatched", "beta": 0.01, "negative_share": 0.25}
    _, found = run(mixture, denoise, data, label_dropout=0.3, **options)
    report = reductions.report(reductions.over_rows(found))
    ((shown, answers),) = seen
    rows = np.arange(0, 400, 4)
    right = np.asarray((answers[:400] - x0) ** 2)[:, 0]
    wrong = np.asarray((answers[400:] - x0[rows]) ** 2)[:, 0]
    np.testing.assert_allclose(report["error"], right.mean(), rtol=1e-5)
    np.testing.assert_allclose(report["negative_error"], wrong.mean(), rtol=1e-5)
    kept = np.asarray(shown[rows] != 3)
    margin = (wrong - right[rows])[kept].mean()
    np.testing.assert_allclose(report["margin"], margin, rtol=1e-4)
    assert "unbounded" not in report
