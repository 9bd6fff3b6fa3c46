"""Orbax checkpoints: saved in the background, the newest and the best kept, broken ones skipped."""

import contextlib
import json
import math
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from shutil import disk_usage
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from mclr_jax.files import read_lines, write_atomically
from mclr_jax.training.devices import barrier, is_first

OVERHEAD = 2**20  # bytes of a checkpoint beside its arrays, at most
# Devices with the same array save a part of it each only if parts have so many bytes: to cut small
# arrays takes longer than to write them.
PART = 2**20


class MismatchError(ValueError):
    """Stored parameters have other names or shapes than the expected parameters."""


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save at the end.

    A checkpoint holds a tree of arrays. Orbax writes under a temporary name and renames, so a
    killed run leaves no incomplete step. `directory`, created if missing, has the steps and
    metrics.jsonl, the metrics that rank the checkpoints. A checkpoint without a valid line in that
    file has no metrics. Beside the `keep` newest checkpoints, the one with the lowest metric `loss`
    and the newest with a metric `memorization` of 0 are kept. `keep` None keeps all and is required
    for processes that only read.

    A checkpoint has its step and a digest of each array, which `restore` compares.
    """

    def __init__(self, directory, keep: int | None = 2):
        self.directory, self._keep = pathlib.Path(directory).resolve(), keep
        self._file = self.directory / "metrics.jsonl"
        # All processes read the file before the manager synchronises them; the first writes later.
        self._metrics = {record["step"]: record for record in read_lines(self._file)}
        # A reader must not delete temporary files, which a training run may be writing.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, cleanup_tmp_directories=keep is not None
        )
        arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=PART)
        handlers = (jax.Array, arrays), (np.ndarray, ocp.type_handlers.NumpyHandler())
        registry = ocp.type_handlers.create_type_handler_registry(*handlers)
        state = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        items = {"state": state, "digest": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.directory, item_handlers=items, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        with self._written():
            self._manager.close()

    def wait(self) -> None:
        """Return when all saved checkpoints are on disk; OSError: one could not be written."""
        with self._written():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turns an error of Orbax's background thread, which may come with any call, into ours."""
        try:
            yield
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise OSError(
                f"A checkpoint could not be written to {self.directory} ({reason}). Make room or "
                "repair the disk, then run the same command again."
            ) from error

    def steps(self) -> list[int]:
        """The steps on disk, in rising order."""
        return sorted(self._manager.all_steps())

    def _lowest(self, name: str, steps: list[int]) -> int | None:
        values = {step: self._metrics.get(step, {}).get(name) for step in steps}
        fine = {s: v for s, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        return min(fine, key=lambda step: fine[step], default=None)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """True for each checkpoint to keep: this object is the preservation policy of Orbax."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        unwarned = before_warning(self._metrics[step] for step in steps if step in self._metrics)
        kept = {*steps[::-1][: self._keep], self._lowest("loss", steps), unwarned}
        return [step in kept for step in steps]

    def require_space(self, state: Any) -> None:
        """Raise OSError if the disk has too little free space for a checkpoint of the state."""
        needed = sum(x.nbytes for x in jax.tree.leaves(state)) + OVERHEAD
        if needed > (free := disk_usage(self.directory).free):
            raise OSError(
                f"A checkpoint needs {needed / 1e6:.1f} MB; the disk of {self.directory} has "
                f"{free / 1e6:.1f} MB free. Make room, then run the same command again."
            )

    def save(self, step: int, state: Any, metrics: dict[str, float] | None = None) -> None:
        """Save in the background; do nothing if a checkpoint of this step exists.

        OSError: see `require_space`; nothing is written.
        """
        held = self.steps()
        if step in held:
            return
        self.require_space(state)
        # Includes the checkpoints that Orbax will delete when the new checkpoint is on disk.
        records = {s: record for s, record in self._metrics.items() if s in held}
        self._metrics = records | {step: {"step": step, **(metrics or {})}}
        if is_first():
            lines = (json.dumps(record) + "\n" for record in self._metrics.values())
            write_atomically(self._file, "".join(lines))
        digest = ocp.args.JsonSave({"step": step, "arrays": digests(state)})
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), digest=digest)
        with self._written():
            self._manager.save(step, args=items)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, int] | None:
        """(state, step) of the newest readable checkpoint, or of `step`; None: no checkpoint.

        `like` is a tree of jax.ShapeDtypeStruct with shardings: the state, or some of its branches.
        If a checkpoint cannot be read, or differs from its digest, the next older one is read, with
        a warning; all but readers move the former to the folder `broken` beside the directory.

        MismatchError: names the first parameter whose stored name or shape differs from `like`.
        RuntimeError: no checkpoint can be read; nothing is moved.
        """
        steps = self.steps()
        if step is not None and step not in steps:
            raise RuntimeError(f"No checkpoint of step {step} in {self.directory}; only {steps}.")
        broken: dict[int, Exception] = {}
        for candidate in steps[::-1] if step is None else [step]:
            try:
                state = self._read(like, candidate)
            except MismatchError:
                raise
            except Exception as error:  # damaged files cause many types of errors
                if step is not None:
                    raise RuntimeError(f"Cannot read checkpoint {step}: {error}") from error
                broken[candidate] = error
            else:
                for number, reason in broken.items():
                    self.set_aside(number, f"cannot be read ({str(reason).splitlines()[0][:200]})")
                return state, candidate
        if broken:
            reasons = "; ".join(f"{n}: {str(e).splitlines()[0][:200]}" for n, e in broken.items())
            raise RuntimeError(
                f"None of the checkpoints {list(broken)} in {self.directory} could be read "
                f"({reasons}). Restore them from a copy, or train from the start with --restart."
            )
        return None

    def _read(self, like: Any, step: int) -> Any:
        stored = self._manager.item_metadata(step)["state"]
        if stored is None or not stored.tree:
            raise OSError("its description of the state is missing")
        check_same(like, stored.tree, f"checkpoint {step} of {self.directory}")
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        item = ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True)
        if not (self.directory / str(step) / "digest").exists():  # of an older version
            logging.warning("Checkpoint %s has no digest: its numbers are not verified.", step)
            return self._manager.restore(step, args=ocp.args.Composite(state=item))["state"]
        items = ocp.args.Composite(state=item, digest=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=items)
        if (saved := found["digest"]["step"]) != step:
            raise OSError(f"it is a copy of checkpoint {saved}")
        for name, digest in digests(found["state"]).items():
            if digest != found["digest"]["arrays"][name]:
                raise OSError(f"{name} is damaged: its digest is not that of the saved array")
        return found["state"]

    def has_loss(self, step: int) -> bool:
        """True if the checkpoint of a step has the metric `loss`."""
        return "loss" in self._metrics.get(step, {})

    def set_aside(self, step: int, reason: str) -> None:
        """Move a checkpoint to the folder `broken` beside the directory; readers only warn."""
        target = self.directory.parent / "broken" / str(step)
        moves = self._keep is not None
        logging.warning("Checkpoint %s %s%s.", step, reason, f"; moved to {target}" * moves)
        if not moves:
            return
        if is_first():
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "_")
            (self.directory / str(step)).rename(target)
        barrier("checkpoint set aside")
        self._manager.reload()


def before_warning(records: Iterable[Mapping[str, Any]]) -> int | None:
    """The last step among records of checkpoints/metrics.jsonl whose `memorization` is 0."""
    return max((r["step"] for r in records if r.get("memorization") == 0), default=None)


def digests(tree: Any) -> dict[str, int]:
    """A 32-bit digest of each array by its path; any change of one number changes it.

    The digest is the sum of all numbers' bits, each times an odd hash of its place, modulo 2^32. It
    is computed where the arrays are, on all devices.
    """
    values = jax.device_get(_sums(_leaves(tree)))
    return {name: int(value) for name, value in values.items()}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    def digest(x):
        size = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
        kind = zlib.crc32(f"{x.shape}{x.dtype}".encode())
        x = x.astype(jnp.uint8) if x.dtype == bool else x
        bits = jax.lax.bitcast_convert_type(x, size).astype(jnp.uint32)  # 8 bytes become a pair
        place = jnp.zeros((), jnp.uint32)
        for axis in range(bits.ndim):
            stride = np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
            place = place + stride * jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        odd = 2 * ((place + np.uint32(1)) * np.uint32(2654435761)) + np.uint32(1)
        return jnp.sum(bits * odd, dtype=jnp.uint32) + np.uint32(kind)

    return {name: digest(x) for name, x in arrays.items()}


def not_finite(tree: Any) -> list[str]:
    """The paths of the arrays that have an infinity or NaN; computed where the arrays are."""
    finite = jax.device_get(_finite(_leaves(tree)))
    return [name for name, fine in finite.items() if not fine]


@jax.jit
def _finite(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: jnp.isfinite(x).all() for name, x in arrays.items()}


def _leaves(tree: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}


def check_same(wanted: Any, stored: Any, source: str) -> None:
    """Raise MismatchError if a leaf of `wanted` has another shape in `stored`, or is missing."""
    available = _leaves(stored)
    for name, leaf in _leaves(wanted).items():
        shape = getattr(available.get(name), "shape", None)
        if shape != leaf.shape:
            found = "no such parameter" if shape is None else f"shape {shape}"
            raise MismatchError(
                f"Parameter {name}: expected shape {leaf.shape}, but {source} has {found}. "
                "Is this the same network, EMA and optimizer configuration?"
            )
