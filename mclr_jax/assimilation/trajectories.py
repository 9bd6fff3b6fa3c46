"""Trajectories of dynamical systems as training data, made when they are first used."""

import dataclasses
import functools
import hashlib
import io
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from mclr_jax.assimilation.dynamics import SYSTEMS, Dynamics
from mclr_jax.files import write_atomically
from mclr_jax.schema import in_range, resolve

CACHE = "~/.cache/mclr_jax/trajectories"
FORMAT = 1  # to be raised when a system gives other numbers than before
PART = 2**22  # numbers in a file of the cache, or one trajectory


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """A data source: windows of `frames` states at any start in long trajectories of a system.

    Trajectory i depends only on (seed, split, i). The trajectories are kept in the folder `path`,
    in files, each written when its part is made. The test split has an eighth as many, of other
    seeds. States are standardised; `offset` and `scale` give their units back.
    """

    split: str = "train"
    system: str = "lorenz63"  # a name in SYSTEMS, or package.module:Name
    frames: int = 32
    trajectories: int = 1024
    length: int = 1024  # frames of a trajectory
    seed: int = 0
    path: str = CACHE

    num_classes = 1
    in_memory = True  # by the file system

    def __post_init__(self):
        if self.split not in ("train", "test"):
            raise ValueError(f"split is {self.split!r}; expected 'train' or 'test'.")
        for name in ("frames", "trajectories", "length"):
            in_range(f"data.{name}", getattr(self, name), 1)
        in_range("data.seed", self.seed, 0)
        in_range("data.frames", self.frames, 1, self.length)

    @functools.cached_property
    def dynamics(self) -> Dynamics:
        return resolve(SYSTEMS, self.system, "system")()

    shape = property(lambda self: (self.frames, *self.dynamics.shape))
    offset = property(lambda self: self.dynamics.offset)
    scale = property(lambda self: self.dynamics.scale)
    time_step = property(lambda self: self.dynamics.time_step)
    labels = property(lambda self: np.zeros(len(self), np.int32))

    @property
    def count(self) -> int:
        """The number of trajectories of this split."""
        return self.trajectories if self.split == "train" else -(-self.trajectories // 8)

    @property
    def part(self) -> int:
        """The number of trajectories in a file."""
        return max(PART // (self.length * math.prod(self.dynamics.shape)), 1)

    def __len__(self) -> int:
        return self.count * (self.length - self.frames + 1)

    def __getitem__(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts, which = np.divmod(np.asarray(indices), self.count)  # the first are of all of them
        windows = [
            self._files[i // self.part][i % self.part, start : start + self.frames]
            for i, start in zip(which.tolist(), starts.tolist(), strict=True)
        ]
        return np.stack(windows), np.zeros(len(windows), np.int32)

    @functools.cached_property
    def _files(self) -> list[np.ndarray]:
        """Standardised trajectories, (part, length, *shape) float32 in each file but the last."""
        parts = (FORMAT, self.dynamics, self.split, self.seed, self.length)
        name = hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
        folder = pathlib.Path(self.path).expanduser() / f"{type(self.dynamics).__name__}_{name}"
        files = []
        for first in range(0, self.count, self.part):
            numbers = np.arange(first, min(first + self.part, self.count))
            file = folder / f"{first}_{len(numbers)}.npy"
            if not file.exists():
                logging.info("%s: trajectories %d to %d are made.", file, first, numbers[-1])
                buffer = io.BytesIO()
                np.save(buffer, np.asarray(self._make(numbers)))
                write_atomically(file, buffer.getvalue())
            files.append(np.load(file, mmap_mode="r"))
        return files

    def _make(self, numbers: np.ndarray) -> jax.Array:
        """The trajectories of these numbers, (n, length, *shape)."""
        key = jax.random.fold_in(jax.random.key(self.seed), self.split == "test")
        system, offset, scale = self.dynamics, jnp.array(self.offset), jnp.array(self.scale)

        def one(number):
            k_start, k_steps = jax.random.split(jax.random.fold_in(key, number))
            states = system.trajectory(k_steps, system.spin_up(k_start), self.length)
            return (states - offset) / scale

        return jax.jit(jax.vmap(one))(numbers)
