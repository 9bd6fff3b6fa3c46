"""ICR during training: it rises before samples begin to copy the training set."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from mclr_jax import generate, images
from mclr_jax.data.protocol import Source, evenly
from mclr_jax.evaluation import evaluate
from mclr_jax.files import read_lines
from mclr_jax.model import Model
from mclr_jax.names import construct
from mclr_jax.representation import blocks, icr, perturb, sweep
from mclr_jax.samplers import Sampler

PATIENCE = 3  # number of last readings that must lie above the minimum
MARGIN = 0.02  # the distance above the minimum, as a share of it


def make(
    config: Any, model: Model, source: Source, workdir: pathlib.Path, start: int
) -> Callable[[int, Any], dict[str, float]]:
    """A function (step, params) -> a reading, with the options of config.icr.

    A reading has icr (bias-corrected), icr_NAME for `icr.traces` and, if config.icr.samples > 0,
    icr_memorized: the share of copies among that number of unguided samples. It is empty if the
    features do not vary in some direction, as in some untrained networks. All readings use the
    same images and perturbations. One warning is logged when the readings, with those in `workdir`
    up to step `start`, have `turned`. ValueError: no such layer, or too few images for it.
    """
    options, sampler = config.icr, construct(Sampler, config.sampler, "sampler")
    (layer,) = blocks.choose(model, [options.layer] if options.layer else [])
    rows = evenly(source, options.num_images)
    icr.check_size(len(rows), blocks.sizes(model)[layer])
    readings = past(workdir, start)
    shown = perturb.Augmentation(flip=bool(config.data.flip or config.data.augment))

    def read(step: int, params: Any) -> dict[str, float]:
        views = sweep.accumulate(model, params, source, rows, options.sigma, (layer,), shown)[layer]
        try:
            values = {"icr": icr.ratio(views, bias_corrected=True)}
        except ValueError as error:
            logging.warning("No reading of ICR: %s", error)
            return {}
        values |= {f"icr_{name}": value for name, value in icr.traces(views).items()}
        if options.samples:
            labels = np.resize(np.arange(model.null_label), options.samples)
            samples = generate.generate(model, params, labels, sampler)
            values["icr_memorized"] = evaluate.memorized(images.clip(samples), source)
        readings.append((step, values["icr"]))
        *before, best = (turned(readings[:end]) for end in range(1, len(readings) + 1))
        if best is not None and not any(before):
            logging.warning(
                "ICR has risen for %d readings from its minimum %.4g at step %d: memorization "
                "likely from step %d; best checkpoint kept (launch.sample --checkpoint=%d).",
                PATIENCE, min(value for _, value in readings), best, best, best,
            )  # fmt: skip
        return values

    return read


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
