"""The output of a command: lines of the log with the time, and errors of others in one line."""

import logging as python_logging
import sys
import threading
import traceback
from typing import Any

from absl import logging


def set_up() -> None:
    """Show the log of this project, and of errors only what helps; for the whole process."""
    logging.use_absl_handler()
    handler = logging.get_absl_handler()
    handler.setFormatter(python_logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    handler.addFilter(_shown)
    sys.excepthook = _report
    threading.excepthook = _report_thread
    logging.set_verbosity(max(logging.get_verbosity(), logging.INFO))


def _shown(record: python_logging.LogRecord) -> bool:
    """True for log records to show: those of this project, and errors of others in one line.

    Orbax writes dozens of records a checkpoint.
    """
    if "mclr_jax" in record.pathname or "launch" in record.pathname:
        return True
    record.exc_info = record.exc_text = None
    return record.levelno > python_logging.WARNING


def _report(kind: type, error: BaseException, trace: Any) -> None:
    """Print an error, except the one of Orbax's threads after each file that cannot be used."""
    if str(error) != "Event loop is closed":
        sys.__excepthook__(kind, error, trace)


def _report_thread(failed: Any) -> None:
    """Print in one line the error of a thread, such as those that write to a full disk.

    Those of TensorBoard come after the error of the training's own log on that disk.
    """
    frames = traceback.extract_tb(failed.exc_traceback)
    if not any("tensorboardX" in frame.filename for frame in frames):
        print(f"{failed.exc_type.__name__}: {failed.exc_value} (in a thread)", file=sys.stderr)
