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

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.denoiser import DenoiseFn
from mclr_jax.objectives.dsm import NoiseLevels, mean_square, perturb
from mclr_jax.posterior import Posterior

NEGATIVES = ("prior", "mismatched", "posterior")
WEIGHTINGS = ("none", "cfg")
BOUNDS = ("none", "clip", "logistic")
TARGETS = ("data", "reference")


def mclr(
    denoise: DenoiseFn,
    x0: jax.Array,
    label: jax.Array,
    keys: jax.Array,
    extra: tuple[Any, ...] = (),
    *,
    noise: NoiseLevels,
    weight: Callable[[jax.Array], jax.Array],
    null_label: int,
    class_prior: Sequence[float],
    beta: float | jax.Array = 1.0,
    label_dropout: float = 0.1,
    negatives: str = "posterior",
    weighting: str = "none",
    negative_share: float = 1.0,
    bound: str = "none",
    clip_ratio: float = 2.0,
    logistic_scale: float = 10.0,
    reference_penalty: float = 0.0,
    sigma_interval: Sequence[float] = (),
    target: str = "data",
    posterior: Posterior | None = None,
    reference: DenoiseFn | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The MCLR loss of each example; see the formula above.

    Examples whose label was dropped, and noise levels outside the interval, get plain DSM.

    Args:
      denoise, x0, label, keys, extra, noise, weight, null_label, label_dropout: as in `dsm`.
      class_prior: (K,) share of each class in the data.
      beta: () or (B,), strength of the contrast; the CFG-equivalent forms end at guidance_scale
        1 + beta.
      negatives: how c~ is drawn: "prior", "mismatched" (the prior without c) or "posterior"
        (p(c | x_s); where c~ = c no second call of the network is needed, see negative_share).
      weighting: "none", or "cfg": prior and mismatched negatives weighted to the CFG-equivalent
        form. Mismatched negatives then stand for c~ != c alone; c~ = c is summed in closed form.
      negative_share: the negative term is computed for at most this share of the batch, drawn among
        the examples that have one and scaled up so that the mean stays the same. It saves time
        with posterior negatives, few of which differ from c.
      bound: keeps the plain form bounded. "clip": the negative error counts up to clip_ratio times
        the positive one. "logistic": 2 / a (log(1 + exp(a m)) - log 2), a = logistic_scale, in
        place of m, which is weight beta (positive error - omega negative error) less the same of
        the reference (Diffusion-DPO, arXiv 2311.12908, with a wrong label on the same image); the
        two have the same gradient where the model is the reference.
      reference_penalty: times weight(s) (|D - D_ref|^2 at c plus the same at c~).
      sigma_interval: (low, high): contrast only where low < sigma <= high.
      target: what both labels are to explain: "data", x0 itself, or "reference", the frozen
        model's D(x_s, c), which stands for the mean of x0 given x_s and c and so leaves the optimum
        where it is, but for the frozen model's error, at far less variance.
      posterior: p(c | x_s); needed by posterior negatives and by weighting "cfg".
      reference: frozen denoiser; needed by target "reference", bound "logistic" and
        reference_penalty.

    Returns:
      loss (B,), and metrics (B,): `error` and `negative_error` (unweighted), `margin` (their
      difference where there is a contrast), `weight`, `weight_square` and `weight_max` (of the
      negative term, without beta), and with a posterior `unbounded`: whether the plain objective
      has no minimum at (x_s, c~).

    Raises:
      ValueError: on an unknown word, or where a posterior or reference is needed and missing.
    """
    held = _is_held(bound, reference_penalty)
    referred = needs_reference(bound, target, reference_penalty)
    _check(negatives, weighting, bound, target, negative_share)
    _check_parts(negatives, weighting, posterior, referred, reference)
    x, sigma, label, keys = perturb(x0, label, keys, noise, null_label, label_dropout)
    k_negative, k_posterior, k_share = jax.vmap(
        lambda key: jax.random.split(key, 3), out_axes=1
    )(keys)  # fmt: skip
    log_prior = jnp.log(jnp.asarray(class_prior, x0.dtype))
    dropped = label == null_label
    contrast = jnp.where(dropped, 0.0, beta)  # (B,)
    if sigma_interval:
        low, high = sigma_interval
        contrast = jnp.where((low < sigma) & (sigma <= high), contrast, 0.0)

    # ---- the wrong label, and the weight of its error --------------------------------------------
    own = jnp.minimum(label, null_label - 1)  # a class even where the label was dropped
    log_posterior: Any = None
    if posterior is not None:
        log_posterior = jax.lax.stop_gradient(posterior(x, sigma, k_posterior, own))
    logits = log_posterior if negatives == "posterior" else jnp.broadcast_to(
        log_prior, (len(x), null_label))  # fmt: skip
    if negatives == "mismatched":
        logits = jnp.where(jnp.arange(null_label) == own[:, None], -jnp.inf, logits)
    negative = jax.vmap(jax.random.categorical)(k_negative, logits)

    def at(table, classes):  # table (B, K) -> (B,)
        return jnp.take_along_axis(table, classes[:, None], axis=-1)[:, 0]

    omega = jnp.ones_like(sigma)
    positive_weight = 1 + contrast
    if weighting == "cfg":
        omega = jnp.exp(at(log_posterior, negative) - at(jax.nn.log_softmax(logits), negative))
        if negatives == "mismatched":
            positive_weight -= contrast * jnp.exp(at(log_posterior, own))
    negative_weight = contrast * omega
    if negatives == "posterior":  # where c~ = c the two terms are one
        same = negative == own
        positive_weight -= jnp.where(same, negative_weight, 0)
        negative_weight = jnp.where(same, 0, negative_weight)

    # ---- the errors of both labels, in one call of the network -----------------------------------
    count = int(np.ceil(negative_share * len(x)))
    rows = jnp.arange(len(x))
    if count < len(x):  # those that have a negative first, and among them at random
        has_negative = negative_weight > 0
        rows = jnp.argsort(jax.vmap(jax.random.uniform)(k_share) - has_negative)[:count]
        scaled_up = has_negative.sum() / jnp.clip(has_negative.sum(), 1, count)
        negative_weight = jnp.zeros_like(sigma).at[rows].set(scaled_up * negative_weight[rows])
    both = jnp.concatenate([jnp.arange(len(x)), rows])
    inputs = (
        x[both],
        sigma[both],
        jnp.concatenate([label, negative[rows]]),
        *jax.tree.map(lambda e: e[both], extra),
    )

    def split(values):  # (B + count,) -> at c (B,), and at c~ (B,) with 0 where it was left out
        return values[: len(x)], jnp.zeros_like(sigma).at[rows].set(values[len(x) :])

    denoised = denoise(*inputs)
    explained = x0
    if reference is not None and referred:
        # at c~ too where the model is held to it
        needed = inputs if held else jax.tree.map(lambda e: e[: len(x)], inputs)
        frozen = jax.lax.stop_gradient(reference(*needed))
        if target == "reference":
            explained = frozen[: len(x)]
    error, negative_error = split(mean_square(denoised - explained[both]))

    # ---- the loss --------------------------------------------------------------------------------
    if bound == "clip":
        limit = clip_ratio * jax.lax.stop_gradient(error)
        loss = positive_weight * error - negative_weight * jnp.minimum(negative_error, limit)
    else:
        loss = positive_weight * error - negative_weight * negative_error
    if held:
        if bound == "logistic":
            error_then, negative_error_then = split(mean_square(frozen - explained[both]))
            then = (positive_weight - 1) * error_then - negative_weight * negative_error_then
            margin = logistic_scale * weight(sigma) * (loss - error - then)
            bounded = 2 / logistic_scale * (jax.nn.softplus(margin) - jnp.log(2.0))
            loss = error + bounded / weight(sigma)
        at_label, at_negative = split(mean_square(denoised - frozen))
        distance = at_label + (negative_weight > 0) * at_negative
        loss += reference_penalty * jnp.where(contrast > 0, distance, 0)

    metrics = {
        "error": error,
        "negative_error": negative_error * (len(x) / count),  # its mean is over those computed
        "margin": jnp.where(negative_weight > 0, negative_error - error, 0),
        "weight": omega,
        "weight_square": omega**2,
        "weight_max": omega,
    }
    if log_posterior is not None:
        ratio = jnp.exp(at(log_posterior, negative) - log_prior[negative])
        metrics["unbounded"] = (ratio < contrast / (1 + contrast)).astype(sigma.dtype)
    return weight(sigma) * loss, metrics


def is_unbounded(config: Mapping[str, Any]) -> bool:
    """Whether the objective with these options is the plain form without a bound."""
    equivalent = config["negatives"] == "posterior" or config["weighting"] == "cfg"
    held = config["bound"] != "none" or config["reference_penalty"] >= config["beta"]
    return not equivalent and not held


def _is_held(bound: str, reference_penalty: float) -> bool:
    """Whether the loss compares the model with the reference at both labels."""
    return bound == "logistic" or reference_penalty > 0


def needs_reference(bound: str, target: str, reference_penalty: float) -> bool:
    """Whether the loss with these options reads the frozen reference."""
    return _is_held(bound, reference_penalty) or target == "reference"


def _check(negatives, weighting, bound, target, share) -> None:
    for name, value, words in [
        ("negatives", negatives, NEGATIVES),
        ("weighting", weighting, WEIGHTINGS),
        ("bound", bound, BOUNDS),
        ("target", target, TARGETS),
    ]:
        if value not in words:
            raise ValueError(f"objective.{name} is {value!r}; expected one of {words}.")
    if not 0 < share <= 1:
        raise ValueError(f"objective.negative_share is {share}; expected above 0 and at most 1.")
    if negatives == "posterior" and weighting == "cfg":
        raise ValueError(
            "Negatives from the posterior are the CFG-equivalent form already: set "
            "objective.weighting='none', or objective.negatives='prior'."
        )


def _check_parts(negatives, weighting, posterior, referred, reference) -> None:
    if posterior is None and (negatives == "posterior" or weighting == "cfg"):
        raise ValueError(
            "The CFG-equivalent objective needs a posterior: set objective.posterior to 'exact', "
            "'classifier' or 'denoiser'."
        )
    if reference is None and referred:
        raise ValueError(
            "objective.target='reference', objective.bound='logistic' and "
            "objective.reference_penalty need a frozen reference: set config.init_from to the work "
            "directory of the base run."
        )
