"""MCLR: fine-tune so that the right class explains an image better than the wrong classes do.

With x_s = x + s n, D_c the exact denoiser of class c, D_0 that of all classes and
rho_c(x_s) = p(c | x_s) / p(c), the objective of arXiv 2603.22364 in its denoising form is

    weight(s) [ (1 + beta) |D(x_s, c) - x|^2  -  beta omega |D(x_s, c~) - x|^2 ].

Plain (omega = 1, c~ ~ p(c)): the pointwise optimum is D_c + gamma (D_c - D_0) with
gamma = beta / ((1 + beta) rho_c - beta), and there is none where rho_c < beta / (1 + beta): the
loss has no lower bound there. CFG-equivalent (omega = rho_c~, or c~ drawn from the posterior): the
optimum is (1 + beta) D_c - beta D_0 everywhere, which is classifier-free guidance of
guidance_scale 1 + beta. With an estimated posterior q the curvature is (1 + beta) p(c|x_s) - beta
q(c|x_s): q may be too large by a factor of (1 + beta) / beta at most, or there is no minimum.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mclr_jax.metrics import Metrics, effective_share, maximum, mean
from mclr_jax.noise import split
from mclr_jax.objectives.base import (
    Noisy,
    Objective,
    arcsine_law,
    draw_label,
    draw_strength,
    in_one_call,
    log_prior,
    per_example,
    perturb,
    square_error,
)
from mclr_jax.problem import Batch, Models, Problem
from mclr_jax.types import with_label

WORDS = {
    "negatives": ("prior", "mismatched", "posterior"),
    "weighting": ("none", "cfg"),
    "bound": ("none", "clip", "logistic"),
    "target": ("data", "reference"),
    "negative_share": (1.0, 0.5, 0.25),
}


@dataclasses.dataclass(frozen=True)
class MCLR(Objective):
    """The MCLR loss of each example; see the formula above.

    Examples whose label was dropped, and noise levels outside the interval, get plain DSM.

    Attributes:
      beta: strength of the contrast; the CFG-equivalent forms end at guidance_scale 1 + beta. A
        network that takes the strength as an input (config.strength) is trained for a range.
      label_dropout: as in `DSM`.
      negatives: how c~ is drawn: "prior", "mismatched" (the prior without c) or "posterior"
        (p(c~ | x_s) without c, and the contrast weighted by 1 - p(c | x_s): where c~ = c the two
        terms are one, which is summed in closed form).
      weighting: "none", or "cfg": prior and mismatched negatives weighted to the CFG-equivalent
        form. Mismatched negatives then stand for c~ != c alone; c~ = c is summed in closed form.
      negative_share: the contrast is computed for this share of the examples, 1, 0.5 or 0.25: for
        every example, every second or every fourth, scaled up so that the mean stays the same.
      bound: keeps the plain form bounded. "clip": the negative error counts up to clip_ratio times
        the positive one. "logistic": 2 / a (log(1 + exp(a m)) - log 2), a = logistic_scale, in
        place of m, which is weight beta (positive error - omega negative error) less the same of
        the reference (Diffusion-DPO, arXiv 2311.12908, with a wrong label on the same image); the
        two have the same gradient where the model is the reference.
      reference_penalty: times weight(s) (|D - D_ref|^2 at c plus the same at c~).
      target: what both labels are to explain: "data", x0 itself, or "reference", the frozen
        model's D(x_s, c), which is the mean of x0 given x_s and c, but for the frozen model's
        error, and so has the same optimum at far less variance.
      sigma_interval: (low, high): contrast only where low < sigma <= high, in all frames.
    """

    beta: float = 1.0
    label_dropout: float = 0.1
    negatives: str = "posterior"
    weighting: str = "none"
    negative_share: float = 1.0
    bound: str = "none"
    clip_ratio: float = 2.0
    logistic_scale: float = 10.0
    reference_penalty: float = 0.0
    target: str = "data"
    sigma_interval: tuple[float, ...] = ()

    def __post_init__(self):
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise ValueError(
                    f"objective.{name} is {getattr(self, name)!r}; expected one of {words}."
                )
        if self.negatives == "posterior" and self.weighting == "cfg":
            raise ValueError(
                "Negatives from the posterior are the CFG-equivalent form already: set "
                "objective.weighting='none', or objective.negatives='prior'."
            )

    @property
    def needs(self) -> frozenset[str]:
        needs = {"class_prior"} | ({"posterior"} if self._equivalent else set())
        if self._held or self.target == "reference":
            needs.add("reference")
        return frozenset(needs)

    @property
    def _equivalent(self) -> bool:
        """Whether the optimum is CFG."""
        return self.negatives == "posterior" or self.weighting == "cfg"

    @property
    def _held(self) -> bool:
        """Whether the loss compares the model with the reference at both labels."""
        return self.bound == "logistic" or self.reference_penalty > 0

    def __call__(
        self, models: Models, problem: Problem, batch: Batch, keys: jax.Array
    ) -> tuple[jax.Array, Metrics]:
        """Metrics: `error` and `negative_error` (unweighted), `margin` (their difference where
        there is a contrast), `weight`, `weight_ess` (effective share) and `weight_max` of the
        negative term, without beta; with a posterior `unbounded`: how often the plain objective has
        no minimum at (x_s, c~).

        Raises:
          ValueError: if the rows are no multiple of 1 / negative_share.
        """
        every = round(1 / self.negative_share)
        if len(batch.x0) % every:
            raise ValueError(
                f"objective.negative_share={self.negative_share} takes every {every}th row, but a "
                f"part of the batch has {len(batch.x0)} rows; expected a multiple of {every}. "
                "Change config.batch_size or config.grad_accumulation."
            )
        noisy = perturb(problem, batch.x0, batch.condition, keys, self.label_dropout)
        k_negative, k_posterior, k_strength = split(noisy.keys, 3)
        beta, condition = draw_strength(
            noisy.condition, k_strength, problem, self.beta, arcsine_law
        )
        noisy = noisy._replace(condition=condition)
        contrast = self._contrast(problem, noisy, beta)
        log_posterior = None
        if models.posterior is not None:
            log_posterior = jax.lax.stop_gradient(
                models.posterior(noisy.x, noisy.sigma, condition, k_posterior)
            )
        wrong, own_weight, omega = self._wrong_label(
            problem, batch.condition.label, k_negative, log_posterior
        )
        some = functools.partial(jax.tree.map, lambda values: values[::every])
        loss, metrics = self._terms(
            models, problem, batch.x0, noisy, some,
            wrong, some(contrast > 0), some(contrast * own_weight), some(contrast * omega),
        )  # fmt: skip
        metrics |= {
            "weight": mean(omega),
            "weight_ess": effective_share(omega),
            "weight_max": maximum(omega),
        }
        if log_posterior is not None:
            ratio = jnp.exp(_at(log_posterior, wrong) - log_prior(problem)[wrong])
            unbounded = ratio < contrast / (1 + contrast)
            metrics["unbounded"] = mean(unbounded.astype(loss.dtype))
        return loss, metrics

    def _contrast(self, problem: Problem, noisy: Noisy, beta: Any) -> jax.Array:
        """The strength (B,) with which each example is contrasted."""
        inside = noisy.condition.label != problem.null_label
        if self.sigma_interval:
            low, high = self.sigma_interval
            levels = noisy.sigma.reshape(len(inside), -1)
            inside &= ((low < levels) & (levels <= high)).all(-1)
        return jnp.where(inside, beta, 0.0)

    def _wrong_label(
        self, problem: Problem, own: jax.Array, keys: jax.Array, log_posterior: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """c~ (B,), and the weights (B,), without beta, of the right and the wrong label's error."""
        ones = jnp.ones(len(own))
        if self.negatives == "posterior":
            wrong = draw_label(keys, log_posterior, other_than=own)
            other = -jnp.expm1(_at(log_posterior, own))  # 1 - p(c | x_s)
            return wrong, other, other
        logits = log_prior(problem)
        mismatched = self.negatives == "mismatched"
        wrong = draw_label(keys, logits, other_than=own if mismatched else None)
        if self.weighting == "none":
            return wrong, ones, ones
        chance = logits[wrong]
        if mismatched:
            chance -= jnp.log1p(-jnp.exp(logits[own]))
        omega = jnp.exp(_at(log_posterior, wrong) - chance)
        own_weight = 1 - jnp.exp(_at(log_posterior, own)) if mismatched else ones
        return wrong, own_weight, omega

    def _terms(self, models, problem, x0, noisy, some, wrong, held, own_weight, wrong_weight):
        """Loss (B,) and metrics, from one call of the network for both labels.

        `some` takes the rows that have a contrast; of these are the weights, and `held`: whether
        the reference penalty holds them.
        """
        x, sigma, condition, _ = noisy
        right = (x, sigma, condition)
        contrasted = some((x, sigma, with_label(condition, wrong)))
        denoised, at_wrong = in_one_call(models.denoise, right, contrasted)
        frozen = frozen_wrong = None
        if "reference" in self.needs:
            reference = models.frozen["reference"].denoise
            if not self._held:
                frozen = reference(*right)
            elif self.target == "reference":
                frozen, frozen_wrong = in_one_call(reference, right, contrasted)
            else:
                frozen, frozen_wrong = in_one_call(reference, some(right), contrasted)
        explained: Any = frozen if self.target == "reference" else x0
        weight = problem.weight(sigma)

        def weighted(a, b):  # at the rows that have a contrast
            return per_example(some(weight) * square_error(a, b, some(sigma)))

        error = square_error(denoised, explained, sigma)
        plain = per_example(weight * error)
        own, other = some(plain), weighted(at_wrong, some(explained))
        if self.bound == "clip":
            other = jnp.minimum(other, self.clip_ratio * jax.lax.stop_gradient(own))
        contrast = own_weight * own - wrong_weight * other
        if self._held:
            held_right = frozen if self.target == "data" else some(frozen)
            if self.bound == "logistic":
                then = own_weight * weighted(held_right, some(explained))
                then -= wrong_weight * weighted(frozen_wrong, some(explained))
                margin = self.logistic_scale * (contrast - then)
                contrast = 2 / self.logistic_scale * (jax.nn.softplus(margin) - jnp.log(2.0))
            distance = weighted(some(denoised), held_right)
            distance += weighted(at_wrong, frozen_wrong)
            contrast += self.reference_penalty * jnp.where(held, distance, 0)
        every = len(x) // len(own)
        loss = plain.at[::every].add(every * contrast)

        positive_error = per_example(error)
        negative_error = per_example(square_error(at_wrong, some(explained), some(sigma)))
        return loss, {
            "error": mean(positive_error),
            "negative_error": mean(negative_error),
            "margin": mean(negative_error - some(positive_error), where=wrong_weight > 0),
        }

    def advice(self) -> str:
        if self.beta <= 0:
            return super().advice()
        bound = self.beta / (1 + self.beta)
        if not self._equivalent and self.bound == "none" and self.reference_penalty < self.beta:
            return (
                "The plain MCLR objective has no minimum: its loss falls without end wherever "
                f"p(c|x_s) / p(c) < beta / (1 + beta) = {bound:.3g}. Use the CFG-equivalent form "
                "(objective.negatives='posterior' or objective.weighting='cfg'), or bound it "
                "(objective.bound='clip' or 'logistic', objective.reference_penalty >= beta)."
            )
        return (
            f"A posterior that is more than (1 + beta) / beta = {1 / bound:.3g} times too large at "
            "some (x_s, c~) takes the minimum away: improve it (for 'denoiser' more "
            "posterior.levels), lower objective.beta, or set objective.bound='clip'. "
            + super().advice()
        )


def _at(table: jax.Array, classes: jax.Array) -> jax.Array:
    """table (B, K) at classes (B,) -> (B,)."""
    return jnp.take_along_axis(table, classes[:, None], axis=-1)[:, 0]
