"""Folders of diffusers: the autoencoder of Stable Diffusion, and DiT.

A folder of a pipeline has `model_index.json`, and a folder for each part with `config.json` and
weights. Sources of names and layouts: huggingface/diffusers, `AutoencoderKL` and
`DiTTransformer2DModel`, which is `Transformer2DModel` in older files.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from absl import logging

from mclr_jax import schema
from mclr_jax.denoiser import Epsilon
from mclr_jax.files import named
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.autoencoder import Autoencoder
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.layers import DEEPEST, WIDEST
from mclr_jax.pretrained import dit, tensors
from mclr_jax.pretrained.names import Checkpoint, Names, to_params, to_state
from mclr_jax.samplers import Sampler
from mclr_jax.schema import key as field

INDEX = "model_index.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# Names of an attention's parts before diffusers 0.17.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def config(path: pathlib.Path, fixed: Mapping[str, Any], unused: Collection[str] = ()) -> dict:
    """The keys of a config that are not null, `unused` or `fixed`.

    ValueError: the value of one, or a part of it, is not the `fixed` one, or one of that tuple.
    """
    found = {k: v for k, v in json.loads(path.read_text()).items() if v is not None}
    for key, value in fixed.items():
        known = value if isinstance(value, tuple) else (value,)
        got = found.get(key, None if key == "_class_name" else known[0])  # all others have defaults
        if any(one not in known for one in (got if isinstance(got, list) else [got])):
            raise ValueError(
                f"{key} is {got!r}; only {' or '.join(map(repr, known))} is known here"
            )
    return {k: v for k, v in found.items() if k not in (*unused, *fixed)}


def settings(
    kind: Any, folder: pathlib.Path, fixed: Mapping[str, Any], unused: Collection[str]
) -> Any:
    """The dataclass `kind` from the config of a part of a pipeline.

    ValueError: a key that `kind` does not have; and those of `config`.
    """
    path = folder / "config.json"
    with named(f"{path} is no config of diffusers that is known here"):
        found = config(path, fixed, unused)
        return schema.read(kind, {k: v for k, v in found.items() if k[0] != "_"}, "it")


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a part of a pipeline by name."""
    for path in (folder / name for name in WEIGHTS):
        if path.is_file():
            return tensors.load(path)
    raise FileNotFoundError(f"found no {' or '.join(WEIGHTS)} in {folder}; check the folder.")


def described(folder: pathlib.Path) -> Autoencoder:
    """The autoencoder that the config in a folder `vae` describes."""
    fixed = {"_class_name": "AutoencoderKL", "act_fn": "silu",
             "down_block_types": "DownEncoderBlock2D",
             "up_block_types": "UpDecoderBlock2D"}  # fmt: skip
    return settings(Autoencoder, folder, fixed, unused=("sample_size", "force_upcast"))


def autoencoder(folder: str | os.PathLike) -> tuple[Autoencoder, Any]:
    """The autoencoder in a folder `vae` of diffusers, and its parameters, float32.

    ValueError: a config of another network, or tensors that do not fit it.
    """
    network = described(folder := pathlib.Path(folder))
    side = 2 ** len(network.block_out_channels)
    images = jax.ShapeDtypeStruct((1, side, side, network.in_channels), np.float32)
    found, state = weights(folder), {}
    with named(f"the weights in {folder} do not fit its config.json"):
        for name, value in found.items():
            *path, last = name.split(".")
            if "attentions" in path:
                path[-1] = OLD.get(path[-1], path[-1])
            state[".".join([*path, last])] = value
        shapes = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
        return network, to_params(state, shapes, AUTOENCODER)


AUTOENCODER = Names(
    lambda path: (".".join(path).replace(".kernel", ".weight").replace(".scale", ".weight"),),
    lambda path: (1, 1) if path[-2].endswith(("quant_conv", "conv_shortcut")) else (),
)


# ---- DiT -----------------------------------------------------------------------------------------

UNUSED = ("upcast_attention", "norm_num_groups")
FIXED = {
    "_class_name": ("DiTTransformer2DModel", "Transformer2DModel"),
    "activation_fn": "gelu-approximate", "attention_bias": True, "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False, "attention_type": "default", "double_self_attention": False,
    "only_cross_attention": False, "use_linear_projection": False,
}  # fmt: skip
# Of schedulers: what is learned, and how the pipeline samples.
PROCESS = {"beta_schedule": "linear", "prediction_type": "epsilon", "trained_betas": None,
           "rescale_betas_zero_snr": False}  # fmt: skip
SAMPLING = {"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": False,
            "timestep_spacing": "leading", "steps_offset": 0,
            "set_alpha_to_one": True}  # fmt: skip
MODULES = {
    "x_embedder": "pos_embed.proj", "final_adaLN_modulation": "proj_out_1",
    "final_linear": "proj_out_2",
    "t_embedder_0": "{}norm1.emb.timestep_embedder.linear_1",
    "t_embedder_2": "{}norm1.emb.timestep_embedder.linear_2",
    "y_embedder": "{}norm1.emb.class_embedder.embedding_table",
    "adaLN_modulation": "{}norm1.linear", "qkv": "{}attn1.to_q {}attn1.to_k {}attn1.to_v",
    "proj": "{}attn1.to_out.0", "fc1": "{}ff.net.0.proj", "fc2": "{}ff.net.2",
}  # fmt: skip
names = partial(dit.names, modules=MODULES, block="transformer_blocks.{}.".format)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The keys of a transformer's config that decide what the network is; defaults of the class."""

    num_attention_heads: int = field(16, 1, DEEPEST)
    attention_head_dim: int = field(72, 1, WIDEST)
    in_channels: int = field(4, 1, WIDEST)
    out_channels: int = field(0, 0, WIDEST)  # 0: those of the input
    num_layers: int = field(28, 1, DEEPEST)
    dropout: float = field(0.0, 0.0, 1.0, ")")
    sample_size: int = field(32, 1, WIDEST)
    patch_size: int = field(2, 1, DEEPEST)
    num_embeds_ada_norm: int = field(1000, 1)
    norm_eps: float = field(1e-5, 0.0, 1.0, "()")


def transformer(folder: pathlib.Path) -> pathlib.Path:
    """The folder of the transformer of a pipeline; the folder itself if it is that."""
    return folder / "transformer" if (folder / "transformer").is_dir() else folder


def read(folder: pathlib.Path, state: Mapping[str, np.ndarray]) -> Checkpoint:
    """The DiT with these `weights` in the folder of a pipeline, or of its transformer alone.

    ValueError: a config of another network or process, or tensors that do not fit it.
    """
    part = transformer(folder)
    config = settings(Transformer, part, FIXED, UNUSED)
    heads, channels = config.num_attention_heads, config.in_channels
    copies = _copies(state, config.num_layers)
    own = not all(k in state and np.array_equal(state[k], state[v]) for k, v in copies.items())
    net = DiT(
        out_channels=config.out_channels or channels, num_classes=config.num_embeds_ada_norm,
        patch_size=config.patch_size, width=heads * config.attention_head_dim, heads=heads,
        depth=config.num_layers, dropout=config.dropout, time_scale=1.0, time_endpoint=True,
        mlp_epsilon=config.norm_eps, own_embeddings=own,
    )  # fmt: skip
    state = {name: x for name, x in state.items() if own or name not in copies}
    facts, units = _of_pipeline(folder, channels) if part != folder else ({}, {})
    data = DataInfo((config.sample_size,) * 2 + (channels,), net.num_classes, 1.0, **units)
    model = Model(net, _process(folder / "scheduler"), data)
    with named(f"the weights in {part} do not fit its config.json"):
        params = to_params(state, shapes_of(model), names(net))
    sampler = Sampler("ddim", 50, 0.01, 157.0, spacing="leading")
    return Checkpoint("diffusers", model, params, sampler, facts=facts)


def state(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, as the folder had them: each block has embedders."""
    net = checkpoint.model.network
    found = to_state(checkpoint.params, names(net))
    copies = {} if net.own_embeddings else _copies(found, net.depth)
    return found | {name: found[first] for name, first in copies.items()}


def write(folder: pathlib.Path, checkpoint: Checkpoint, found: dict[str, np.ndarray]) -> None:
    """Write the tensors of `state` as a folder that diffusers loads.

    Everything but these is that of the folder which the checkpoint was read from. ValueError:
    `folder` exists, or the checkpoint no longer has DiT's process. FileNotFoundError: the folder
    that it was read from is not there.
    """
    process = type(checkpoint.model.preconditioning).__name__
    if process != "Epsilon":
        raise ValueError(f"diffusers' DiT predicts the noise (epsilon); this run has {process}.")
    if folder.exists():
        raise ValueError(f"{folder} exists; give a new folder.")
    part = transformer(source := pathlib.Path(checkpoint.facts["file"]))
    if not (part / "config.json").is_file():
        raise FileNotFoundError(f"found no {part}/config.json, of the folder that this run was "
                                "read from: put it there, or write a .safetensors.")  # fmt: skip
    kept = {source: {INDEX, "scheduler", "transformer", "vae"}, part: {"config.json"}}

    def others(place: str, names: list[str]) -> set[str]:
        return {*names} - kept.get(pathlib.Path(place), {*names})

    shutil.copytree(source, folder, ignore=others)
    tensors.save(folder / part.relative_to(source) / WEIGHTS[0], found)


def _copies(state: Mapping[str, Any], depth: int) -> dict[str, str]:
    """The names of the embedders of later blocks, and their names in block 0."""
    firsts = [name for name in state if name.startswith("transformer_blocks.0.norm1.emb.")]
    return {name.replace(".0.", f".{i}.", 1): name for name in firsts for i in range(1, depth)}


def _of_pipeline(folder: pathlib.Path, channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts about the labels and the autoencoder of a pipeline, and the units of its latents."""
    facts: dict[str, Any] = {}
    units: dict[str, Any] = {}
    if (vae := folder / "vae").is_dir():
        network = described(vae)
        units = {"offset": network.shift_factor, "scale": 1 / network.scaling_factor}
        facts |= {"autoencoder": os.path.abspath(vae), "latents": "stable_diffusion"}
    if (path := folder / INDEX).is_file():
        with named(f"{path} is no index of a pipeline"):
            facts |= {"id2label": dict(json.loads(path.read_text()).get("id2label") or {})}
    return facts, {name: (value,) * channels for name, value in units.items()}


def _process(folder: pathlib.Path) -> Epsilon:
    """The process of a pipeline's scheduler; that of DiT without one."""
    if not (path := folder / "scheduler_config.json").is_file():
        return Epsilon()
    with named(f"{path} describes no process that is known here"):
        found = config(path, PROCESS)
        for name, value in SAMPLING.items():
            if (got := found.get(name, value)) != value:
                logging.warning("%s: %s is %r; samples here are as if it were %r.",
                                path, name, got, value)  # fmt: skip
        betas = found.get("beta_start", 1e-4), found.get("beta_end", 0.02)
        return schema.read(
            Epsilon, {"betas": betas, "steps": found.get("num_train_timesteps", 1000)}, "it"
        )
