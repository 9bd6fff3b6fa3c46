"""The processes of a command meet, and an error of one ends all of them at once.

JAX's own calls abort a process after minutes if another one is absent or has ended. The processes
therefore tell each other what went wrong, through the store of JAX's distributed service.
"""

import atexit
import contextlib
import os
import pathlib
import secrets
import socket
import sys
import threading
import time
from typing import NoReturn

import jax

from mclr_jax.files import made
from mclr_jax.training.devices import service
from mclr_jax.training.log import say

PATIENCE = 300.0  # seconds until all processes must have met
WAIT = 15.0  # seconds between two lines of the log meanwhile
ANSWER = 60_000  # milliseconds in which a process that is there answers
LOOK = 10.0  # seconds in which a new file is seen by other hosts
_alone = threading.Event()  # set but while the processes of a command have met
_alone.set()


def join(folder: pathlib.Path, where: str | None, count: int | None, number: int | None) -> None:
    """`meet` at `where`, if there is such a place, and `share` the folder.

    ValueError: the values do not fit together.
    """
    if where is None:
        if count is not None or number is not None:
            raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT.")
        return
    if where != "auto":
        if not where.rpartition(":")[2].isdigit() or count is None or number is None:
            raise ValueError(
                f"--coordinator is {where!r}; expected auto, or HOST:PORT together with "
                "--num_processes and --process_id."
            )
        if number >= count:
            raise ValueError(
                f"--process_id is {number}; expected 0 to {count - 1} for {count} processes."
            )
    meet(where, count, number)
    share(folder)


def meet(where: str, count: int | None = None, number: int | None = None) -> None:
    """Join `count` processes at the address of process 0; `auto` finds all out of the cluster.

    RuntimeError: there is no such cluster, or not all processes are there within PATIENCE.
    """
    address = None if where == "auto" else where
    errors: list[Exception] = []

    def join() -> None:
        try:
            patience = int(2 * PATIENCE)  # at its end JAX would abort
            jax.distributed.initialize(address, count, number, initialization_timeout=patience)
        except Exception as error:
            errors.append(error)

    joining = threading.Thread(target=join, daemon=True)
    joining.start()
    end = time.monotonic() + PATIENCE
    while joining.is_alive() and (left := end - time.monotonic()) > 0:
        joining.join(min(WAIT, left))
        if joining.is_alive():
            say(f"Waiting for the other processes of --coordinator={where} ...")
    if joining.is_alive():
        raise RuntimeError(
            f"The processes of --coordinator={where} did not meet within {PATIENCE:.0f} s. Start "
            "all of --num_processes, with --process_id from 0 on, and let them reach that address."
        )
    if errors and isinstance(errors[0], ValueError):
        raise RuntimeError(
            f"--coordinator={where} found no TPU pod and no Slurm step; give --coordinator="
            f"HOST:PORT, --num_processes and --process_id instead ({errors[0]})"
        )
    if errors:
        raise errors[0]
    _alone.clear()
    listening = threading.Thread(target=_listen, daemon=True)
    listening.start()

    def leave() -> None:  # at the interpreter's end a thread may not return from the service
        _alone.set()
        listening.join()

    atexit.register(leave)


def share(folder: pathlib.Path) -> None:
    """RuntimeError in process 0, which ends the others, unless all see the same folder."""
    state = service()
    here = f"{folder.resolve()} on {socket.gethostname()}"
    if state.process_id:
        name, end = _answer("folder"), time.monotonic() + LOOK
        while not (seen := (folder / name).exists()) and time.monotonic() < end:
            time.sleep(0.2)
        state.client.key_value_set(f"mclr/sees {state.process_id}", "" if seen else here)
        _answer("shared")
        return
    with contextlib.suppress(OSError), made(folder):  # a run may be read only
        (mark := folder / f".shared-{secrets.token_hex(8)}").touch()
        state.client.key_value_set("mclr/folder", mark.name)
        others = {i: _answer(f"sees {i}") for i in range(1, state.num_processes)}
        mark.unlink()
        if blind := {i: place for i, place in others.items() if place}:
            places = ", ".join(f"{place} for process {i}" for i, place in blind.items())
            raise RuntimeError(
                f"--workdir is {here} for process 0, and another folder, {places}: name one on a "
                "disk that all hosts share."
            )
    state.client.key_value_set("mclr/folder", "", allow_overwrite=True)
    state.client.key_value_set("mclr/shared", "yes")


def end(message: str) -> None:
    """End all processes with the message of this one, or of the one whose error came first.

    Returns if there are no others.
    """
    if not _alone.is_set():
        _alone.set()
        state = service()
        try:
            state.client.key_value_set("mclr/error", f"Process {state.process_id}: {message}")
        except Exception:  # that of this process may follow from it
            with contextlib.suppress(Exception):  # the service has ended
                message = state.client.key_value_try_get("mclr/error")
        _exit(message)


def _answer(key: str) -> str:
    return service().client.blocking_key_value_get(f"mclr/{key}", ANSWER)


def _listen() -> None:
    while not _alone.wait(1):
        with contextlib.suppress(Exception):  # no error, or the service has ended
            message = service().client.key_value_try_get("mclr/error")
            if not _alone.is_set():  # meanwhile: it may be the message of this process
                _exit(message)


def _exit(message: str) -> NoReturn:
    """At once: what runs at the end of a program would wait for the others."""
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if service().process_id == 0:
        time.sleep(2)  # the others read the message from the service in this process
    os._exit(1)
