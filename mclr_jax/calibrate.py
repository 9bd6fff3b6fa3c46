"""Guidance strengths by class, at which samples are as recognisable as held-out data.

One strength for all classes makes the samples of some classes too uniform while others still gain.
With x_s samples of class c drawn with guidance strength s, the strength of class c is the smallest
s with

    m_c(s) = E p(c | x_s + sigma n) >= E p(c | x + sigma n),   n ~ N(0, I),

where x are held-out images of class c, and p is a classifier of noisy images, such as the one that
MCLR's posterior reads. The rule uses no measure of quality that samples are compared by. The
strength of a fine-tuned run may be the place of its weights on the line from its first ones.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mclr_jax import generate, images
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source, caption, drawn
from mclr_jax.model import Model
from mclr_jax.noise import SIGMA_RANGE
from mclr_jax.runs import Run
from mclr_jax.samplers import Sampler
from mclr_jax.schema import in_range

HELD_OUT = 10_000  # at most so many held-out images, drawn by class
# (images (n, ...), labels (n,)) -> a value with log_probs (n, K), as evaluation.features.Extractor.
ClassifyFn = Callable[[np.ndarray, np.ndarray], Any]


def crossings(grid: np.ndarray, means: np.ndarray, real: np.ndarray) -> np.ndarray:
    """The smallest strength of each class at which `means` reach `real`, (K,).

    Args:
      grid: (G,) strengths that rise.
      means: (G, K), replaced by their running maximum over the strengths, which never falls, and
        linear between two strengths.
      real: (K,); the result is grid[0] where grid[0] suffices, and grid[-1] where no strength does.
    """
    rising = np.maximum.accumulate(means)
    found = np.full(len(real), grid[-1], np.float64)
    for label, wanted in enumerate(real):
        reached = np.flatnonzero(rising[:, label] >= wanted)
        if reached.size and (end := reached[0]) > 0:
            start, stop = rising[end - 1 : end + 1, label]
            share = (wanted - start) / (stop - start)
            found[label] = grid[end - 1] + share * (grid[end] - grid[end - 1])
        elif reached.size:
            found[label] = grid[0]
    return found


def recognition(
    classifier: ClassifyFn, examples: np.ndarray, labels: np.ndarray, sigma: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of p(label | x + sigma n) over the examples x of each class, and its standard error.

    Args:
      classifier: gives the log probabilities (n, K) of images with noise of level `sigma`.
      examples: (n, ...) uint8 or scaled data.
      labels: (n,) integers; ValueError if a class has fewer than 2 examples.
      sigma: noise level, in units of the scaled data.
      seed: of the noise n.

    Returns:
      Two arrays (K,).
    """
    noise = np.random.default_rng(seed).standard_normal(examples.shape, np.float32)
    noisy = np.asarray(to_float(jnp.asarray(examples))) + np.float32(sigma) * noise
    log_probs = classifier(noisy, labels).log_probs
    counts = np.bincount(labels, minlength=log_probs.shape[1])
    if counts.min() < 2:
        raise ValueError(
            f"Class {counts.argmin()} has {counts.min()} of {len(labels)} examples; expected at "
            "least 2 of each class. Use another held-out set (config.data.test)."
        )
    found = np.exp(log_probs[np.arange(len(labels)), labels])
    groups = [found[labels == label] for label in range(len(counts))]
    errors = [group.std(ddof=1) / np.sqrt(len(group)) for group in groups]
    return np.array([group.mean() for group in groups]), np.array(errors)


def calibrate(
    model: Model,
    params: Any,
    sampler: Sampler,
    classifier: ClassifyFn,  # of images with noise of level `sigma`; see `recognition`
    held_out: Source,
    *,
    weights: Callable[[float], Any] | None = None,  # parameters by strength, without guidance
    max_strength: float = 1.0,  # largest guidance_scale - 1, or argument of `weights`
    grid: int = 6,  # number of strengths, evenly spaced from 0 to max_strength
    samples_per_class: int = 200,  # for each strength, from the same noise
    sigma: float = 0.3,
    seed: int = 1,
    progress: Callable[[int], Any] = lambda count: None,  # called with the number of new samples
    guided: generate.Guidance = generate.NONE,  # at the scales 1 + strength
    batch_size: int = 256,
) -> dict[str, Any]:
    """Strengths by class, as JSON: those of the rule above, and what they were found from.

    Returns:
      `class_strengths`: (K,) factors in [0, 1], to 4 digits. With them, guidance_scale
        1 + `strength` gives the calibrated samples, and another scale turns all classes up or down;
        with `weights`, they are those of a fine-tuning whose strength is `strength` times as large.
      `strength`: max_strength.
      `at_one_error_less`, `at_one_error_more`: the factors for a `real` mean that is lower and
        higher by its standard error.
      `unreached`: classes that no strength makes recognisable enough; their factor is 1.
      `real`, `by_strength`: `mean` and `standard_error` (K,) of held-out data and of samples.
      `network_calls`: of the model, for all samples; `classifier_calls`.
    """
    in_range("max_strength", max_strength, 0.0, 1e6, "(")
    in_range("grid", grid, 2)
    in_range("samples_per_class", samples_per_class, 2)
    in_range("sigma", sigma, 0.0, SIGMA_RANGE[1], "(")
    examples, classes = held_out[drawn(held_out, HELD_OUT, by_class=True)]
    real, real_error = recognition(classifier, examples, classes, sigma, seed)
    labels = np.resize(np.arange(model.null_label), model.null_label * samples_per_class)
    strengths, rows, calls = np.linspace(0.0, max_strength, grid), [], 0
    for strength in strengths:
        here = generate.NONE if weights else guided.at(1 + strength)
        params = weights(strength) if weights else params
        samples = generate.generate(
            model, params, labels, sampler, guided=here, seed=seed, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
        rows.append(recognition(classifier, images.clip(samples), labels, sigma, seed))
        calls += len(labels) * here.calls(model, sampler)
    means = np.array([mean for mean, _ in rows])

    def factors(wanted: np.ndarray) -> list[float]:
        return np.round(crossings(strengths, means, wanted) / max_strength, 4).tolist()

    return {
        "class_strengths": factors(real),
        "strength": max_strength,
        "at_one_error_less": factors(real - real_error),
        "at_one_error_more": factors(real + real_error),
        "unreached": np.flatnonzero(means.max(0) < real).tolist(),
        "real": {"mean": real.tolist(), "standard_error": real_error.tolist()},
        "by_strength": [
            {"strength": strength, "mean": mean.tolist(), "standard_error": error.tolist()}
            for strength, (mean, error) in zip(strengths.tolist(), rows, strict=True)
        ],
        "sigma": sigma,
        "samples_per_class": samples_per_class,
        "held_out": len(classes),
        "seed": seed,
        "network_calls": calls,
        "classifier_calls": len(classes) + grid * len(labels),
    }


def places(
    run: Run, average: str, step: int | None, guided: generate.Guidance
) -> Callable[[float], Any]:
    """The weights at each place from those that a run was fine-tuned from to its own.

    ValueError: the samples would be guided, too.
    """
    if guided.interval or guided.weak or run.model.strength:
        raise ValueError(
            "--interpolation is in place of guidance: leave out --guidance_interval and "
            "--autoguidance, and take a run without config.strength, whose network needs none."
        )
    return lambda place: run.weights(average, step, place)[0]


def table(found: Mapping[str, Any], class_names: Sequence[str] = ()) -> str:
    """Findings of `calibrate`, a line for each class."""
    first, last = found["by_strength"][0], found["by_strength"][-1]
    columns = {
        "held out": found["real"]["mean"],
        "error": found["real"]["standard_error"],
        "strength 0": first["mean"],
        f"strength {last['strength']:g}": last["mean"],
        "factor": found["class_strengths"],
        "from": found["at_one_error_less"],
        "to": found["at_one_error_more"],
    }
    names = [caption(label, class_names) for label in range(len(columns["factor"]))]
    width = max(map(len, ["class", *names]))
    lines = [" ".join([f"{'class':>{width}s}", *(f"{name:>12s}" for name in columns)])]
    for name, row in zip(names, zip(*columns.values(), strict=True), strict=True):
        lines.append(" ".join([f"{name:>{width}s}", *(f"{value:12.4f}" for value in row)]))
    if found["unreached"]:
        classes = ", ".join(names[label] for label in found["unreached"])
        lines.append(f"No strength makes these as recognisable as held-out data: {classes}.")
    return "\n".join(lines)


def use(found: Mapping[str, Any], file: str) -> str:
    """Flags that use the findings of `calibrate`; those of sampling where a file has them."""
    factors = ",".join(f"{factor:g}" for factor in found["class_strengths"])
    train = f"To train with strength {found['strength']:g}: --config.class_strengths={factors}"
    scale = f"To sample: --guidance_scale={1 + found['strength']:g} --class_strengths={file}\n"
    return scale * bool(file) + train
