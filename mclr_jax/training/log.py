"""The log of a training: progress as a bar or as lines, JSON lines and curves."""

import datetime
import functools
import json
import os
import pathlib
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

from mclr_jax import extras
from mclr_jax.files import append, flat, read_lines, write_atomically
from mclr_jax.training.devices import is_first, peak_memory

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
    """A bar on a terminal, elsewhere a line at least every 15 seconds; a context manager.

    It is shown by the first of several processes.
    """

    def __init__(self, total: int | None, unit: str, done: int = 0):
        quiet = not is_first()
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


class TensorBoard:
    """Scalars and images in a folder of events, with config, device and hyper-parameters.

    Events after `start` are not shown: they are from a run that was killed. MissingExtraError: the
    library is not installed.
    """

    def __init__(self, folder: pathlib.Path, start: int, config: Mapping[str, Any], device: str):
        library = extras.needed("tensorboardX", "tensorboard")  # imports PyTorch if it is installed
        self._writer = library.SummaryWriter(str(folder), purge_step=start + 1)
        values = {key: _plain(value) for key, value in flat(dict(config)).items()}
        texts = {"config": "".join(f"    {key} = {value}\n" for key, value in values.items()),
                 "device": device}  # fmt: skip
        for name, text in texts.items():
            if text:
                self._writer.add_text(name, text, start)
        if values:  # as add_hparams does, which would make a run of its own
            made = extras.needed("tensorboardX.summary", "tensorboard")
            experiment, session, _ = made.hparams(values, dict.fromkeys(("loss", "eval_loss"), 0.0))
            for summary in (experiment, session):
                self._writer.file_writer.add_summary(summary, start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        self._writer.add_image(name, array, step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """The same for a project of Weights & Biases; a resumed training continues its run there.

    WANDB_MODE=offline keeps all in `workdir`/wandb, for `wandb sync`. MissingExtraError: the
    library is not installed. RuntimeError: no run can be made there.
    """

    def __init__(
        self, workdir: pathlib.Path, project: str, config: Mapping[str, Any], device: str
    ) -> None:
        self._library = extras.needed("wandb", "wandb")
        name = workdir / "wandb" / "run.txt"
        if not name.exists():
            write_atomically(name, uuid.uuid4().hex[:12])
        try:
            self._run = self._library.init(
                project=project, id=name.read_text(), name=workdir.resolve().name, resume="allow",
                dir=str(workdir), config={**config, "device": device},
                settings=self._library.Settings(console="off"),
            )  # fmt: skip
        except self._library.errors.Error as error:
            raise RuntimeError(
                f"Weights & Biases makes no run of project {project!r} ({error}): run wandb login, "
                "set WANDB_MODE=offline, or leave config.log.wandb empty."
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")  # those after a checkpoint are sent again

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        self._run.log({name: self._library.Image(array), "step": step})

    def close(self) -> None:
        self._run.finish()


def _plain(value: Any) -> bool | int | float | str:
    """A value as TensorBoard's table of hyper-parameters takes it."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value)


class Writer:
    """Writes scalars, with the time, to `workdir`/metrics.jsonl, and to TensorBoard; a context
    manager.

    Progress is shown, see `Progress`, with a line for each report. Rates exclude the compilation,
    which is announced. Records after `start_step`, from a run that was killed after its last
    checkpoint, are removed, so that each step has one record. TensorBoard, and Weights & Biases if
    `wandb` names a project there, get the config, the device, examples per second and memory, too.
    The first of several processes alone writes.
    """

    def __init__(
        self, workdir: str | pathlib.Path, start_step: int, num_steps: int, *,
        config: Mapping[str, Any] | None = None, device: str = "", batch_size: int = 0,
        wandb: str = "",
    ) -> None:  # fmt: skip
        self._enabled, self._compiled, self._step = is_first(), False, start_step
        self._made = time.monotonic()
        self._progress = Progress(num_steps, "step", start_step)
        self._workdir, self._start, self._batch_size = pathlib.Path(workdir), start_step, batch_size
        self._config, self._device, self._project = config or {}, device, wandb
        self._rated: tuple[int, float] | None = None  # step and time of the last report
        if not self._enabled:
            return
        self._path = self._workdir / "metrics.jsonl"
        kept = [record for record in read_lines(self._path) if record["step"] <= start_step]
        write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))

    @functools.cached_property
    def _curves(self) -> list[TensorBoard | Wandb]:
        found: list[TensorBoard | Wandb] = []
        try:
            folder = self._workdir / "tensorboard"
            found.append(TensorBoard(folder, self._start, self._config, self._device))
        except extras.MissingExtraError as error:
            say(f"No curves for TensorBoard are written: {error}")
        if self._project:
            found.append(Wandb(self._workdir, self._project, self._config, self._device))
        return found

    def __enter__(self) -> "Writer":
        if self._enabled:
            if self._project:  # its errors come before the first step
                self._curves  # noqa: B018
            say("Compiling the training step ...")
        return self

    def __exit__(self, *_) -> None:
        if self._enabled:
            self._progress.__exit__()
            for curves in vars(self).get("_curves", ()):
                curves.close()

    def progress(self, step: int) -> None:
        """Show this step, if it is time to; the first call ends the compilation."""
        count, self._step = step - self._step, step
        if self._compiled:
            self._progress.update(count)
            return
        self._compiled, self._rated = True, (step, time.monotonic())
        self._progress.restart(count)
        if self._enabled:
            say(f"Compiled in {time.monotonic() - self._made:.1f} s.")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write one record, and a short form of it to the bar or, without a terminal, to a line."""
        if not self._enabled:
            return
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        append(self._path, json.dumps({"step": step, **values, "time": now}) + "\n")
        for curves in self._curves:
            curves.scalars(step, {**values, **self._costs(step)})
        self._progress.line(", ".join(f"{name} {value:.4g}" for name, value in values.items()))

    def _costs(self, step: int) -> dict[str, float]:
        """Examples per second since the last report, and memory; none twice for one step."""
        now, since = time.monotonic(), self._rated
        if since is None or step <= since[0]:
            return {}
        self._rated = step, now
        rate = (step - since[0]) * self._batch_size / max(now - since[1], 1e-9)
        return {"images_per_second": rate, "peak_memory_gib": peak_memory() / 2**30}

    def image(self, step: int, name: str, array) -> None:
        """Write an (H, W, 3) uint8 image to TensorBoard, and to Weights & Biases."""
        for curves in self._curves if self._enabled else ():
            curves.image(step, name, array)
