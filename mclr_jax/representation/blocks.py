"""Features of images inside a network: the output of a block, averaged over positions."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source
from mclr_jax.model import Model
from mclr_jax.noise import sample_keys
from mclr_jax.representation import perturb
from mclr_jax.schema import look_up
from mclr_jax.training.devices import in_batches, replicated, shardings

BATCH = 256


@functools.lru_cache(maxsize=8)
def sizes(model: Model) -> dict[str, int]:
    """The length of each block's features, by name, in the order of the calls."""
    found: dict[str, jax.Array] = {}

    def trace():  # fills `found`, since JAX sorts a returned dict
        features = model.block_features(model.init(jax.random.key(0)))
        found.update(features(jnp.zeros((1, *model.data.shape)), 1.0))

    jax.eval_shape(trace)
    return {name: h.shape[-1] for name, h in found.items()}


def choose(model: Model, names: Sequence[str] = ()) -> tuple[str, ...]:
    """The blocks with these names, by default the middle one; ("all",): all of them.

    ValueError: no such block, or an emulator.
    """
    network = type(model.network).__name__
    if model.is_emulator:
        raise ValueError(
            f"{network} is an emulator; expected a denoiser or a classifier, whose features are "
            "those of noisy images."
        )
    known = sizes(model)
    if not known:
        raise ValueError(f"{network} has no module whose class name ends in Block; expected one.")
    if [*names] == ["all"]:
        return tuple(known)
    for name in names:
        look_up(known, name, "layer")
    return tuple(names) or (list(known)[(len(known) - 1) // 2],)


@functools.lru_cache(maxsize=8)
def _compiled(
    model: Model, layers: tuple[str, ...], number_of_views: int, augmentation: perturb.Augmentation
) -> Callable:
    """Jitted (params, images (B, ...), labels, numbers (B,), seed, sigma) -> layer -> (V, B, d)."""

    def run(params, images, labels, numbers, seed, sigma):
        x0, keys = to_float(images), sample_keys(seed, numbers)

        def one(number):
            view_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            x = perturb.view(x0, sigma, view_keys, augmentation)
            found = model.block_features(params)(x, sigma, labels)
            return {name: found[name] for name in layers}  # XLA removes the later layers

        return jax.lax.map(one, jnp.arange(number_of_views))

    return jax.jit(run, out_shardings=shardings()[1])


def extract(
    model: Model,
    params: Any,
    source: Source,
    rows: np.ndarray,
    sigma: float,
    *,
    layers: tuple[str, ...],
    number_of_views: int = 2,
    augmentation: perturb.Augmentation = perturb.NONE,
    seed: int = 0,
    at_labels: bool = False,  # features at the class of each image, not at the null label
    batch_size: int = BATCH,  # rounded up to a multiple of the devices
    progress: Callable[[int], Any] = lambda count: None,  # called with the number of new images
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of features, layer -> (V, b, d) float32, of rows (n,) of a source at noise sigma > 0.

    View v of an image depends on (seed, its row, v) alone, not on batch size or devices; sigma
    scales its noise. A new sigma does not recompile.
    """
    if not sigma > 0:
        raise ValueError(f"Got sigma {sigma}; expected above 0. For clean images use 0.002.")
    run = _compiled(model, layers, number_of_views, augmentation)
    params = replicated(params)

    def read(places: np.ndarray) -> tuple[np.ndarray, ...]:
        images, labels = source[chosen := rows[places]]
        labels = labels if at_labels else np.full_like(labels, model.null_label)
        return images, labels, chosen.astype(np.uint32)

    def compute(*inputs: jax.Array) -> Any:
        return run(params, *inputs, np.uint32(seed), np.float32(sigma))

    for some, features in in_batches(compute, read, len(rows), batch_size, axis=1):
        yield features
        progress(len(some))
