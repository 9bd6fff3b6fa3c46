"""The flags of commands that several processes run together, and how these processes meet."""

import jax
from absl import flags

from launch import common

COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "Several hosts: address of process 0, HOST:PORT, or auto."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Several hosts: how many processes.", lower_bound=1
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Several hosts: number of this process, from 0.", lower_bound=0
)


def connect() -> None:
    """Join the processes that the flags name; call it before JAX is used.

    Stops with a message if the flags do not fit together. RuntimeError: `auto` finds no cluster, or
    the processes do not meet within five minutes.
    """
    address, count, number = COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value
    if address is None:
        if count is not None or number is not None:
            common.stop("--num_processes and --process_id need --coordinator=HOST:PORT.")
        return
    if address == "auto":
        try:
            jax.distributed.initialize()
        except ValueError as error:
            raise RuntimeError(
                "--coordinator=auto found no TPU pod and no Slurm step; give --coordinator="
                f"HOST:PORT, --num_processes and --process_id instead ({error})"
            ) from error
        return
    if not address.rpartition(":")[2].isdigit() or count is None or number is None:
        common.stop(
            f"--coordinator is {address!r}; expected auto, or HOST:PORT together with "
            "--num_processes and --process_id."
        )
    if number >= count:
        common.stop(f"--process_id is {number}; expected 0 to {count - 1} for {count} processes.")
    jax.distributed.initialize(address, count, number)
