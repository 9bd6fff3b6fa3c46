"""MCLR against a network's own wrong answer: what CFG and autoguidance extrapolate from, learned.

The wrong explanation of a noisy image x_s is not a wrong label but the answer e(x_s) of a frozen
network, at the null label or of a weaker network at the same label, or the null answer of the
*source*, the run that training starts from, whose data may have other classes:

    weight(s) [ |D(x_s, c) - x|^2 + gamma (|D(x_s, c) - t|^2 - |D(x_s, c) - e|^2) ].

Both terms of the contrast have the same network input, so that the loss is a parabola of curvature
1, whatever the networks are: it is weight |D(x_s, c) - (x + gamma (t - e))|^2 and a constant.
With T the frozen network's answer at c, its optimum is

    target     t   x   optimum                      variance of the target
    data       x   x   (1 + gamma) D_c - gamma e    (1 + gamma)^2 of DSM's
    mixed      T   x   D_c + gamma (T - e)          that of DSM
    reference  T   T   T + gamma (T - e)            0

An exact network makes all three CFG of guidance_scale 1 + gamma. For a network that errs,
"reference" is the CFG of exactly that network, "mixed" also learns D_c from the data, and "data"
takes only e from the network. MCLR with negatives from the posterior has the optimum
(1 + gamma) D_c - gamma D_0: it leaves out the network's error D_0 - e, which CFG extrapolates, too.

"mixed" with the running average as the frozen network is model guidance (arXiv 2502.12154) of
w = gamma / (1 + gamma): the average has learned the guidance, and D_c + w (D - e) has the fixed
point D_c + gamma (D_c - e). If the strength is an input of the network, the average is asked at
strength 0, where it is D_c, and w is gamma.

With the source as the wrong explanation and the average as the teacher, "mixed" is DogFit (arXiv
2508.05685): w there is 1 + gamma / (1 + gamma), and 1 + gamma with the strength as an input; its
late start and its cut-off are step_interval and sigma_interval. Its optimum, D_c + gamma (D_c - e),
is domain guidance (DoG, arXiv 2504.01521) in one call. The score of e is that of the source's data
q, so that an exact network samples p_c (p_c / q)^gamma = p_c (p_c / p)^gamma (p / q)^gamma, up to
the order of noising and powers: guidance to the class, which the own null answer has alone, and
away from the source's domain. An error of e enters as -gamma times itself. Not in DogFit: the other
targets, the teacher that is frozen, and the contrast with a wrong label beside.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mclr_jax.noise import split
from mclr_jax.objectives import base
from mclr_jax.objectives.base import Batch, Loss, Models, Objective, Problem
from mclr_jax.reductions import Metrics, mean
from mclr_jax.schema import key
from mclr_jax.types import expand, with_label


@dataclasses.dataclass(frozen=True)
class NullMCLR(Objective):
    """The loss of each example; see the formula above. Dropped labels get plain DSM.

    A network with the strength as an input needs no interval: the optimum is one for each (x_s,
    sigma), and sampling gives it strength 0 outside an interval. The second contrast has a random
    label c~ != c at any noise level: wrong_label gamma (2 / (a d)) log(1 + exp(a r)), a =
    wrong_label_scale / gamma, with r the log ratio of model and reference at c~ (`base.log_ratio`,
    CCA's) and d the dimensions. Where r = 0 it has the gradient of -wrong_label gamma weight
    |D(x_s, c~) - x|^2, the plain MCLR's negative term. It is bounded: where r goes below -1 / a,
    the gradient vanishes.
    """

    beta: float = key(1.0, 0.0, 1e6, says="gamma of the optimum; times config.class_strengths, or "
                      "replaced by config.strength")  # fmt: skip
    label_dropout: float = base.label_dropout()
    wrong: str = key("null", words=("null", "weak", "source"), says="e is the teacher's answer at "
                     "the null label; that of config.companions.weak at the same label "
                     "(autoguidance, arXiv 2406.02507, in one call); or that of the run in "
                     "config.init_from at its null label, whatever its classes")  # fmt: skip
    teacher: str = key("reference", words=("reference", "average"), says="frozen network: that of "
                       "config.init_from, or the first average of the weights")  # fmt: skip
    target: str = key("mixed", words=("data", "mixed", "reference"), says="see the formula")
    sigma_interval: tuple[float, ...] = base.sigma_interval()
    step_interval: tuple[float, ...] = key((), 0.0, ordered=True, says="contrast only in training "
                                           "steps low < step <= high, counted from 1")  # fmt: skip
    wrong_label: float = key(0.0, 0.0, 1e6, says="factor of the contrast with a random wrong label")
    wrong_label_scale: float = key(0.025, 0.0, 1e9, "(", says="a gamma of that contrast")
    negative_share: float = base.negative_share("that contrast")

    @property
    def needs(self) -> frozenset[str]:
        labels = bool(self.wrong_label)
        needs = [
            ("class_strengths", True), ("weak", self.wrong == "weak"),
            ("step", bool(self.step_interval)), (self.teacher, self._asks_teacher),
            ("reference", labels or self.wrong == "source"), ("class_prior", labels),
        ]  # fmt: skip
        return frozenset(name for name, needed in needs if needed)

    @property
    def _asks_teacher(self) -> bool:
        return self.wrong == "null" or self.target != "data"

    @property
    def reads_null(self) -> frozenset[str]:
        return frozenset({"null": {self.teacher}, "source": {"reference"}}.get(self.wrong, set()))

    @property
    def reads_only_null(self) -> frozenset[str]:
        labels = self.wrong_label or (self._asks_teacher and self.teacher == "reference")
        return frozenset({"reference"} if self.wrong == "source" and not labels else set())

    def __call__(self, models: Models, problem: Problem, batch: Batch, keys: jax.Array) -> Loss:
        """Loss (B,) and metrics; raises ValueError unless 1 / negative_share divides the rows.

        Metrics: `error`, |D - x|^2, and `negative_error`, |D - e|^2 (unweighted); `margin`, their
        difference for examples with a contrast; with `wrong_label` the `negative_ratio`, r at c~.
        """
        noisy = base.perturb(problem, batch.x0, batch.condition, keys, self.label_dropout)
        k_wrong, k_beta, _ = split(noisy.keys, 3)
        beta, condition = base.draw_strength(noisy.condition, k_beta, problem, self.beta)
        noisy = noisy._replace(condition=condition)
        x, sigma, condition, _ = noisy
        gamma = base.contrast_strength(problem, noisy, beta, self.sigma_interval)
        if self.step_interval and batch.step is not None:  # None: held-out examples
            gamma = jnp.where(base.inside(batch.step + 1, self.step_interval), gamma, 0.0)
        if self.teacher == "average" and not problem.strength:  # which has learned the guidance
            gamma = gamma / (1 + gamma)
        metrics: Metrics = {}
        target, explanation = self._target(models, problem, batch.x0, noisy, gamma)
        if not self.wrong_label:
            denoised, contrast = models.denoise(x, sigma, condition), jnp.zeros(len(x))
        else:
            every = base.rows_with_negatives(self.negative_share, len(x))
            some = functools.partial(jax.tree.map, lambda values: values[::every])
            wrong = base.draw_label(k_wrong, base.log_prior(problem))
            labelled = condition.label != problem.null_label
            there = labelled & (wrong != batch.condition.label)
            strength = beta * base.strength_factor(problem, wrong)
            x0, own_sigma, there, strength = some((batch.x0, sigma, there, strength))
            shown = some((x, sigma, with_label(condition, wrong)))
            denoised, at_wrong = base.in_one_call(models.denoise, (x, sigma, condition), shown)
            frozen = models.frozen["reference"].denoise(*shown)
            ratio = base.log_ratio(problem, own_sigma, at_wrong, frozen, x0)
            there &= strength > 0
            a = self.wrong_label_scale / jnp.where(there, strength, 1.0)
            bounded = 2 / (a * x0[0].size) * jax.nn.softplus(a * ratio)
            bounded = jnp.where(there, self.wrong_label * strength * bounded, 0.0)
            contrast = jnp.zeros(len(x)).at[::every].set(every * bounded)
            metrics["negative_ratio"] = mean(ratio, where=there)
        distance = base.square_error(denoised, target, sigma)
        loss = base.per_example(base.weighted(models, problem, distance, sigma)) + contrast
        error = base.per_example(base.square_error(denoised, batch.x0, sigma))
        negative_error = base.per_example(base.square_error(denoised, explanation, sigma))
        metrics |= {"error": mean(error), "negative_error": mean(negative_error)}
        metrics["margin"] = mean(negative_error - error, where=gamma > 0)
        return loss, metrics

    def _target(self, models, problem, x0, noisy, gamma):
        """x + gamma (t - e) and e, of x0's shape; gamma is (B,)."""
        x, sigma, condition, _ = noisy
        right = x0
        if self._asks_teacher:
            labels = [] if self.target == "data" else [condition.label]
            if self.wrong == "null":
                labels.append(problem.null_label)
            answers = base.at_labels(models.frozen[self.teacher].denoise, noisy, labels)
            right, wrong = x0 if self.target == "data" else answers[0], answers[-1]
        if self.wrong == "weak":
            wrong = models.frozen["weak"].denoise(x, sigma, condition)
        elif self.wrong == "source":
            nothing = with_label(condition, problem.null_label)
            wrong = models.frozen["reference"].denoise(x, sigma, nothing)
        start = right if self.target == "reference" else x0
        return start + expand(gamma, x) * (right - wrong), wrong
