"""Training of a part of a run's weights: low-rank updates of kernels, or all but frozen layers.

Source of the updates: Hu et al. 2021 (LoRA, arXiv 2106.09685). The base is the run that training
starts from; the weights in training are a tree of their own, `merged` with the base's.
"""

import dataclasses
import re
import zlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct, traverse_util

from mclr_jax.schema import Keys, key

NEW_LABELS = ("drawn", "null")  # first rows of labels that a base does not have


class LowRank(struct.PyTreeNode):
    """A kernel W + scale A B whose layer computes x W + scale (x A) B.

    So no merged copy of the weights, and no gradient of W's size, is in memory. Flax compares the
    shape of the first leaf with the layer's.
    """

    base: jax.Array
    down: jax.Array  # ([blocks,] inputs, rank)
    up: jax.Array  # ([blocks,] rank, outputs)
    scale: float = struct.field(pytree_node=False)

    def merged(self) -> jax.Array:
        update = jnp.matmul(self.down, self.up, precision="highest")
        return self.base + self.scale * update.reshape(self.base.shape)


@dataclasses.dataclass(frozen=True)
class Adapter(Keys, where="config.adapter"):
    """The weights in training: those of the base and, of each kernel (in, out), scale A B.

    A (in, rank) starts normal with variance 1 / in, B (rank, out) at zero, so that training begins
    at the base. The first of an odd number of axes counts blocks, which have factors each; the
    other axes but the last are those of the input. Kernels no larger than their factors, inputs
    that the base does not have and the rows of new labels are trained as they are; all else is the
    base's.
    """

    rank: int = key(0, 0, 2**16, says="train updates A B of kernels, of this rank, of the run in "
                    "init_from; 0: all its weights")  # fmt: skip
    match: str = key("", says="regular expression: kernels whose path, as blocks/qkv/kernel, has "
                     "a part like it; empty: all")  # fmt: skip
    scale: float = key(1.0, 0.0, 1e6, "(", says="factor of the updates")
    freeze: str = key("", says="regular expression: weights of the run in init_from that are not "
                      "trained, by their paths; empty: none")  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("match", "freeze"):
            try:
                re.compile(text := getattr(self, name))
            except re.error as error:
                raise ValueError(
                    f"{self.where}.{name} is {text!r}; expected a regular expression ({error})."
                ) from error

    @property
    def used(self) -> bool:
        """False: all weights are trained, and training needs no base."""
        return bool(self.rank or self.freeze)

    @property
    def needs(self) -> frozenset[str]:
        """The needs of a training, see `objectives.base.Objective`."""
        return frozenset({"reference"} if self.used else ())

    def start(self, key: jax.Array, params: Any, base: Any, new: Collection[str] = ()) -> Any:
        """The first weights in training, of initial parameters and the shapes of the base's.

        Parameters below the names in `new` are trained as they are. ValueError: nothing of the
        base is trained.
        """
        flat, old = traverse_util.flatten_dict(params), traverse_util.flatten_dict(base)
        found, trains = {}, False
        for path, x in flat.items():
            name = "/".join(path)
            if {*path} & {*new} or path not in old or old[path].shape != x.shape:
                found[path] = x
                continue
            if self.freeze and re.search(self.freeze, name):
                continue
            if self.rank and not (path[-1] == "kernel" and re.search(self.match, name)):
                continue
            stack, rows, columns = _matrices(x.shape) if self.rank else ((), 0, 0)
            trains = True
            if rows * columns <= self.rank * (rows + columns):
                found[path] = x
                continue
            draw = jax.random.fold_in(key, zlib.crc32(name.encode()))
            down = jax.random.normal(draw, (*stack, rows, self.rank)) / np.sqrt(rows)
            found[*path, "down"] = down
            found[*path, "up"] = jnp.zeros((*stack, self.rank, columns))
        if not trains:
            raise ValueError(
                f"config.adapter.match={self.match!r} and freeze={self.freeze!r} leave nothing to "
                f"train; the paths are {', '.join(sorted(map('/'.join, flat)))}."
            )
        return traverse_util.unflatten_dict(found)

    def of(self, trained: Any, params: Any) -> Any:
        """The weights in training, with those that are trained as they are taken from `params`."""
        given = traverse_util.flatten_dict(params)
        return traverse_util.path_aware_map(lambda path, x: given.get(path, x), trained)

    def merged(self, shapes: Any, base: Any, trained: Any, in_layers: bool = False) -> Any:
        """All parameters, whose `shapes` these are; `in_layers`: kernels are `LowRank`."""
        old, found = traverse_util.flatten_dict(base), traverse_util.flatten_dict(trained)

        def one(path: tuple[Any, ...], _: Any) -> Any:
            if (down := found.get((*path, "down"))) is None:
                return found[path] if path in found else old[path]
            kernel = LowRank(old[path], down, found[*path, "up"], self.scale)
            return kernel if in_layers else kernel.merged()

        return traverse_util.path_aware_map(one, shapes)


def _matrices(shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
    """The axes of blocks, and the rows and columns of each block's matrix, of a kernel's shape."""
    stack, (*window, columns) = shape[: len(shape) % 2], shape[len(shape) % 2 :]
    return stack, int(np.prod(window)), columns


def relabelled(weights: Any, drawn: Any, inputs: Collection[str], at_null: bool = False) -> Any:
    """The weights of a run of other classes, with the rows of new labels; its null label is kept.

    Layers of labels are those below the names `inputs`: a table `embedding`, whose last row is that
    of the null label, or a `kernel` of one-hot labels, where the null label has zeros. The rows are
    those of `drawn`, initial weights for the new classes, or all the null label's.
    """
    flat, new = traverse_util.flatten_dict(weights), traverse_util.flatten_dict(drawn)
    for path in flat.keys() & new.keys():
        if not {*path} & {*inputs}:
            continue
        rows = new[path]
        if path[-1] == "embedding":
            null, rows = flat[path][..., -1:, :], rows[..., :-1, :]
            rows = jnp.broadcast_to(null, rows.shape) if at_null else rows
            flat[path] = jnp.concatenate([rows, null], axis=-2)
        elif path[-1] == "kernel":
            flat[path] = jnp.zeros_like(rows) if at_null else rows
    return traverse_util.unflatten_dict(flat)
