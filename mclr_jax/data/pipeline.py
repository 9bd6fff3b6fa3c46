"""Batches for training.

The examples of a batch depend on (seed, step) alone, not on the source, the number of processes or
interruptions. Grain reads ahead in threads, unless the sources are in memory.
"""

import functools
import itertools
import sys
from collections.abc import Iterator, Mapping

import grain
import numpy as np

from mclr_jax.data.protocol import Source, for_training

Batch = dict[str, np.ndarray]
OTHER_SEED = 2**31  # step between the seeds of companions; other runs have far smaller seeds


def step_indices(seed: int, step: int, batch_size: int, length: int) -> np.ndarray:
    """The examples of one global batch, (batch_size,) int64 in [0, length).

    Each epoch is a new permutation of the set; a batch may span epochs. Grain's own
    `shuffle(seed).repeat()` seeds epoch e with seed + e: seeds n and n + 1 would share epochs.
    """
    positions = step * batch_size + np.arange(batch_size, dtype=np.int64)
    all_epochs, offsets = np.divmod(positions, length)
    epochs = np.unique(all_epochs).tolist()
    return np.concatenate([_permutation(seed, e, length)[offsets[all_epochs == e]] for e in epochs])


@functools.lru_cache(maxsize=8)  # two epochs of each of several streams
def _permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox([seed, epoch])).permutation(length)


def stream(
    source: Source,
    batch_size: int,  # of the global batch, of which each process gets an equal share of the rows
    seed: int,  # non-negative
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 16,  # each reads a batch ahead
    extra: Mapping[str, Source] = {},  # sources of companions by name
) -> Iterator[Batch]:
    """An endless stream of this process's rows of the global batches.

    A batch has image (b, *source.shape) uint8 or float32 (of latents, means and standard deviations
    with twice the channels), label (b,) int32, and index (b,) int32,
    the row in the global batch, from which the example's random key is derived; and NAME_image and
    NAME_label for each name in `extra`. The k-th name in alphabetical order, k = 1, 2, ..., is
    drawn with seed + k * OTHER_SEED.

    Raises ValueError if the processes do not divide the batch, a source has no examples, or a float
    image has an infinity or NaN.
    """
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"got batch_size={batch_size}, expected a positive multiple of {process_count}, the "
            "number of processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"got process_index={process_index}, expected 0 to {process_count - 1}")
    sources = {"": source} | {f"{name}_": extra[name] for name in sorted(extra)}
    if not all(map(len, sources.values())):
        raise ValueError("a source has no examples, expected at least one; check split and limit")
    rows = np.arange(batch_size, dtype=np.int32).reshape(process_count, -1)[process_index]

    def batch(step: int) -> Batch:
        result = {"index": rows.copy()}
        for k, (prefix, examples) in enumerate(sources.items()):
            chosen = step_indices(seed + k * OTHER_SEED, step, batch_size, len(examples))[rows]
            images, result[f"{prefix}label"] = for_training(examples, chosen)
            if images.dtype != np.uint8 and not np.isfinite(images).all():
                fine = np.isfinite(images).reshape(len(images), -1).all(1)
                number = chosen[fine.argmin()]
                raise ValueError(f"image {number} of the data is not finite; remove or mend it")
            result[f"{prefix}image"] = images
        return result

    if all(examples.in_memory for examples in sources.values()):
        return map(batch, itertools.count(start_step))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    steps = grain.MapDataset.range(start_step, sys.maxsize - 1).map(batch)
    return iter(steps.to_iter_dataset(options))


def stack(stream: Iterator[Batch], count: int, length: int) -> Batch:
    """`count` batches stacked to (length, B, ...) and padded with the last one."""
    batches = [next(stream) for _ in range(count)]
    batches += [batches[-1]] * (length - count)
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
