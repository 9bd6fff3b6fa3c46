"""Where numbers go during training: a progress bar, JSON lines and TensorBoard."""

import json
import pathlib
import sys
import time

import tensorboardX
import tqdm
from absl import logging

from mclr_jax.files import read_lines, write_atomically


class Writer:
    """Writes scalars to `workdir`/metrics.jsonl and TensorBoard, and shows progress.

    On a terminal a bar with steps/s and time left; elsewhere one plain line per report. Records
    beyond `start_step`, left by a run that was killed after its last checkpoint, are removed, so
    that every step stands once. A context manager.

    Args:
      workdir: directory of the run.
      start_step: the step that training starts from.
      num_steps: the step that it ends with.
      enabled: False writes nothing, for all processes but the first.
    """

    def __init__(self, workdir, start_step: int, num_steps: int, enabled: bool = True):
        self._enabled = enabled
        self._start, self._started = start_step, time.monotonic()
        self._num_steps = num_steps
        if not enabled:
            return
        path = pathlib.Path(workdir) / "metrics.jsonl"
        _drop_records_after(path, start_step)
        self._file = path.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(pathlib.Path(workdir) / "tensorboard"), purge_step=start_step + 1
        )
        self._bar = tqdm.tqdm(
            total=num_steps,
            initial=start_step,
            unit="it",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()

    def progress(self, step: int) -> None:
        """Move the bar."""
        if self._enabled:
            self._bar.update(step - self._bar.n)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write one record; a short form goes to the bar or, without a terminal, to a line."""
        if not self._enabled:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        text = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        speed = (step - self._start) / max(time.monotonic() - self._started, 1e-9)
        left = time.gmtime((self._num_steps - step) / speed) if speed else time.gmtime(0)
        eta = time.strftime("%H:%M:%S", left)
        logging.info("step %d/%d (%.3g it/s, %s left): %s", step, self._num_steps, speed, eta, text)

    def image(self, step: int, name: str, array) -> None:
        """An (H, W, 3) uint8 picture for TensorBoard."""
        if self._enabled:
            self._tensorboard.add_image(name, array, step, dataformats="HWC")


def _drop_records_after(path: pathlib.Path, step: int) -> None:
    kept = [json.dumps(record) + "\n" for record in read_lines(path) if record["step"] <= step]
    write_atomically(path, "".join(kept))
