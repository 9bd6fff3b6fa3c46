"""Files and folders of other code bases as runs, and runs as such files and folders."""

import collections
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mclr_jax import record, runs
from mclr_jax.data.latents import units
from mclr_jax.files import digest, named, save_arrays
from mclr_jax.model import shapes_of
from mclr_jax.pretrained import diffusers, dit, edm, names, tensors
from mclr_jax.pretrained.checkpoint import Checkpoint, take
from mclr_jax.runs import Run
from mclr_jax.schema import look_up, nearest

FAMILIES: dict[str, Any] = {"edm": edm, "edm2": edm, "dit": dit, "sit": dit, "repa": dit,
                            "diffusers": diffusers}  # fmt: skip
REST = "rest.npz"  # of a run's directory: official tensors that are no parameters here


def read(path: str | os.PathLike, family: str = "", **given: Any) -> Checkpoint:
    """The model in a published file (.pkl, .pt, .safetensors) or folder of diffusers.

    `family` is needed where the file does not tell it: edm, edm2, dit, sit, repa or diffusers.
    `given` is what the file does not hold: heads, num_classes (if its last label is no null label),
    image_size, path_type, prediction; average ("ema" or "model") of a training file; autoencoder,
    the folder of diffusers by which latents are shown.

    Nothing that a file names or holds is executed. ValueError: the file is damaged or of another
    family, a tensor is missing, unexpected or misshapen, or a value must be given.
    """
    path, left = pathlib.Path(path), dict(given)
    autoencoder = left.pop("autoencoder", "")
    if family:
        look_up(FAMILIES, family, "family")
    if path.is_dir():
        content: Any = diffusers.weights(diffusers.transformer(path))
    else:
        content = tensors.load(path)
    with named(f"{path} cannot be read as a published model"):
        found, state, args = _parts(content, family, left)
        if path.is_dir():
            checkpoint = diffusers.read(path, left, state)
        elif found in ("edm", "edm2"):
            checkpoint = edm.read(content, left)
        else:
            checkpoint = dit.read(found, state, args, left)
        for key in left:
            known = ("heads", "num_classes", "image_size", "path_type", "prediction", "average",
                     "autoencoder")  # fmt: skip
            raise ValueError(f"{key} is not used for this file. {nearest(key, known)}")
        if family and family != checkpoint.family:
            raise ValueError(f"it is of the family {checkpoint.family!r}, not {family!r}.")
    checkpoint = _of_latents(checkpoint, autoencoder)
    facts: dict[str, Any] = {"average": given.get("average", "ema"), **_types(state)}
    if told := re.search(r"-(\d{7})-(\d\.\d+)\.pkl$", path.name):  # EDM2's; the file has neither
        facts |= {"kimg": int(told[1]), "average": f"power_{float(told[2])}"}
    return dataclasses.replace(checkpoint, facts=facts | dict(checkpoint.facts))


def given(texts: Iterable[str]) -> dict[str, int | str]:
    """The values of texts NAME=VALUE, as `read` takes them."""
    found: dict[str, int | str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set has {text!r}; expected NAME=VALUE, separated by commas.")
        found[name] = int(value) if value.isdigit() else value
    return found


def described(run: Run) -> str:
    """A sentence on the model of a run."""
    network, data = run.model.network, run.model.data
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes_of(run.model)))
    return (f"{type(network).__name__} with {size} parameters for examples of shape {data.shape} "
            f"in {data.num_classes} classes, {json.dumps(run.sampler.method)}.")  # fmt: skip


def _of_latents(checkpoint: Checkpoint, autoencoder: str) -> Checkpoint:
    """The checkpoint, which says of latents how they are made; of 4 channels are only these.

    ValueError: the autoencoder is not one in a folder of diffusers, or the model has no latents.
    """
    *_, channels = checkpoint.model.data.shape
    kind = "edm2" if checkpoint.family == "edm2" else "stable_diffusion"
    facts = {"latents": kind, **checkpoint.facts} if channels == 4 else dict(checkpoint.facts)
    model = checkpoint.model
    if "latents" in facts and not model.data.scale:
        offset, scale = units(kind, channels)
        data = dataclasses.replace(model.data, offset=offset, scale=scale)
        model = dataclasses.replace(model, data=data)
    if autoencoder:
        diffusers.described(pathlib.Path(autoencoder))
        if "latents" not in facts:
            raise ValueError(f"it has images of {channels} channels, not latents of 4: no "
                             "autoencoder shows them.")  # fmt: skip
        facts["autoencoder"] = os.path.abspath(autoencoder)
    return dataclasses.replace(checkpoint, model=model, facts=facts)


def _parts(
    content: Any, family: str, given: dict[str, Any]
) -> tuple[str, dict[str, np.ndarray], Mapping[str, Any]]:
    """Family, tensors by name and training arguments of a file's content."""
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}; expected tensors by name")
    snapshot = "dataset_kwargs" in content  # of EDM and EDM2, also of those without a network
    if snapshot or any(isinstance(value, tensors.Module) for value in content.values()):
        if not isinstance(module := content.get("ema"), tensors.Module):
            raise ValueError("it has no network 'ema'; expected a snapshot of EDM or EDM2")
        return edm.family_of(module), module.tensors(), {}
    args: Any = content.get("args", {})
    if isinstance(content.get("ema"), dict) or isinstance(content.get("model"), dict):
        average, known = str(take(given, "average", "ema")), ("ema", "model")
        if average not in known or not isinstance(content.get(average), dict):
            raise ValueError(f"average is {average!r}; expected one that it holds of {known}.")
        content = content[average]
    state = content if isinstance(content, dict) else {}
    if wrong := [name for name, value in state.items() if not isinstance(value, np.ndarray)]:
        raise ValueError(f"{wrong[0]!r} is no tensor")
    if not dit.is_dit(state) or family in ("edm", "edm2"):
        if family == "diffusers" or "pos_embed.proj.weight" in state:
            return "diffusers", state, {}
        raise ValueError(
            "it has no tensors x_embedder.proj.weight and final_layer.linear.weight; expected a "
            "DiT, SiT or REPA, or a snapshot of EDM or EDM2 (.pkl)"
        )
    args = args if isinstance(args, Mapping) else {}
    if not (found := family or dit.family_of(state, args)):
        raise ValueError(
            "files of DiT and SiT without their training arguments cannot be told apart: give "
            "--family=dit or --family=sit"
        )
    return found, state, args


def _types(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The most frequent type of the tensors, and those of the others by name."""
    types = {name: np.asarray(value).dtype.name for name, value in state.items()}
    ((most, _),) = collections.Counter(types.values()).most_common(1)
    return {"dtype": most, "dtypes": {name: t for name, t in types.items() if t != most}}


def state(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their official names, in the types of the file."""
    family = FAMILIES[checkpoint.family]
    found = names.to_state(checkpoint.params, family.names(checkpoint.model.network))
    if hasattr(family, "state"):
        found = family.state(checkpoint, found)
    found |= checkpoint.rest
    usual, types = checkpoint.facts.get("dtype", "float32"), checkpoint.facts.get("dtypes", {})
    return {n: np.asarray(x).astype(jnp.dtype(types.get(n, usual))) for n, x in found.items()}


def convert(path: str | os.PathLike, workdir: pathlib.Path, family: str = "", **given: Any) -> Run:
    """Write a published model as the run `workdir`, without a training.

    ValueError: `workdir` has a run already; and those of `read`.
    """
    if record.read(workdir):
        raise ValueError(f"{workdir} has a run already; use another directory.")
    checkpoint = read(path, family, **given)
    origin = {
        "file": os.path.abspath(path), "family": checkpoint.family,
        "digest": digest(checkpoint.params), "rest": sorted(checkpoint.rest), **checkpoint.facts,
    }  # fmt: skip
    runs.publish(workdir, checkpoint.model, checkpoint.params, checkpoint.sampler, origin=origin)
    if checkpoint.rest:  # npz files have no bfloat16
        rest = {
            n: x.astype(np.float32) if x.dtype.kind == "V" else x
            for n, x in checkpoint.rest.items()
        }
        save_arrays(workdir / REST, **rest)
    return runs.load(workdir)


def checkpoint_of(run: Run, params: Any) -> Checkpoint:
    """A run with these weights as a checkpoint of the family that it, or its start, was read from.

    ValueError: it was started from no published model.
    """
    if not (origin := record.origin(record.read(run.workdir), run.workdir)):
        raise ValueError(
            f"{run.workdir} comes from no published model: neither it nor the run that it was "
            "started from was written by mclr convert."
        )
    rest, place = {}, pathlib.Path(run.config.get("init_from") or run.workdir) / REST
    if origin.get("rest") and not place.exists():
        logging.warning("Written without %s, which are in %s.", ", ".join(origin["rest"]), place)
    elif origin.get("rest"):
        with np.load(place) as arrays:
            rest = dict(arrays)
    return Checkpoint(origin["family"], run.model, params, run.sampler, rest, origin)


def export(run: Run, params: Any, path: pathlib.Path) -> None:
    """Write weights under their official names: FILE.safetensors, or a folder of diffusers."""
    checkpoint = checkpoint_of(run, params)
    if path.suffix == ".safetensors":
        tensors.save(path, state(checkpoint))
    elif checkpoint.family == "diffusers":
        diffusers.write(path, checkpoint, state(checkpoint))
    else:
        raise ValueError(
            f"{path} is a folder of diffusers, and the run is of the family "
            f"{checkpoint.family!r}: expected a name that ends in .safetensors."
        )
