"""ICR along a training run: it turns up before samples begin to copy the training set."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import logging

from mclr_jax import generate, images
from mclr_jax.data.sources import Source, evenly
from mclr_jax.evaluation import evaluate
from mclr_jax.experiment import Experiment
from mclr_jax.representation import blocks, icr, sweep

PATIENCE = 3  # readings that must lie above the minimum ...
MARGIN = 0.02  # ... by this share of it
Reading = dict[str, float]


def make(
    experiment: Experiment, source: Source, workdir: pathlib.Path, start: int
) -> Callable[[int, Any], Reading] | None:
    """(step, params) -> a reading as config.icr wants it, or None where every_steps is 0.

    It remembers the run's readings, those of `workdir` up to step `start` too, and warns once when
    they have turned up. A reading has icr (bias-corrected), its traces and, if config.icr.samples,
    memorized, each a float named icr_NAME; it is empty where the features do not vary in some
    direction, as those of an untrained network may. Images and perturbations are the same each
    time.

    Raises:
      ValueError: before training, if there is no such layer, or images are too few for it.
    """
    config = experiment.config.icr
    if not config.every_steps:
        return None
    layers = blocks.choose(experiment, [config.layer] if config.layer else [])
    rows = evenly(source, config.num_images)
    icr.check_size(len(rows), blocks.sizes(experiment)[layers[0]])
    readings = past(workdir, start)

    def read(step: int, params: Any) -> Reading:
        views = sweep.accumulate(experiment, params, source, rows, config.sigma, layers)[layers[0]]
        try:
            values = {"icr": icr.ratio(views, bias_corrected=True)}
        except ValueError as error:
            logging.warning("No reading of ICR: %s", error)
            return {}
        values |= {f"icr_{name}": value for name, value in icr.traces(views).items()}
        if config.samples:
            values["icr_memorized"] = memorized(experiment, params, source, config.samples)
        readings.append((step, values["icr"]))
        warn(readings)
        return values

    return read


def memorized(experiment: Experiment, params: Any, source: Source, count: int) -> float:
    """Share of `count` unguided samples that copy a training image, by pixels."""
    labels = np.resize(np.arange(experiment.null_label), count)
    samples = images.clip(generate.generate(experiment, params, labels))
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
    path, found = workdir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:  # a line cut short by a kill
            continue
        if "icr" in record and record["step"] <= step:
            found.append((record["step"], record["icr"]))
    return found
