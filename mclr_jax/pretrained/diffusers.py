"""Folders of diffusers: the autoencoder of Stable Diffusion, and DiT.

A folder of a pipeline has `model_index.json`, and a folder for each part with `config.json` and
weights. Sources of names and layouts: huggingface/diffusers, `AutoencoderKL` and
`DiTTransformer2DModel`, which is `Transformer2DModel` in older files.
"""

import json
import os
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from mclr_jax.files import named
from mclr_jax.networks.autoencoder import Autoencoder
from mclr_jax.pretrained import tensors
from mclr_jax.pretrained.names import Names, Path, to_params
from mclr_jax.schema import read

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Names of an attention's parts before diffusers 0.17.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def settings(
    folder: pathlib.Path, classes: Collection[str], unused: Collection[str],
    fixed: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """The keys of a part's config that are neither null, nor unused, nor fixed.

    ValueError: the config of another class, or a key, or one of its values, that is not what is
    `fixed` for it.
    """
    path = folder / "config.json"
    with named(f"{path} is no config of diffusers"):
        found = {k: v for k, v in json.loads(path.read_text()).items() if v is not None}
    if (kind := found.get("_class_name")) not in classes:
        raise ValueError(f"{path} is of the class {kind!r}; expected {' or '.join(classes)}.")
    for key, value in fixed.items():
        got = found.get(key, value)
        if any(one != value for one in (got if isinstance(got, list) else [got])):
            raise ValueError(f"{path}: {key} is {found[key]!r}; only {value!r} is known here.")
    return {k: v for k, v in found.items() if k[0] != "_" and k not in (*unused, *fixed)}


def weights(folder: pathlib.Path) -> dict[str, Any]:
    """The tensors of a part of a pipeline by name."""
    for path in (folder / name for name in WEIGHTS):
        if path.is_file():
            state = tensors.load(path)
            if isinstance(state, dict) and all(isinstance(v, np.ndarray) for v in state.values()):
                return state
            raise ValueError(f"{path} does not hold tensors by name; get it again.")
    raise FileNotFoundError(f"found no {' or '.join(WEIGHTS)} in {folder}; check the folder.")


def autoencoder(folder: str | os.PathLike) -> tuple[Autoencoder, Any]:
    """The autoencoder in a folder `vae` of diffusers, and its parameters, float32.

    ValueError: a config of another network, or tensors that do not fit it.
    """
    folder = pathlib.Path(folder)
    fixed = {"act_fn": "silu", "down_block_types": "DownEncoderBlock2D",
             "up_block_types": "UpDecoderBlock2D"}  # fmt: skip
    found = settings(folder, ["AutoencoderKL"], ("sample_size", "force_upcast"), fixed)
    with named(f"{folder}/config.json describes no autoencoder that is known here"):
        network = read(Autoencoder, found, "it")
        side = 2 ** len(network.block_out_channels)
        images = jax.ShapeDtypeStruct((1, side, side, network.in_channels), np.float32)
        shapes = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    state = {}
    for name, value in weights(folder).items():
        *path, last = name.split(".")
        if "attentions" in path:
            path[-1] = OLD.get(path[-1], path[-1])
        state[".".join([*path, last])] = value
    with named(f"the weights in {folder} do not fit its config.json"):
        return network, to_params(state, shapes, AUTOENCODER)


def _dense(path: Path) -> tuple[int, ...]:
    """The window of the convolutions of an autoencoder that are dense layers here."""
    return (1, 1) if path[-2] in ("quant_conv", "post_quant_conv", "conv_shortcut") else ()


AUTOENCODER = Names(
    lambda path: ".".join(path).replace(".kernel", ".weight").replace(".scale", ".weight"), _dense
)
