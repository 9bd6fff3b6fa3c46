"""Measures of samples in training, such as the FD by class."""

import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np
from absl import logging

from mclr_jax import generate, latents
from mclr_jax.data.protocol import Source
from mclr_jax.data.sources import Data
from mclr_jax.evaluation import evaluate, features
from mclr_jax.evaluation.evaluate import RealStatistics
from mclr_jax.model import Model
from mclr_jax.samplers import Sampler
from mclr_jax.training.beside import Evaluate


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """The reading (step, params) -> measures of samples, always from the same noise.

    `sample_accuracy` is the `accuracy` of `mclr evaluate`, a name that objectives have, too. Errors
    of the settings come before the first step; statistics of the training set when first needed.
    """

    options: Evaluate
    model: Model
    sampler: Sampler
    data: Data
    source: Source  # of training

    def __post_init__(self):
        least = 2 * self.model.null_label
        if self.options.num_samples < least:
            raise ValueError(
                f"config.evaluate.num_samples is {self.options.num_samples}; expected at least "
                f"{least}, two of each class."
            )
        _ = self.extractor, self.decode

    @functools.cached_property
    def extractor(self) -> features.Extractor:
        return features.load(self.options.features)

    @functools.cached_property
    def decode(self) -> latents.Decoder | None:
        return latents.decoder(self.data, self.model)

    @functools.cached_property
    def real(self) -> RealStatistics:
        cache = pathlib.Path(evaluate.CACHE).expanduser()
        source = latents.decoded(self.source, self.decode)
        return evaluate.real_statistics(self.extractor, source, cache)

    def __call__(self, step: int, params: Any) -> dict[str, float]:
        labels = np.resize(np.arange(self.model.null_label), self.options.num_samples)
        try:
            samples = generate.generate(self.model, params, labels, self.sampler)
            pixels = latents.as_8_bits(samples, self.decode)
            names = self.options.metrics
            found = evaluate.judged(pixels, labels, self.extractor, self.real, names)
        except FloatingPointError as error:  # no reason to stop a run
            logging.warning("No measures of samples at step %d: %s", step, error)
            return {}
        accuracy = {"sample_accuracy": found.pop("accuracy")} if "accuracy" in found else {}
        return found | accuracy
