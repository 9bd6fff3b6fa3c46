"""The curves of a training for other programs: TensorBoard, and Weights & Biases."""

import json
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from mclr_jax import extras
from mclr_jax.files import flat, write_atomically


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
