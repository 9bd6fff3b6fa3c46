"""Batches for training: which examples make up step n, and what the device does to them first.

The examples of a step follow from (seed, step) alone, whatever the source, the number of processes
or the place where a run was interrupted. Sources in memory are indexed on the spot; for the others
Grain reads and decodes batches ahead in threads.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grain
import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.data.sources import Source

Batch = dict[str, np.ndarray]
OTHER_SEED = 2**31  # added to the seed for the second examples; far from other runs' seeds


class Stream(Protocol):
    """An endless iterator over batches that can say where it is."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """What `stream(..., state=)` needs to go on after the last batch returned; JSON-able."""


def step_indices(seed: int, step: int, batch_size: int, length: int) -> np.ndarray:
    """The examples of one global batch, (batch_size,) int64 in [0, length).

    All steps together walk through one fresh permutation of the set per epoch; a batch may span
    several epochs. Grain's own `shuffle(seed).repeat()` is not used: it seeds epoch e with
    seed + e, so that runs with neighbouring seeds would see the same epochs, one later.
    """
    positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, offsets = np.divmod(positions, length)
    parts = [
        _permutation(seed, int(epoch), length)[offsets[epochs == epoch]]
        for epoch in np.unique(epochs)
    ]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)  # the epoch that ends and the one that begins, for two streams
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    bits = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    permutation = np.random.Generator(bits).permutation(length)
    permutation.flags.writeable = False
    return permutation


def stream(
    source: Source,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    state: dict[str, Any] | None = None,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 16,
    other: Source | None = None,
) -> Stream:
    """An endless stream of this process's rows of the global batches.

    Args:
      source: where examples come from.
      batch_size: of the global batch, over all processes.
      seed: non-negative; with the step it decides which examples a batch has.
      start_step: the step of the first batch returned.
      state: from `get_state()`; where neither None nor empty, it overrules `start_step`. It is
        always empty for sources in memory, where the step says all; otherwise it is Grain's.
      process_index, process_count: this process gets rows [index, index + 1) * batch_size / count.
      threads: that read ahead, a batch each, where the source is not in memory.
      other: a second source, or the same, that gives each example a companion drawn apart.

    Returns:
      An iterator over dicts of image (b, *source.shape) uint8 or float32, label (b,) int32, and
      index (b,) int32, the row in the global batch, from which an example's random key is derived;
      with `other`, its other_image and other_label too.

    Raises:
      ValueError: if the batch does not divide among the processes, or there are no examples.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"got batch_size={batch_size} for {process_count} processes; it must be a positive "
            f"multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"got process_index={process_index}, expected 0 to {process_count - 1}")
    if len(source) == 0:
        raise ValueError("the source has no examples; check its split and limit")
    local = batch_size // process_count
    rows = np.arange(process_index * local, (process_index + 1) * local, dtype=np.int32)

    def batch(step: int) -> Batch:
        image, label = source[step_indices(seed, step, batch_size, len(source))[rows]]
        result = {"image": image, "label": label, "index": rows.copy()}
        if other is not None:
            chosen = step_indices(seed + OTHER_SEED, step, batch_size, len(other))[rows]
            result["other_image"], result["other_label"] = other[chosen]
        return result

    if source.in_memory and (other is None or other.in_memory):
        return _MemoryStream(batch, start_step)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    steps = grain.MapDataset.range(sys.maxsize - 1).map(batch)  # the element of index n is step n
    iterator = iter(steps.to_iter_dataset(options))
    if state:
        iterator.set_state(state)
    else:
        grain.experimental.set_next_index(iterator, start_step)
    return iterator


class _MemoryStream:
    """A stream that is nothing but a step counter."""

    def __init__(self, batch: Callable[[int], Batch], step: int):
        self._batch, self._step = batch, step

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._step += 1
        return self._batch(self._step - 1)

    def get_state(self) -> dict[str, Any]:
        return {}


# On the device, inside jit.


def to_float(images: jax.Array) -> jax.Array:
    """uint8 0..255 -> float32 in [-1, 1]; floats (scaled already, or latents) -> float32."""
    if images.dtype == jnp.uint8:
        return images.astype(jnp.float32) / 127.5 - 1
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"got images of {images.dtype}, expected uint8 (0..255) or a float type")
    return images.astype(jnp.float32)


def random_flip(images: jax.Array, keys: jax.Array) -> jax.Array:
    """Flips each of the images (B, H, W, C) left to right with probability 1/2 by its key (B,)."""
    if images.ndim != 4:
        raise ValueError(f"got images of shape {images.shape}, expected (B, H, W, C) to flip")
    flip = jax.vmap(jax.random.bernoulli)(keys)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)
