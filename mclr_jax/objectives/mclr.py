"""MCLR: fine-tuning in which the right class must explain an image better than wrong classes.

With x_s = x + s n, D_c the exact denoiser of class c, D_0 that of all classes and
rho_c(x_s) = p(c | x_s) / p(c), the objective of arXiv 2603.22364 in its denoising form is

    weight(s) [ (1 + beta) |D(x_s, c) - x|^2  -  beta omega |D(x_s, c~) - x|^2 ].

Plain form (omega = 1, c~ ~ p(c)): the pointwise optimum is D_c + gamma (D_c - D_0) with
gamma = beta / ((1 + beta) rho_c - beta). At x_s with rho_c < beta / (1 + beta) the loss has no
lower bound. CFG-equivalent form (omega = rho_c~, or c~ drawn from the posterior): the optimum is
(1 + beta) D_c - beta D_0 everywhere, which is classifier-free guidance with guidance_scale
1 + beta. With an estimated posterior q the curvature is (1 + beta) p(c|x_s) - beta q(c|x_s): the
loss has a minimum only if q is too large by a factor of less than (1 + beta) / beta.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mclr_jax.noise import split
from mclr_jax.objectives import base
from mclr_jax.objectives.base import Batch, Loss, Models, Objective, Problem
from mclr_jax.reductions import effective_share, maximum, mean
from mclr_jax.schema import key
from mclr_jax.types import with_label


@dataclasses.dataclass(frozen=True)
class MCLR(Objective):
    """The MCLR loss of each example; see the formula above.

    Examples with a dropped label or a noise level outside the interval get plain DSM. The bound
    "clip" limits the negative error to clip_ratio times the positive error. The target "reference"
    is D_ref(x_s, c), an estimate of E[x0 | x_s, c]: the optimum is the same, and the variance far
    less.
    """

    beta: float = key(1.0, 0.0, 1e12, says="strength of the contrast; config.strength replaces it")
    label_dropout: float = base.label_dropout()
    negatives: str = key(
        "posterior", words=("prior", "mismatched", "posterior"), says="law of the wrong label c~: "
        "p(c~), p(c~) without c, or p(c~ | x_s) without c with the weight 1 - p(c | x_s)"
    )  # fmt: skip
    weighting: str = key("none", words=("none", "cfg"), says="cfg weights negatives that are not "
                         "from the posterior to the CFG-equivalent form")  # fmt: skip
    negative_share: float = base.negative_share()
    bound: str = key("none", words=("none", "clip"), says="bound of the plain form")
    clip_ratio: float = key(2.0, 0.0, 1e12, says="largest negative error over positive error")
    target: str = key("data", words=("data", "reference"), says="target of both errors")
    sigma_interval: tuple[float, ...] = base.sigma_interval()

    def __post_init__(self):
        super().__post_init__()
        if self.negatives == "posterior" and self.weighting == "cfg":
            raise ValueError(
                "Negatives from the posterior are the CFG-equivalent form already: set "
                "objective.weighting='none', or objective.negatives='prior'."
            )

    @property
    def needs(self) -> frozenset[str]:
        needs = {"posterior": self._equivalent, "reference": self.target == "reference"}
        found = {name for name, needed in needs.items() if needed}
        return frozenset({"class_prior", "class_strengths"} | found)

    @property
    def _equivalent(self) -> bool:
        """True if the optimum is CFG."""
        return self.negatives == "posterior" or self.weighting == "cfg"

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Loss (B,) and metrics; raises ValueError unless 1 / negative_share divides the rows.

        Metrics: `error` and `negative_error` (unweighted), `margin` (their difference, for examples
        with a contrast); `weight`, `weight_ess` (effective share) and `weight_max` of the negative
        term, without beta; with a posterior `unbounded`, the share of examples for which the plain
        objective has no minimum at (x_s, c~).
        """
        every = base.rows_with_negatives(self.negative_share, len(batch.x0))
        noisy = base.perturb(problem, batch.x0, batch.condition, keys, self.label_dropout)
        k_negative, k_posterior, k_beta = split(noisy.keys, 3)
        beta, condition = base.draw_strength(noisy.condition, k_beta, problem, self.beta)
        noisy = noisy._replace(condition=condition)
        contrast = base.contrast_strength(problem, noisy, beta, self.sigma_interval)
        log_posterior = None
        if models.posterior is not None:
            log_posterior = models.posterior(noisy.x, noisy.sigma, condition, k_posterior)
            log_posterior = jax.lax.stop_gradient(log_posterior)
        own = batch.condition.label
        wrong, own_weight, omega = self._wrong_label(problem, own, k_negative, log_posterior)
        some = functools.partial(jax.tree.map, lambda values: values[::every])
        loss, metrics = self._terms(
            models, problem, batch.x0, noisy, some,
            wrong, some(contrast * own_weight), some(contrast * omega),
        )  # fmt: skip
        metrics |= {"weight": mean(omega), "weight_ess": effective_share(omega)}
        metrics["weight_max"] = maximum(omega)
        if log_posterior is not None:
            ratio = jnp.exp(_at(log_posterior, wrong) - base.log_prior(problem)[wrong])
            unbounded = ratio < contrast / (1 + contrast)
            metrics["unbounded"] = mean(unbounded.astype(loss.dtype))
        return loss, metrics

    def _wrong_label(
        self, problem: Problem, own: jax.Array, keys: jax.Array, log_posterior: Any
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """c~ (B,), and weights (B,), without beta, of the errors of the right and wrong label."""
        ones = jnp.ones(len(own))
        if self.negatives == "posterior":
            wrong = base.draw_label(keys, log_posterior, other_than=own)
            other = -jnp.expm1(_at(log_posterior, own))  # 1 - p(c | x_s)
            return wrong, other, other
        logits = base.log_prior(problem)
        mismatched = self.negatives == "mismatched"
        wrong = base.draw_label(keys, logits, other_than=own if mismatched else None)
        if self.weighting == "none":
            return wrong, ones, ones
        chance = logits[wrong]
        if mismatched:
            chance -= jnp.log1p(-jnp.exp(logits[own]))
        omega = jnp.exp(_at(log_posterior, wrong) - chance)
        own_weight = 1 - jnp.exp(_at(log_posterior, own)) if mismatched else ones
        return wrong, own_weight, omega

    def _terms(self, models, problem, x0, noisy, some, wrong, own_weight, wrong_weight):
        """Loss (B,) and metrics, from one call of the network for both labels.

        `some` takes the rows that can have a contrast, for which the weights are.
        """
        x, sigma, condition, _ = noisy
        right = (x, sigma, condition)
        contrasted = some((x, sigma, with_label(condition, wrong)))
        denoised, at_wrong = base.in_one_call(models.denoise, right, contrasted)
        asks = self.target == "reference"
        explained = models.frozen["reference"].denoise(*right) if asks else x0
        weight, error = problem.weight(sigma), base.square_error(denoised, explained, sigma)
        wrong_error = base.square_error(at_wrong, some(explained), some(sigma))
        plain = base.per_example(weight * error)
        own, other = some(plain), base.per_example(some(weight) * wrong_error)
        if self.bound == "clip":
            other = jnp.minimum(other, self.clip_ratio * jax.lax.stop_gradient(own))
        contrast = own_weight * own - wrong_weight * other
        every = len(x) // len(own)
        loss = plain.at[::every].add(every * contrast)

        positive_error, negative_error = base.per_example(error), base.per_example(wrong_error)
        return loss, {
            "error": mean(positive_error),
            "negative_error": mean(negative_error),
            "margin": mean(negative_error - some(positive_error), where=wrong_weight > 0),
        }

    def advice(self) -> str:
        if self.beta <= 0:
            return super().advice()
        bound = self.beta / (1 + self.beta)
        if not self._equivalent and self.bound == "none":
            return (
                "The plain MCLR objective has no minimum: its loss has no lower bound if "
                f"p(c|x_s) / p(c) < beta / (1 + beta) = {bound:.3g}. Use the CFG-equivalent form "
                "(objective.negatives='posterior' or objective.weighting='cfg'), or bound the loss "
                "(objective.bound='clip')."
            )
        return (
            "The loss has no minimum if the posterior is more than (1 + beta) / beta = "
            f"{1 / bound:.3g} times too large at some (x_s, c~): improve the posterior, "
            f"lower objective.beta, or set objective.bound='clip'. {super().advice()}"
        )


def _at(table: jax.Array, classes: jax.Array) -> jax.Array:
    """table (B, K) at classes (B,) -> (B,)."""
    return jnp.take_along_axis(table, classes[:, None], axis=-1)[:, 0]
