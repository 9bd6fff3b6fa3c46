"""A published checkpoint as a model with weights, which all families of files become."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mclr_jax.model import Model
from mclr_jax.samplers import Sampler


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A published model."""

    family: str
    model: Model
    params: Any  # float32, of the network
    sampler: Sampler  # that of the official script
    rest: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # other tensors
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for run.json
