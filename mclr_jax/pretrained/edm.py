"""Official EDM PyTorch weights (DDPM++, NCSN++, ADM) -> Flax parameters of `networks.unet`.

Source of the names and layouts: NVlabs/edm, training/networks.py. Its qkv convolution orders the
output channels (head, channel, q/k/v); ours orders them (head, q/k/v, channel).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mclr_jax.networks.unet import UNet, attention_heads
from mclr_jax.types import Condition


def convert(state_dict: Mapping[str, np.ndarray], net: UNet) -> dict:
    """Parameters of `net` from an official state dict.

    Args:
      state_dict: official name -> array, with or without the prefix "model." of EDMPrecond.
      net: the network that the weights belong to; its fields say what is expected.

    Returns:
      params for `net.apply({"params": params}, ...)`; optional inputs that the weights lack get
      zeros.

    Raises:
      ValueError: a parameter is missing, unexpected or misshapen; the first is named.
    """
    remaining = {name.removeprefix("model."): value for name, value in state_dict.items()}
    params = {}
    for path, expected in _expected(remaining, net).items():
        name = _official_name(path)
        if name not in remaining and path[0] in net.optional_inputs:
            params[path] = jnp.zeros(expected.shape)
            continue
        if name not in remaining:
            raise ValueError(f"parameter {name!r} is missing, expected shape {expected.shape}")
        value = np.asarray(remaining.pop(name), np.float32)
        original = value.shape
        if path[-1] == "kernel":
            value = np.moveaxis(value, (0, 1), (-1, -2))  # (out, in, ...) -> (..., in, out)
            value = value.reshape(value.shape[-2:]) if value.shape[:2] == (1, 1) else value
        if value.shape != expected.shape:
            raise ValueError(
                f"parameter {name!r} has shape {original}, which becomes {value.shape}; "
                f"the network expects {expected.shape}"
            )
        if path[-2:-1] == ("qkv",):
            value = reorder_qkv(value, attention_heads(net.architecture, value.shape[-1] // 3))
        params[path] = jnp.asarray(value)

    taps = 4 if net.architecture == "ncsnpp" else 2
    for name, value in remaining.items():
        if not name.endswith("resample_filter"):
            raise ValueError(f"parameter {name!r} of shape {value.shape} is unexpected")
        if value.shape != (1, 1, taps, taps):
            raise ValueError(
                f"parameter {name!r} has shape {value.shape}, expected {(1, 1, taps, taps)} "
                f"for architecture {net.architecture!r}"
            )
    return traverse_util.unflatten_dict(params)


def reorder_qkv(value: np.ndarray, heads: int) -> np.ndarray:
    """Last axis (..., 3 D) from official order (head, channel, q/k/v) to (head, q/k/v, channel)."""
    channels = value.shape[-1] // (3 * heads)
    split = value.reshape(*value.shape[:-1], heads, channels, 3)
    return split.swapaxes(-1, -2).reshape(value.shape)


def _expected(state_dict: Mapping[str, np.ndarray], net: UNet) -> dict:
    """Path -> shape of the network's parameters; resolution and input channels come from names."""
    first = next((k for k in state_dict if k.startswith("enc.") and k.endswith("_conv.weight")), "")
    if not first:
        raise ValueError("parameter 'enc.*_conv.weight' is missing: not weights of an EDM U-Net")
    height, width = map(int, first.removeprefix("enc.").removesuffix("_conv.weight").split("x"))
    x = jax.ShapeDtypeStruct((1, height, width, state_dict[first].shape[1]), jnp.float32)
    condition = Condition(jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, jnp.zeros(1), condition)
    return traverse_util.flatten_dict(shapes["params"])


def _official_name(path: tuple[str, ...]) -> str:
    """('enc_16x16_block0', 'norm0', 'scale') -> 'enc.16x16_block0.norm0.weight'."""
    if path == ("map_noise_freqs",):
        return "map_noise.freqs"
    module = path[0].replace("enc_", "enc.").replace("dec_", "dec.")
    leaf = {"kernel": "weight", "scale": "weight"}.get(path[-1], path[-1])
    return ".".join((module, *path[1:-1], leaf))
