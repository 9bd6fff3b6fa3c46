"""The outcome of a use with odd or hostile input; see benchmarks/robustness.py."""

import collections
import contextlib
import logging
import pathlib
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from tasks import ROOT  # makes `launch` importable

from mclr_jax.launch.common import USER_ERRORS

WORKS, REFUSED, WARNED = "works", "refused", "warned"
FOREIGN, SILENT, LOST = "FOREIGN", "SILENT", "LOST"
GOOD, BAD = (WORKS, REFUSED, WARNED), (FOREIGN, SILENT, LOST)
OURS = tuple(str(ROOT / folder) + "/" for folder in ("mclr_jax", "launch"))


class Case(NamedTuple):
    """One use: what was done, its outcome, and the message or the difference."""

    what: str
    outcome: str
    detail: str = ""


class TimeoutExpired(BaseException):
    """The call of `attempt` has not ended in time."""


def is_ours(error: BaseException) -> bool:
    """Whether this project raised the error on purpose: a USER_ERROR raised by a line of its own.

    An error of the operating system that names its file is clear, too.
    """
    if isinstance(error, OSError) and error.filename:
        return True
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return isinstance(error, USER_ERRORS) and frame.f_code.co_filename.startswith(OURS)


@contextlib.contextmanager
def warnings() -> Iterator[list[str]]:
    """The warnings that this project logs meanwhile."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.WARNING and record.pathname.startswith(OURS):
                found.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("absl")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def attempt(call: Callable[[], Any], seconds: float = 120) -> tuple[str, str, Any]:
    """(outcome, detail, result of `call` or None): WORKS, WARNED, REFUSED or FOREIGN."""

    def expire(*_: Any) -> None:
        raise TimeoutExpired

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings() as found:
            value = call()
    except TimeoutExpired:
        return FOREIGN, f"no end within {seconds} s", None
    except Exception as error:
        first = f"{type(error).__name__}: {error}".partition("\n")[0]
        if is_ours(error):
            return REFUSED, first, None
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(OURS)]
        at = f"{pathlib.Path(own[-1].filename).relative_to(ROOT)}:{own[-1].lineno}" if own else "?"
        return FOREIGN, f"{first} [{at}, {frame.f_code.co_name}:{line}]", None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return (WARNED, found[0][:300], value) if found else (WORKS, "", value)


def difference(found: Any, expected: Any, tolerance: float = 0.0) -> str:
    """How two trees of weights differ by more than the tolerance, or nothing."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    most = max(float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)
    return f"weights differ by {most:.3g}" if not most <= tolerance else ""


def summary(cases: Iterable[Case]) -> dict[str, Any]:
    """The number of cases by outcome, and every case with a bad outcome."""
    cases = list(cases)
    counts = collections.Counter(case.outcome for case in cases)
    bad = [case._asdict() for case in cases if case.outcome in BAD]
    return {"cases": len(cases), **{name: counts[name] for name in (*GOOD, *BAD)}, "bad": bad}
