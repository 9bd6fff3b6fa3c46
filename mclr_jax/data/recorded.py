"""Trajectories in a file: windows of frames, standardised, read where they are asked for."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from absl import logging

from mclr_jax import extras
from mclr_jax.data.folders import divided
from mclr_jax.data.protocol import evenly
from mclr_jax.files import named
from mclr_jax.schema import in_range, nearest, of_kind

AXES = {1: "T", 2: "TD", 3: "NTD", 5: "NTHWC"}  # by their number
STATES: tuple[set[str], ...] = ({*"D"}, {*"HWC"}, {*"HW"}, set())  # axes of a state
SCANNED = 2**28  # numbers that are read for mean, standard deviation and missing values
BLOCK = 2**20  # of these at a time
HELD_IN_MEMORY = 2**30  # bytes


def load(
    path: str, split: str, *, array: str = "", axes: str = "", frames: int = 32,
    time_step: float = 0.0, held_out: float = 0.1, units: Any = None,
) -> "Windows":  # fmt: skip
    """Windows of `frames` frames of the trajectories in a .npy or .npz file, NetCDF or Zarr.

    `array` is the name of the array or variable, if the file has several. `axes` are the letters of
    its axes: N for the trajectory, T for the frame, D for the coordinate of a state, or H, W and C
    for the height, the width and the channel of a field. By default they are those of `AXES`;
    without N it is one trajectory, without D and C a state has one number. `time_step` is that
    between two frames. States are standardised by mean and standard deviation of the training
    frames, for each coordinate or channel, or by those of `units`, another source.

    Of ten trajectories or more, by the default share, some are `held_out` as a whole, drawn by a
    fixed seed; of fewer, the last frames of each, or one trajectory if these are no window. No
    window has frames of both parts.
    """
    for name, value in {"array": array, "axes": axes}.items():
        of_kind(f"config.data.{name}", value, str)
    in_range("config.data.frames", frames, 1)
    in_range("config.data.time_step", time_step, 0.0)
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"found no file {path}; check config.data.name")
    is_numpy = pathlib.Path(path).suffix in (".npy", ".npz")
    data = (_numpy if is_numpy else _xarray)(path, array)
    if data.dtype.kind not in "fiu" or not math.prod(data.shape):
        raise ValueError(f"{path} has {data.dtype} {data.shape}; expected numbers")
    axes = _axes(path, data.shape, axes)
    size = dict(zip(axes, data.shape, strict=True))
    parts = _parts(size.get("N", 1), size["T"], held_out, frames)
    if split not in parts:
        raise ValueError(
            f"{path} has no {split} split; set config.data.held_out, the share that is held out, "
            "or config.data.test to a file of other trajectories"
        )
    for name, (numbers, first, last) in parts.items():
        if last - first < frames:
            raise ValueError(
                f"{path}: split {name!r} has {last - first} frames of each trajectory; expected at "
                f"least config.data.frames, {frames}. Make it smaller, change "
                "config.data.held_out, or name a file of other trajectories in config.data.test"
            )
        if split == "train" and name == "test":
            text = "%s: held out are frames %d to %d of %d trajectories (config.data.held_out=%g)."
            logging.info(text, path, first, last - 1, len(numbers), held_out)
    rows, first, last = parts[split]
    in_memory = data.dtype.itemsize * math.prod(data.shape) <= HELD_IN_MEMORY
    data = np.asarray(data) if in_memory and not is_numpy else data  # NumPy maps its files
    train = Windows(data, axes, path, *parts["train"], frames, time_step, in_memory)
    offset, scale = (units.offset, units.scale) if units else train.measured()
    if len(offset) != train.shape[-1]:
        raise ValueError(
            f"{path} has states of shape {train.shape[1:]}; those of training have "
            f"{len(offset)} coordinates or channels"
        )
    return dataclasses.replace(train, rows=rows, first=first, last=last, offset=offset, scale=scale)


def _numpy(path: str, array: str) -> np.ndarray:
    """The array of a .npy file, mapped into memory, or an array of a .npz file, read."""
    with named(f"{path} is no readable file of NumPy"):
        data = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(data, np.ndarray):
        return data
    name = _name(path, array, data.files)
    with named(f"{path} is no readable file of NumPy"):
        return np.asarray(data[name])


def _xarray(path: str, array: str) -> Any:
    """A variable of a NetCDF file or a Zarr store, not yet read."""
    library = extras.needed("xarray", "xarray")
    with named(f"{path} cannot be opened by xarray"):
        data = library.open_dataset(path, decode_times=False)
    return data[_name(path, array, map(str, data.data_vars))].variable


def _name(path: str, array: str, known: Any) -> str:
    known = list(known)
    if array in known or (len(known) == 1 and not array):
        return array or known[0]
    raise ValueError(
        f"config.data.array is {array!r}; expected an array of {path}. {nearest(array, known)}"
    )


def _axes(path: str, shape: tuple[int, ...], axes: str) -> str:
    """The letters of the axes of an array; ValueError: they do not fit, or cannot be known."""
    found = axes or AXES.get(len(shape), "")
    state = {*found} - {*"NT"}
    if len(found) != len(shape) or len({*found}) != len(found) or "T" not in found or (
        state not in STATES
    ):  # fmt: skip
        raise ValueError(
            f"{path} has the shape {shape}, and config.data.axes is {axes!r}; expected a letter "
            "for each axis: N trajectory, T frame, and D coordinate, or H, W and C of fields. "
            "Without any: NTD, TD or NTHWC; for four axes say THWC or NTHW"
        )
    return found


def _parts(
    count: int, length: int, share: float, frames: int
) -> dict[str, tuple[np.ndarray, int, int]]:
    """Each split: numbers of its trajectories, and the first and the last frame + 1 of each."""
    rows = np.arange(count)
    if not share:
        return {"train": (rows, 0, length)}
    tail = max(1, round(share * length))
    if count > 1 and (share * count >= 1 or tail < frames):
        return {split: (found, 0, length) for split, found in divided(0 * rows, share).items()}
    cut = length - tail
    return {"train": (rows, 0, cut), "test": (rows, cut, length)}


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """A data source: windows of `frames` states at any start between frames `first` and `last`.

    States are standardised; `offset` and `scale` give their units back.
    """

    data: Any  # array, or variable of xarray, of which the frames that are asked for are read
    axes: str  # of it, see `load`
    path: str  # for errors
    rows: np.ndarray  # numbers of the trajectories
    first: int
    last: int
    frames: int
    time_step: float
    in_memory: bool  # or mapped into it
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()

    num_classes = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.frames, *self.read(self.rows[0], 0, 0).shape[1:])

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(len(self), np.int32)

    def __len__(self) -> int:
        return len(self.rows) * (self.last - self.first - self.frames + 1)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, which = np.divmod(np.asarray(indices), len(self.rows))
        states = np.stack([
            self.read(row, start, start + self.frames)
            for row, start in zip(self.rows[which].tolist(), starts + self.first, strict=True)
        ])  # fmt: skip
        windows = ((states - self.offset) / self.scale).astype(np.float32)
        return windows, np.zeros(len(windows), np.int32)

    def read(self, row: int, start: int, stop: int) -> np.ndarray:
        """Frames (stop - start, *state) float64 of a trajectory, in the units of the file."""
        place = {"N": row, "T": slice(start, stop)}
        part = np.asarray(self.data[tuple(place.get(axis, slice(None)) for axis in self.axes)])
        kept = self.axes.replace("N", "")
        part = part.transpose([kept.index(axis) for axis in "TDHWC" if axis in kept])
        part = part if kept.strip("THW") else part[..., None]
        if not np.isfinite(part).all():
            frame = start + np.isfinite(part).reshape(len(part), -1).all(1).argmin()
            raise ValueError(
                f"{self.path}: trajectory {row} has missing or infinite values, the first in frame "
                f"{frame}. Fill them, as by interpolation, or leave out the trajectory or the "
                "frames around them; gaps are for observations alone"
            )
        return part.astype(np.float64)

    def measured(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each coordinate or channel, of all frames of the split.

        Of more than `SCANNED` numbers it reads evenly spaced parts.
        """
        size = math.prod(self.shape[1:])
        block = max(1, BLOCK // size)
        starts = np.arange(self.first, self.last, block)
        count = len(self.rows) * len(starts)
        chosen = evenly(range(count), max(1, SCANNED // (block * size)))
        total, shift, sums, squares = 0, np.zeros(()), np.zeros(()), np.zeros(())
        for number in chosen.tolist():
            which, start = number // len(starts), starts[number % len(starts)]
            part = self.read(self.rows[which], start, min(start + block, self.last))
            part = part.reshape(-1, part.shape[-1])
            shift = part.mean(0) if not total else shift  # against cancellation
            total, part = total + len(part), part - shift
            sums, squares = sums + part.sum(0), squares + (part**2).sum(0)
        mean = sums / total
        std = np.sqrt(np.maximum(squares / total - mean**2, 0))
        if (same := np.flatnonzero(std <= 1e-6 * np.abs(mean + shift))).size:
            raise ValueError(
                f"{self.path}: coordinates or channels {same.tolist()} have one value in all "
                "frames; leave them out"
            )
        return tuple((mean + shift).tolist()), tuple(std.tolist())
