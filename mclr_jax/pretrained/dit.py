"""Published DiT, SiT and REPA files: their hyper-parameters, and the names of their tensors.

Sources: facebookresearch/DiT (models.py), willisma/SiT and sihyun-yu/REPA, which share the names
and shapes. Our blocks are stacked on a leading depth axis; the patch convolution is a dense layer.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging

from mclr_jax.denoiser import Epsilon, Preconditioning, Velocity
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.dit import DiT
from mclr_jax.pretrained.names import Checkpoint, Names, Path, to_params, to_state
from mclr_jax.samplers import Sampler

# Modules of the network here: their names in a file, where {} is a block, as "blocks.3.".
MODULES = {
    "x_embedder": "x_embedder.proj", "y_embedder": "y_embedder.embedding_table",
    "t_embedder_0": "t_embedder.mlp.0", "t_embedder_2": "t_embedder.mlp.2",
    "adaLN_modulation": "{}adaLN_modulation.1", "qkv": "{}attn.qkv", "proj": "{}attn.proj",
    "q_norm": "{}attn.q_norm", "k_norm": "{}attn.k_norm", "fc1": "{}mlp.fc1", "fc2": "{}mlp.fc2",
    "final_adaLN_modulation": "final_layer.adaLN_modulation.1",
    "final_linear": "final_layer.linear",
}  # fmt: skip
TABLE = "y_embedder.embedding_table.weight"
SIZES = {"XL": (1152, 28, 16), "L": (1024, 24, 16), "B": (768, 12, 12), "S": (384, 12, 6)}
PATHS = {"linear": "linear", "gvp": "cosine", "cosine": "cosine", "vp": "vp"}


def names(
    net: Any,
    modules: Mapping[str, str] = MODULES,
    block: Callable[[int], str] = "blocks.{}.".format,
) -> Names:
    """The names of the parameters of `networks.dit.DiT` in a file with these modules and blocks.

    Several names, separated by spaces, are joined along the outputs. Modules of the network itself
    that files have in each block are those of the first one.
    """

    def name(path: Path) -> Any:
        if path[0] in net.optional_inputs:
            return None
        if path == ("pos_embed",):
            return path
        found, end = modules[path[-2]].split(), ".bias" if path[-1] == "bias" else ".weight"
        layers = [tuple(part.format(block(i)) + end for part in found) for i in range(net.depth)]
        return layers if path[0] == "blocks" else layers[0]

    patch = (net.patch_size, net.patch_size)
    return Names(name, lambda path: patch if path[0] == "x_embedder" else ())


def blocks(first: int) -> Callable[[int], str]:
    """The name of block i; in early files of REPA, blocks from `first` on are decoder_blocks."""
    return lambda i: f"decoder_blocks.{i - first}." if 0 < first <= i else f"blocks.{i}."


def take(given: dict[str, Any], name: str, known: Any = None) -> Any:
    """The value `name` that the user has given, or else the one that the file tells.

    ValueError: there is neither.
    """
    if (value := given.pop(name, known)) is None:
        raise ValueError(f"the file does not hold {name}: give it, as --set={name}=VALUE.")
    return value


def family_of(family: str, state: Mapping[str, Any], args: Mapping[str, Any]) -> str:
    """dit, sit or repa; ValueError: the file does not tell, or `family` is another one."""
    of_repa = ("projectors.", "decoder_blocks.")
    if args.get("prediction") == "v" or "encoder_depth" in args:
        found = "repa"
    elif args:
        found = "sit" if "path_type" in args else "dit"
    elif any(name.startswith(of_repa) or ".q_norm." in name for name in state):
        found = "repa"
    elif family in ("dit", "sit", "repa"):
        found = family
    else:
        raise ValueError(
            "files of DiT and SiT without their training arguments cannot be told apart: give "
            "--family=dit or --family=sit"
        )
    if family not in ("", found):
        raise ValueError(f"it is of the family {found!r}, not {family!r}.")
    return found


def read(
    family: str, state: Mapping[str, np.ndarray], args: Mapping[str, Any], given: dict[str, Any]
) -> Checkpoint:
    """The model in a state dict; `args` are those of a training file, {} without.

    `given`, of which all keys are used: heads, num_classes, image_size, path_type, prediction.
    ValueError: a tensor is missing, unexpected or misshapen, or the family or a number is needed
    that the file does not hold.
    """

    def shape(name: str, axes: int) -> tuple[int, ...]:
        found = np.shape(state.get(name, ()))
        if len(found) != axes:
            raise ValueError(
                f"tensor {name} of {axes} axes is missing; expected a DiT, SiT or REPA, or a "
                "snapshot of EDM or EDM2 (.pkl)"
            )
        return found

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    outputs, _ = shape("final_layer.linear.weight", 2)
    rows, _ = shape(TABLE, 2)
    hidden, _ = shape("blocks.0.mlp.fc1.weight", 2)
    family = family_of(family, state, args)
    times = (1,) if family == "repa" else (1, 2)
    if outputs not in [n * channels * patch**2 for n in times]:
        raise ValueError(
            f"the last layer has {outputs} outputs for patches of {patch}x{patch} pixels and "
            f"{channels} channels, which no file of the family {family!r} has; SiT's and DiT's may "
            "have twice as many outputs as inputs."
        )
    classes = int(take(given, "num_classes", args.get("num_classes", rows - 1)))
    if rows - classes not in (0, 1):
        raise ValueError(
            f"the table has {rows} labels; expected num_classes={classes} of them, or one more, "
            "which is the null label. Give num_classes."
        )
    own, later = (
        len({name.split(".")[1] for name in state if name.startswith(kind)})
        for kind in ("blocks.", "decoder_blocks.")
    )
    side = patch * math.isqrt(shape("pos_embed", 3)[1]) if "pos_embed" in state else None
    size = int(take(given, "image_size", side))
    net = DiT(
        dtype="float32", out_channels=outputs // patch**2, num_classes=classes, patch_size=patch,
        width=width, depth=own + later, heads=_heads(state, width, own + later, given),
        mlp_ratio=hidden / width, time_scale=1.0, qk_norm="blocks.0.attn.q_norm.weight" in state,
        stored_positions="pos_embed" in state,
    )  # fmt: skip
    preconditioning, sampler = _process(family, args, given)
    data = DataInfo((size, size, channels), classes, 1.0, has_null=rows > classes)
    model = Model(net, preconditioning, data)
    rest = {name: value for name, value in state.items() if name.startswith("projectors.")}
    state = {name: value for name, value in state.items() if name not in rest}
    if rows == classes:  # a row of zeros, which is never asked for
        table = np.asarray(state[TABLE])
        state[TABLE] = np.append(table, 0 * table[:1], axis=0)
    first = own if later else 0
    params = to_params(state, shapes_of(model), names(net, block=blocks(first)))
    facts = {"decoder_blocks": first} if first else {}
    return Checkpoint(family, model, params, sampler, rest, facts)


def state(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, as the file had them."""
    block = blocks(checkpoint.facts.get("decoder_blocks", 0))
    found = to_state(checkpoint.params, names(checkpoint.model.network, block=block))
    if not checkpoint.model.data.has_null:
        found[TABLE] = found[TABLE][:-1]
    return found


def _heads(state: Mapping[str, Any], width: int, depth: int, given: dict[str, Any]) -> int:
    """The number of attention heads: of q_norm, or of the published network of this size."""
    known: int | None = None
    if (norm := "blocks.0.attn.q_norm.weight") in state:
        known = width // max(np.size(state[norm]), 1)
    else:
        known = next((heads for *size, heads in SIZES.values() if size == [width, depth]), None)
        if known and "heads" not in given:
            logging.info("%d attention heads, as in the published network of this size.", known)
    return int(take(given, "heads", known))


def _process(
    family: str, args: Mapping[str, Any], given: dict[str, Any]
) -> tuple[Preconditioning, Sampler]:
    """The preconditioning and the sampler of the official script."""
    if family == "dit":
        return Epsilon(), Sampler("ddpm", 250, 0.01, 157.0, spacing="even")
    path = str(take(given, "path_type", args.get("path_type", "linear"))).lower()
    prediction = str(take(given, "prediction", args.get("prediction", "velocity")))
    if path not in PATHS or (path == "vp" and family == "repa"):
        raise ValueError(f"path_type is {path!r}; expected one of {', '.join(PATHS)}.")
    prediction = "velocity" if prediction == "v" else prediction
    process = Velocity(int(family == "sit"), PATHS[path], prediction)
    diffusion = "sigma" if family == "sit" else "linear"
    return process, Sampler("sde_euler", 250, 1e-3, 1e4, diffusion=diffusion)
