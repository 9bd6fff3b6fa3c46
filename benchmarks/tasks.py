"""Long benchmarks as small processes that can be stopped: each makes one file, and is run once."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Task:
    """One process: `run` makes the file `output`, once the files `needs` are there."""

    name: str
    run: Callable[[], None]
    output: str
    needs: tuple[str, ...] = ()


def schedule(root: pathlib.Path, tasks: Sequence[Task], command: Sequence[str], jobs: int) -> None:
    """Run what is missing, `jobs` processes at a time, each on a core of its own.

    Args:
      root: folder of the outputs.
      tasks: in the order in which to start them.
      command: runs one of them, with --task=NAME added.
      jobs: processes at a time.
    """
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    running: dict[int, tuple[Task, subprocess.Popen]] = {}
    started: set[str] = set()
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def there(output: str) -> bool:
        return (root / output).exists()

    while any(not there(task.output) for task in tasks):
        for core, (task, process) in list(running.items()):
            if process.poll() is not None:
                del running[core]
                if process.returncode:
                    sys.exit(f"{task.name} failed; see {logs / task.name}.log")
                print(f"{time.strftime('%H:%M:%S')} {task.name}", flush=True)
        ready = [
            task for task in tasks
            if task.name not in started and not there(task.output) and all(map(there, task.needs))
        ]  # fmt: skip
        for core in [c for c in cores if c not in running][: len(ready)]:
            task = ready.pop(0)
            started.add(task.name)
            with (logs / f"{task.name}.log").open("ab") as log:
                running[core] = task, subprocess.Popen(
                    ["taskset", "-c", str(core), *command, f"--task={task.name}"],
                    stdout=log,
                    stderr=log,
                )  # fmt: skip
        time.sleep(0.5)
