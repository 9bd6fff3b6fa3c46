"""ICR during training: it rises before samples begin to copy the training set."""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from mclr_jax import generate, images
from mclr_jax.config import ICR
from mclr_jax.data.protocol import Source, drawn
from mclr_jax.evaluation import evaluate
from mclr_jax.files import read_lines
from mclr_jax.model import Model
from mclr_jax.representation import blocks, icr, perturb, sweep
from mclr_jax.samplers import Sampler

PATIENCE = 3  # number of last readings that must lie above the minimum
MARGIN = 0.02  # the distance above the minimum, as a share of it


@dataclasses.dataclass(frozen=True, eq=False)
class Monitor:
    """(step, params) -> a reading, with the options of config.icr.

    A reading has icr (bias-corrected), icr_NAME for `icr.traces` and, if options.samples > 0,
    icr_memorized: the share of copies among that number of unguided samples. It is empty if the
    features do not vary in some direction, as in some untrained networks. All readings use the
    same images and perturbations. One warning is logged when the readings, with those in `workdir`
    up to step `start`, have `turned`. ValueError: no such layer, or too few images for it.
    """

    options: ICR
    model: Model
    sampler: Sampler
    source: Source
    flip: bool  # whether training shows mirrored images
    workdir: pathlib.Path
    start: int

    def __post_init__(self):
        icr.check_size(len(self.rows), blocks.sizes(self.model)[self.layer])

    @property
    def layer(self) -> str:
        return blocks.choose(self.model, [self.options.layer] if self.options.layer else [])[0]

    @property
    def rows(self) -> np.ndarray:
        return drawn(self.source, self.options.num_images)

    @functools.cached_property
    def readings(self) -> list[tuple[int, float]]:
        return past(self.workdir, self.start)

    def __call__(self, step: int, params: Any) -> dict[str, float]:
        options, model, shown = self.options, self.model, perturb.Augmentation(flip=self.flip)
        views = sweep.accumulate(
            model, params, self.source, self.rows, options.sigma, (self.layer,), shown
        )[self.layer]
        try:
            values = {"icr": icr.ratio(views, bias_corrected=True)}
        except ValueError as error:
            logging.warning("No reading of ICR: %s", error)
            return {}
        values |= {f"icr_{name}": value for name, value in icr.traces(views).items()}
        if options.samples:
            labels = np.resize(np.arange(model.null_label), options.samples)
            samples = generate.generate(model, params, labels, self.sampler)
            values["icr_memorized"] = evaluate.memorized(images.clip(samples), self.source)
        self.readings.append((step, values["icr"]))
        *before, best = (turned(self.readings[:end]) for end in range(1, len(self.readings) + 1))
        if best is not None and not any(before):
            logging.warning(
                "ICR has risen for %d readings from its minimum %.4g at step %d: memorization "
                "likely from step %d; best checkpoint kept (mclr sample --checkpoint=%d).",
                PATIENCE, min(value for _, value in self.readings), best, best, best,
            )  # fmt: skip
        return values


def turned(readings: Sequence[tuple[int, float]]) -> int | None:
    """The step of the lowest of the readings (step, ICR) if the curve has turned up, else None.

    It has turned up if each of the last PATIENCE readings is above (1 + MARGIN) * minimum.
    """
    step, least = min(readings, key=lambda reading: reading[1], default=(0, 0.0))
    last = [value for at, value in readings if at > step][-PATIENCE:]
    risen = len(last) == PATIENCE and min(last) > (1 + MARGIN) * least
    return step if risen else None


def past(workdir: pathlib.Path, step: int) -> list[tuple[int, float]]:
    """The readings (step, ICR) of a run up to a step, from its metrics.jsonl."""
    records = [r for r in read_lines(workdir / "metrics.jsonl") if r["step"] <= step]
    return [(r["step"], r["icr"]) for r in records if isinstance(r.get("icr"), float)]
