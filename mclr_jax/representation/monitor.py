"""ICR during training."""

import dataclasses
from typing import Any

import numpy as np
from absl import logging

from mclr_jax import generate, images
from mclr_jax.config import ICR
from mclr_jax.data.protocol import Source, drawn
from mclr_jax.evaluation import evaluate
from mclr_jax.model import Model
from mclr_jax.representation import blocks, icr, perturb, sweep
from mclr_jax.samplers import Sampler


@dataclasses.dataclass(frozen=True, eq=False)
class Monitor:
    """(step, params) -> a reading, with the options of config.icr.

    A reading has icr (bias-corrected), icr_NAME for `icr.traces` and, if options.samples > 0,
    icr_memorized: the share of copies among that number of unguided samples. It is empty if the
    features do not vary in some direction, as in some untrained networks. All readings use the
    same images and perturbations. ValueError: no such layer, or too few images for it.
    """

    options: ICR
    model: Model
    sampler: Sampler
    source: Source
    flip: bool  # whether training shows mirrored images

    def __post_init__(self):
        icr.check_size(len(self.rows), blocks.sizes(self.model)[self.layer])

    @property
    def layer(self) -> str:
        return blocks.choose(self.model, [self.options.layer] if self.options.layer else [])[0]

    @property
    def rows(self) -> np.ndarray:
        return drawn(self.source, self.options.num_images)

    def __call__(self, step: int, params: Any) -> dict[str, float]:
        options, model, shown = self.options, self.model, perturb.Augmentation(flip=self.flip)
        views = sweep.accumulate(
            model, params, self.source, self.rows, options.sigma, (self.layer,), shown
        )[self.layer]
        try:
            values = {"icr": icr.ratio(views, bias_corrected=True)}
        except ValueError as error:
            logging.warning("No reading of ICR at step %d: %s", step, error)
            return {}
        values |= {f"icr_{name}": value for name, value in icr.traces(views).items()}
        if options.samples:
            labels = np.resize(np.arange(model.null_label), options.samples)
            samples = generate.generate(model, params, labels, self.sampler)
            pixels = images.clip(samples)
            values["icr_memorized"] = evaluate.memorized(pixels, self.source, self.flip)
        return values
