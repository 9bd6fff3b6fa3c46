"""Odd command lines, and trainings that are killed or out of disk space."""

import ctypes
import json
import os
import pathlib
import random
import re
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import outcomes
from absl.flags import FLAGS
from outcomes import FOREIGN, LOST, REFUSED, SILENT, WORKS, Case, is_ours
from robustness_files import images
from robustness_values import fits, small
from tasks import ROOT, config_of, differences

from mclr_jax import main, runs
from mclr_jax.assimilation.observe import Observations, Operator, Select, write
from mclr_jax.files import flat, read_lines

sys.path.insert(0, str(ROOT / "tests"))
# The server imports what all commands need, from this checkout, and forks a process for each.
os.environ["PYTHONPATH"] = ":".join(str(ROOT / name) for name in ("", "benchmarks", "tests"))
import commands

commands.SERVER.set_forkserver_preload([*commands.PRELOADED, __name__])
SECOND = "the same command, with space"
SECONDS = 60  # of a command, at most
WORDS = ("1e3", "abc", "", "nan", "inf", "-inf", "-1", "0", "1", "1e30", "1e-30", "None", "True",
         "(1,2)", "[1]", "0x10", "1_000", "1,2", "'x'", "é", "x" * 300, "../..", "0.5", "-0.5",
         "99999999999999999999", "1 2", "{}", "%s", "\n")  # fmt: skip
BAD_FLAGS = ("--nonsense", "--nonsense=1", "oops", "-x", "--", "--=", "--seed", "--help=3")
CONFIGS = {
    "digits": None, "configs": None, "nofile.py": None, "README.md": None, "": None, "/": None,
    "configs/base.py": None, "configs/digits.py:x": None,
    "syntax.py": "def get_config(:\n", "raises.py": "def get_config():\n    return 1 / 0\n",
    "none.py": "def get_config():\n    return None\n", "empty.py": "",
    "dict.py": "def get_config():\n    return {'num_steps': 1}\n",
    "imports.py": "import no_such_module\n", "binary.py": "\0\1\2",
    "sections.py": "from ml_collections import ConfigDict\ndef get_config():\n"
    "    return ConfigDict({'num_steps': 1})\n",
}  # fmt: skip
WRITTEN = ("workdir", "out", "cache", "to", "write_statistics")  # into these folders and files
# Where no command can write, or in a folder that is removed: a command that works leaves files.
PLACES = ("/proc/x/y", "/dev/null/x", "FILE", "x" * 300, "é\u2028/x", "../out/./y")


def observe(module: str, *argv: str) -> None:
    """In a new process: a command that also says where the error was raised that ended it."""
    from mclr_jax.launch import common

    stop = common.stop

    def told(message: str, status: int = 2) -> None:
        if (error := sys.exc_info()[1]) is not None and status == 1:
            print(f"RAISED BY {'us' if is_ours(error) else 'others'}", file=sys.stderr)
        stop(message, status)

    common.stop = told
    sys.argv, sys.orig_argv = [module, *argv], [sys.executable, "-m", module, *argv]
    runpy.run_module(f"launch.{module}", run_name="__main__", alter_sys=True)


def call(module: str, *argv: Any, log: pathlib.Path, target: Any = observe) -> tuple[Any, str]:
    """Exit status (None: no end in time) and output of a command."""
    log.unlink(missing_ok=True)
    process = commands.start(target, [module, *map(str, argv)], log)
    process.join(SECONDS)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None, log.read_text(errors="replace")
    return process.exitcode, log.read_text(errors="replace")


def judge(what: str, status: Any, output: str) -> Case:
    """The outcome of a command by its exit status and its output."""
    lines = [line for line in output.splitlines() if line.strip()]
    last = next((line for line in lines[::-1] if not line.startswith("RAISED BY")), "")[:300]
    if status is None:
        return Case(what, FOREIGN, f"no end within {SECONDS} s: {last}")
    if "Traceback" in output:
        errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Warning)\b", line)]
        last = (errors or [last])[-1][:300]
    if "Traceback" in output or status not in (0, 1, 2) or (status and not last):
        return Case(what, FOREIGN, f"exit status {status}: {last}")
    if "RAISED BY others" in output:
        return Case(what, FOREIGN, f"in the words of others: {last}")
    return Case(what, REFUSED if status else WORKS, last if status else "")


# ---- command lines -------------------------------------------------------------------------------


def small_flags(config: Any) -> list[str]:
    """The flags that change configs/digits.py to this config."""
    return [f"--config.{k}={v}" for k, v in differences(config, "digits").items()]


def flags_of(module: str) -> dict[str, Sequence[str]]:
    """The flags of a command, each with words that it may take.

    Those of several hosts, which wait for each other, are not among them.
    """
    before = {*FLAGS}
    runpy.run_module(f"launch.{module}")
    found = {name: getattr(FLAGS[name].parser, "enum_values", None) or ("1", "2", "0.5", "true")
             for name in sorted({*FLAGS} - before)}  # fmt: skip
    for name in found:  # the next command defines some of them, too
        delattr(FLAGS, name)
    return found


def valid(folder: pathlib.Path) -> dict[str, tuple[float, list[Any], dict[str, Any]]]:
    """How often a command is drawn, its arguments, and flags with which it works in seconds."""
    run, out, judge = folder / "run", folder / "out", folder / "judge"
    return {
        "train": (5, small_flags(cheap()), {"config": "configs/digits.py", "workdir": out / "w"}),
        "sample": (4, [], {"workdir": run, "out": out / "x.npz", "num_samples": 3, "steps": 2}),
        "evaluate": (3, [], {"workdir": run, "out": out / "x.json", "num_samples": 30,
                             "features": f"classifier:{judge}", "metrics": "fd,kid",
                             "batch_size": 32, "cache": folder / "cache"}),
        "icr": (1, [], {"workdir": run, "out": out / "x.json", "sigmas": "0.1", "num_images": 40}),
        "assimilate": (3, [], {"workdir": folder / "forcing", "observations": folder / "seen.npz",
                               "out": out / "x.npz", "ensemble": 2,
                               "scheme": "steps=2,first_steps=2"}),
        "calibrate": (1, [], {"workdir": run, "classifier": judge, "out": out / "x.json",
                              "samples_per_class": 2, "grid": 2}),
        "report": (1, [run], {"out": out / "x.html", "guidance_scales": "1", "per_class": 1}),
        "convert": (1, [], {"workdir": run, "to": out / "x.safetensors"}),
        "data": (1, [folder / "images"], {"out": out / "x.zip"}),
        "inspect": (1, [folder / "images"], {"out": out / "x.png"}),
        "encode": (0.5, [], {"data": "digits", "autoencoder": folder / "file", "latents": "edm2",
                             "out": out / "x.zip"}),
        "plan": (0.5, small_flags(cheap()), {"config": "configs/digits.py", "topology": "v5e:1x1",
                                             "out": out / "x.json"}),
        "demo": (0.3, [], {"per_class": 0, "workdir": out / "d"}),  # refused: it takes minutes
    }  # fmt: skip


def cheap() -> Any:
    return small("digits", {"num_steps": 1, "eval_examples": 0})


def command(rng: random.Random, folder: pathlib.Path, known: Mapping) -> tuple[str, list[str]]:
    """A random command line with one or two odd words, as module and arguments.

    `known` are the flags of each command, see `flags_of`.
    """
    commands, keys = valid(folder), sorted(flat(cheap().to_dict()))
    module = rng.choices([*commands], [often for often, *_ in commands.values()])[0]
    _, extra, given = commands[module]
    there = [str(folder / name) for name in ("run", "judge", "forcing", "seen.npz", "images")]
    for _ in range(rng.choice((1, 1, 2))):
        kind, name = rng.random(), rng.choice([*known[module]])
        words = [w for w in (*WORDS, *there) if module != "demo" or w[:1] != "1"]
        if kind < 0.12:
            extra.append(rng.choice(BAD_FLAGS))
        elif kind < 0.2 and module not in ("demo", "inspect"):  # which then write where they are
            given.pop(rng.choice([*given]), None)
        elif module in ("train", "plan") and kind < 0.75:
            key = rng.choice(keys)
            extra.append(f"--config.{key[:-1] if kind < 0.25 else key}={rng.choice(words)}")
        elif name == "config":
            config = rng.choice([*CONFIGS])
            given[name] = str(folder / config) if CONFIGS[config] is not None else config
        elif name in WRITTEN:
            word = rng.choice((*(w for w in WORDS if ".." not in w), *PLACES))
            word = word.replace("FILE", str(folder / "file"))
            given[name] = word if word.startswith("/") else f"{folder}/out/{word}"
        else:
            likely = module != "demo" and rng.random() < 0.3
            given[name] = rng.choice(known[module][name] if likely else words)
    return module, [*map(str, extra), *(f"--{name}={value}" for name, value in given.items())]


def finite(path: pathlib.Path) -> bool:
    """Whether all numbers of an output are finite, but for observations that are missing."""
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = {name: file[name] for name in file if name != "state_values"}
            numbers = [x for x in arrays.values() if x.dtype.kind in "fiu"]
            return bool(numbers) and all(np.isfinite(x).all() for x in numbers)
    text = path.read_text(errors="replace")
    return not re.search(r"\b(NaN|Infinity)\b", text) or path.suffix == ".html"


def silent(module: str, folder: pathlib.Path) -> str:
    """What is wrong with the outputs of a command that has succeeded, or nothing."""
    bad = [p.name for p in folder.glob("x.*") if p.suffix in (".npz", ".json") and not finite(p)]
    if module == "train" and (folder / "w" / "run.json").exists():
        run, defaults = runs.load(folder / "w"), flat(config_of("digits").to_dict())
        params, _ = run.weights()
        if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)):
            bad.append("weights that are not finite")
        for key, value in flat(dict(run.config)).items():
            if key in defaults and value != defaults[key] and not fits(key, value, defaults[key]):
                bad.append(f"{key}={value!r:.60}")
    return ", ".join(bad)


def prepare(folder: pathlib.Path) -> None:
    """A run, a classifier and the files that command lines name."""
    main.train(small("digits", {}), folder / "run")
    main.train(small("digits_classifier", {}), folder / "judge")
    sizes = {"data.trajectories": 4, "data.length": 16, "data.frames": 8,
             "data.path": str(folder / "trajectories")}  # fmt: skip
    main.train(small("lorenz63_forcing", sizes), folder / "forcing")
    values = np.sin(np.arange(12.0)).reshape(2, 6, 1)
    select = Operator(Select((0,)))
    write(folder / "seen.npz", Observations(values, select, 1.0))
    (folder / "file").write_text("a file, no folder\n")
    (folder / "images").mkdir()
    for name, content in images().items():
        (folder / "images" / name).write_bytes(content)
    for name, text in CONFIGS.items():
        if text is not None:
            (folder / name).write_text(text)


def cases(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """`count` command lines with mistakes."""
    rng, known = random.Random(seed), {module: flags_of(module) for module in valid(folder)}
    prepare(folder)
    for _ in range(count):
        shutil.rmtree(folder / "out", ignore_errors=True)
        (folder / "out").mkdir()
        module, arguments = command(rng, folder, known)
        written = " ".join(arguments).replace(f"{folder}/", "")
        status, output = call(module, *arguments, log=folder / "log")
        case = judge(f"launch.{module} {written}", status, output)
        if case.outcome == WORKS and (wrong := silent(module, folder / "out")):
            case = case._replace(outcome=SILENT, detail=wrong)
        yield case


# ---- processes -----------------------------------------------------------------------------------


def mounted(options: str, disk: str, *argv: str) -> None:
    """In a new process: launch.train on a file system of its own, then with that limit removed.

    `options` are those of a tmpfs, or "ro" for the folder itself without write access. The folder
    is copied to `disk`.after, with the exit status of both commands.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000 | (0 if os.geteuid() == 0 else 0x10000000)):  # NEWNS, NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")

    def mount(source: str, kind: Any, flags: int, data: Any) -> None:
        if libc.mount(source.encode(), disk.encode(), kind, flags, data):
            raise OSError(ctypes.get_errno(), "mount")

    libc.mount(None, b"/", None, 0x4000 | 0x40000, None)  # REC, PRIVATE
    if options == "ro":
        mount(disk, None, 0x1000, None)  # BIND
        mount(disk, None, 0x1000 | 0x20 | 1, None)  # REMOUNT, RDONLY
    else:
        mount("tmpfs", b"tmpfs", 0, options.encode())
    statuses, left = [], []
    for _ in range(2):
        if not (pid := os.fork()):
            observe("train", *argv)
            os._exit(0)
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        print(SECOND, flush=True)
        left += [str(p) for p in pathlib.Path(disk).rglob("*.tmp*")]
        if options == "ro":
            mount(disk, None, 0x1000 | 0x20, None)
        else:
            mount("tmpfs", None, 0x20, b"size=100m")
    shutil.copytree(disk, f"{disk}.after")
    pathlib.Path(f"{disk}.json").write_text(json.dumps({"statuses": statuses, "left": left}))


def difference(a: pathlib.Path, b: pathlib.Path) -> str:
    """How the last weights of two runs differ, or nothing."""
    names = ("none", "halflife")
    try:
        both = ([runs.load(path).weights(name)[0] for name in names] for path in (a, b))
        return outcomes.difference(*both)
    except Exception as error:
        return f"cannot be read: {error}"


def processes(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """`count` SIGKILLs, a third as many SIGTERMs and small disks, and a read-only one.

    Each training must end with the weights of one that ran undisturbed.
    """
    rng, third, few = random.Random(seed), max(count // 3, 1), count < 3
    steps, every = (30, 10) if few else (300, 20)
    config = small("digits", {"num_steps": steps, "checkpoint_every": every, "log_every": 5,
                              "optimizer.schedule": "constant", "network.dropout": 0.1,
                              "eval_examples": 0})  # fmt: skip
    flags = ["--config=configs/digits.py", *small_flags(config)]
    whole, log = folder / "whole", folder / "log"
    start = time.monotonic()
    status, output = call("train", *flags, f"--workdir={whole}", log=log)
    assert status == 0, output
    seconds = time.monotonic() - start
    signals = [signal.SIGKILL] * count + [signal.SIGTERM] * third
    yield from _stopped(rng, signals, flags, folder, seconds)
    sizes = [f"size={round(2 ** rng.uniform(5, 11))}k" for _ in range(third)]
    for options in sizes if few else [*sizes, "ro"]:
        yield _on_disk(options, flags, folder)


def _on_disk(options: str, flags: list[str], folder: pathlib.Path) -> Case:
    """A training on a small or read-only file system, and the same command later with space."""
    disk, log, what = folder / "disk", folder / "log", f"a file system with {options}"
    after, told = folder / "disk.after", folder / "disk.json"
    for path in (disk, after):
        shutil.rmtree(path, ignore_errors=True)
    told.unlink(missing_ok=True)
    disk.mkdir()
    _, output = call(options, disk, *flags, f"--workdir={disk}/run", log=log, target=mounted)
    output, _, later = output.partition(SECOND)
    if not told.exists():
        return Case(what, FOREIGN, output[-300:])
    (first, second), left = json.loads(told.read_text()).values()
    wrong = later.splitlines()[-1] if second else difference(folder / "whole", after / "run")
    if wrong:
        return Case(what, LOST, f"the same command later, with space: {wrong}")
    case = judge(what, first, output)
    return case._replace(outcome=FOREIGN, detail=f"left {left}: {case.detail}") if left else case


def _stopped(
    rng: random.Random, signals: list, flags: list[str], folder: pathlib.Path, full: float
) -> Iterator[Case]:
    """Signals at random moments; the same command continues until the end."""
    workdir, log = folder / "stopped", folder / "log"
    rng.shuffle(signals)
    for number in [*signals, None]:
        log.unlink(missing_ok=True)
        process = commands.start(observe, ["train", *flags, f"--workdir={workdir}"], log)
        moment = rng.uniform(0.1, 0.9) * full
        process.join(moment if number else None)
        if process.exitcode is None:
            os.kill(process.pid, number)
            process.join()
        status, what = process.exitcode, f"{number.name if number else 'no signal'}"
        if number and status == -number:  # SIGTERM before the train loop ends at once
            yield Case(f"{what} after {moment:.2f} s", WORKS)
        elif status == 143:
            saved = (int(path.name) for path in (workdir / "checkpoints").glob("[0-9]*"))
            done = (record["step"] for record in read_lines(workdir / "metrics.jsonl"))
            steps = max(saved), max(done, default=0)
            outcome = WORKS if steps[0] == steps[1] else LOST
            yield Case(f"{what} after {moment:.2f} s", outcome, f"checkpoint, last step: {steps}")
        else:
            case = judge("continued to the end", status, log.read_text(errors="replace"))
            wrong = difference(folder / "whole", workdir)
            yield Case(case.what, LOST, wrong) if wrong else case
            shutil.rmtree(workdir)
