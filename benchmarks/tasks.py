"""Long benchmarks as small processes that can be stopped: each makes one file, and is run once."""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclasses.dataclass(frozen=True)
class Task:
    """One process: `run` makes the file `output`, once the files `needs` are there."""

    name: str
    run: Callable[[], None]
    output: str
    needs: tuple[str, ...] = ()


class Files:
    """JSON files under a folder `root`."""

    root: pathlib.Path

    def write(self, name: str, value: Any) -> None:
        from mclr_jax.run import write_atomically

        path = self.root / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value, indent=1))

    def read(self, name: str) -> Any:
        return json.loads((self.root / f"{name}.json").read_text())


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `run`."""
    parser.add_argument("--jobs", type=int, default=2, help="tasks at a time, one core each")
    parser.add_argument("--task", help="run this task alone, in this process")


def run(root: pathlib.Path, tasks: Sequence[Task], arguments: argparse.Namespace) -> dict:
    """Run the task of `arguments` and exit, or all that are missing.

    Returns:
      what made the results: command, revision, device, jax, seconds.
    """
    from launch.common import keep_compiled

    keep_compiled()
    if arguments.task:
        next(task for task in tasks if task.name == arguments.task).run()
        sys.exit()
    start = time.time()
    schedule(root, tasks, [sys.executable, *sys.argv], arguments.jobs)
    import jax

    from mclr_jax.training.devices import banner

    revision = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    )
    script, *flags = sys.argv
    return {
        "command": " ".join(["python", f"benchmarks/{pathlib.Path(script).name}", *flags]),
        "revision": revision.stdout.strip(),
        "device": banner(),
        "jax": jax.__version__,
        "seconds_of_this_call": round(time.time() - start),
    }


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
