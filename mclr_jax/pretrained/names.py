"""Names and layouts of parameters in official files: one map for each family, read both ways."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

Path = tuple[str, ...]


class Names(NamedTuple):
    """The tensors of official files that hold a parameter, by its path in ours.

    PyTorch's order of a kernel is (out, in, height, width), ours (height, width, in, out).
    """

    # The tensor's name; a list of names: stacked on a leading axis; a tuple of names: joined along
    # the outputs; None: files have no such parameter.
    name: Callable[[Path], Any]
    # The window of a kernel that is dense here and a convolution in the file; () for others.
    window: Callable[[Path], tuple[int, ...]] = lambda path: ()
    # (path, value in our layout, False) -> the same in our order; True: back to that of the file.
    turn: Callable[[Path, Any, bool], Any] = lambda path, value, back: value


def to_params(
    state: Mapping[str, np.ndarray], shapes: Any, names: Names, optional: Collection[str] = ()
) -> Any:
    """Parameters, a tree of float32 NumPy arrays with these `shapes`, from official tensors.

    Parameters of `optional` modules that `state` lacks are zeros, and so are those without a name.
    ValueError: the first tensor that is missing, unexpected, not real or of another shape.
    """
    left, params = dict(state), {}

    def take(name: str, path: Path, shape: tuple[int, ...], parts: int) -> np.ndarray:
        expected = _official_shape(path, shape, names)
        expected = (expected[0] // parts, *expected[1:]) if parts > 1 else expected
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
        found = names.name(path)
        if found is None or (path[0] in optional and found not in left):
            params[path] = np.zeros(leaf.shape, np.float32)
            continue
        layers = found if isinstance(found, list) else [found]
        shape = leaf.shape[1:] if isinstance(found, list) else leaf.shape
        values = []
        for layer in layers:
            parts = layer if isinstance(layer, tuple) else (layer,)
            taken = [take(name, path, shape, len(parts)) for name in parts]
            value = np.concatenate(taken) if len(parts) > 1 else taken[0]
            if path[-1] == "kernel":
                value = np.moveaxis(value, (0, 1), (-1, -2)).reshape(shape)
            values.append(names.turn(path, value, False))
        params[path] = np.stack(values) if isinstance(found, list) else values[0]
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
            shape = _official_shape(path, value.shape, names)
            if path[-1] == "kernel":
                value = value.reshape(*shape[2:], shape[1], shape[0])
                value = np.moveaxis(value, (-1, -2), (0, 1))
            parts = layer if isinstance(layer, tuple) else (layer,)
            values = np.split(value, len(parts)) if len(parts) > 1 else [value]
            state |= {n: np.array(v, order="C") for n, v in zip(parts, values, strict=True)}
    return state


def _official_shape(path: Path, shape: tuple[int, ...], names: Names) -> tuple[int, ...]:
    if path[-1] != "kernel":
        return tuple(shape)
    *own, inputs, outputs = shape
    window = own or names.window(path)
    return (outputs, inputs // (int(np.prod(window)) if len(shape) == 2 else 1), *window)
