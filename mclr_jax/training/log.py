"""The log of a training: progress as a bar or as lines, JSON lines and TensorBoard."""

import functools
import json
import os
import pathlib
import sys
import time
from typing import Any

import tqdm

from mclr_jax import extras
from mclr_jax.files import append, read_lines, write_atomically

SILENCE = 15  # seconds without a line, at most


def _on_a_terminal() -> bool:
    """True if a bar can be drawn: notebooks give commands a terminal of width 0."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # a replaced or closed stderr
        return False


def say(text: str) -> None:
    """Print a line with the time of day to stderr, above a bar if there is one."""
    tqdm.tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


class Progress:
    """A bar on a terminal, elsewhere a line at least every 15 seconds; a context manager."""

    def __init__(self, total: int | None, unit: str, done: int = 0, quiet: bool = False):
        self._total, self._unit, self._done, self._quiet = total, unit, done, quiet
        self._bar = tqdm.tqdm(
            total=total, initial=done, unit=unit, dynamic_ncols=True,
            disable=quiet or not _on_a_terminal(),
        )  # fmt: skip
        self.restart()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def restart(self, count: int = 0) -> None:
        """Add `count` done; the rate counts from here."""
        self._done += count
        self._first, self._began = self._done, time.monotonic()
        self._shown = self._began
        self._bar.initial = self._bar.n = self._done
        self._bar.unpause()

    def update(self, count: int) -> None:
        """Add `count` done, and show it if it is time to."""
        self._done += count
        self._bar.update(count)
        if self._bar.disable and time.monotonic() - self._shown >= SILENCE:
            self.line()

    def line(self, text: str = "") -> None:
        """Show the progress and a text now."""
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        self._shown = time.monotonic()
        speed = (self._done - self._first) / max(self._shown - self._began, 1e-9)
        left = ((self._total or 0) - self._done) / speed if speed > 0 and self._total else None
        eta = "" if left is None else f", {tqdm.tqdm.format_interval(left)} left"
        count = f"{self._done}/{self._total}" if self._total else self._done
        if not self._quiet:
            say(f"{self._unit} {count} ({speed:.3g} it/s{eta}){text and ': '}{text}")


class _Nowhere:
    """A writer of TensorBoard without effect, whose library is not installed."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Writer:
    """Writes scalars to `workdir`/metrics.jsonl and TensorBoard; a context manager.

    Progress is shown, see `Progress`, with a line for each report. Rates exclude the compilation,
    which is announced. Records after `start_step`, from a run that was killed after its last
    checkpoint, are removed, so that each step has one record. With `enabled` false, as in all
    processes except the first, nothing is written.
    """

    def __init__(self, workdir, start_step: int, num_steps: int, enabled: bool = True):
        self._enabled, self._compiled, self._step = enabled, False, start_step
        self._made = time.monotonic()
        self._progress = Progress(num_steps, "step", start_step, quiet=not enabled)
        if not enabled:
            return
        path, self._events = (pathlib.Path(workdir) / n for n in ("metrics.jsonl", "tensorboard"))
        kept = [record for record in read_lines(path) if record["step"] <= start_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept))
        self._path, self._purged = path, start_step + 1

    @functools.cached_property
    def _tensorboard(self) -> Any:
        try:  # PyTorch is imported, too, where it is installed
            library = extras.needed("tensorboardX", "tensorboard")
        except extras.MissingExtraError as error:
            say(f"No curves for TensorBoard are written: {error}")
            return _Nowhere()
        return library.SummaryWriter(str(self._events), purge_step=self._purged)

    def __enter__(self) -> "Writer":
        if self._enabled:
            say("Compiling the training step ...")
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            self._progress.__exit__()
            if "_tensorboard" in vars(self):
                self._tensorboard.close()

    def progress(self, step: int) -> None:
        """Show this step, if it is time to; the first call ends the compilation."""
        count, self._step = step - self._step, step
        if self._compiled:
            self._progress.update(count)
            return
        self._compiled = True
        self._progress.restart(count)
        if self._enabled:
            say(f"Compiled in {time.monotonic() - self._made:.1f} s.")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write one record, and a short form of it to the bar or, without a terminal, to a line."""
        if not self._enabled:
            return
        append(self._path, json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)
        self._progress.line(", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def image(self, step: int, name: str, array) -> None:
        """Write an (H, W, 3) uint8 image to TensorBoard."""
        if self._enabled:
            self._tensorboard.add_image(name, array, step, dataformats="HWC")
