"""Checkpoints by Orbax: asynchronous, the last n and the best, with a way back from broken ones."""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies


class MismatchError(ValueError):
    """Stored parameters have other names or shapes than those asked for."""


def _metric(name: str) -> Callable[[dict], float]:
    return lambda metrics: metrics.get(name, math.inf)


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save at the end.

    A checkpoint holds a tree of arrays and the position in the data. Orbax writes under a temporary
    name and renames, so that a killed run leaves no half-written step.

    Args:
      directory: where steps are kept; created if missing.
      keep: how many of the newest to keep, None for all; the one with the lowest metric `loss` and
        the one with the lowest `icr` are kept besides.
    """

    def __init__(self, directory, keep: int | None = 2):
        self.directory = pathlib.Path(directory).resolve()
        best = [
            policies.BestN(
                get_metric_fn=_metric(name),
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            )
            for name in ("loss", "icr")
        ]
        for step in sorted(self.directory.glob("[0-9]*")):
            try:  # Orbax reads these while it opens the directory, and would not open it
                for file in (step / "metrics" / "metrics", step / "data" / "metadata"):
                    if file.parent.exists():
                        json.loads(file.read_text())
            except (OSError, ValueError) as error:
                self._set_aside(step.name, error)
        self._manager = ocp.CheckpointManager(
            self.directory,
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(),
                "data": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), *best]),
                best_fn=_metric("loss"),
                best_mode="min",
                cleanup_tmp_directories=True,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def wait(self) -> None:
        """Return once everything saved so far is on disk."""
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """The steps on disk, newest last."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the lowest metric `loss`, None if no checkpoint has one."""
        return self._manager.best_step()

    def save(self, step: int, state: Any, data_state: dict, metrics: dict | None = None) -> None:
        """Save in the background; nothing is done if this step is saved already."""
        if step not in self._manager.all_steps():
            items = {"state": ocp.args.PyTreeSave(state), "data": ocp.args.JsonSave(data_state)}
            self._manager.save(step, args=ocp.args.Composite(**items), metrics=metrics)

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict, int] | None:
        """The newest checkpoint that can be read; None where there is no checkpoint at all.

        Args:
          like: tree of jax.ShapeDtypeStruct with shardings: the state, or some of its branches.
          step: read this step and no other.

        Returns:
          (state, data_state, step). A newest checkpoint that cannot be read is moved beside the
          directory, under `broken`, with a warning, and the one before is tried.

        Raises:
          MismatchError: naming the first parameter whose stored name or shape differs from `like`.
          RuntimeError: if there are checkpoints and none of them can be read.
        """
        steps = self.steps()[::-1]
        if step is not None:
            if step not in steps:
                raise RuntimeError(
                    f"No checkpoint of step {step} in {self.directory}; there are {steps[::-1]}."
                )
            steps = [step]
        for candidate in steps:
            try:
                return *self._read(like, candidate), candidate
            except MismatchError:
                raise
            except Exception as error:  # whatever a damaged file makes the reader raise
                if step is not None:
                    raise RuntimeError(f"Cannot read checkpoint {step}: {error}") from error
                self._set_aside(str(candidate), error)
                self._manager.reload()
        if steps:
            raise RuntimeError(
                f"None of the checkpoints {steps} could be read; they were moved to "
                f"{self.directory.parent / 'broken'}. Start again with another --workdir."
            )
        return None

    def _read(self, like: Any, step: int) -> tuple[Any, dict]:
        stored = self._manager.item_metadata(step)["state"]
        if stored is None or not stored.tree:
            raise OSError("its description of the state is missing")
        check_same(like, stored.tree, f"checkpoint {step} of {self.directory}")
        restore_args = ocp.checkpoint_utils.construct_restore_args(like)
        items = {
            "state": ocp.args.PyTreeRestore(like, restore_args=restore_args, partial_restore=True),
            "data": ocp.args.JsonRestore(),
        }
        restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return restored["state"], restored["data"]

    def _set_aside(self, step: str, error: Exception) -> None:
        target = self.directory.parent / "broken" / step
        reason = str(error).splitlines()[0][:200]
        logging.warning("Checkpoint %s cannot be read (%s); moved to %s.", step, reason, target)
        if jax.process_index() == 0:
            target.parent.mkdir(exist_ok=True)
            while target.exists():
                target = target.with_name(target.name + "_")
            (self.directory / step).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoint set aside")


def check_same(wanted: Any, stored: Any, source: str) -> None:
    """Raises MismatchError at the first leaf of `wanted` that `stored` lacks or has differently."""

    def leaves(tree):
        paths = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}

    available = leaves(stored)
    for name, leaf in leaves(wanted).items():
        shape = getattr(available.get(name), "shape", None)
        if shape != leaf.shape:
            found = "no such parameter" if shape is None else f"shape {shape}"
            raise MismatchError(
                f"Parameter {name}: expected shape {leaf.shape}, but {source} has {found}. "
                "Is this the same network, EMA and optimizer configuration?"
            )
