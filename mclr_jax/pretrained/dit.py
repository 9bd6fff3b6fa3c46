"""Published DiT, SiT and REPA files: their hyper-parameters, and the names of their tensors.

Sources: facebookresearch/DiT (models.py), willisma/SiT and sihyun-yu/REPA, which share the names
and shapes. Our blocks are stacked on a leading depth axis; the patch convolution is a dense layer.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from mclr_jax.denoiser import Epsilon, Preconditioning, Velocity
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.dit import DiT
from mclr_jax.pretrained.checkpoint import Checkpoint, take
from mclr_jax.pretrained.names import Names, Path, to_params
from mclr_jax.samplers import Sampler

OFFICIAL = {
    "x_embedder": "x_embedder.proj", "y_embedder": "y_embedder.embedding_table",
    "t_embedder_0": "t_embedder.mlp.0", "t_embedder_2": "t_embedder.mlp.2",
    "final_adaLN_modulation": "final_layer.adaLN_modulation.1",
    "final_linear": "final_layer.linear",
    # inside blocks.<index>
    "adaLN_modulation": "adaLN_modulation.1", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm",
    "qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2",
}  # fmt: skip
SIZES = {"XL": (1152, 28, 16), "L": (1024, 24, 16), "B": (768, 12, 12), "S": (384, 12, 6)}
PATHS = {"linear": "linear", "gvp": "cosine", "cosine": "cosine", "vp": "vp"}


def names(net: DiT) -> Names:
    """The official names of the parameters of `networks.dit.DiT`."""

    def name(path: Path) -> Any:
        if path[0] in net.optional_inputs:
            return None
        if path == ("pos_embed",):
            return "pos_embed"
        found = OFFICIAL[path[-2]] + (".bias" if path[-1] == "bias" else ".weight")
        return [f"blocks.{i}.{found}" for i in range(net.depth)] if path[0] == "blocks" else found

    patch = (net.patch_size, net.patch_size)
    return Names(name, lambda path: patch if path[0] == "x_embedder" else ())


def is_dit(state: Mapping[str, Any]) -> bool:
    return {"x_embedder.proj.weight", "final_layer.linear.weight"} <= state.keys()


def family_of(state: Mapping[str, Any], args: Mapping[str, Any]) -> str:
    """dit, sit or repa, or "" where the file does not tell."""
    if args:
        kind = "sit" if "path_type" in args else "dit"
        return "repa" if "encoder_depth" in args or args.get("prediction") == "v" else kind
    of_repa = ("projectors.", "decoder_blocks.")
    found = any(name.startswith(of_repa) or ".q_norm." in name for name in state)
    return "repa" if found else ""


def read(
    family: str, state: Mapping[str, np.ndarray], args: Mapping[str, Any], given: dict[str, Any]
) -> Checkpoint:
    """The model in a state dict; `args` are those of a training file, {} without.

    `given`, of which all keys are used: heads, num_classes, image_size, path_type, prediction.
    ValueError: a tensor is missing, unexpected or misshapen, the family is another one, or a number
    is needed that the file does not hold.
    """
    if (found := family_of(state, args)) not in ("", family):
        raise ValueError(f"it is a file of the family {found!r}; it was read as {family!r}.")
    state, legacy = _modern(state)
    blocks = {int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))}
    depth = max(blocks, default=-1) + 1
    shapes = {name: np.shape(value) for name, value in state.items()}
    try:
        width, channels, patch, again = shapes["x_embedder.proj.weight"]
        outputs, _ = shapes["final_layer.linear.weight"]
        rows, _ = shapes["y_embedder.embedding_table.weight"]
        hidden, _ = shapes["blocks.0.mlp.fc1.weight"]
    except KeyError as error:
        raise ValueError(f"tensor {error} is missing.") from error
    except ValueError as error:  # of the unpacking
        raise ValueError("a kernel or a table has not the number of axes that it needs.") from error
    if blocks != {*range(depth)} or patch != again or outputs % patch**2:
        raise ValueError(
            f"it has the blocks {sorted(blocks)}, patches of {patch}x{again} and {outputs} outputs "
            "of a patch; expected blocks from 0 without gaps, square patches and whole channels."
        )
    outputs //= patch**2
    if outputs not in ((channels,) if family == "repa" else (channels, 2 * channels)):
        raise ValueError(
            f"the last layer has {outputs} channels for {channels} of the input, which no file of "
            f"the family {family!r} has; SiT's and DiT's may have twice as many."
        )
    classes = int(take(given, "num_classes", args.get("num_classes", rows - 1)))
    if rows - classes not in (0, 1):
        raise ValueError(
            f"the table has {rows} labels; expected num_classes={classes} of them, or one more, "
            "which is the null label. Give num_classes."
        )
    size = _image_size(shapes, patch, given)
    net = DiT(
        dtype="float32", out_channels=outputs, num_classes=classes, patch_size=patch, width=width,
        depth=depth, heads=_heads(state, args, width, depth, given), mlp_ratio=hidden / width,
        time_scale=1.0, qk_norm="blocks.0.attn.q_norm.weight" in state,
        stored_positions="pos_embed" in state,
    )  # fmt: skip
    preconditioning, sampler = _process(family, args, given)
    data = DataInfo((size, size, channels), classes, 1.0, has_null=rows > classes)
    model = Model(net, preconditioning, data)
    rest = {name: value for name, value in state.items() if name.startswith("projectors.")}
    state = {name: value for name, value in state.items() if name not in rest}
    if rows == classes:  # a row of zeros, which is never asked for
        table = np.asarray(state["y_embedder.embedding_table.weight"])
        state["y_embedder.embedding_table.weight"] = np.append(table, 0 * table[:1], axis=0)
    params = to_params(state, shapes_of(model), names(net), net.optional_inputs)
    return Checkpoint(
        family, model, params, sampler, rest, {"decoder_blocks": legacy} if legacy else {}
    )


def state(checkpoint: Checkpoint, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Official tensors as the file had them, from those of `names`."""
    if not checkpoint.model.data.has_null:
        table = "y_embedder.embedding_table.weight"
        found[table] = found[table][:-1]
    if first := checkpoint.facts.get("decoder_blocks"):

        def old(match: re.Match) -> str:
            number = int(match[1])
            return f"decoder_blocks.{number - first}." if number >= first else match[0]

        found = {re.sub(r"^blocks\.(\d+)\.", old, name): value for name, value in found.items()}
    return found


def _modern(state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int]:
    """The tensors under the names of today, and the number of the first of the decoder's blocks.

    Early files of REPA name the block encoder_depth + N decoder_blocks.N; 0 for other files.
    """
    if not any(name.startswith("decoder_blocks.") for name in state):
        return dict(state), 0
    first = 1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name)))

    def new(match: re.Match) -> str:
        return f"blocks.{int(match[1]) + first}."

    return {re.sub(r"^decoder_blocks\.(\d+)\.", new, k): v for k, v in state.items()}, first


def _image_size(shapes: Mapping[str, tuple], patch: int, given: dict[str, Any]) -> int:
    if "pos_embed" not in shapes:
        return int(take(given, "image_size"))
    shape = shapes["pos_embed"]
    side = math.isqrt(shape[1]) if len(shape) == 3 else 0
    if len(shape) != 3 or side**2 != shape[1]:
        raise ValueError(f"tensor 'pos_embed' has shape {shape}; expected (1, a square number, D).")
    if (size := int(take(given, "image_size", side * patch))) != side * patch:
        raise ValueError(f"image_size is {size}; the position embedding is that of {side * patch}.")
    return size


def _heads(
    state: Mapping[str, Any], args: Mapping[str, Any], width: int, depth: int, given: dict[str, Any]
) -> int:
    """The number of attention heads: of q_norm, the architecture's name or the published sizes."""
    known: int | None = None
    letter = re.match(r"(?:DiT|SiT)-(XL|L|B|S)/\d+", str(args.get("model", "")))
    if letter and SIZES[letter[1]][:2] != (width, depth):
        raise ValueError(
            f"its args name {letter[0]}, of width and depth {SIZES[letter[1]][:2]}; its tensors "
            f"have {(width, depth)}."
        )
    if (norm := "blocks.0.attn.q_norm.weight") in state:
        known = width // max(len(np.atleast_1d(state[norm])), 1)
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
