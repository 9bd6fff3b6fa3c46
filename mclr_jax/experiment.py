"""Makes models and tasks from configs.

A name in a config is a key of the tables below, or `package.module:Name`, which is imported.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mclr_jax import ema, names
from mclr_jax.data.augment import LABEL_SIZE
from mclr_jax.data.protocol import Source
from mclr_jax.data.protocol import sigma_data as measured_sigma
from mclr_jax.denoiser import EDM, Epsilon, V, Velocity, fused_snr_weight, natural_weight
from mclr_jax.model import DataInfo, Model
from mclr_jax.names import check_keys, construct, look_up, make
from mclr_jax.networks.classifier import ConvClassifier, MLPClassifier
from mclr_jax.networks.dit import DiT
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.trajectory import FrameDiT, Trajectory
from mclr_jax.networks.unet import UNet
from mclr_jax.noise import CausalForcing, Forcing, LogNormal, LogUniform
from mclr_jax.objectives.classify import Classify
from mclr_jax.objectives.dsm import DSM
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.objectives.rivals import CCA, DDO, DPO, GFT, ContrastiveFlow, ModelGuidance
from mclr_jax.optimizer import learning_rate, optimizer
from mclr_jax.posterior import Classifier, Denoiser, Exact
from mclr_jax.problem import Problem
from mclr_jax.task import Task, needs_of

CLASSIFIERS: dict[str, Any] = {"mlp_classifier": MLPClassifier, "conv_classifier": ConvClassifier}
NETWORKS: dict[str, Any] = {"mlp": MLP, "unet": UNet, "dit": DiT, "trajectory": Trajectory,
                            "frame_dit": FrameDiT, **CLASSIFIERS}  # fmt: skip
OBJECTIVES: dict[str, Any] = {
    "dsm": DSM,
    "mclr": MCLR,
    "mclr_null": NullMCLR,
    "classify": Classify,
    "cca": CCA,
    "contrastive_flow": ContrastiveFlow,
    "ddo": DDO,
    "dpo": DPO,
    "gft": GFT,
    "model_guidance": ModelGuidance,
}
PRECONDITIONINGS: dict[str, Any] = {"edm": EDM, "velocity": Velocity, "epsilon": Epsilon, "v": V}
POSTERIORS: dict[str, Any] = {"exact": Exact, "classifier": Classifier, "denoiser": Denoiser}
NOISE_LEVELS: dict[str, Any] = {
    "lognormal": LogNormal,
    "loguniform": LogUniform,
    "forcing": Forcing,
    "causal_forcing": CausalForcing,
}
WEIGHTS: dict[str, Any] = {"natural": natural_weight, "fused_snr": fused_snr_weight}
UNITS = ("offset", "scale", "time_step")  # of the data; optional attributes of a source
DTYPES = ("float32", "bfloat16")
# Fields that are not keys of a config: those set in this file, and those of Flax.
MADE = ("num_classes", "out_channels", "augment_dim", "takes_strength", "sigma_data")
FLAX = ("parent", "name")


def options(name: str, **values: Any) -> dict[str, Any]:
    """A config section for an objective, network, posterior, ...: its defaults except `values`."""
    tables = OBJECTIVES | NETWORKS | POSTERIORS | PRECONDITIONINGS | NOISE_LEVELS
    return names.options(tables, name, values, MADE + FLAX)


def make_model(config: Any, data: DataInfo) -> Model:
    """The model that a config describes, for this data set."""
    if (dtype := config.network.get("dtype", "float32")) not in DTYPES:
        raise ValueError(f"Unknown network.dtype {dtype!r}; expected one of {DTYPES}.")
    inputs = {
        "augment_dim": LABEL_SIZE if config.data.augment else 0,
        "takes_strength": bool(config.strength),
    }
    shape = {"num_classes": data.num_classes, "out_channels": data.shape[-1]}
    network = make(NETWORKS, config.network, "network", **shape, **inputs)
    for field, wanted in inputs.items():
        if wanted and not hasattr(network, field):
            raise ValueError(
                f"Network {config.network.name!r} has no field {field!r}, which config.strength or "
                "config.data.augment needs: add it, or leave that key empty."
            )
    preconditioning = make(
        PRECONDITIONINGS, config.preconditioning, "preconditioning", sigma_data=data.sigma_data
    )
    return Model(network, preconditioning, data, tuple(config.strength))


def describe(model: Model) -> dict[str, Any]:
    """All values of the model, as JSON; the inverse of `model_of`."""

    def resolved(part: Any, table: Mapping[str, Any]) -> dict[str, Any]:
        cls = type(part)
        found = (name for name, factory in table.items() if factory is cls)
        keys = [key for key in names.fields(cls) if key not in FLAX]
        values = {key: _plain(key, getattr(part, key)) for key in keys}
        return {"name": next(found, f"{cls.__module__}:{cls.__qualname__}")} | values

    return {
        "network": resolved(model.network, NETWORKS),
        "preconditioning": resolved(model.preconditioning, PRECONDITIONINGS),
        "data": {
            key: _plain(key, value)
            for key, value in dataclasses.asdict(model.data).items()
            if value or key not in UNITS  # as in descriptions of earlier versions
        },
        "strength": list(model.strength),
    }


def model_of(description: Mapping[str, Any]) -> Model:
    """The model with this description; a network from outside the package is imported."""
    return Model(
        make(NETWORKS, description["network"], "network"),
        make(PRECONDITIONINGS, description["preconditioning"], "preconditioning"),
        construct(DataInfo, description["data"], "data"),
        tuple(description["strength"]),
    )


def _plain(key: str, value: Any) -> Any:
    """The value of a field for JSON: lists, names of types, null for infinity."""
    if key == "dtype":
        return np.dtype(value).name
    if isinstance(value, tuple):
        return [_plain(key, part) for part in value]
    return None if isinstance(value, float) and math.isinf(value) else value


def _objective(config: Any) -> tuple[Any, Any]:
    """The objective and the posterior, which is None if config.posterior.name is empty."""
    objective = make(OBJECTIVES, config.objective, "objective")
    if config.posterior.name:
        return objective, make(POSTERIORS, config.posterior, "posterior")
    check_keys("config.posterior without a name", config.posterior.keys(), ["name"])
    if "posterior" in objective.needs:
        raise ValueError(
            "This objective needs a posterior: set config.posterior.name to 'exact', 'classifier' "
            "or 'denoiser'."
        )
    return objective, None


def needs(config: Any) -> frozenset[str]:
    """The needs of the objective and its posterior, see `objectives.base.Objective`."""
    return needs_of(*_objective(config))


def make_task(config: Any, data: DataInfo, companions: Mapping[str, Model]) -> Task:
    """The training that a config describes; its objective may call the companions."""
    model = make_model(config, data)
    objective, posterior = _objective(config)
    weight = look_up(WEIGHTS, config.weight, "config.weight")
    problem = Problem(
        levels=make(NOISE_LEVELS, config.noise, "noise"),
        weight=functools.partial(weight, model.preconditioning),
        null_label=model.null_label,
        class_prior=data.class_prior,
        sigma_data=data.sigma_data,
        frames=model.frames,
        strength=model.strength,
        class_strengths=tuple(config.class_strengths),
    )
    return Task(
        model=model,
        objective=objective,
        problem=problem,
        optimizer=optimizer(config.optimizer, config.num_steps),
        learning_rate=learning_rate(config.optimizer, config.num_steps),
        averages=ema.tracks(config.ema),
        posterior=posterior,
        companions=companions,
        flip=config.data.flip,
        augment=config.data.augment,
        grad_accumulation=config.grad_accumulation,
        seed=config.seed,
    )


def data_info(config: Any, source: Source) -> DataInfo:
    """The `DataInfo` of a data source; sigma_data is measured if config.sigma_data is 0."""
    sigma_data = config.sigma_data or measured_sigma(source)
    if not 0 < sigma_data < np.inf:
        raise ValueError(
            f"The data have standard deviation {sigma_data}; expected a positive number. Check the "
            "images of config.data, or set config.sigma_data."
        )
    prior: tuple[float, ...] = ()
    if "class_prior" in needs(config):  # reads all labels of a lazy source
        counts = np.bincount(source.labels, minlength=source.num_classes)
        prior = tuple((counts / len(source)).tolist())
    units = {name: getattr(source, name) for name in UNITS if hasattr(source, name)}
    return DataInfo(tuple(source.shape), source.num_classes, float(sigma_data), prior, **units)
