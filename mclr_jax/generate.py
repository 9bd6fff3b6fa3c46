"""Samples from a trained model, in batches, on all devices."""

import functools
import math
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from mclr_jax import guidance, samplers
from mclr_jax.model import Model
from mclr_jax.names import class_factors, in_range
from mclr_jax.noise import normal_like, sample_keys
from mclr_jax.samplers import Sampler
from mclr_jax.training.devices import AXIS, Devices
from mclr_jax.types import DenoiseFn


def shardings(
    devices: tuple[jax.Device, ...] | None = None,
) -> tuple[NamedSharding, NamedSharding]:
    """Rows divided among the devices, by default all, and a copy on each of them."""
    mesh = Devices("data", devices).mesh
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def replicated(tree: Any) -> Any:
    """The arrays of a tree copied to each device, unless all devices have them."""
    if all(len(x.sharding.device_set) == jax.device_count() for x in jax.tree.leaves(tree)):
        return tree
    if jax.process_count() > 1:  # arrays of one process do not move to the devices of others
        tree = jax.device_get(tree)
    return jax.device_put(tree, shardings()[1])


def spread_size(batch_size: int, count: int) -> int:
    """The batch size for `count` examples: at most `count`, rounded up to a multiple of devices."""
    batch_size = min(batch_size, max(count, 1))
    return batch_size + -batch_size % jax.device_count()


def _with_strength(denoise: DenoiseFn, strength: Any, interval: Any) -> DenoiseFn:
    """The denoiser with the guidance strength (B,) as its input, 0 outside the interval."""
    low, high = interval

    def with_strength(x, sigma, condition):
        inside = jnp.where((low < sigma) & (sigma <= high), strength, 0.0)
        return denoise(x, sigma, condition.replace(strength=inside))

    return with_strength


def program(
    model: Model, method: str, guided: bool, stochastic: bool = False, weak: Model | None = None
) -> Callable:
    """(both models' params, seed, indices, labels, sigmas, scales, interval, churn) -> x.

    The scales (num_classes + 1,) are those of `scales_by_label`.
    """

    def run(all_params, seed, indices, labels, sigmas, scales, interval, churn):
        params, weak_params = all_params
        denoise, scale = model.denoise(params), scales[labels]
        if weak is not None:
            denoise = guidance.autoguidance(denoise, weak.denoise(weak_params), scale, interval)
        elif model.strength:
            denoise = _with_strength(denoise, scale - 1, interval)
        elif guided:
            denoise = guidance.classifier_free(denoise, model.null_label, scale, interval)
        keys = sample_keys(seed, indices)
        x_init = sigmas[0] * normal_like(keys, jnp.zeros((len(keys), *model.data.shape)))
        churn = churn if stochastic else None
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)  # not those of x_init
        return samplers.sample(denoise, x_init, labels, sigmas, method, churn=churn, keys=keys)

    return run


@functools.lru_cache(maxsize=8)
def compiled(*options: Any) -> Callable:
    """Jitted `program` of these options, for all devices."""
    return jax.jit(program(*options), out_shardings=shardings()[1])


def scales_by_label(
    model: Model, guidance_scale: float, class_strengths: Sequence[float] | None
) -> np.ndarray:
    """Guidance scale of each class and of the null label, (num_classes + 1,) float64.

    That of class c is 1 + (guidance_scale - 1) class_strengths[c], that of the null label
    guidance_scale. ValueError: not a factor of at least 0 for each class.
    """
    if class_strengths is None:
        return np.full(model.null_label + 1, guidance_scale, np.float64)
    factors = np.asarray(class_strengths).tolist()
    class_factors("class_strengths", factors, model.null_label)
    # This form returns exactly `guidance_scale` at factor 1.
    return guidance_scale + (guidance_scale - 1) * (np.append(factors, 1.0) - 1)


def is_guided(model: Model, guidance_scale: float, weak: Any = None) -> bool:
    """Whether guidance at this scale needs a second network call."""
    return guidance_scale != 1 and (weak is not None or not model.strength)


def network_calls(
    model: Model,
    sampler: Sampler,
    *,
    guidance_scale: float = 1.0,
    class_strengths: Sequence[float] | None = None,
    interval: tuple[float, float] | None = None,
    weak: tuple[Model, Any] | None = None,
) -> int:
    """Network calls for one sample of `generate` with these arguments.

    A second call is for all samples of a batch: classes of strength 0 have it beside others.
    """
    levels = samplers.call_levels(sampler.grid(model.preconditioning.levels), sampler.method)
    low, high = interval or (0.0, np.inf)
    scales = scales_by_label(model, guidance_scale, class_strengths)[:-1]
    guided = any(is_guided(model, scale, weak) for scale in scales)
    second = (low < levels) & (levels <= high) & guided
    return len(levels) + int(second.sum())


def check_memory(what: str, numbers: int, remedy: str) -> None:
    """ValueError if so many float32 numbers do not fit into the memory of this machine."""
    pages = os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else np.inf
    if 4 * numbers > (memory := pages * mmap.PAGESIZE):
        raise ValueError(
            f"{what} need {4 * numbers / 1e9:.3g} GB; this machine has {memory / 1e9:.3g} GB. "
            f"{remedy}"
        )


def _checked(
    model: Model, labels: np.ndarray, scales: np.ndarray, weak: Any, interval: Any, churn: Any,
    seed: int,
) -> np.ndarray:  # fmt: skip
    """Labels as int32; ValueError on arguments of `generate` without a meaning."""
    labels = np.asarray(labels)
    if labels.size and labels.dtype.kind not in "iu":
        raise ValueError(f"Got labels of {labels.dtype}; expected integers.")
    in_range("seed", seed, 0, 2**32 - 1)
    if interval is not None and not 0 <= interval[0] < interval[1]:
        raise ValueError(f"The guidance interval is {tuple(interval)}; expected 0 <= low < high.")
    for name, value in (churn._asdict() if churn else {}).items():
        in_range(f"churn.{name}", value, 0.0)
    what = f"{labels.size} samples of shape {model.data.shape}"
    check_memory(what, labels.size * math.prod(model.data.shape), "Draw them in several calls.")
    if labels.size and not 0 <= labels.min() <= labels.max() <= model.null_label:
        raise ValueError(
            f"Labels must lie in 0..{model.null_label} ({model.null_label} is the null label); got "
            f"{labels.min()}..{labels.max()}."
        )
    if weak is not None and weak[0].data.shape != model.data.shape:
        raise ValueError(
            f"The weak model has samples of shape {weak[0].data.shape}; expected "
            f"{model.data.shape}, the shape of the guided model's."
        )
    if weak is None and model.strength:
        low, high = model.strength
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
    seed: int = 0,  # sample i starts from the noise of key fold_in(seed, i)
    guidance_scale: float = 1.0,  # of classifier-free guidance; 1 is none
    class_strengths: Sequence[float] | None = None,  # factors of guidance_scale - 1, (num_classes,)
    interval: tuple[float, float] | None = None,  # (low, high] of sigma with guidance; None: all
    weak: tuple[Model, Any] | None = None,  # (model, params) for autoguidance
    churn: samplers.Churn | None = None,  # stochastic sampling; None is deterministic
    batch_size: int = 256,  # rounded up to a multiple of the devices
    progress: Callable[[int], Any] = lambda count: None,  # called with the number of new samples
) -> np.ndarray:
    """Samples (n, ...) of the classes, float32 in the units of the scaled data.

    Sample i depends on (seed, i, labels[i]) alone, not on batch size or devices. A change of grid,
    guidance scale, class strengths or interval does not recompile. A sample of class c is guided
    with the scale 1 + (guidance_scale - 1) class_strengths[c]. A network with the strength as an
    input receives that scale - 1 instead of guidance. Autoguidance (arXiv:2406.02507) uses a
    smaller or less trained model in place of the null label. ValueError: a label is outside
    [0, num_classes], class_strengths are not num_classes factors of at least 0, or the weak model
    has another data shape.
    """
    in_range("guidance_scale", guidance_scale, -np.inf)
    scales = scales_by_label(model, guidance_scale, class_strengths)
    labels = _checked(model, labels, scales, weak, interval, churn, seed)
    guided = is_guided(model, guidance_scale, weak)
    weak_model, weak_params = weak or (None, {})
    run = compiled(model, sampler.method, guided, churn is not None, weak_model)

    sigmas, interval = sampler.grid(model.preconditioning.levels), interval or (0.0, np.inf)
    options = (sigmas, scales, interval, churn or samplers.Churn())
    scalars = jax.tree.map(np.float32, options)
    both, (rows, _) = replicated((params, weak_params)), shardings()
    batch_size = spread_size(batch_size, len(labels))
    out = np.zeros((len(labels), *model.data.shape), np.float32)
    for start in range(0, len(labels), batch_size):
        here = labels[start : start + batch_size]
        # The last batch is padded to the same size, so that one program runs all batches.
        padded = np.arange(start, start + batch_size), np.resize(here, batch_size)
        samples = run(both, np.uint32(seed), *jax.device_put(padded, rows), *scalars)
        out[start : start + batch_size] = here_out = np.asarray(samples)[: len(here)]
        finite = np.isfinite(here_out).reshape(len(here), -1).all(1)
        if not finite.all():
            raise FloatingPointError(
                f"{(~finite).sum()} samples are not finite, the first is sample "
                f"{start + finite.argmin()}, with guidance_scale={guidance_scale:g}, {sampler} and "
                f"churn={churn}. Lower the guidance scale, or check the weights."
            )
        progress(len(here))
    return out
