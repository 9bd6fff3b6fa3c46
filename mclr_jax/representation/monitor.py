"""ICR along a training run: it turns up before samples begin to copy the training set."""

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
from mclr_jax.representation import blocks, icr, perturb, sweep
from mclr_jax.samplers import Sampler

PATIENCE = 3  # readings that must lie above the minimum ...
MARGIN = 0.02  # ... by this share of it
Reading = dict[str, float]


def make(
    config: Any,
    model: Model,
    source: Source,
    workdir: pathlib.Path,
    start: int,
    sampler: Sampler,
    flip: bool,
) -> Callable[[int, Any], Reading]:
    """(step, params) -> a reading as `config`, config.icr of the run, wants it.

    It remembers the run's readings, those of `workdir` up to step `start` too, and warns once when
    they have turned up. A reading has icr (bias-corrected), its traces and, if config.samples,
    memorized (of samples by `sampler`), each a float named icr_NAME; it is empty where the features
    do not vary in some direction, as those of an untrained network may. Images and perturbations,
    among them flips if `flip`, are the same each time.

    Raises:
      ValueError: before training, if there is no such layer, or images are too few for it.
    """
    (layer,) = blocks.choose(model, [config.layer] if config.layer else [])
    rows = evenly(source, config.num_images)
    icr.check_size(len(rows), blocks.sizes(model)[layer])
    readings, shown = past(workdir, start), perturb.Augmentation(flip=flip)

    def read(step: int, params: Any) -> Reading:
        views = sweep.accumulate(model, params, source, rows, config.sigma, (layer,), shown)[layer]
        try:
            values = {"icr": icr.ratio(views, bias_corrected=True)}
        except ValueError as error:
            logging.warning("No reading of ICR: %s", error)
            return {}
        values |= {f"icr_{name}": value for name, value in icr.traces(views).items()}
        if config.samples:
            values["icr_memorized"] = memorized(model, params, source, config.samples, sampler)
        readings.append((step, values["icr"]))
        warn(readings)
        return values

    return read


def memorized(model: Model, params: Any, source: Source, count: int, sampler: Sampler) -> float:
    """Share of `count` unguided samples that copy a training image, by pixels."""
    labels = np.resize(np.arange(model.null_label), count)
    samples = images.clip(generate.generate(model, params, labels, sampler))
    return evaluate.memorized(samples, source)


def turned(readings: Sequence[tuple[int, float]]) -> int | None:
    """The step of the lowest of all readings (step, ICR) once the curve has turned up; or None.

    It has turned when the last PATIENCE readings all lie above that minimum by MARGIN of it.
    """
    if not readings:
        return None
    step, least = min(readings, key=lambda reading: reading[1])
    last = [value for at, value in readings if at > step][-PATIENCE:]
    risen = len(last) == PATIENCE and min(last) > (1 + MARGIN) * least
    return step if risen else None


def warn(readings: Sequence[tuple[int, float]]) -> None:
    """Say once that the curve has turned: at the first reading at which it has."""
    step = turned(readings)
    if step is None or any(turned(readings[:end]) for end in range(len(readings))):
        return
    logging.warning(
        "ICR has risen for %d readings from its minimum %.4g at step %d: memorization likely from "
        "step %d; best checkpoint kept (launch.sample --checkpoint=%d).",
        PATIENCE, min(value for _, value in readings), step, step, step,
    )  # fmt: skip


def past(workdir: pathlib.Path, step: int) -> list[tuple[int, float]]:
    """The readings (step, ICR) of a run up to a step, from its metrics.jsonl."""
    records = read_lines(workdir / "metrics.jsonl")
    found = [r for r in records if isinstance(r.get("icr"), float) and r["step"] <= step]
    return [(record["step"], record["icr"]) for record in found]
