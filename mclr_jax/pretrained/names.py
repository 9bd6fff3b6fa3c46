"""A published checkpoint, and the names and layouts of its parameters in official files.

One map for each family is read both ways.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from mclr_jax.model import Model
from mclr_jax.samplers import Sampler

Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published model with its weights, which all families of files become."""

    family: str
    model: Model
    params: Any  # float32, of the network
    sampler: Sampler  # that of the official script
    rest: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # other tensors
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for run.json


class Names(NamedTuple):
    """The tensors of official files that hold a parameter, by its path in ours.

    PyTorch's order of a kernel is (out, in, height, width), ours (height, width, in, out).
    """

    # The names of its tensors, which are joined along the outputs; a list of such: joined on a
    # leading axis; None: files have no such parameter.
    name: Callable[[Path], tuple[str, ...] | list[tuple[str, ...]] | None]
    # The window of a kernel that is dense here and a convolution in the file; () for others.
    window: Callable[[Path], tuple[int, ...]] = lambda path: ()
    # (path, value in our layout, False) -> the same in our order; True: back to that of the file.
    turn: Callable[[Path, Any, bool], Any] = lambda path, value, back: value

    def shape(self, path: Path, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
        """That of each of the tensors that are joined to a parameter of this shape."""
        if path[-1] == "kernel":
            *own, inputs, outputs = shape
            window = own or self.window(path)
            shape = (outputs, inputs if own else inputs // int(np.prod(window)), *window)
        return (shape[0] // parts, *shape[1:]) if parts > 1 else tuple(shape)


def to_params(state: Mapping[str, np.ndarray], shapes: Any, names: Names) -> Any:
    """Parameters, a tree of float32 NumPy arrays with these `shapes`, from official tensors.

    Those without a name are zeros. ValueError: the first tensor that is missing, unexpected, not
    real or of another shape.
    """
    left, params = dict(state), {}

    def take(name: str, expected: tuple[int, ...]) -> np.ndarray:
        if name not in left:
            raise ValueError(f"tensor {name!r} is missing; expected one of shape {expected}.")
        value = np.asarray(left.pop(name))
        real = value.dtype.kind in "fiu" or value.dtype.name == "bfloat16"
        if value.shape != expected or not real:
            raise ValueError(
                f"tensor {name!r} is {value.dtype} of shape {value.shape}; expected real numbers "
                f"of shape {expected}."
            )
        return value.astype(np.float32, copy=False)

    for path, leaf in traverse_util.flatten_dict(shapes).items():
        if (found := names.name(path)) is None:
            params[path] = np.zeros(leaf.shape, np.float32)
            continue
        layers = found if isinstance(found, list) else [found]
        shape, values = leaf.shape[1:] if layers is found else leaf.shape, []
        for layer in layers:
            taken = [take(name, names.shape(path, shape, len(layer))) for name in layer]
            value = np.concatenate(taken) if len(taken) > 1 else taken[0]
            if path[-1] == "kernel":
                value = np.moveaxis(value, (0, 1), (-1, -2)).reshape(shape)
            values.append(names.turn(path, value, False))
        params[path] = np.stack(values) if layers is found else values[0]
    for name, value in left.items():
        raise ValueError(f"tensor {name!r} of shape {np.shape(value)} is unexpected.")
    return traverse_util.unflatten_dict(params)


def to_state(params: Any, names: Names) -> dict[str, np.ndarray]:
    """The inverse of `to_params`: official tensors, float32.

    ValueError: a parameter that official files do not have is not zero.
    """
    state: dict[str, np.ndarray] = {}
    for path, leaf in traverse_util.flatten_dict(params).items():
        leaf, found = np.asarray(leaf), names.name(path)
        if found is None:
            if leaf.any():
                raise ValueError(
                    f"the published network has no input {path[0]!r}: export a run without it."
                )
            continue
        layers = zip(found, leaf, strict=True) if isinstance(found, list) else [(found, leaf)]
        for layer, value in layers:
            value = names.turn(path, value, True)
            if path[-1] == "kernel":
                outputs, inputs, *window = names.shape(path, value.shape, 1)
                value = value.reshape(*window, inputs, outputs)
                value = np.moveaxis(value, (-1, -2), (0, 1))
            values = np.split(value, len(layer)) if len(layer) > 1 else [value]
            state |= {n: np.array(v, order="C") for n, v in zip(layer, values, strict=True)}
    return state
