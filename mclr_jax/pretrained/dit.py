"""Official DiT and SiT PyTorch weights -> Flax parameters of `networks.dit`.

Source of the names and layouts: facebookresearch/DiT, models.py; willisma/SiT has the same. Our
blocks are stacked on a leading depth axis, and the patch convolution is a dense layer.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mclr_jax.networks.dit import DiT
from mclr_jax.types import Condition

OFFICIAL = {
    "x_embedder": "x_embedder.proj",
    "t_embedder_0": "t_embedder.mlp.0",
    "t_embedder_2": "t_embedder.mlp.2",
    "y_embedder": "y_embedder.embedding_table",
    "final_adaLN_modulation": "final_layer.adaLN_modulation.1",
    "final_linear": "final_layer.linear",
    # inside blocks.<index>
    "adaLN_modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def convert(state_dict: Mapping[str, np.ndarray], net: DiT) -> dict:
    """Parameters of `net` from an official state dict.

    Args:
      state_dict: official name -> array. `pos_embed`, a fixed table, is not needed.
      net: the network that the weights belong to; its fields say what is expected. Official weights
        want time_scale 1.

    Returns:
      params for `net.apply({"params": params}, ...)`; optional inputs, which no official weights
      have, get zeros.

    Raises:
      ValueError: a parameter is missing, unexpected or misshapen; the first is named.
    """
    remaining = {name: value for name, value in state_dict.items() if name != "pos_embed"}

    def take(name: str, expected: tuple[int, ...]) -> np.ndarray:
        if name not in remaining:
            raise ValueError(f"parameter {name!r} is missing, expected shape {expected}")
        original = np.asarray(remaining.pop(name), np.float32)
        value = original
        if value.ndim == 4:  # (width, C, p, p) -> (p * p * C, width)
            value = value.transpose(2, 3, 1, 0).reshape(-1, len(value))
        elif value.ndim == 2 and "embedding_table" not in name:
            value = value.T
        if value.shape != expected:
            raise ValueError(
                f"parameter {name!r} has shape {original.shape}, which becomes {value.shape}; "
                f"the network expects {expected}"
            )
        return value

    params = {}
    for path, leaf in _expected(remaining, net).items():
        if path[0] in net.optional_inputs:
            params[path] = jnp.zeros(leaf.shape)
            continue
        name = f"{OFFICIAL[path[-2]]}.{'bias' if path[-1] == 'bias' else 'weight'}"
        if path[0] == "blocks":
            names = [f"blocks.{index}.{name}" for index in range(net.depth)]
            params[path] = jnp.stack([jnp.asarray(take(n, leaf.shape[1:])) for n in names])
        else:
            params[path] = jnp.asarray(take(name, leaf.shape))
    for name, value in remaining.items():
        raise ValueError(f"parameter {name!r} of shape {value.shape} is unexpected")
    return traverse_util.unflatten_dict(params)


def _expected(state_dict: Mapping[str, np.ndarray], net: DiT) -> dict:
    """Path -> shape of the network's parameters; the input channels come from the patch layer."""
    name = "x_embedder.proj.weight"
    if name not in state_dict:
        raise ValueError(f"parameter {name!r} is missing: not weights of a DiT")
    p, channels = net.patch_size, state_dict[name].shape[1]
    x = jax.ShapeDtypeStruct((1, p, p, channels), jnp.float32)
    condition = Condition(jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), condition)
    return traverse_util.flatten_dict(shapes["params"])
