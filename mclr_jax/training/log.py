"""The log of a training: a progress bar, JSON lines and TensorBoard."""

import json
import os
import pathlib
import sys
import time

import tensorboardX
import tqdm
from absl import logging

from mclr_jax.files import read_lines, write_atomically

SILENCE = 15  # seconds without a line, at most


def _on_a_terminal() -> bool:
    """Whether a bar can be drawn: notebooks give commands a terminal of width 0."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except OSError:
        return False


class Writer:
    """Writes scalars to `workdir`/metrics.jsonl and TensorBoard; a context manager.

    Progress is shown as a bar on a terminal, elsewhere as a line for each report and at least every
    15 seconds. Rates exclude the compilation, which is logged. Records after `start_step`, from a
    run that was killed after its last checkpoint, are removed, so that each step has one record.
    With `enabled` false, as in all processes except the first, nothing is written.
    """

    def __init__(self, workdir, start_step: int, num_steps: int, enabled: bool = True):
        self._enabled, self._num_steps = enabled, num_steps
        self._start, self._started = start_step, 0.0  # of the steps that the rate counts
        self._made = self._shown = time.monotonic()
        if not enabled:
            return
        path, events = (pathlib.Path(workdir) / name for name in ("metrics.jsonl", "tensorboard"))
        kept = [record for record in read_lines(path) if record["step"] <= start_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = path.open("a")
        self._tensorboard = tensorboardX.SummaryWriter(str(events), purge_step=start_step + 1)
        bar = {"unit": "it", "dynamic_ncols": True, "disable": not _on_a_terminal()}
        self._bar = tqdm.tqdm(total=num_steps, initial=start_step, **bar)

    def __enter__(self) -> "Writer":
        if self._enabled:
            logging.info("Compiling the training step ...")
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            self._bar.close()
            self._file.close()
            self._tensorboard.close()

    def progress(self, step: int) -> None:
        """Show this step, if it is time to; the first call ends the compilation."""
        if not self._enabled:
            return
        now = time.monotonic()
        if not self._started:
            logging.info("Compiled in %.1f s.", now - self._made)
            self._start, self._started, self._shown = step, now, now
            self._bar.initial = self._bar.n = step
            self._bar.unpause()
        self._bar.update(step - self._bar.n)
        if self._bar.disable and now - self._shown >= SILENCE:
            self._line(step, "")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write one record, and a short form of it to the bar or, without a terminal, to a line."""
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
        self._line(step, f": {text}")

    def _line(self, step: int, text: str) -> None:
        self._shown = time.monotonic()
        speed = (step - self._start) / max(self._shown - self._started, 1e-9)
        eta = tqdm.tqdm.format_interval((self._num_steps - step) / speed) if speed > 0 else "?"
        logging.info("step %d/%d (%.3g it/s, %s left)%s", step, self._num_steps, speed, eta, text)

    def image(self, step: int, name: str, array) -> None:
        """Write an (H, W, 3) uint8 image to TensorBoard."""
        if self._enabled:
            self._tensorboard.add_image(name, array, step, dataformats="HWC")
