"""MCLR against a network's own wrong answer: its optimum for networks that err."""

import cases
import chex
import jax
import jax.numpy as jnp
import pytest
from cases import Level

from mclr_jax import guidance, posterior
from mclr_jax.mixture import GaussianMixture, toy
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.types import Condition, label_of, with_label

BETA, NULL = 1.5, 3
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


def error_of_null(*inputs):
    return null(erring)(*inputs) - expected_label(erring)(*inputs)


@pytest.mark.parametrize("form", OPTIMA)
def test_the_optimum_of_each_form_for_networks_that_err(form):
    options, optimum = OPTIMA[form]
    objective = NullMCLR(BETA, label_dropout=0.0, **options)
    # beside the optimum: no guidance, and that of an exact network
    others = [EXACT.denoise, guidance.classifier_free(EXACT.denoise, NULL, 1 + BETA)]
    frozen = {"reference": erring, "weak": weaker}
    at_optimum, *elsewhere = cases.slopes_in_standard_errors(
        objective, [optimum, *others], [error_of_null], **frozen
    )
    assert at_optimum < 4
    assert min(elsewhere) > 15


def test_with_the_average_as_teacher_the_fixed_point_is_cfg():
    """The teacher is guided itself; at its null label it is not."""
    objective = NullMCLR(BETA, label_dropout=0.0, teacher="average")
    for share, fixed in [(1.0, True), (0.8, False)]:
        guided = guidance.classifier_free(EXACT.denoise, NULL, 1 + share * BETA)
        (slope,) = cases.slopes_in_standard_errors(objective, [guided], average=guided)
        assert slope < 4 if fixed else slope > 15


@pytest.mark.parametrize("share", [1.0, 0.8])
@pytest.mark.parametrize("strength", [(), (BETA, BETA)], ids=["fixed", "input"])
def test_the_fixed_point_of_dogfit_is_domain_guidance(share, strength):
    """Of a source with other classes, exact or erring; a strength as input asks the average at 0.

    DogFit of w has the target x + (w - 1) (D_avg(c) - e), and w - 1 = gamma / (1 + gamma) or gamma.
    """
    objective = NullMCLR(BETA, label_dropout=0.0, teacher="average", wrong="source")
    assert objective.needs == {"average", "reference", "class_strengths"}
    assert (objective.reads_null, objective.reads_only_null) == ({"reference"}, {"reference"})
    domain = GaussianMixture(
        means=jnp.float32([[[2, 1]], [[-1, 2]]]), stds=jnp.float32([[0.4], [0.6]]),
        weights=jnp.ones((2, 1)), class_prior=jnp.float32([0.5, 0.5]),
    )  # fmt: skip

    def source(x, sigma, condition):
        asked = label_of(condition)[:, None] == NULL
        found = domain.denoise(x, sigma, jnp.full(len(x), 2)) + 0.1 * jnp.sin(2 * x)
        return jnp.where(asked, found, jnp.nan)

    guided = extrapolated(EXACT.denoise, EXACT.denoise, null(source), share * BETA)
    average = EXACT.denoise if strength else guided
    (slope,) = cases.slopes_in_standard_errors(
        objective, [guided], [null(source)], strength=strength, average=average, reference=source
    )
    assert slope < 4 if share == 1 else slope > 15


def test_the_contrast_of_some_steps_is_absent_in_all_others():
    batch, keys = cases.draws(8)
    models = cases.models(EXACT.denoise, reference=erring)

    def loss(step, **options):
        given = batch.replace(step=None if step is None else jnp.full(8, step))
        objective = NullMCLR(BETA, label_dropout=0.0, **options)
        assert ("step" in objective.needs) == bool(options)
        return objective(models, cases.problem(Level(0.7)), given, keys)[0]

    plain = NullMCLR(0.0, label_dropout=0.0)(models, cases.problem(Level(0.7)), batch, keys)[0]
    chex.assert_trees_all_equal(loss(None, step_interval=(3, 5)), loss(None))
    for done, there in [(2, False), (3, True), (4, True), (5, False)]:  # step 3 is the third
        chex.assert_trees_all_equal(
            loss(done, step_interval=(3.0, 5.0)), loss(None) if there else plain
        )


def test_the_second_contrast_begins_as_the_plain_one_and_is_bounded():
    batch, keys = cases.draws(500)
    problem = cases.problem(Level(0.8), class_prior=(1 / 3, 1 / 3, 1 / 3))
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


def test_a_log_variance_head_divides_the_parabola_and_leaves_its_optimum():
    """weight |D - target|^2 / e^u + u, of EDM2's networks."""
    batch, keys = cases.draws(32)
    problem = cases.problem(Level(0.7), weight=lambda sigma: 3 * jnp.ones_like(sigma))
    objective = NullMCLR(BETA, label_dropout=0.0)
    models = cases.models(EXACT.denoise, reference=erring)
    plain, _ = objective(models, problem, batch, keys)
    head = models._replace(log_variance=lambda sigma: jnp.full_like(sigma, 0.8))
    loss, metrics = objective(head, problem, batch, keys)
    chex.assert_trees_all_close(loss, plain * jnp.exp(-0.8) + 0.8, rtol=1e-5)
    assert metrics.keys() == {"error", "negative_error", "margin"}
