"""Files and folders of other code bases as runs, and runs as such files and folders."""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from mclr_jax import record, runs
from mclr_jax.data.latents import units
from mclr_jax.files import digest, named, save_arrays
from mclr_jax.model import shapes_of, size_of
from mclr_jax.pretrained import diffusers, dit, edm, tensors
from mclr_jax.pretrained.names import Checkpoint
from mclr_jax.runs import Run
from mclr_jax.schema import look_up, nearest

FAMILIES: dict[str, Any] = {"edm": edm, "edm2": edm, "dit": dit, "sit": dit, "repa": dit,
                            "diffusers": diffusers}  # fmt: skip
AVERAGES = ("ema", "model")  # in a training file
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
    is_folder = path.is_dir()
    part = diffusers.transformer(path)
    content: Any = diffusers.weights(part) if is_folder else tensors.load(path)
    with named(f"{path} cannot be read as a published model"):
        snapshot = any(isinstance(value, tensors.Module) for value in content.values())
        if is_folder:
            state, checkpoint = content, diffusers.read(path, content)
        elif snapshot or "dataset_kwargs" in content:  # of EDM and EDM2, also without a network
            checkpoint = edm.read(content)
            state = content["ema"].tensors()
        else:
            state, args = _of_training(content, left)
            checkpoint = dit.read(family, state, args, left)
        for key in left:
            known = ("heads", "num_classes", "image_size", "path_type", "prediction", "average",
                     "autoencoder")  # fmt: skip
            raise ValueError(f"{key} is not used for this file. {nearest(key, known)}")
        if family and family != checkpoint.family:
            raise ValueError(f"it is of the family {checkpoint.family!r}, not {family!r}.")
    facts = {"average": given.get("average", "ema"), **_types(state), **checkpoint.facts}
    if told := re.search(r"-(\d{7})-(\d\.\d+)\.pkl$", path.name):  # EDM2's; the file has neither
        facts |= {"kimg": int(told[1]), "average": f"power_{float(told[2])}"}
    checkpoint = dataclasses.replace(checkpoint, facts=facts)
    return _of_latents(checkpoint, autoencoder)


def _of_training(content: dict, given: dict[str, Any]) -> tuple[dict, Mapping[str, Any]]:
    """The tensors by name and the arguments in a training file of DiT, SiT or REPA, or flat one."""
    if not any(isinstance(content.get(name), dict) for name in AVERAGES):
        return content, {}
    average, args = given.pop("average", "ema"), content.get("args")
    if average not in AVERAGES or not isinstance(content.get(average), dict):
        raise ValueError(f"average is {average!r}; expected one that it holds of {AVERAGES}.")
    return content[average], args if isinstance(args, Mapping) else {}


def _of_latents(checkpoint: Checkpoint, autoencoder: str) -> Checkpoint:
    """The checkpoint, which says of latents how they are made; of 4 channels are only these.

    ValueError: the autoencoder is not one in a folder of diffusers, or the model has no latents.
    """
    model, facts = checkpoint.model, dict(checkpoint.facts)
    *_, channels = model.data.shape
    if channels == 4:
        kind = "edm2" if checkpoint.family == "edm2" else "stable_diffusion"
        facts.setdefault("latents", kind)
        if not model.data.scale:
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


def _types(state: Mapping[str, Any]) -> dict[str, Any]:
    """The most frequent type of the tensors, and those of the others by name."""
    types = {name: np.asarray(value).dtype.name for name, value in state.items()}
    ((most, _),) = collections.Counter(types.values()).most_common(1)
    return {"dtype": most, "dtypes": {name: t for name, t in types.items() if t != most}}


def state(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their official names, in the types of the file."""
    found = FAMILIES[checkpoint.family].state(checkpoint) | dict(checkpoint.rest)
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


def described(run: Run) -> str:
    """A sentence on the model of a run: its network, size, data and sampler."""
    network, data = type(run.model.network).__name__, run.model.data
    return (
        f"{network} with {size_of(shapes_of(run.model))} parameters for examples of shape "
        f'{data.shape} in {data.num_classes} classes, "{run.sampler.method}".'
    )


def export(run: Run, params: Any, path: pathlib.Path) -> None:
    """Write weights of a run under their official names: FILE.safetensors, or a diffusers folder.

    ValueError: neither the run nor its start was read from a published model, or it is of a family
    that has no folders.
    """
    if not (origin := record.origin(record.read(run.workdir), run.workdir)):
        raise ValueError(
            f"{run.workdir} comes from no published model: neither it nor the run that it was "
            "started from was written by mclr convert."
        )
    place = pathlib.Path(run.config.get("init_from") or run.workdir) / REST
    rest: dict[str, np.ndarray] = {}
    if place.exists():
        with np.load(place) as arrays:
            rest = dict(arrays)
    elif origin.get("rest"):
        logging.warning("Written without %s, which are in %s.", ", ".join(origin["rest"]), place)
    checkpoint = Checkpoint(origin["family"], run.model, params, run.sampler, rest, origin)
    if path.suffix == ".safetensors":
        tensors.save(path, state(checkpoint))
    elif checkpoint.family == "diffusers":
        diffusers.write(path, checkpoint, state(checkpoint))
    else:
        raise ValueError(
            f"{path} is a folder of diffusers, and the run is of the family "
            f"{checkpoint.family!r}: expected a name that ends in .safetensors."
        )
