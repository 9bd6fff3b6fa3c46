"""Samples from a trained model, in batches, on all devices."""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mclr_jax import flow, guidance, samplers
from mclr_jax.files import digest, named
from mclr_jax.model import Model
from mclr_jax.noise import normal_like, sample_keys
from mclr_jax.samplers import Sampler
from mclr_jax.schema import class_factors, in_range
from mclr_jax.training.devices import check_memory, in_batches, replicated, shardings
from mclr_jax.types import DenoiseFn


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
    """Guidance of samples: towards their class, away from the null label or a weak model.

    A sample of class c has the scale 1 + (scale - 1) class_strengths[c]. A network with the
    strength as an input gets that scale - 1 instead of a second call. Autoguidance
    (arXiv:2406.02507) has a smaller or less trained model in place of the null label. Domain
    guidance (arXiv:2504.01521) has the null answer of the model that a fine-tuning started from.
    """

    scale: float = 1.0  # of classifier-free guidance; 1 is none
    class_strengths: Sequence[float] | None = None  # factors of scale - 1, (num_classes,)
    interval: tuple[float, float] | None = None  # (low, high] of sigma; None: all
    weak: tuple[Model, Any] | None = None  # (model, params) for autoguidance
    channels: int | None = None  # guide only this number of first channels; None: all
    domain: bool = False  # the weak model is asked at its null label, whatever its classes

    def __post_init__(self):
        in_range("guidance_scale", self.scale, -math.inf)
        if self.interval is not None and not 0 <= self.interval[0] < self.interval[1]:
            raise ValueError(
                f"The guidance interval is {tuple(self.interval)}; expected 0 <= low < high."
            )
        if self.channels is not None:
            in_range("guidance_channels", self.channels, 1)

    def at(self, scale: float) -> "Guidance":
        """The same guidance with another scale."""
        return dataclasses.replace(self, scale=float(scale))

    def scales(self, num_classes: int) -> np.ndarray:
        """The scale of each class and of the null label, (num_classes + 1,) float64."""
        if self.class_strengths is None:
            return np.full(num_classes + 1, self.scale, np.float64)
        factors = np.asarray(self.class_strengths).tolist()
        class_factors("class_strengths", factors, num_classes)
        # This form returns exactly `scale` at factor 1.
        return self.scale + (self.scale - 1) * (np.append(factors, 1.0) - 1)

    def is_second_call(self, model: Model, scale: float | None = None) -> bool:
        """True if guidance at a scale, by default its own, needs a second network call."""
        scale = self.scale if scale is None else scale
        return scale != 1 and (self.weak is not None or not model.strength)

    def calls(self, model: Model, sampler: Sampler) -> int:
        """Network calls for one sample.

        A second call is for all samples of a batch: classes of strength 0 have it beside others.
        """
        levels = sampler.levels(model.preconditioning)
        low, high = self.interval or (0.0, np.inf)
        guided = any(self.is_second_call(model, s) for s in self.scales(model.null_label)[:-1])
        return len(levels) + int(((low < levels) & (levels <= high) & guided).sum())

    def settings(self) -> dict[str, Any]:
        """Entries of a file about the guidance, beside its scale; other files keep their keys."""
        found: dict[str, Any] = {"guidance_interval": self.interval and list(self.interval)}
        name = "domain_guidance" if self.domain else "autoguidance"
        found |= {name: digest(self.weak[1])} if self.weak else {}
        found |= {"guidance_channels": self.channels} if self.channels else {}
        strengths = self.class_strengths
        return found | ({} if strengths is None else {"class_strengths": list(strengths)})


NONE = Guidance()


def class_strengths(name: str | None, num_classes: int) -> list[float] | None:
    """The factors of the guidance strength by class in a file of mclr calibrate; None: no file.

    ValueError: the file has other content, or the factors are for another number of classes.
    """
    if name is None:
        return None
    with named(f"--class_strengths={name}: expected the --out of mclr calibrate"):
        found = json.loads(pathlib.Path(name).read_text())["class_strengths"]
    class_factors(f"class_strengths in {name}", found, num_classes)
    return found


def _with_strength(denoise: DenoiseFn, strength: Any, interval: Any) -> DenoiseFn:
    """The denoiser with the guidance strength (B,) as its input, 0 outside the interval."""
    low, high = interval

    def with_strength(x, sigma, condition, level=None):
        level = sigma if level is None else level
        inside = jnp.where((low < level) & (level <= high), strength, 0.0)
        return denoise(x, sigma, condition.replace(strength=inside))

    return with_strength


def program(
    model: Model, method: str, guided: bool, stochastic: bool = False, weak: Model | None = None,
    channels: int | None = None, domain: bool = False,
) -> Callable:  # fmt: skip
    """(both models' params, seed, indices, labels, table, scales, interval, churn) -> x.

    The table is that of `Sampler.table`, the scales (num_classes + 1,) those of `Guidance.scales`.
    """

    in_time = method in flow.METHODS
    if in_time and weak is not None and weak.preconditioning != model.preconditioning:
        raise ValueError(
            f"The weak model has {weak.preconditioning}; sampler {method!r} needs that of the "
            f"guided model, {model.preconditioning}. Use a sampler such as heun."
        )
    if method == "ddpm":  # the place of the variance follows the channels, and is not guided
        channels = min(channels or model.data.shape[-1], model.data.shape[-1])

    def function(model: Model, params: Any) -> Any:
        """The function that the method calls."""
        if in_time:
            output = model.output(params)
            return lambda x, clock, condition, level=None: output(x, clock, condition)
        return (model.denoise_with_range if method == "ddpm" else model.denoise)(params)

    def run(all_params, seed, indices, labels, table, scales, interval, churn):
        params, weak_params = all_params
        denoise, scale = function(model, params), scales[labels]
        options = scale, interval, channels
        if weak is not None:
            other = function(weak, weak_params)
            other = guidance.unconditional(other, weak.null_label) if domain else other
            denoise = guidance.autoguidance(denoise, other, *options)
        elif model.strength:
            denoise = _with_strength(denoise, scale - 1, interval)
        elif guided:
            denoise = guidance.classifier_free(denoise, model.null_label, *options)
        keys = sample_keys(seed, indices)
        noise = normal_like(keys, jnp.zeros((len(keys), *model.data.shape)))
        churn = churn if stochastic else None
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)  # not those of the first noise
        return samplers.draw(denoise, noise, labels, table, method, churn=churn, keys=keys)

    return run


@functools.lru_cache(maxsize=8)
def compiled(*options: Any) -> Callable:
    """Jitted `program` of these options, for all devices."""
    return jax.jit(program(*options), out_shardings=shardings()[1])


def _checked(
    model: Model, labels: np.ndarray, guided: Guidance, churn: Any, seed: int
) -> np.ndarray:
    """Labels as int32; ValueError on arguments of `generate` without a meaning."""
    labels, weak = np.asarray(labels), guided.weak
    if guided.channels and weak is None and model.strength:
        raise ValueError(
            "guidance_channels needs guidance by a second call; this network has the strength as "
            "an input, and no channel without it."
        )
    if labels.size and labels.dtype.kind not in "iu":
        raise ValueError(f"Got labels of {labels.dtype}; expected integers.")
    in_range("seed", seed, 0, 2**32 - 1)
    for name, value in (churn._asdict() if churn else {}).items():
        in_range(f"churn.{name}", value, 0.0)
    what = f"{labels.size} samples of shape {model.data.shape}"
    check_memory(what, labels.size * math.prod(model.data.shape), "Draw them in several calls.")
    if labels.size and not 0 <= labels.min() <= labels.max() <= model.null_label:
        raise ValueError(
            f"Labels must lie in 0..{model.null_label} ({model.null_label} is the null label); got "
            f"{labels.min()}..{labels.max()}."
        )
    other = weak[0].data if weak else model.data
    got, expected = ((data.shape, data.num_classes) for data in (other, model.data))
    if guided.domain:
        got = (other.shape, model.data.num_classes)  # its one answer is for all classes
    if got not in (expected, (model.data.shape, 0)):
        raise ValueError(
            f"The weak model has samples of shape and number of classes {got}; expected "
            f"{expected}, those of the guided model."
        )
    asks_null = weak is None or guided.domain
    if asks_null and guided.is_second_call(model) and not other.has_null:
        raise ValueError(
            f"guidance_scale is {guided.scale:g}, and the model has no answer without a class: no "
            "training has shown it the null label. Guide it by a weak or unconditional model "
            "(--autoguidance)."
        )
    if weak is None and model.strength:
        (low, high), scales = model.strength, guided.scales(model.null_label)
        for scale in sorted({scales.min(), scales.max()}):
            if not low <= scale - 1 <= high:
                logging.warning(
                    f"guidance_scale {scale:g} is strength {scale - 1:g}, outside the range "
                    f"{model.strength} that this network was trained with."
                )
    return labels.astype(np.int32)


def generate(
    model: Model,
    params: Any,  # of the network, on some or all devices of this process, or on all devices
    labels: np.ndarray,  # (n,) classes
    sampler: Sampler,  # method and grid, of which the model's range of noise levels is used
    *,
    guided: Guidance = NONE,
    seed: int = 0,  # sample i starts from the noise of key fold_in(seed, i)
    churn: samplers.Churn | None = None,  # stochastic sampling; None is deterministic
    batch_size: int = 256,  # rounded up to a multiple of the devices
    progress: Callable[[int], Any] = lambda count: None,  # called with the number of new samples
) -> np.ndarray:
    """Samples (n, ...) of the classes, float32 in the units of the scaled data.

    Sample i depends on (seed, i, labels[i]) alone, not on batch size or devices. A change of grid
    or guidance does not recompile. ValueError: a label is outside [0, num_classes], class_strengths
    are not num_classes factors of at least 0, or the weak model has another data shape.
    """
    scales, labels = guided.scales(model.null_label), _checked(model, labels, guided, churn, seed)
    weak_model, weak_params = guided.weak or (None, {})
    second = guided.is_second_call(model)
    kind = guided.channels, guided.domain
    run = compiled(model, sampler.method, second, churn is not None, weak_model, *kind)
    interval = guided.interval or (0.0, np.inf)
    scalars = (
        sampler.table(model.preconditioning),
        *jax.tree.map(np.float32, (scales, interval, churn or samplers.Churn())),
    )
    both = replicated((params, weak_params))

    def draw(*inputs: jax.Array) -> jax.Array:
        return run(both, np.uint32(seed), *inputs, *scalars)

    out = np.zeros((len(labels), *model.data.shape), np.float32)
    given = draw, lambda rows: (rows, labels[rows])
    for rows, samples in in_batches(*given, len(labels), batch_size):
        out[rows] = samples
        finite = np.isfinite(samples).reshape(len(rows), -1).all(1)
        if not finite.all():
            raise FloatingPointError(
                f"{(~finite).sum()} samples are not finite, the first is sample "
                f"{rows[finite.argmin()]}, with guidance_scale={guided.scale:g}, {sampler} and "
                f"churn={churn}. Lower the guidance scale, or check the weights."
            )
        progress(len(rows))
    return out
