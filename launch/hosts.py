"""The flags of commands that several processes run together, and how these processes meet."""

import pathlib

from absl import flags

from mclr_jax import meeting
from mclr_jax.launch import common

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: address of process 0, HOST:PORT, or auto."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Several hosts: how many processes.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Several hosts: number of this process, from 0.", lower_bound=0
)


def connect(workdir: str) -> None:
    """Join the processes that the flags name; call it before JAX is used.

    Stops with a message if the flags do not fit together. RuntimeError: `auto` finds no cluster,
    the processes do not meet within five minutes, or see different work directories.
    """
    address, count, number = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    if address is None:
        if count is not None or number is not None:
            common.stop("--num_processes and --process_id need --coordinator=HOST:PORT.")
        return
    known = address.rpartition(":")[2].isdigit() and count is not None and number is not None
    if address != "auto" and not known:
        common.stop(
            f"--coordinator is {address!r}; expected auto, or HOST:PORT together with "
            "--num_processes and --process_id."
        )
    if known and number >= count:
        common.stop(f"--process_id is {number}; expected 0 to {count - 1} for {count} processes.")
    meeting.meet(address, count, number)
    meeting.share(pathlib.Path(workdir))
