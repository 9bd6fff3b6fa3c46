"""The lock of a directory, in which one process trains at a time."""

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator

from absl import logging

from mclr_jax.files import write_atomically

BEAT = 20.0  # seconds between two signs of life that a trainer gives in its lock
SILENCE = 120.0  # seconds without one, after which a trainer on another host has ended


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a directory, so that only one process trains in it.

    Raises RuntimeError if another process holds the lock, unless that process of this host has
    ended, or its host has given no sign of life for SILENCE seconds.
    """
    path, host = workdir / "lock", socket.gethostname()
    born = _born(os.getpid())
    mine = {"host": host, "pid": os.getpid(), "since": time.ctime(), "born": born, "beat": BEAT}
    while not _create(path, json.dumps(mine)):
        with contextlib.suppress(FileNotFoundError):  # the lock was released in between
            try:
                holder = json.loads(path.read_text())
                here = holder["host"] == host
                ended = _born(holder["pid"]) != holder["born"] if here else False
            except (ValueError, KeyError, TypeError):
                holder, here, ended = dict.fromkeys(mine, "unknown"), True, False
            if not (ended or (not here and "beat" in holder and _is_silent(path))):
                raise RuntimeError(
                    f"Process {holder['pid']} on {holder['host']} has trained in {workdir} since "
                    f"{holder['since']}; wait for its end, or use another --workdir. If that host "
                    f"no longer runs it, delete {path}."
                )
            path.unlink()
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, done), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        path.unlink(missing_ok=True)


def _beat(path: pathlib.Path, done: threading.Event) -> None:
    """Change the time of a file every BEAT seconds, until `done` is set."""
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _is_silent(path: pathlib.Path) -> bool:
    """True if the time of a file stays the same for SILENCE seconds; clocks may differ."""
    logging.warning("Waiting at most %.0f s for a sign of life in %s.", SILENCE, path)
    before, end = path.stat().st_mtime_ns, time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(min(SILENCE, 1.0))
        if path.stat().st_mtime_ns != before:
            return False
    return True


def _create(path: pathlib.Path, text: str) -> bool:
    """Make a file with this text at once; False if the file exists."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    write_atomically(own, text)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        own.unlink()
    return True


def _born(pid: int) -> str | None:
    """The mark of a running process, beside its number; None if no process has the number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user
        pass
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""
