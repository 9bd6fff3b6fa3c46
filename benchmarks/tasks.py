"""Long benchmarks as small processes that can be stopped: each makes one file, and is run once.

Importing it makes `configs` and `launch` importable, whatever folder a script is started from. JAX
is imported where it is used: some processes set it up first, or do without.
"""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT))

from mclr_jax.files import flat, provenance, write_json  # noqa: E402


class Rows:
    """The rows of a result file, by default benchmarks/results/NAME.json; each is made once."""

    def __init__(self, path: str | pathlib.Path):
        self.path = RESULTS / f"{path}.json" if isinstance(path, str) else path

    def content(self) -> dict[str, Any]:
        """All that is stored, read anew: another process may have written since."""
        return json.loads(self.path.read_text()) if self.path.exists() else {"rows": []}

    def row(
        self, asked: Mapping[str, Any], make: Callable[[], Mapping[str, Any]], kind: str = "rows"
    ) -> dict[str, Any]:
        """The first row that has all that is asked; if there is none it is made and stored."""
        asked = json.loads(json.dumps(asked))
        if found := made(self.content().get(kind, []), asked):
            return found
        from mclr_jax.training.devices import banner

        new = {**asked, **make(), **provenance(), "device": banner()}
        content = self.content()
        content[kind] = [*content.get(kind, []), new]
        write_json(self.path, content)
        print({k: v for k, v in new.items() if not isinstance(v, list | dict)}, flush=True)
        return new


@dataclasses.dataclass(frozen=True)
class Task:
    """One process: `run` makes the file `output`, once the files `needs` are there."""

    name: str
    run: Callable[[], None]
    output: str
    needs: tuple[str, ...] = ()


class Files:
    """JSON files under a folder `root`, each with what made it."""

    root: pathlib.Path

    def write(self, name: str, value: Any, workdir: pathlib.Path | None = None) -> None:
        """Write NAME.json; `workdir` is that of the run whose weights were used."""
        made_by = provenance() | ({"run": training(workdir)} if workdir else {})
        write_json(self.root / f"{name}.json", {"value": value, "made_by": made_by})

    def read(self, name: str) -> Any:
        """The value that was written."""
        return json.loads((self.root / f"{name}.json").read_text())["value"]

    def there(self, name: str) -> bool:
        """Whether it was written."""
        return (self.root / f"{name}.json").exists()

    def made_by(self, name: str) -> dict:
        """The command and the revision that wrote it and, where weights were used, their run."""
        return json.loads((self.root / f"{name}.json").read_text())["made_by"]

    def trainings(self, names: Iterable[str]) -> dict[str, dict]:
        """How the runs of these work directories were trained."""
        return {name: training(self.root / name) for name in names}

    def train(self, name: str, file: str, config: Any, may_diverge: bool = False) -> None:
        """Train to the end; only then is there NAME/done.json, which `training` reads.

        NAME is the work directory, under `root`; `config` has come from configs/FILE.py. With
        `may_diverge` that is an end, too.
        """
        from mclr_jax import runs
        from mclr_jax.main import train
        from mclr_jax.training.loop import NonFiniteError

        ended: dict[str, Any] = {}
        try:
            step = int(train(config, self.root / name).step)
        except NonFiniteError as error:
            found = re.search(r"in step (\d+)", str(error))
            if not may_diverge or not found:
                raise
            step, ended = int(found[1]), {"diverged": str(error)}
        count = parameters(runs.load(self.root / name).model)
        how = {"config": f"configs/{file}.py", "changes": differences(config, file)}
        self.write(f"{name}/done", {**how, "steps": step, "parameters": count, **ended})


def serve(first: Mapping[str, Any], run: Callable[[int], Mapping[str, Any]]) -> None:
    """The process of an `alternation.Worker`: `first` says that it is set up, `run` makes calls."""
    print(json.dumps(first), flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), flush=True)


def done(workdir: str) -> str:
    """The file that says that a training has come to its end."""
    return f"{workdir}/done.json"


def training(workdir: pathlib.Path) -> dict:
    """What was trained in a work directory, and by what command and revision.

    It has name, config, changes (by key), steps, parameters, command, revision and, where the run
    has diverged, the message.
    """
    done = json.loads((workdir / "done.json").read_text())
    return {"name": workdir.name, **done["value"], **done["made_by"]}


def config_of(file: str, changes: Mapping[str, Any] = {}) -> Any:
    """configs/FILE.py with `changes`, whose keys have dots for levels.

    Where SECTION.name is changed, the section gets the options of its new name.
    """
    from mclr_jax.configs import base

    config = importlib.import_module(f"mclr_jax.configs.{file}").get_config()
    for key, value in changes.items():
        section, _, field = key.rpartition(".")
        if field == "name" and section != "data":
            config[section] = base.options(value)
    config.update_from_flattened_dict(changes)
    return config


def differences(config: Any, file: str) -> dict[str, Any]:
    """The values of a config that configs/FILE.py does not have, by key; paths from ROOT."""

    def plain(config: Any) -> dict[str, Any]:
        return flat(json.loads(json.dumps(config.to_dict()).replace(f"{ROOT}/", "")))

    before = plain(config_of(file))
    return {k: v for k, v in plain(config).items() if k not in before or before[k] != v}


def made(rows: Sequence[dict], asked: Mapping[str, Any]) -> dict | None:
    """The first row that has all that was asked, or None."""
    return next((row for row in rows if asked.items() <= row.items()), None)


def parameters(model: Any) -> int:
    """The number of parameters of a model's network."""
    import jax

    from mclr_jax.model import shapes_of

    return sum(leaf.size for leaf in jax.tree.leaves(shapes_of(model)))


# The flags of `run`, and that of several seeds.
TASKS: dict[str, tuple] = {
    "jobs": (2, "tasks at a time, one core each"),
    "task": ("", "run this task alone, in this process"),
    "collect": (False, "collect what is there, run nothing"),
}
SEEDS = {"seeds": ((0, 1, 2), "of fine-tuning and sampling"), **TASKS}


def parsed(doc: str | None, **options: tuple) -> argparse.Namespace:
    """The flags of a driver, whose docstring is `doc`: see `add_flags`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    add_flags(parser, options)
    return parser.parse_args()


def add_flags(parser: argparse.ArgumentParser, options: Mapping[str, tuple] = TASKS) -> None:
    """Flags by name, each as (default, text) or (default, text, choices).

    The default is of the flag's type: False of a switch, a tuple of integers with commas between. A
    type in its place is that of a flag that must be given.
    """
    for name, (default, text, *choices) in options.items():
        if default is False:
            parser.add_argument(f"--{name}", action="store_true", help=text)
            continue
        needed = isinstance(default, type)
        kind = default if needed else type(default)
        if isinstance(default, tuple):
            kind = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
        given = {"required": True} if needed else {"default": default}
        given |= {"choices": choices[0]} if choices else {}
        parser.add_argument(f"--{name}", type=kind, help=text, **given)


def run(root: pathlib.Path, tasks: Sequence[Task], arguments: argparse.Namespace) -> dict:
    """Run the task of `arguments` and exit, or all that are missing; the provenance of a result."""
    from mclr_jax.cpu import keep_compiled, keep_freed_memory

    keep_compiled()
    keep_freed_memory()
    if arguments.task:
        next(task for task in tasks if task.name == arguments.task).run()
        sys.exit()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("Stopped; the same command continues."))
    start = time.time()
    if not arguments.collect:
        schedule(root, tasks, [sys.executable, *sys.argv], arguments.jobs)
    import jax

    from mclr_jax.training.devices import banner

    made_by = {**provenance(), "device": banner(), "jax": jax.__version__}
    return made_by | {"seconds_of_this_call": round(time.time() - start)}


def schedule(root: pathlib.Path, tasks: Sequence[Task], command: Sequence[str], jobs: int) -> None:
    """Run what is missing in this order, `jobs` processes at a time, each on a core of its own.

    `root` is the folder of the outputs; `command` runs one task, with --task=NAME added. If one
    fails, the others are told to stop, too, and this process exits.
    """
    cores = sorted(os.sched_getaffinity(0))[:jobs]
    running: dict[int, tuple[Task, subprocess.Popen]] = {}
    started: set[str] = set()
    logs = root / "logs"
    logs.mkdir(parents=True, exist_ok=True)

    def there(output: str) -> bool:
        return (root / output).exists()

    try:
        while running or any(not there(task.output) for task in tasks):
            for core, (task, process) in list(running.items()):
                if process.poll() is not None:
                    del running[core]
                    if process.returncode or not there(task.output):
                        sys.exit(f"{task.name} failed; see {logs / task.name}.log")
                    print(f"{time.strftime('%H:%M:%S')} {task.name}", flush=True)
            left = (task for task in tasks if task.name not in started and not there(task.output))
            ready = [task for task in left if all(map(there, task.needs))]
            for core in [c for c in cores if c not in running][: len(ready)]:
                task = ready.pop(0)
                started.add(task.name)
                own = ["taskset", "-c", str(core), *command, f"--task={task.name}"]
                with (logs / f"{task.name}.log").open("ab") as log:
                    running[core] = task, subprocess.Popen(own, stdout=log, stderr=log)
            time.sleep(0.5)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
