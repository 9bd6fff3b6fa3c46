"""Official EDM PyTorch weights (DDPM++, NCSN++, ADM) -> Flax parameters of `networks.unet`.

Source of the names and layouts: NVlabs/edm, training/networks.py. Its qkv convolution orders the
output channels (head, channel, q/k/v); ours orders them (head, q/k/v, channel).
"""

from collections.abc import Mapping

import jax
import numpy as np
from flax import traverse_util

from mclr_jax.networks.unet import UNet, attention_heads
from mclr_jax.pretrained import official


def convert(state_dict: Mapping[str, np.ndarray], net: UNet) -> dict:
    """An official state dict -> params for `net.apply({"params": params}, ...)`.

    Names may have the prefix "model." of EDMPrecond. Errors are those of `official.convert`.
    """
    state = {name.removeprefix("model."): value for name, value in state_dict.items()}
    taps = 4 if net.architecture == "ncsnpp" else 2
    for name in [name for name in state if name.endswith("resample_filter")]:
        if (shape := state.pop(name).shape) != (1, 1, taps, taps):
            raise ValueError(
                f"parameter {name!r} has shape {shape}, expected {(1, 1, taps, taps)} "
                f"for architecture {net.architecture!r}"
            )
    first = next((k for k in state if k.startswith("enc.") and k.endswith("_conv.weight")), "")
    if not first:
        raise ValueError("parameter 'enc.*_conv.weight' is missing: not weights of an EDM U-Net")
    size = first.removeprefix("enc.").removesuffix("_conv.weight").split("x")
    image = (*map(int, size), state[first].shape[1])
    params = official.convert(state, net, image, _official_name)
    for path in (path for path in params if path[-2:-1] == ("qkv",)):
        heads = attention_heads(net.architecture, params[path].shape[-1] // 3)
        params[path] = reorder_qkv(params[path], heads)
    return traverse_util.unflatten_dict(params)


def reorder_qkv(value: jax.Array, heads: int) -> jax.Array:
    """Last axis (..., 3 D) from official order (head, channel, q/k/v) to (head, q/k/v, channel)."""
    split = value.reshape(*value.shape[:-1], heads, -1, 3)
    return split.swapaxes(-1, -2).reshape(value.shape)


def _official_name(path: official.Path) -> str:
    """('enc_16x16_block0', 'norm0', 'scale') -> 'enc.16x16_block0.norm0.weight'."""
    name = ".".join(path).replace("kernel", "weight").replace("scale", "weight")
    name = name.replace("map_noise_freqs", "map_noise.freqs")
    return name.replace("enc_", "enc.").replace("dec_", "dec.")
