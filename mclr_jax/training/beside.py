"""Sections of the config for what happens beside the update."""

import dataclasses
from typing import ClassVar

from mclr_jax.noise import SIGMA_RANGE
from mclr_jax.schema import Keys, key

METRICS = ("frechet", "per_class_frechet", "inter_class_frechet", "inception_score", "kernel",
           "precision", "recall", "density", "coverage")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ICR(Keys):
    """ICR during training (mclr_jax/representation), a warning of memorization."""

    every_steps: int = key(0, 0, says="measure and write a checkpoint; 0 for never")
    num_images: int = key(2048, 2, says="training images, at least twice the length of features")
    sigma: float = key(0.29, 0.0, SIGMA_RANGE[1], "(", says="noise level of the features")
    layer: str = key("", says="name of a block; empty for the middle one")
    samples: int = key(0, 0, says="samples for the memorized fraction; 0 for none")

    where: ClassVar[str] = "config.icr"


@dataclasses.dataclass(frozen=True)
class Evaluate(Keys):
    """Samples of the model in training, measured as by mclr evaluate."""

    every_steps: int = key(0, 0, says="measure samples; 0 for never")
    num_samples: int = key(1000, 2, says="of all classes, from the same noise each time")
    features: str = key("", says="extractor, as --features of mclr evaluate")
    metrics: tuple[str, ...] = key(METRICS[:2], words=METRICS, says="as --metrics there")

    where: ClassVar[str] = "config.evaluate"

    def __post_init__(self):
        super().__post_init__()
        if self.every_steps and not self.features:
            raise ValueError(
                "config.evaluate.every_steps is set: set config.evaluate.features to an extractor, "
                "such as classifier:DIR or efficientnet_lite0."
            )


@dataclasses.dataclass(frozen=True)
class Log(Keys):
    """Further places of the curves, beside metrics.jsonl and TensorBoard."""

    wandb: str = key("", says="project of Weights & Biases; empty: none")

    where: ClassVar[str] = "config.log"


@dataclasses.dataclass(frozen=True)
class Profile(Keys):
    """Steps that are traced for TensorBoard's profiler."""

    start: int = key(0, 0, says="first step")
    num_steps: int = key(0, 0, says="0 for none")

    where: ClassVar[str] = "config.profile"
