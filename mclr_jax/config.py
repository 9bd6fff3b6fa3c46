"""Every key of a training, with its type, default, range and meaning, and what the keys name.

`Training.parse(config)` reads an ml_collections ConfigDict or any mapping, once: unknown keys,
values of another kind or out of range, and names that do not exist are errors here. What follows
takes the typed value. A name is a key of a table, or `package.module:Name`, which is imported.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from mclr_jax import backend, schema
from mclr_jax.adapter import NEW_LABELS, Adapter
from mclr_jax.data import latents
from mclr_jax.data.augment import LABEL_SIZE
from mclr_jax.data.protocol import Source
from mclr_jax.data.protocol import sigma_data as measured_sigma
from mclr_jax.data.sources import Data
from mclr_jax.denoiser import fused_snr_weight, natural_weight
from mclr_jax.files import as_json
from mclr_jax.model import DataInfo, Model
from mclr_jax.noise import SIGMA_RANGE, CausalForcing, Forcing, LogNormal, LogUniform, NoiseLevels
from mclr_jax.objectives.base import Objective, Problem
from mclr_jax.objectives.classify import Classify
from mclr_jax.objectives.dsm import DSM
from mclr_jax.objectives.mclr import MCLR
from mclr_jax.objectives.mclr_null import NullMCLR
from mclr_jax.objectives.rivals import CCA, DDO, DPO, GFT, ContrastiveFlow, ModelGuidance
from mclr_jax.parts import NETWORKS, PRECONDITIONINGS
from mclr_jax.posterior import Classifier, Exact
from mclr_jax.samplers import Sampler
from mclr_jax.schema import Keys, Part, key, part, section
from mclr_jax.task import MADE_HERE, Posterior, Task, needs_of
from mclr_jax.training.beside import ICR, Evaluate, Log, Memorization, Profile
from mclr_jax.training.devices import MODES
from mclr_jax.training.ema import EMA
from mclr_jax.training.optimizer import Optimizer

OBJECTIVES: dict[str, Any] = {
    "dsm": DSM, "mclr": MCLR, "mclr_null": NullMCLR, "classify": Classify, "cca": CCA,
    "contrastive_flow": ContrastiveFlow, "ddo": DDO, "dpo": DPO, "gft": GFT,
    "model_guidance": ModelGuidance,
}  # fmt: skip
POSTERIORS: dict[str, Any] = {"exact": Exact, "classifier": Classifier}
NOISE_LEVELS: dict[str, Any] = {"lognormal": LogNormal, "loguniform": LogUniform,
                                "forcing": Forcing, "causal_forcing": CausalForcing}  # fmt: skip
WEIGHTS: dict[str, Any] = {"natural": natural_weight, "fused_snr": fused_snr_weight}
# Fields that are known with the data.
OF_DATA = ("num_classes", "out_channels", "augment_dim", "takes_strength")
COMPANIONS = {"reference": "a frozen reference", "classifier": "a classifier"}


@dataclasses.dataclass(frozen=True)
class Training(Keys, where="config"):
    """A training as a config says it; its named parts are made already."""

    seed: int = key(0, 0, says="of initial weights, data order and noise")
    num_steps: int = key(10_000, 1, says="of the whole training")
    batch_size: int = key(128, 1, says="over all devices")
    parallel: str = key("pmap", words=MODES, says="pmap, data (jit, replicated) or "
                        "fsdp (jit, sharded state)")  # fmt: skip
    require_accelerator: bool = key(False, says="stop if JAX finds only the CPU")
    init_from: str = key("", says="directory of a run, whose EMA weights are the first weights")
    new_labels: str = key("auto", words=("auto", *NEW_LABELS, "keep"), says="rows of the label "
                          "embedding, if the run in init_from has other classes: drawn anew, or "
                          "its null label's; auto: drawn anew if the classes differ in number or "
                          "name; keep: they are the same by other names")  # fmt: skip
    steps_per_dispatch: int = key(0, 0, says="training steps in one call of the compiled program; "
                                  "0 is 1 on the CPU and 8 elsewhere")  # fmt: skip
    grad_accumulation: int = key(1, 1, says="parts of a batch, one after the other")
    log_every: int = key(100, 1, says="steps between two lines of the log")
    checkpoint_every: int = key(1000, 0, says="0: at the end alone")
    keep_checkpoints: int = key(2, 1, says="newest ones; the one with the lowest held-out loss too")
    eval_examples: int = key(1024, 0, says="held-out examples for that loss; 0 for none")
    sample_every: int = key(0, 0, says="steps between two grids of samples; 0 for never")
    sigma_data: float = key(0.0, 0.0, SIGMA_RANGE[1], says="standard deviation; 0 measures it")
    strength: tuple[float, ...] = key((), says="(low, high) of the guidance strength as an input")
    class_strengths: tuple[float, ...] = key((), 0.0, says="factors of the objective's strength by "
                                             "class, of mclr calibrate; empty: 1")  # fmt: skip
    weight: str = key("natural", words=WEIGHTS, says="1 / c_out^2, or fused_snr by frame")
    companions: dict = schema.texts(
        {"classifier": "", "weak": ""}, "directory of a run that an objective or a posterior reads"
    )
    data: Data = section(Data)
    network: Part = part(NETWORKS, "", OF_DATA, says="network")
    adapter: Adapter = section(Adapter)
    objective: Objective = part(OBJECTIVES, "dsm", says="objective")
    posterior: Posterior | None = part(POSTERIORS, "", optional=True, says="estimate of the "
                                       "probability of each class; empty: none")  # fmt: skip
    noise: NoiseLevels = part(NOISE_LEVELS, "lognormal", says="distribution of the noise levels")
    preconditioning: Part = part(
        PRECONDITIONINGS, "edm", ("sigma_data",), says="from the network's output to a denoiser"
    )
    optimizer: Optimizer = section(Optimizer)
    ema: EMA = section(EMA)
    sampler: Sampler = section(Sampler)
    icr: ICR = section(ICR)
    memorization: Memorization = section(Memorization)
    evaluate: Evaluate = section(Evaluate)
    log: Log = section(Log)
    profile: Profile = section(Profile)
    config: Mapping[str, Any] = schema.hidden()  # all keys, as JSON, for run.json

    def __post_init__(self):
        super().__post_init__()
        if "posterior" in self.objective.needs and self.posterior is None:
            raise ValueError(
                "This objective needs a posterior: set config.posterior.name to 'exact' or "
                "'classifier'."
            )
        if self.class_strengths and "class_strengths" not in self.needs:
            raise ValueError(
                f"The objective {type(self.objective).__name__} reads no config.class_strengths: "
                "leave it empty, or let the objective need 'class_strengths' and use "
                "`objectives.base.strength_factor`."
            )

    @classmethod
    def parse(cls, config: Any) -> "Training":
        """The training that a config describes; ValueError names the first wrong key."""
        if isinstance(config, cls):
            return config
        config = config.to_dict() if isinstance(config, ConfigDict) else config
        found = schema.read(cls, config, "config")
        return dataclasses.replace(found, config=as_json(schema.filled(cls, config)))

    @functools.cached_property
    def needs(self) -> frozenset[str]:
        """The needs of objective, posterior and adapter, see `objectives.base.Objective`."""
        return needs_of(self.objective, self.posterior, self.adapter)

    @property
    def asked_for_classes(self) -> frozenset[str]:
        """Those of `needs` whose answers are read at classes, which must be those of the data."""
        found = self.objective.needs - self.objective.reads_only_null
        return found | (self.posterior.needs if self.posterior and "posterior" in found else set())

    @functools.cached_property
    def runs(self) -> dict[str, str]:
        """The directories of the runs that the objective reads, by name.

        ValueError: one is not set.
        """
        paths, found = {**self.companions, "reference": self.init_from}, {}
        for name in sorted(self.needs - MADE_HERE):
            if not paths.get(name):
                what = COMPANIONS.get(name, f"the companion run {name!r}")
                key = "init_from" if name == "reference" else f"companions.{name}"
                raise ValueError(
                    f"This training needs {what}: set config.{key} to the directory of its run."
                )
            found[name] = paths[name]
        return found

    @property
    def dispatch(self) -> int:
        """Training steps in one call of the compiled program.

        XLA:CPU computes gradients of convolutions up to 59 times slower inside a loop.
        """
        return self.steps_per_dispatch or (1 if backend.traced_for() == "cpu" else 8)

    @property
    def save_every(self) -> int:
        """The period of checkpoints and their measurements; the last step always has both."""
        return self.checkpoint_every or self.num_steps

    def data_info(self, source: Source) -> DataInfo:
        """The `DataInfo` of a source; sigma_data is measured if the key is 0."""
        sigma_data = self.sigma_data or measured_sigma(source)
        if not 0 < sigma_data < np.inf:
            raise ValueError(
                f"The data have standard deviation {sigma_data}; expected a positive number. Check "
                "the images of config.data, or set config.sigma_data."
            )
        prior: tuple[float, ...] = ()
        if "class_prior" in self.needs:  # reads all labels of a lazy source
            counts = np.bincount(source.labels, minlength=source.num_classes)
            prior = tuple((counts / len(source)).tolist())
        given = tuple(source.shape), source.num_classes, float(sigma_data), prior
        return DataInfo(*given, **latents.units_of(source))

    def model(self, data: DataInfo) -> Model:
        """The model for this data set."""
        inputs = {
            "augment_dim": LABEL_SIZE if self.data.augment else 0,
            "takes_strength": bool(self.strength),
        }
        shape = {"num_classes": data.num_classes, "out_channels": data.shape[-1]}
        network = self.network.make(**shape, **inputs)
        for field, wanted in inputs.items():
            if wanted and not hasattr(network, field):
                raise ValueError(
                    f"Network {self.network.name!r} has no field {field!r}, which config.strength "
                    "or config.data.augment needs: add it, or leave that key empty."
                )
        preconditioning = self.preconditioning.make(sigma_data=data.sigma_data)
        self.sampler.table(preconditioning)  # its errors come before a training
        return Model(network, preconditioning, data, self.strength)

    def task(
        self, data: DataInfo, companions: Mapping[str, Model], new_labels: bool = False
    ) -> Task:
        """The task: all that is trained; the objective may call the companions.

        `new_labels`: the classes are others than those of the run in init_from.
        """
        model = self.model(data)
        problem = Problem(
            levels=self.noise,
            weight=functools.partial(WEIGHTS[self.weight], model.preconditioning),
            null_label=model.null_label,
            class_prior=data.class_prior,
            sigma_data=data.sigma_data,
            frames=model.frames,
            strength=model.strength,
            class_strengths=self.class_strengths,
        )
        return Task(
            model=model,
            objective=self.objective,
            problem=problem,
            optimizer=self.optimizer.transformation(self.num_steps),
            learning_rate=self.optimizer.rate(self.num_steps),
            averages=self.ema.tracks,
            posterior=self.posterior,
            companions=companions,
            flip=self.data.flip,
            augment=self.data.augment,
            grad_accumulation=self.grad_accumulation,
            seed=self.seed,
            adapter=self.adapter,
            new_labels=new_labels,
        )


def blank() -> dict[str, Any]:
    """The default of every key, as a config holds them."""
    return schema.filled(Training, {})


def options(name: str, **values: Any) -> dict[str, Any]:
    """A config section for an objective, network, posterior, ...: its defaults except `values`."""
    tables = OBJECTIVES | NETWORKS | POSTERIORS | PRECONDITIONINGS | NOISE_LEVELS
    return schema.options(tables, name, values, (*OF_DATA, "sigma_data"))
