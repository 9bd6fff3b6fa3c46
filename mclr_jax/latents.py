"""Latents and images: the encoding of a data set, and the decoding of what is shown or measured."""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mclr_jax import images
from mclr_jax.data import folders
from mclr_jax.data.latents import KINDS, units
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import Derived, Source
from mclr_jax.data.sources import Data
from mclr_jax.files import digest
from mclr_jax.model import Model
from mclr_jax.networks.autoencoder import Autoencoder
from mclr_jax.pretrained import diffusers
from mclr_jax.training.devices import in_batches, shardings

BATCH = 64
UNSEEN = (
    "No picture: the samples have {} channels and are latents, and the run names no autoencoder. "
    "Name one, a folder of diffusers, by --autoencoder, or by config.data.autoencoder in training."
)


@functools.lru_cache(maxsize=2)
def load(folder: str) -> tuple[Autoencoder, Any]:
    """The autoencoder in a folder of diffusers, with parameters on all devices."""
    try:
        network, params = diffusers.autoencoder(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} The autoencoder was looked for in {folder}; name its folder by "
            "--autoencoder, or by config.data.autoencoder in training."
        ) from error
    return network, jax.device_put(params, shardings()[1])


@functools.lru_cache(maxsize=8)
def _compiled(function: Callable) -> Callable:
    return jax.jit(function, out_shardings=shardings()[1])


@dataclasses.dataclass(frozen=True)
class Decoder:
    """(latents x (n, H, W, C)) -> images (n, H', W', 3) float32 in [-1, 1], in batches.

    With EDM2's latents images are in its 8 bits: 255 times a value in [0, 1], without its fraction.
    """

    folder: str  # of the autoencoder
    kind: str  # of `data.latents.KINDS`
    offset: tuple[float, ...]  # raw latents are offset + scale * x
    scale: tuple[float, ...]

    @property
    def network(self) -> Autoencoder:
        return load(self.folder)[0]

    @property
    def digest(self) -> str:
        """That of the autoencoder's parameters."""
        return digest(load(self.folder)[1])

    def shape(self, latents: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the image of latents of this shape."""
        factor = 2 ** (len(self.network.block_out_channels) - 1)
        return (factor * latents[0], factor * latents[1], self.network.out_channels)

    def _decode(self, params: Any, x: jax.Array) -> jax.Array:
        raw = jnp.asarray(self.offset, x.dtype) + jnp.asarray(self.scale, x.dtype) * x
        found: Any = self.network.apply({"params": params}, raw, method="decode")
        if KINDS[self.kind].low < 0:
            return jnp.clip(found, -1, 1)
        return jnp.floor(jnp.clip(found, 0, 1) * 255) / 127.5 - 1

    def __call__(self, samples: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
        """The images; with `dtype` uint8 in 8 bits."""
        run = functools.partial(_compiled(self._decode), load(self.folder)[1])
        out = np.zeros((len(samples), *self.shape(samples.shape[1:])), dtype)
        for rows, found in in_batches(run, lambda rows: (samples[rows],), len(out), BATCH):
            out[rows] = images.to_uint8(found) if dtype == np.uint8 else found
        return out


def decoder(data: Data, model: Model) -> Decoder | None:
    """That of a model of latents whose data name an autoencoder; None without.

    ValueError: the data do not say how the latents were made, or the autoencoder has latents with
    another number of channels.
    """
    if not data.autoencoder:
        return None
    if not data.latents:
        raise ValueError(
            "config.data.autoencoder is set, and config.data.latents is empty: set it to one of "
            f"{', '.join(KINDS)}."
        )
    channels, network = model.data.shape[-1], load(data.autoencoder)[0]
    if network.latent_channels != channels:
        raise ValueError(
            f"The autoencoder in {data.autoencoder} has latents of {network.latent_channels} "
            f"channels; the model has {channels}."
        )
    offset, scale = model.data.offset, model.data.scale
    if not scale:
        offset, scale = units(data.latents, channels)
    return Decoder(data.autoencoder, data.latents, offset, scale)


def shown(samples: np.ndarray, decode: Decoder | None) -> np.ndarray | None:
    """Samples as `images.picture` takes them; None, and a warning, for latents without decoder."""
    if decode is not None:
        return decode(samples)
    if samples.ndim == 4 and samples.shape[-1] > 3:
        logging.warning(UNSEEN.format(samples.shape[-1]))
        return None
    return images.clip(samples)


def as_8_bits(samples: np.ndarray, decode: Decoder | None) -> np.ndarray:
    """Samples as measures take them: decoded latents, or images, in 8 bits."""
    return decode(samples, np.uint8) if decode else images.as_8_bits(samples)


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded(Derived):
    """The source of the images, uint8, of a source of latents."""

    source: Source
    decode: Decoder
    in_memory: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.decode.shape(self.source.shape)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found, labels = self.source[indices]
        return self.decode(found, np.uint8), labels


def decoded(source: Source, decode: Decoder | None) -> Source:
    """A source as images: latents are decoded; images stay."""
    is_latent = bool(getattr(source, "latents", ""))
    return Decoded(source, decode) if decode is not None and is_latent else source


def encode(
    source: Source,
    folder: str,
    kind: str,
    out: pathlib.Path,
    progress: Callable[[int], Any] = lambda count: None,
) -> None:
    """Write the latents of images as a zip in the format of EDM2, which names their kind, too.

    Each file has the means and the standard deviations of the raw latents, (2 C, H, W) float32.
    Grey images are shown to an autoencoder of colours in grey. ValueError: images that it does not
    take, or whose sides it does not halve.
    """
    network, params = load(folder)
    height, width, channels = source.shape
    factor = 2 ** (len(network.block_out_channels) - 1)
    if height % factor or width % factor or channels not in (1, network.in_channels):
        raise ValueError(
            f"The images have shape {source.shape}; the autoencoder in {folder} takes "
            f"{network.in_channels} channels, or grey, and sides divisible by {factor}."
        )
    low = KINDS[kind].low

    @functools.partial(jax.jit, out_shardings=shardings()[1])
    def run(params: Any, pixels: jax.Array) -> jax.Array:
        x = to_float(pixels) if low < 0 else (to_float(pixels) + 1) / 2
        x = jnp.broadcast_to(x, (*x.shape[:-1], network.in_channels))
        mean_and_std: Any = network.apply({"params": params}, x, method="encode")
        return jnp.moveaxis(jnp.concatenate(mean_and_std, axis=-1), -1, 1)

    names = [f"{i:08d}"[:5] + f"/img-mean-std-{i:08d}.npy" for i in range(len(source))]
    with folders.archive(out, source, names, latents=kind, autoencoder=digest(params)) as archive:
        given = functools.partial(run, params), lambda rows: source[rows][:1]
        for rows, found in in_batches(*given, len(source), BATCH):
            for row, array in zip(rows, found, strict=True):
                np.save(buffer := io.BytesIO(), array)
                archive.writestr(names[row], buffer.getvalue())
            progress(len(rows))
