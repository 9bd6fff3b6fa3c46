"""Latents as data: means and standard deviations by an autoencoder, drawn anew in each epoch.

Two conventions are in use, whose files look the same: that of EDM2, and that of DiT, SiT and REPA.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from mclr_jax.data.protocol import UNITS, Derived, Source, check_finite, names_of


class Kind(NamedTuple):
    """A way from images to the latents that a network is trained on: x = (raw - offset) / scale."""

    low: float  # the autoencoder takes and gives pixels in [low, 1]
    offset: tuple[float, ...]  # for each channel, or one number for all
    scale: tuple[float, ...]


KINDS = {
    # Karras et al. 2023 (arXiv 2312.02696), training/encoders.py: mean 0 and standard deviation 0.5
    "edm2": Kind(0.0, (5.81, 3.25, 0.12, -2.15), tuple(s / 0.5 for s in (4.17, 4.62, 3.71, 3.28))),
    # Rombach et al. 2022 (arXiv 2112.10752), for DiT, SiT and REPA
    "stable_diffusion": Kind(-1.0, (0.0,), (1 / 0.18215,)),
}


def units(kind: str, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Offset and scale of latents with so many channels; ValueError: the kind has others."""
    _, *found = KINDS[kind]
    offset, scale = (one * channels if len(one) == 1 else one for one in found)
    if len(scale) != channels:
        raise ValueError(
            f"latents of the kind {kind!r} have {len(scale)} channels; got {channels}. Choose "
            f"another kind of {', '.join(KINDS)}."
        )
    return offset, scale


def units_of(source: Source) -> dict[str, Any]:
    """The units that a source has, or those of its kind of latents; empty: it has none."""
    kind = getattr(source, "latents", "")
    known = units(kind, source.shape[-1]) if kind else ()
    own = {name: getattr(source, name) for name in UNITS if hasattr(source, name)}
    return dict(zip(UNITS, known, strict=False)) | own


@dataclasses.dataclass(frozen=True, eq=False)
class Latents(Derived):
    """A source of latents x, drawn from the means and standard deviations of another source.

    Indexing draws with noise that follows from the index: the same latents each time. Training
    takes `moments` instead and draws with fresh noise, see `pixels.from_moments`.
    """

    source: Source  # of raw latents (H, W, 2 C): means and standard deviations
    latents: str  # the kind, of KINDS

    def __post_init__(self):
        units(self.latents, self.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.source.shape[:-1], self.source.shape[-1] // 2)

    @property
    def in_memory(self) -> bool:
        return self.source.in_memory

    @property
    def class_names(self) -> tuple[str, ...]:
        return names_of(self.source)

    def moments(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of x (n, H, W, 2 C) float32, and labels (n,)."""
        raw, labels = self.source[indices]
        mean, std = np.split(raw, 2, axis=-1)
        offset, scale = np.asarray(units(self.latents, self.shape[-1]), np.float32)
        return np.concatenate([(mean - offset) / scale, std / scale], axis=-1), labels

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, labels = self.moments(indices)
        mean, std = np.split(found, 2, axis=-1)
        noise = [np.random.default_rng([0, i]).standard_normal(self.shape) for i in indices]
        return mean + std * np.asarray(noise, np.float32), labels


def check_moments(images: np.ndarray, what: str) -> None:
    """Raise ValueError unless images (n, H, W, 2 C) are means and standard deviations."""
    if images.ndim != 4 or images.shape[-1] % 2 or images.dtype == np.uint8:
        raise ValueError(
            f"{what} is an array (H, W, C) of shape {images.shape[1:]} and {images.dtype}; "
            "expected floats with as many means as standard deviations along C"
        )
    check_finite(images, what)
    if images[..., images.shape[-1] // 2 :].min(initial=0) < 0:
        raise ValueError(f"{what} has standard deviations below 0; expected means, then these")
