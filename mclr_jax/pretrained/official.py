"""Official PyTorch weights -> Flax parameters: the part that all networks share."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mclr_jax.networks.layers import Network
from mclr_jax.types import Condition

Path = tuple[str, ...]


def convert(
    state: Mapping[str, np.ndarray],
    net: Network,
    image: tuple[int, ...],
    official_name: Callable[[Path], str | list[str]],
) -> dict[Path, jax.Array]:
    """Parameters of `net` by path: kernels (..., in, out), and zeros for absent optional inputs.

    `state` maps official names to arrays, `image` is the shape (H, W, C) of the network's input,
    `official_name` maps a path to its name, or to a list of names whose arrays are stacked. Raises
    ValueError for the first parameter that is missing, unexpected or of another shape.
    """
    remaining = dict(state)

    def take(name: str, expected: tuple[int, ...], is_kernel: bool) -> np.ndarray:
        if name not in remaining:
            raise ValueError(f"parameter {name!r} is missing, expected shape {expected}")
        value = original = np.asarray(remaining.pop(name), np.float32)
        if is_kernel and value.ndim > 1:
            value = np.moveaxis(value, (0, 1), (-1, -2))
            if len(expected) == 2:  # a dense layer of patches, or instead of a 1x1 convolution
                value = value.reshape(-1, value.shape[-1])
        if value.shape != expected:
            raise ValueError(
                f"parameter {name!r} has shape {original.shape}, which becomes {value.shape}; "
                f"the network expects {expected}"
            )
        return value

    inputs = jnp.zeros((1, *image)), jnp.zeros(1), Condition(jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    params = {}
    for path, leaf in traverse_util.flatten_dict(shapes).items():
        name, is_kernel = official_name(path), path[-1] == "kernel"
        if path[0] in net.optional_inputs and name not in state:
            params[path] = jnp.zeros(leaf.shape)
        elif isinstance(name, str):
            params[path] = jnp.asarray(take(name, leaf.shape, is_kernel))
        else:
            params[path] = jnp.stack([take(part, leaf.shape[1:], is_kernel) for part in name])
    for name, value in remaining.items():
        raise ValueError(f"parameter {name!r} of shape {value.shape} is unexpected")
    return params
