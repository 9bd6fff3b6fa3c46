"""Samples from a trained model: any number, in batches, over all devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from mclr_jax import guidance, samplers
from mclr_jax.model import Model
from mclr_jax.noise import normal_like, sample_keys
from mclr_jax.samplers import Sampler
from mclr_jax.training.devices import AXIS, Devices
from mclr_jax.types import DenoiseFn


def shardings() -> tuple[NamedSharding, NamedSharding]:
    """Rows spread over all devices, and a copy on each."""
    mesh = Devices("data").mesh
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def replicated(tree: Any) -> Any:
    """The arrays of a tree with a copy on each device, as they are where they have one."""
    _, everywhere = shardings()
    there = all(len(x.sharding.device_set) == jax.device_count() for x in jax.tree.leaves(tree))
    return tree if there else jax.device_put(tree, everywhere)


def spread_size(batch_size: int, count: int) -> int:
    """The size of batches of `count` examples: at most all, a multiple of the devices."""
    batch_size = min(batch_size, count)
    return batch_size + -batch_size % jax.device_count()


def _with_strength(denoise: DenoiseFn, strength: Any, interval: Any) -> DenoiseFn:
    """A network that takes the strength of guidance as an input: one call at any strength."""
    low, high = interval

    def told(x, sigma, condition):
        inside = jnp.where((low < sigma) & (sigma <= high), strength, 0.0)
        return denoise(x, sigma, condition.replace(strength=inside))

    return told


@functools.lru_cache(maxsize=8)
def compiled(
    model: Model, method: str, guided: bool, stochastic: bool, weak: Model | None
) -> Callable:
    """Jitted (both models' params, seed, numbers, labels, sigmas, scale, interval, churn) -> x."""

    def run(all_params, seed, numbers, labels, sigmas, scale, interval, churn):
        params, weak_params = all_params
        denoise = model.denoise(params)
        if weak is not None:
            denoise = guidance.autoguidance(denoise, weak.denoise(weak_params), scale, interval)
        elif model.strength:
            denoise = _with_strength(denoise, scale - 1, interval)
        elif guided:
            denoise = guidance.classifier_free(denoise, model.null_label, scale, interval)
        keys = sample_keys(seed, numbers)
        x_init = sigmas[0] * normal_like(keys, jnp.zeros((len(keys), *model.data.shape)))
        return samplers.sample(
            denoise,
            x_init,
            labels,
            sigmas,
            method,
            churn=churn if stochastic else None,
            # other keys than those of x_init
            keys=jax.vmap(jax.random.fold_in, (0, None))(keys, 1),
        )

    _, everywhere = shardings()
    return jax.jit(run, out_shardings=everywhere)


def _guided(model: Model, guidance_scale: float, weak: Any = None) -> bool:
    """Whether this scale takes second calls of a network."""
    return guidance_scale != 1 and (weak is not None or not model.strength)


def network_calls(
    model: Model,
    sampler: Sampler,
    *,
    guidance_scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    weak: tuple[Model, Any] | None = None,
) -> int:
    """Calls of networks that `generate` makes for a sample, with the same arguments."""
    levels = samplers.call_levels(sampler.grid(model.preconditioning.levels), sampler.method)
    low, high = interval or (0.0, np.inf)
    second = (low < levels) & (levels <= high) & _guided(model, guidance_scale, weak)
    return len(levels) + int(second.sum())


def _checked(model: Model, labels: np.ndarray, guidance_scale: float, weak: Any) -> np.ndarray:
    labels = np.asarray(labels, np.int32)
    if labels.size and not 0 <= labels.min() <= labels.max() <= model.null_label:
        raise ValueError(
            f"Labels must lie in 0..{model.null_label} ({model.null_label} is the null label); got "
            f"{labels.min()}..{labels.max()}."
        )
    if weak is not None and weak[0].data.shape != model.data.shape:
        raise ValueError(
            f"The weak model makes examples of shape {weak[0].data.shape}; expected "
            f"{model.data.shape}, the shape of the guided one."
        )
    if weak is None and model.strength:
        low, high = model.strength
        if not low <= guidance_scale - 1 <= high:
            logging.warning(
                "guidance_scale %g is strength %g, outside the range %s that this network was "
                "trained with.", guidance_scale, guidance_scale - 1, model.strength,
            )  # fmt: skip
    return labels


def generate(
    model: Model,
    params: Any,
    labels: np.ndarray,
    sampler: Sampler,
    *,
    seed: int = 0,
    guidance_scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    weak: tuple[Model, Any] | None = None,
    churn: samplers.Churn | None = None,
    batch_size: int = 256,
    progress: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Samples for `labels` (n,), as (n, ...) float32 in the unit of the scaled data.

    Sample i depends on (seed, i, labels[i]) alone, not on batch size or devices. Changing the grid,
    the guidance scale or the interval does not recompile.

    Args:
      model: what the parameters belong to.
      params: network parameters, on any devices of this process or all.
      labels: class of each sample.
      sampler: method and grid; the levels are kept within those that the model knows.
      seed: sample i starts from the noise of key fold_in(seed, i).
      guidance_scale: of classifier-free guidance; 1 is none. A network that takes the strength as
        an input is told guidance_scale - 1 instead.
      interval: (low, high) of sigma to guide in; None for all.
      weak: (model, params) to guide by in place of the null label: autoguidance (arXiv 2406.02507),
        whose weak model is smaller or less trained.
      churn: stochastic sampling; None is deterministic.
      batch_size: samples at a time, rounded up to a multiple of the devices.
      progress: called with the number of new samples after each batch.

    Raises:
      ValueError: if a label is outside [0, num_classes], or the weak model is of other data.
    """
    labels = _checked(model, labels, guidance_scale, weak)
    sigmas = sampler.grid(model.preconditioning.levels)
    guided = _guided(model, guidance_scale, weak)
    weak_model, weak_params = weak or (None, {})
    run = compiled(model, sampler.method, guided, churn is not None, weak_model)

    rows, _ = shardings()
    both = replicated((params, weak_params))
    batch_size = spread_size(batch_size, len(labels))
    scalars = jax.tree.map(
        np.float32, (sigmas, guidance_scale, interval or (0.0, np.inf), churn or samplers.Churn())
    )
    out = np.zeros((len(labels), *model.data.shape), np.float32)
    for start in range(0, len(labels), batch_size):
        # The last batch is padded, so that one program serves all.
        numbers = np.arange(start, start + batch_size)
        batch_labels = np.resize(labels[start : start + batch_size], batch_size)
        numbers, batch_labels = jax.device_put((numbers, batch_labels), rows)
        samples = np.asarray(run(both, np.uint32(seed), numbers, batch_labels, *scalars))
        count = min(batch_size, len(labels) - start)
        out[start : start + count] = samples[:count]
        progress(count)
    return out
