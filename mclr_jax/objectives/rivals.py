"""MCLR's rivals: other methods that need no guidance at sampling time, for the same train loop.

The defaults are the hyper-parameters of the papers. Preference losses use `base.log_ratio` as the
log likelihood ratio. `label_dropout` is that of `DSM`. config.class_strengths are no part of the
papers: they multiply lambda at c~ (CCA), the fixed strength (GFT) or w / (1 - w) (model guidance).
"""

import dataclasses

import jax
import jax.numpy as jnp

from mclr_jax.noise import normal_like, split
from mclr_jax.objectives import base
from mclr_jax.objectives.base import Batch, Loss, Models, Objective, Problem
from mclr_jax.reductions import Metrics, mean
from mclr_jax.schema import key
from mclr_jax.types import Condition, expand, with_label


@dataclasses.dataclass(frozen=True)
class CCA(Objective):
    """CCA, condition contrastive alignment (Chen et al. 2024, arXiv 2410.09347).

    [-log s(beta r(x, c)) - lambda log s(-beta r(x, c~))] / max(lambda, 1), s the logistic.

    c~ is drawn from the class prior. With r a true log ratio the optimum is
    p_ref(x|c) [p(x|c) / (lambda p(x))]^(1/beta). An example with a dropped label is a positive of
    the null label and has no negative.

    Differs from the official code, where c~ is the label of a neighbour in the batch, dropped or
    not, and a c~ that is null or equal to c is a second positive of weight 1. With
    `second_positives` c~ is drawn by that law, independently, for dropped labels too.
    """

    beta: float = key(0.02, 0.0, 1e9, "(", says="inverse temperature; larger: weaker contrast")
    negative_weight: float = key(1000.0, 0.0, 1e9, says="lambda")
    label_dropout: float = base.label_dropout()
    second_positives: bool = key(False, says="the official code's law of wrong labels")

    needs = frozenset({"reference", "class_prior", "class_strengths"})

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Metrics: `positive_ratio` and `negative_ratio`, r at c and at c~."""
        x0 = batch.x0
        noisy = base.perturb(problem, x0, batch.condition, keys, self.label_dropout)
        shown = noisy.condition.label
        k_wrong, k_dropped = split(noisy.keys, 2)
        wrong = base.draw_label(k_wrong, base.log_prior(problem))
        if self.second_positives:
            dropped = jax.vmap(jax.random.uniform)(k_dropped) < self.label_dropout
            wrong = jnp.where(dropped, problem.null_label, wrong)
        labels = (shown, wrong)
        denoised = base.at_labels(models.denoise, noisy, labels)
        frozen = base.at_labels(models.frozen["reference"].denoise, noisy, labels)
        positive, negative = (
            base.log_ratio(problem, noisy.sigma, d, r, x0)
            for d, r in zip(denoised, frozen, strict=True)
        )
        weight = self.negative_weight * base.strength_factor(problem, wrong)
        contrast = weight * jax.nn.softplus(self.beta * negative)
        if self.second_positives:
            second = (wrong == shown) | (wrong == problem.null_label)
            contrast = jnp.where(second, jax.nn.softplus(-self.beta * negative), contrast)
        else:
            contrast = jnp.where(shown == problem.null_label, 0.0, contrast)
        loss = jax.nn.softplus(-self.beta * positive) + contrast
        metrics: Metrics = {"positive_ratio": mean(positive), "negative_ratio": mean(negative)}
        return loss / max(self.negative_weight, 1.0), metrics


@dataclasses.dataclass(frozen=True)
class DPO(Objective):
    """Diffusion-DPO with a wrong label (Wallace et al. 2023, arXiv 2311.12908, eq. 14).

    -log s(-(beta / 2) m), m = (e(c) - e(c~)) - (e_ref(c) - e_ref(c~)), c~ != c.

    s is the logistic and e = mean (D - x)^2 / sigma^2 the mean square error of the noise. With
    l = -e a true log likelihood the optimum has l(c) - l(c~) - (the same of the reference) equal to
    (2 / beta) log of p(x|c) / (1 - p(c)) over the same of c~.

    Differs from the official code: winner and loser are two images of one prompt there; here they
    are one image under its label and under a label c~ drawn from the prior of the other classes. An
    example with a dropped label has no loser: its loss is (beta / 4) e, with the gradient that the
    loss has by e(c) where model and reference agree.
    """

    beta: float = key(5000.0, 0.0, 1e9, "(", says="inverse temperature; larger: weaker contrast")
    label_dropout: float = base.label_dropout()

    needs = frozenset({"reference", "class_prior"})

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Metrics: `error`, `negative_error` (unweighted), `accuracy`: share with m below 0."""
        noisy = base.perturb(problem, batch.x0, batch.condition, keys, self.label_dropout)
        sigma, shown = noisy.sigma, noisy.condition.label
        wrong = base.draw_label(
            noisy.keys, base.log_prior(problem), other_than=batch.condition.label
        )

        def errors(denoise):
            answers = base.at_labels(denoise, noisy, (shown, wrong))
            return [base.square_error(answer, batch.x0, sigma) for answer in answers]

        error, wrong_error = errors(models.denoise)
        error_then, wrong_then = errors(models.frozen["reference"].denoise)
        gain = (error - wrong_error) - (error_then - wrong_then)
        margin, plain = base.per_example(gain / sigma**2), base.per_example(error / sigma**2)
        contrast = jax.nn.softplus(self.beta / 2 * margin)
        loss = jnp.where(shown == problem.null_label, self.beta / 4 * plain, contrast)
        return loss, {
            "error": mean(base.per_example(error)),
            "negative_error": mean(base.per_example(wrong_error)),
            "accuracy": mean((margin < 0).astype(loss.dtype)),
        }


@dataclasses.dataclass(frozen=True)
class DDO(Objective):
    """DDO, direct discriminative optimisation (Zheng et al. 2025, arXiv 2503.01103).

    -log s(beta r(x, c)) - alpha log(1 - s(beta r(x', c'))), x' a sample of the frozen model.

    s is the logistic. With r a true log ratio the optimum is p_ref [p / (alpha p_ref)]^(1/beta).
    Rounds of self-play: sample the fine-tuned model, and fine-tune it against those samples.

    Differs from the official code: label dropout is an option; the samples, read from a file
    (config.data.generated), are in shuffled order.
    """

    beta: float = key(0.05, 0.0, 1e9, "(", says="inverse temperature")
    negative_weight: float = key(1.0, 0.0, 1e9, says="alpha")
    label_dropout: float = base.label_dropout(0.0)

    needs = frozenset({"reference", "generated"})

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Metrics: `positive_ratio` and `negative_ratio`, r of data and of samples."""
        assert batch.generated is not None  # the Task gives it
        x_generated, label = batch.generated
        # samples are not augmented
        generated = Condition(label, dropout_keys=batch.condition.dropout_keys)
        reference = models.frozen["reference"].denoise

        def ratio(x0, condition, keys):
            x, sigma, shown, _ = base.perturb(problem, x0, condition, keys, self.label_dropout)
            denoised = models.denoise(x, sigma, shown)
            return base.log_ratio(problem, sigma, denoised, reference(x, sigma, shown), x0)

        k_data, k_generated = split(keys, 2)
        positive = ratio(batch.x0, batch.condition, k_data)
        negative = ratio(x_generated, generated, k_generated)
        loss = jax.nn.softplus(-self.beta * positive)
        loss += self.negative_weight * jax.nn.softplus(self.beta * negative)
        return loss, {"positive_ratio": mean(positive), "negative_ratio": mean(negative)}


@dataclasses.dataclass(frozen=True)
class ContrastiveFlow(Objective):
    """Contrastive flow matching, dFM (Stoica et al. 2025, arXiv 2506.05350).

    weight' [|v(x_s, c) - v|^2 - lambda |v(x_s, c) - v~|^2], v = n - x of flow matching.

    x_t = (1 - t) x + t n is x_s / (1 + s) with t = s / (1 + s), so that v(x_s, c) =
    x_s / s - (1 + 1/s) D(x_s, c), and weight' = weight / (1 + 1/s)^2 is that of `DSM`. v~ = n~ - x~
    is of another example. The optimum is (v_c - lambda E v~) / (1 - lambda).

    Differs from the official code: the other example is drawn from all data, with fresh noise;
    there it is another example of the batch with its noise.
    """

    contrast: float = key(0.05, 0.0, 1.0, ")", says="lambda; from 1 on the loss has no minimum")
    label_dropout: float = base.label_dropout()

    needs = frozenset({"other"})

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Metrics: `error`, |D - x|^2, and `negative_error`, |v - v~|^2, unweighted."""
        x0, other = batch.x0, batch.other
        assert other is not None  # the Task gives it
        x, sigma, shown, keys = base.perturb(problem, x0, batch.condition, keys, self.label_dropout)
        slope = 1 + 1 / sigma
        denoised = models.denoise(x, sigma, shown)
        velocity = x / expand(sigma, x) - expand(slope, x) * denoised
        error = base.square_error(denoised, x0, sigma)
        negative_error = base.square_error(velocity, normal_like(keys, x0) - other, sigma)
        contrast = self.contrast * negative_error / slope**2
        metrics: Metrics = {
            "error": mean(base.per_example(error)),
            "negative_error": mean(base.per_example(negative_error)),
        }
        return base.per_example(problem.weight(sigma) * (error - contrast)), metrics


def uniform_share(uniform: jax.Array, low: float, high: float) -> jax.Array:
    """Strengths whose b = 1 / (1 + strength) is uniform."""
    return 1 / (1 / (1 + low) + uniform * (1 / (1 + high) - 1 / (1 + low))) - 1


@dataclasses.dataclass(frozen=True)
class GFT(Objective):
    """GFT, guidance-free training (Chen et al. 2025, arXiv 2501.15420).

    weight |b D(x_s, c, b) + (1 - b) D(x_s, null, 1) - x|^2 with b = 1 / (1 + strength).

    No gradient flows through D(x_s, null, 1). The optimum is CFG of guidance_scale 1 / b. A network
    with b as an input (config.strength) is shown b = 1 with a dropped label, as the official code
    does, so that D(x_s, null, 1) is trained.

    Differs from the official code: b is uniform on [1 / (1 + high), 1 / (1 + low)] of
    config.strength = (low, high), and on [0, 1] there: (0.0, 999.0) is nearly that. The network's
    input is the strength, of which b is a function.
    """

    beta: float = key(1.0, 0.0, 1e6, says="the strength, if it is no input of the network")
    label_dropout: float = base.label_dropout()

    needs = frozenset({"self", "class_strengths"})
    reads_null = frozenset({"self"})

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Metrics: `error` of the combination, unweighted."""
        x, sigma, shown, keys = base.perturb(
            problem, batch.x0, batch.condition, keys, self.label_dropout
        )
        fixed = self.beta * base.strength_factor(problem, shown.label)
        strength, shown = base.draw_strength(shown, keys, problem, fixed, uniform_share)
        if shown.strength is not None:
            dropped = shown.label == problem.null_label
            shown = shown.replace(strength=jnp.where(dropped, 0.0, shown.strength))
        b = expand(1 / (1 + jnp.asarray(strength)), x)
        null = with_label(shown, problem.null_label)
        unconditional = models.frozen["self"].denoise(x, sigma, null)
        combined = b * models.denoise(x, sigma, shown) + (1 - b) * unconditional
        error = base.square_error(combined, batch.x0, sigma)
        loss = base.per_example(problem.weight(sigma) * error)
        return loss, {"error": mean(base.per_example(error))}


@dataclasses.dataclass(frozen=True)
class ModelGuidance(Objective):
    """MG, model guidance (Tang et al. 2025, arXiv 2502.12154).

    weight |D(x_s, c) - [x + w (D_ema(x_s, c) - D_ema(x_s, null))]|^2.

    No gradient flows through the target. The fixed point is CFG of guidance_scale 1 / (1 - w).

    Differs from the official code: the target has the average of weights that `ema` keeps first,
    not one of decay 0.9999.
    """

    scale: float = key(0.45, 0.0, 1.0, ")", says="w; from 1 on there is no fixed point")
    # The paper's t < 0.75 of flow matching is sigma / sigma_data = t / (1 - t) < 3.
    relative_interval: tuple[float, float] = key(
        (0.0, 3.0), 0.0, ordered=True, says="targets are guided if low < sigma / sigma_data <= high"
    )
    label_dropout: float = base.label_dropout()

    needs = frozenset({"average", "class_strengths"})
    reads_null = frozenset({"average"})

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Metrics: `error`, |D - x|^2 unweighted."""
        noisy = base.perturb(problem, batch.x0, batch.condition, keys, self.label_dropout)
        x, sigma, shown, _ = noisy
        low, high = (end * problem.sigma_data for end in self.relative_interval)
        guided = (low < sigma) & (sigma <= high)  # at the null label the shift below is 0
        teacher = models.frozen["average"].denoise
        right, unconditional = base.at_labels(teacher, noisy, (shown.label, problem.null_label))
        share = self.scale * base.strength_factor(problem, shown.label)
        # gamma = w / (1 - w) times s_c
        scale = share / (1 - self.scale + share)
        scale = jnp.where(guided, expand(scale, sigma), 0.0)
        shift = expand(scale, x) * (right - unconditional)
        denoised = models.denoise(x, sigma, shown)
        loss = problem.weight(sigma) * base.square_error(denoised, batch.x0 + shift, sigma)
        error = base.square_error(denoised, batch.x0, sigma)
        return base.per_example(loss), {"error": mean(base.per_example(error))}
