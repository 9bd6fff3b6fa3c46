"""Sections of the config for what happens beside the update."""

import dataclasses
import math

from mclr_jax.noise import SIGMA_RANGE
from mclr_jax.schema import Keys, key

METRICS = ("frechet", "per_class_frechet", "inter_class_frechet", "inception_score", "kernel",
           "precision", "recall", "density", "coverage")  # fmt: skip
SHARE = 0.02  # of a training's time, at most, for readings of memorization


@dataclasses.dataclass(frozen=True)
class ICR(Keys, where="config.icr"):
    """ICR during training (mclr_jax/representation)."""

    every_steps: int = key(0, 0, says="steps between two readings; 0 for never")
    num_images: int = key(2048, 2, says="training images, at least twice the length of features")
    sigma: float = key(0.29, 0.0, SIGMA_RANGE[1], "(", says="noise level of the features")
    layer: str = key("", says="name of a block; empty for the middle one")
    samples: int = key(0, 0, says="samples for the memorized fraction; 0 for none")


@dataclasses.dataclass(frozen=True)
class Memorization(Keys, where="config.memorization"):
    """A warning before samples copy training images (representation/memorization.py)."""

    every_steps: int = key(0, -1, says="steps between two readings; 0: so many that they cost less "
                           "than 2%, if there are held-out examples; -1: never")  # fmt: skip
    num_images: int = key(128, 2, says="training images, and as many held-out ones, at most")
    sigma: float = key(0.0, 0.0, SIGMA_RANGE[1], says="noise level; 0 finds it")
    warning: float = key(0.6, 0.0, 1.0, "(", says="gap from which copies are to be expected")
    likely: float = key(0.75, 0.0, 1.0, "(", says="gap from which copies are likely")
    samples: int = key(200, 0, says="drawn after the warning, to count copies; 0 for none")
    features: str = key("", says="extractor, as --features of mclr evaluate, in whose features "
                        "copies are counted, too")  # fmt: skip

    def __post_init__(self):
        super().__post_init__()
        if self.likely < self.warning:
            raise ValueError(
                f"config.memorization.likely is {self.likely}; expected at least "
                f"config.memorization.warning, {self.warning}."
            )

    def period(self, calls: int, batch_size: int, num_steps: int, multiple: int) -> int:
        """Steps between two events of so many network calls; 0 for none.

        If the key leaves it open: the least number that costs at most SHARE of the training, where
        a step costs three calls for each example, and that divides `multiple` or is a multiple of
        it; none if it exceeds the training.
        """
        if self.every_steps:
            return max(self.every_steps, 0)
        least = max(math.ceil(calls / (3 * batch_size * SHARE)), 1)
        divisors = [n for n in range(least, multiple + 1) if multiple % n == 0]
        found = min(divisors, default=-(-least // multiple) * multiple)
        return found if found <= num_steps else 0


@dataclasses.dataclass(frozen=True)
class Evaluate(Keys, where="config.evaluate"):
    """Samples of the model in training, measured as by mclr evaluate."""

    every_steps: int = key(0, 0, says="measure samples; 0 for never")
    num_samples: int = key(1000, 2, says="of all classes, from the same noise each time")
    features: str = key("", says="extractor, as --features of mclr evaluate")
    metrics: tuple[str, ...] = key(METRICS[:2], words=METRICS, says="as --metrics there")

    def __post_init__(self):
        super().__post_init__()
        if self.every_steps and not self.features:
            raise ValueError(
                "config.evaluate.every_steps is set: set config.evaluate.features to an extractor, "
                "such as classifier:DIR or efficientnet_lite0."
            )


@dataclasses.dataclass(frozen=True)
class Log(Keys, where="config.log"):
    """Further places of the curves, beside metrics.jsonl and TensorBoard."""

    wandb: str = key("", says="project of Weights & Biases; empty: none")


@dataclasses.dataclass(frozen=True)
class Profile(Keys, where="config.profile"):
    """Steps that are traced for TensorBoard's profiler."""

    start: int = key(0, 0, says="first step")
    num_steps: int = key(0, 0, says="0 for none")
