"""The parts of a model by name, and a model's description, from which a run rebuilds it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mclr_jax.data.protocol import UNITS
from mclr_jax.denoiser import EDM, IDDPM, VE, VP, Epsilon, V, Velocity
from mclr_jax.model import DataInfo, Model
from mclr_jax.networks.classifier import ConvClassifier, MLPClassifier
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.edm2 import EDM2
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.trajectory import FrameDiT, Trajectory
from mclr_jax.networks.unet import UNet
from mclr_jax.schema import Part, fields, read

CLASSIFIERS: dict[str, Any] = {"mlp_classifier": MLPClassifier, "conv_classifier": ConvClassifier}
NETWORKS: dict[str, Any] = {"mlp": MLP, "unet": UNet, "edm2": EDM2, "dit": DiT,
                            "trajectory": Trajectory, "frame_dit": FrameDiT,
                            **CLASSIFIERS}  # fmt: skip
PRECONDITIONINGS: dict[str, Any] = {"edm": EDM, "velocity": Velocity, "epsilon": Epsilon, "v": V,
                                    "vp": VP, "ve": VE, "iddpm": IDDPM}  # fmt: skip
LATER = (*UNITS, "has_null")  # not in descriptions of earlier versions, and so not by default


def describe(model: Model) -> dict[str, Any]:
    """All values of the model, as JSON; the inverse of `model_of`."""

    def resolved(part: Any, table: Mapping[str, Any]) -> dict[str, Any]:
        cls = type(part)
        found = (name for name, factory in table.items() if factory is cls)
        values = {key: _plain(key, getattr(part, key)) for key in fields(cls)}
        return {"name": next(found, f"{cls.__module__}:{cls.__qualname__}")} | values

    return {
        "network": resolved(model.network, NETWORKS),
        "preconditioning": resolved(model.preconditioning, PRECONDITIONINGS),
        "data": {
            key: _plain(key, value)
            for key, value in dataclasses.asdict(model.data).items()
            if key not in LATER or value != getattr(DataInfo, key)
        },
        "strength": list(model.strength),
    }


def model_of(description: Mapping[str, Any]) -> Model:
    """The model with this description; a network from outside the package is imported."""
    network = Part.read(NETWORKS, description["network"], "network")
    preconditioning = Part.read(PRECONDITIONINGS, description["preconditioning"], "preconditioning")
    data = read(DataInfo, description["data"], "data")
    return Model(network.make(), preconditioning.make(), data, tuple(description["strength"]))


def _plain(key: str, value: Any) -> Any:
    """The value of a field for JSON: lists, names of types, null for infinity."""
    if key == "dtype":
        return np.dtype(value).name
    if isinstance(value, tuple):
        return [_plain(key, part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value
