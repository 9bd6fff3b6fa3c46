"""Memorization during training: a warning that comes before samples copy training images.

A network that memorizes denoises the images of its training better than held-out ones:

    gap(sigma) = 1 - mean error of training images / mean error of held-out images

with the square error |D(x0 + sigma n; label) - x0|^2 of the averaged weights. docs/memorization.md
says how sure the warning is.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mclr_jax import generate, images, latents
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Source, Subset, drawn
from mclr_jax.data.sources import Data
from mclr_jax.evaluation import evaluate, features, metrics
from mclr_jax.files import read_lines
from mclr_jax.model import Model
from mclr_jax.noise import normal_like, sample_keys
from mclr_jax.samplers import Sampler
from mclr_jax.training.beside import Memorization
from mclr_jax.training.checkpoint import before_warning
from mclr_jax.training.devices import in_batches, replicated, shardings

NOISES = 2  # for each image, the same at every reading
BATCH = 64
LEVEL = 0.4  # root mean square error of held-out images, as a share of their distance, see `climb`
RISE = 2**0.25  # from a noise level to the next
ONE_CALL = 0.25  # share of images from which copies are to be expected without held-out ones,
ONE_CALL_LEVEL = 2.8  # at this multiple of `first_level`
# Training images among which the nearest is looked for: at most; those that are held in memory have
# at most so many numbers, or are so few.
NEIGHBOURS, NUMBERS, LEAST = 8192, 2**25, 256
FEATURES = 2**16  # training images whose features are kept to count copies by
SHARE, ERROR, SIGMA, WARNING = (
    "memorization_gap", "memorization_error", "memorization_sigma", "memorization_warning"
)  # fmt: skip


@functools.lru_cache(maxsize=4)
def _compiled(model: Model) -> Callable:
    """Jitted (params, images (B, ...), labels (B,), numbers (B,), seed, sigma) -> (V, B, ...)."""

    def run(params, examples, labels, numbers, seed, sigma):
        x0, keys = to_float(examples), sample_keys(seed, numbers)
        level = jnp.full(len(x0), sigma, jnp.float32)

        def one(number):
            noise = normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, number), x0)
            return model.denoise(params)(x0 + sigma * noise, level, labels)

        return jax.lax.map(one, jnp.arange(NOISES))

    return jax.jit(run, out_shardings=shardings()[1])


def denoised(
    model: Model, params: Any, x0: np.ndarray, labels: np.ndarray, sigma: float, seed: int = 0
) -> np.ndarray:
    """D(x0 + sigma n; label) (NOISES, n, ...) of examples (n, ...), with noise by (seed, row)."""
    run, params = _compiled(model), replicated(params)
    parts = in_batches(
        lambda *inputs: run(params, *inputs, np.uint32(seed), np.float32(sigma)),
        lambda rows: (x0[rows], labels[rows], rows.astype(np.uint32)), len(x0), BATCH, axis=1,
    )  # fmt: skip
    return np.concatenate([found for _, found in parts], axis=1)


def errors(model: Model, params: Any, x0: np.ndarray, labels: np.ndarray, sigma: float,
           seed: int = 0) -> np.ndarray:  # fmt: skip
    """|D(x0 + sigma n; label) - x0|^2 (n,) float64 of examples (n, ...): means over the noises."""
    off = denoised(model, params, x0, labels, sigma, seed) - np.asarray(to_float(jnp.asarray(x0)))
    return np.square(off, dtype=np.float64).reshape(NOISES, len(x0), -1).sum(-1).mean(0)


def gap(train: np.ndarray, held_out: np.ndarray) -> tuple[float, float]:
    """The gap of errors (n,) and (m,), and its standard error by images, to first order."""
    ratio = train.mean() / held_out.mean()
    relative = sum(x.var(ddof=1) / len(x) / x.mean() ** 2 for x in (train, held_out))
    return float(1 - ratio), float(ratio * np.sqrt(relative))


def climb(
    measure: Callable[[float], np.ndarray], start: float, distance: float
) -> tuple[float, np.ndarray]:
    """(noise level, errors (m,) there) of held-out images: the level of a reading.

    It is the first of start, RISE start, ... where their root mean square error is at least LEVEL
    times the distance, the median of those to the nearest training image. From reading to reading
    it only rises, while the network learns; it stays where the network begins to memorize.
    """
    sigma = start
    while np.sqrt((found := measure(sigma)).mean()) < LEVEL * distance and sigma < 8 * distance:
        sigma *= RISE
    return sigma, found


@dataclasses.dataclass(frozen=True, eq=False)
class Monitor:
    """(step, params) -> a reading, with the options of config.memorization.

    It has memorization_gap, its standard error memorization_error, memorization_sigma and
    memorization_warning: 0, 1 from the step on where the gap less two standard errors has reached
    options.warning, and 2 from options.likely on. Each is logged once. From then on, as often as
    `pause` steps allow, it has memorization_copies: the share of copies among samples.

    Without held-out images the gap is not known: memorization_one_call is the share of training
    images whose denoised version is a copy of one training image.

    All readings use the same images and noise; what earlier ones have found, up to step `start`, is
    read from `workdir`.
    """

    options: Memorization
    model: Model
    sampler: Sampler
    data: Data
    source: Source
    held_out: Source | None
    workdir: pathlib.Path
    start: int
    pause: int = 0

    def __post_init__(self):
        _ = self.extractor  # its errors come before the first step

    @functools.cached_property
    def extractor(self) -> features.Extractor | None:
        return features.load(self.options.features) if self.options.features else None

    @functools.cached_property
    def readings(self) -> list[dict[str, float]]:
        return past(self.workdir, self.start)

    @functools.cached_property
    def rows(self) -> np.ndarray:
        return drawn(self.source, self.options.num_images)

    @functools.cached_property
    def shown(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The images and labels of readings, by side."""
        found = {"train": self.source[self.rows]}
        if self.held_out is not None:
            found["held_out"] = self.held_out[drawn(self.held_out, self.options.num_images)]
        return found

    @functools.cached_property
    def neighbours(self) -> np.ndarray:
        """Training images (n, d), drawn, with those of `shown`."""
        count = min(NEIGHBOURS, max(NUMBERS // int(np.prod(self.source.shape)), LEAST))
        chosen = np.union1d(drawn(self.source, count), self.rows)
        return evaluate.flat(self.source[chosen][0])

    @functools.cached_property
    def features(self) -> np.ndarray:
        """Those of training images (n, d), of FEATURES drawn ones where there are more."""
        assert self.extractor is not None
        real = latents.decoded(self.source, latents.decoder(self.data, self.model))
        some = Subset(real, drawn(real, FEATURES))
        parts = (self.extractor(*some[rows]).features for rows in evaluate.batches(some))
        return np.concatenate([*parts])

    @functools.cached_property
    def distance(self) -> float:
        """The median distance from held-out images, or training images, to the nearest other."""
        side = "train" if self.held_out is None else "held_out"
        found, _ = metrics.two_nearest(self.neighbours, evaluate.flat(self.shown[side][0]))
        return float(np.median(found[:, int(self.held_out is None)]))

    @functools.cached_property
    def blind(self) -> bool:
        """True if no noise level can be found, which is said once."""
        if found := not (self.options.sigma or self.distance):
            what = "training images are twice there" if self.held_out is None else (
                "held-out images are training images"
            )  # fmt: skip
            logging.warning("No readings of memorization: most %s.", what)
        return found

    @property
    def first_level(self) -> float:
        """The noise level where noise alone has the error that `climb` looks for."""
        return LEVEL * self.distance / np.sqrt(np.prod(self.source.shape))

    def __call__(self, step: int, params: Any) -> dict[str, float]:
        if self.blind:
            return {}
        before = self.readings[-1] if self.readings else {}
        sigma = self.options.sigma or before.get(SIGMA) or self.first_level
        if self.held_out is None:
            sigma = self.options.sigma or ONE_CALL_LEVEL * self.first_level
            share = self.one_call(params, sigma)
            values = {"memorization_one_call": share, SIGMA: float(sigma)}
            stage = int(share >= ONE_CALL)
        else:
            values, stage = self._gap(params, sigma)
        stage = max(stage, int(before.get(WARNING, 0)))
        if stage > before.get(WARNING, 0):
            self._warn(step, stage, values)
        last = max((r["step"] for r in self.readings if "memorization_copies" in r), default=None)
        if stage and self.options.samples and (last is None or step - last >= self.pause):
            values |= self._copies(step, params)
        values[WARNING] = float(stage)
        self.readings.append({"step": step, **values})
        return values

    def _gap(self, params: Any, sigma: float) -> tuple[dict[str, float], int]:
        def measure(level: float, side: str = "held_out") -> np.ndarray:
            seed = int(side == "held_out")
            return errors(self.model, params, *self.shown[side], level, seed)

        sigma, held_out = climb(measure, sigma, 0.0 if self.options.sigma else self.distance)
        found, error = gap(measure(sigma, "train"), held_out)
        stage = sum(found - 2 * error >= at for at in (self.options.warning, self.options.likely))
        return {SHARE: found, ERROR: error, SIGMA: float(sigma)}, stage

    def one_call(self, params: Any, sigma: float) -> float:
        """Share of training images whose denoised version is a copy of a training image."""
        found = evaluate.flat(denoised(self.model, params, *self.shown["train"], sigma)[0])
        ratios = metrics.copy_ratios(metrics.two_nearest(self.neighbours, found)[0])
        return float((ratios < metrics.COPY).mean())

    def _copies(self, step: int, params: Any) -> dict[str, float]:
        labels = np.resize(np.arange(self.model.null_label), self.options.samples)
        try:
            samples = images.clip(generate.generate(self.model, params, labels, self.sampler))
        except FloatingPointError as error:  # no reason to stop a run
            logging.warning("No samples at step %d: %s", step, error)
            return {}
        found = {"memorization_copies": evaluate.memorized(samples, self.source, self.data.flip)}
        if self.extractor is not None:
            pixels = latents.as_8_bits(samples, latents.decoder(self.data, self.model))
            fake = self.extractor(pixels, labels).features
            share = metrics.memorized_fraction(self.features, fake)
            found["memorization_copies_by_features"] = share
        return found

    def _warn(self, step: int, stage: int, values: dict[str, float]) -> None:
        last = before_warning(read_lines(self.workdir / "checkpoints" / "metrics.jsonl"))
        kept = (
            "no checkpoint is older: to keep one, lower config.checkpoint_every"
            if last is None
            else f"the last checkpoint before the first warning, of step {last}, is kept (mclr "
            f"sample --checkpoint={last})"
        )
        if self.held_out is None:
            logging.warning(
                "Memorization at step %d: of %.0f%% of the training images one call of the network "
                "gives a copy, and samples may begin to be copies. Without held-out images this is "
                "less certain; %s.", step, 100 * values["memorization_one_call"], kept,
            )  # fmt: skip
            return
        text = "samples are likely copies" if stage == 2 else "samples may soon be copies"
        logging.warning(
            "Memorization at step %d: the denoising error of training images is %.2f +- %.2f of "
            "that of held-out images (sigma %.3g): %s of training images; %s.",
            step, 1 - values[SHARE], 2 * values[ERROR], values[SIGMA], text, kept,
        )  # fmt: skip


def past(workdir: pathlib.Path, step: int) -> list[dict[str, float]]:
    """The readings of a run up to a step, from its metrics.jsonl."""
    found = []
    for record in read_lines(workdir / "metrics.jsonl"):
        kept = {key: x for key, x in record.items() if key.startswith("memorization_")}
        if WARNING in kept and record["step"] <= step:
            if all(isinstance(x, int | float) and np.isfinite(x) for x in kept.values()):
                found.append({"step": record["step"], **kept})
    return found
