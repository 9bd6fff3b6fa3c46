"""Official DiT and SiT PyTorch weights -> Flax parameters of `networks.dit`.

Source of the names and layouts: facebookresearch/DiT, models.py; willisma/SiT has the same. Our
blocks are stacked on a leading depth axis, and the patch convolution is a dense layer.
"""

from collections.abc import Mapping

import numpy as np
from flax import traverse_util

from mclr_jax.networks.dit import DiT
from mclr_jax.pretrained import official

OFFICIAL = {
    "x_embedder": "x_embedder.proj", "y_embedder": "y_embedder.embedding_table",
    "t_embedder_0": "t_embedder.mlp.0", "t_embedder_2": "t_embedder.mlp.2",
    "final_adaLN_modulation": "final_layer.adaLN_modulation.1",
    "final_linear": "final_layer.linear",
    # inside blocks.<index>
    "adaLN_modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip


def convert(state_dict: Mapping[str, np.ndarray], net: DiT) -> dict:
    """An official state dict -> params for `net.apply({"params": params}, ...)`.

    `net` must have time_scale 1. Errors are those of `official.convert`.
    """
    state = {k: v for k, v in state_dict.items() if k != "pos_embed"}  # a fixed table
    if (patches := "x_embedder.proj.weight") not in state:
        raise ValueError(f"parameter {patches!r} is missing: not weights of a DiT")

    def official_name(path: official.Path) -> str | list[str]:
        name = OFFICIAL.get(path[-2], path[-2]) + (".bias" if path[-1] == "bias" else ".weight")
        return [f"blocks.{i}.{name}" for i in range(net.depth)] if path[0] == "blocks" else name

    image = (net.patch_size, net.patch_size, state[patches].shape[1])
    return traverse_util.unflatten_dict(official.convert(state, net, image, official_name))
