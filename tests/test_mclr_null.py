"""MCLR against a network's own wrong answer: its optimum for networks that err."""

import functools

import cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Level

from mclr_jax import guidance, posterior
from mclr_jax.mixture import toy
from mclr_jax.objectives.base import Batch
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.types import Condition, label_of, with_label

BETA, NULL, PRIOR, DRAWS = 1.5, 3, (1 / 3, 1 / 3, 1 / 3), 30_000
EXACT = toy()
POSTERIOR = posterior.exact(EXACT)


def erring(x, sigma, condition):
    """A network whose errors differ by label: its null answer is no mixture of the others."""
    label = label_of(condition)[:, None]
    return 0.9 * EXACT.denoise(x, sigma, condition) + 0.1 * jnp.sin(3 * x + label)


def weaker(x, sigma, condition):
    return 0.7 * EXACT.denoise(x, sigma, condition) + 0.05 * label_of(condition)[:, None]


def null(denoise):
    return lambda x, sigma, condition: denoise(x, sigma, with_label(condition, NULL))


def extrapolated(start, right, wrong, gamma):
    return lambda *inputs: start(*inputs) + gamma * (right(*inputs) - wrong(*inputs))


def expected_label(denoise):
    """The mean answer over labels from the posterior."""

    def mean(x, sigma, condition):
        chances = jnp.exp(POSTERIOR(x, sigma, condition, None))
        answers = [denoise(x, sigma, with_label(condition, label)) for label in range(NULL)]
        return sum(chances[:, [c]] * answer for c, answer in enumerate(answers))

    return mean


OPTIMA = {
    "data": ({"target": "data"}, extrapolated(EXACT.denoise, EXACT.denoise, null(erring), BETA)),
    "mixed": ({}, extrapolated(EXACT.denoise, erring, null(erring), BETA)),
    "reference": ({"target": "reference"}, guidance.classifier_free(erring, NULL, 1 + BETA)),
    "weak": ({"wrong": "weak"}, extrapolated(EXACT.denoise, erring, weaker, BETA)),
    "weak, reference": ({"wrong": "weak", "target": "reference"},
                        guidance.autoguidance(erring, weaker, 1 + BETA)),
}  # fmt: skip


@functools.cache
def draws():
    x0, label = EXACT.sample(jax.random.key(0), DRAWS)
    return Batch(x0, Condition(label)), jax.random.split(jax.random.key(1), DRAWS)


def guidance_direction(*inputs):
    return EXACT.denoise(*inputs) - null(EXACT.denoise)(*inputs)


def waves(x, sigma, condition):
    return jnp.tanh(2 * x + label_of(condition)[:, None])


def error_of_null(*inputs):
    return null(erring)(*inputs) - expected_label(erring)(*inputs)


DIRECTIONS = (guidance_direction, waves, error_of_null)


def slopes_in_standard_errors(objective, points, **frozen):
    """The largest slope of the mean loss along DIRECTIONS, over its error, at each denoiser."""
    batch, keys = draws()
    problem = cases.problem(Level(0.8), class_prior=PRIOR)

    def slope(place):  # of a parabola, for which this is exact
        def loss(size):
            def moved(*inputs):
                start = jnp.stack([point(*inputs) for point in points])[place[0]]
                return start + size * jnp.stack([along(*inputs) for along in DIRECTIONS])[place[1]]

            return objective(cases.models(moved, **frozen), problem, batch, keys)[0]

        return (loss(1.0) - loss(-1.0)) / 2

    @jax.jit  # one loss for all places, which compiles in a tenth of the time
    def slopes():
        places = jnp.indices((len(points), len(DIRECTIONS))).reshape(2, -1).T
        return jax.lax.map(slope, places).reshape(len(points), len(DIRECTIONS), DRAWS)

    found = np.asarray(slopes(), np.float64)  # (points, directions, DRAWS)
    return np.abs(found.mean(-1) / (found.std(-1) / np.sqrt(DRAWS) + 1e-6)).max(-1)


@pytest.mark.parametrize("form", OPTIMA)
def test_the_optimum_of_each_form_for_networks_that_err(form):
    options, optimum = OPTIMA[form]
    objective = NullMCLR(BETA, label_dropout=0.0, **options)
    # beside the optimum: no guidance, and that of an exact network
    others = [EXACT.denoise, guidance.classifier_free(EXACT.denoise, NULL, 1 + BETA)]
    frozen = {"reference": erring, "weak": weaker}
    at_optimum, *elsewhere = slopes_in_standard_errors(objective, [optimum, *others], **frozen)
    assert at_optimum < 4
    assert min(elsewhere) > 15


def test_with_the_average_as_teacher_the_fixed_point_is_cfg():
    """The teacher is guided itself; at its null label it is not."""
    objective = NullMCLR(BETA, label_dropout=0.0, teacher="average")
    for share, fixed in [(1.0, True), (0.8, False)]:
        guided = guidance.classifier_free(EXACT.denoise, NULL, 1 + share * BETA)
        (slope,) = slopes_in_standard_errors(objective, [guided], average=guided)
        assert slope < 4 if fixed else slope > 15


def test_the_second_contrast_begins_as_the_plain_one_and_is_bounded():
    batch, keys = jax.tree.map(lambda x: x[:500], draws())
    problem = cases.problem(Level(0.8), class_prior=PRIOR)
    label, weight, beta = batch.condition.label, 0.8, 0.5

    def second(shift):
        """The second contrast alone, and what the network was shown; `shift` is (500, 3)."""
        seen = []

        def denoise(x, sigma, condition):
            rows = jnp.arange(len(x)) % 500
            seen.append((x, condition.label))
            answer = erring(x, sigma, condition)
            return answer + shift[rows, condition.label][:, None]

        models = cases.models(denoise, reference=erring)
        losses = [
            NullMCLR(beta, 0.0, wrong_label=share)(models, problem, batch, keys)[0]
            for share in (weight, 0.0)
        ]
        return losses[0] - losses[1], seen[0]

    @jax.jit
    def measured():
        slope = jax.grad(lambda shift: second(shift)[0].sum())(jnp.zeros((500, 3)))
        loss, seen = second(jnp.full((500, 3), 1e3))
        return slope, loss, seen

    slope, far, (x, shown) = measured()
    wrong = shown[500:]
    assert 0.2 < (wrong == label).mean() < 0.45
    at_wrong = erring(x[500:], jnp.full(500, 0.8), Condition(wrong))
    # of -weight beta |D(c~) - x|^2, the mean over two dimensions, for c~ != c
    expected = -2 * weight * beta * (at_wrong - batch.x0).mean(-1) * (wrong != label)
    chex.assert_trees_all_close(slope[jnp.arange(500), wrong], expected, atol=1e-4)
    assert float(jnp.abs(slope).sum()) == pytest.approx(float(jnp.abs(expected).sum()), rel=1e-3)
    assert float(far.min()) > -1e-2  # plainly it is about -1e5
