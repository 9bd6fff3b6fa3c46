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
from mclr_jax.denoiser import DenoiseFn
from mclr_jax.experiment import Experiment
from mclr_jax.noise import normal_like, rho_grid, sample_keys
from mclr_jax.training.devices import AXIS, Devices


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


def _with_strength(experiment: Experiment, params, strength, interval) -> DenoiseFn:
    """A network that takes the strength of guidance as an input: one call at any strength."""
    low, high = interval

    def denoise(x, sigma, label):
        inside = jnp.where((low < sigma) & (sigma <= high), strength, 0.0)
        return experiment.denoiser(params, inside)(x, sigma, label)

    return denoise


@functools.lru_cache(maxsize=8)
def compiled(
    experiment: Experiment,
    method: str,
    guided: bool,
    stochastic: bool,
    weak: Experiment | None,
) -> Callable:
    """Jitted (both models' params, seed, numbers, labels, sigmas, scale, interval, churn) -> x."""

    def run(all_params, seed, numbers, labels, sigmas, scale, interval, churn):
        params, weak_params = all_params
        denoise = experiment.denoiser(params)
        if weak is not None:
            denoise = guidance.autoguidance(denoise, weak.denoiser(weak_params), scale, interval)
        elif experiment.strength:
            denoise = _with_strength(experiment, params, scale - 1, interval)
        elif guided:
            denoise = guidance.classifier_free(denoise, experiment.null_label, scale, interval)
        keys = sample_keys(seed, numbers)
        x_init = sigmas[0] * normal_like(keys, jnp.zeros((len(keys), *experiment.data.shape)))
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


def _grid(experiment: Experiment) -> np.ndarray:
    config = experiment.config.sampler
    return rho_grid(config.num_steps, config.sigma_min, config.sigma_max, config.rho)


def _guided(experiment: Experiment, guidance_scale: float, weak: Any = None) -> bool:
    """Whether this scale takes second calls of a network."""
    return guidance_scale != 1 and (weak is not None or not experiment.strength)


def network_calls(
    experiment: Experiment,
    *,
    sigmas: np.ndarray | None = None,
    method: str | None = None,
    guidance_scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    weak: tuple[Experiment, Any] | None = None,
) -> int:
    """Calls of networks that `generate` makes for a sample, with the same arguments."""
    grid = _grid(experiment) if sigmas is None else sigmas
    levels = samplers.call_levels(grid, method or experiment.config.sampler.method)
    low, high = interval or (0.0, np.inf)
    second = (low < levels) & (levels <= high) & _guided(experiment, guidance_scale, weak)
    return len(levels) + int(second.sum())


def generate(
    experiment: Experiment,
    params: Any,
    labels: np.ndarray,
    *,
    seed: int = 0,
    sigmas: np.ndarray | None = None,
    method: str | None = None,
    guidance_scale: float = 1.0,
    interval: tuple[float, float] | None = None,
    weak: tuple[Experiment, Any] | None = None,
    churn: samplers.Churn | None = None,
    batch_size: int = 256,
    progress: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """Samples for `labels` (n,), as (n, ...) float32 in the unit of the scaled data.

    Sample i depends on (seed, i, labels[i]) alone, not on batch size or devices. Changing the grid,
    the guidance scale or the interval does not recompile.

    Args:
      experiment: what the parameters belong to.
      params: network parameters, on any devices of this process or all.
      labels: class of each sample.
      seed: sample i starts from the noise of key fold_in(seed, i).
      sigmas: sampling grid; None is the config's.
      method: sampler; None is the config's.
      guidance_scale: of classifier-free guidance; 1 is none. A network trained with
        objective.strength takes guidance_scale - 1 as its input instead.
      interval: (low, high) of sigma to guide in; None for all.
      weak: (experiment, params) of a model that stands where the null label stands otherwise:
        autoguidance (arXiv 2406.02507), whose weak model is smaller or less trained.
      churn: stochastic sampling; None is deterministic.
      batch_size: samples at a time, rounded up to a multiple of the devices.
      progress: called with the number of new samples after each batch.

    Raises:
      ValueError: if a label is outside [0, num_classes], or the weak model is of other data.
    """
    labels = np.asarray(labels, np.int32)
    if labels.size and not 0 <= labels.min() <= labels.max() <= experiment.null_label:
        raise ValueError(
            f"Labels must lie in 0..{experiment.null_label} ({experiment.null_label} is the null "
            f"label); got {labels.min()}..{labels.max()}."
        )
    if weak is not None and weak[0].data.shape != experiment.data.shape:
        raise ValueError(
            f"The weak model makes examples of shape {weak[0].data.shape}; expected "
            f"{experiment.data.shape}, the shape of the guided one."
        )
    if (
        weak is None
        and experiment.strength
        and not (experiment.strength[0] <= guidance_scale - 1 <= experiment.strength[1])
    ):
        logging.warning(
            "guidance_scale %g is strength %g, outside the range %s that this network was trained "
            "with.", guidance_scale, guidance_scale - 1, experiment.strength,
        )  # fmt: skip
    sigmas = _grid(experiment) if sigmas is None else sigmas
    method = method or experiment.config.sampler.method
    guided = _guided(experiment, guidance_scale, weak)
    weak_experiment, weak_params = weak or (None, {})
    run = compiled(experiment, method, guided, churn is not None, weak_experiment)

    rows, _ = shardings()
    both = replicated((params, weak_params))
    batch_size = spread_size(batch_size, len(labels))
    scalars = jax.tree.map(
        np.float32, (sigmas, guidance_scale, interval or (0.0, np.inf), churn or samplers.Churn())
    )
    out = np.zeros((len(labels), *experiment.data.shape), np.float32)
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
