"""Samples of a run as commands ask for them, their file, and pictures of several runs."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mclr_jax import generate, images, latents, runs
from mclr_jax.files import named, save_arrays
from mclr_jax.labels import chosen, warn_untrained
from mclr_jax.runs import Run

Drawn = tuple[np.ndarray, np.ndarray | None]  # samples, and those to show, as of `latents.shown`


def draw(
    run: Run,
    labels: np.ndarray,
    guided: generate.Guidance = generate.NONE,
    sampler: Mapping[str, Any] = {},  # replaces the run's; None: as the run has it
    weights: Sequence[Any] = (),  # arguments of `Run.weights`
    **options: Any,  # of `generate.generate`
) -> Drawn:
    """Samples of a run with these labels (n,), from the noise of their seed and number alone."""
    decode = latents.decoder(run.data, run.model)
    given = {name: value for name, value in sampler.items() if value is not None}
    warn_untrained(run, labels, guided)
    samples = generate.generate(
        run.model, run.weights(*weights)[0], labels, dataclasses.replace(run.sampler, **given),
        guided=guided, **options,
    )  # fmt: skip
    return samples, latents.shown(samples, decode)


def guidance(
    run: Run, scale: float = 1.0, *, class_strengths: str | None = None,
    guidance_interval: Sequence[float] | None = None, guidance_channels: int | None = None,
    autoguidance: str | None = None, domain_guidance: str | None = None,
) -> generate.Guidance:  # fmt: skip
    """Guidance by a file of mclr calibrate, and by the run in a directory, of one of both kinds.

    ValueError: the run there is of other data.
    """
    factors = generate.class_strengths(class_strengths, run.model.null_label)
    name, weak = "domain_guidance" if domain_guidance else "autoguidance", None
    if path := domain_guidance or autoguidance:
        other = runs.load(path)
        runs.check_companion(name, path, other.model, run.model.data, run.data.name)
        weak = other.model, other.weights()[0]
    interval: Any = tuple(guidance_interval) if guidance_interval else None
    domain = bool(domain_guidance)
    return generate.Guidance(scale, factors, interval, weak, guidance_channels, domain)


def write(path: pathlib.Path, run: Run, labels: np.ndarray, drawn: Drawn) -> list[pathlib.Path]:
    """Write samples as npz, and beside it a picture if they can be shown; the files written."""
    samples, shown = drawn
    arrays = {"images": samples if shown is None else shown}
    arrays |= {"latents": samples} if run.data.autoencoder else {}
    save_arrays(path, **arrays, labels=labels.astype(np.int32))
    if shown is None:
        return [path]
    picture = images.picture(shown, labels, class_names=run.class_names)
    images.save(path.with_suffix(".png"), picture)
    return [path, path.with_suffix(".png")]


def side_by_side(
    texts: Sequence[str],
    beside: pathlib.Path,
    classes: Sequence[str] | None,  # as of `labels.chosen`, repeated to `count` samples
    count: int,
    load: Callable[[pathlib.Path], Run],
    draw: Callable[[Run, np.ndarray, float], Drawn],  # (run, labels, guidance scale)
) -> np.ndarray:
    """The picture of runs, each written RUN or RUN:SCALE: a directory, or its name beside another.

    ValueError: a scale that is no number, runs of other images or classes, or latents that nothing
    decodes.
    """
    found, shown = {}, {}
    for text in texts:
        name, colon, scale = text.partition(":")
        places = pathlib.Path(name), beside.parent / name
        place = next((path for path in places if (path / "run.json").exists()), places[0])
        with named(f"--compare has {text!r}; expected RUN, or RUN:SCALE with a number"):
            title = f"{name}, scale {scale}" if colon else name, float(scale or 1)
        found[title] = load(place)
    first, *others = found.values()
    for run in others:
        a, b = ((one.model.data.shape, one.model.null_label) for one in (first, run))
        if a != b:
            raise ValueError(
                f"--compare: {run.workdir} and {first.workdir} have other images or classes."
            )
    labels = np.resize(chosen(classes, first), count)
    for (name, at), run in found.items():
        samples, pictured = draw(run, labels, at)
        if pictured is None:
            raise ValueError(latents.UNSEEN.format(samples.shape[-1]))
        shown[name] = pictured
    return images.side_by_side(shown, labels, class_names=first.class_names)
