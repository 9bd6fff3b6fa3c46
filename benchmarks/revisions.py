"""Two checkouts of this repository side by side: the same bits, messages and speed.

  python benchmarks/revisions.py --before=DIR --after=DIR     # benchmarks/results/revisions.json

Every measurement is a process in the folder of one checkout, with the modules of that checkout.
Sections that are not run again keep their results.

  bits     trainings of 20 steps in three layouts on 4 devices: metrics, states, samples
  runs     runs written by the checkout before, which the one after samples, continues, fine-tunes
  errors   wrong configs and command lines: exit status and message; also printed as a table
  startup  s and CPU s until launch.train is imported and until its first step, and their ratios
  speed    steps/s and steps/CPU s of trainings whose windows of steps alternate, and their ratios
"""

import argparse
import importlib
import json
import multiprocessing
import os
import pathlib
import re
import resource
import runpy
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from mclr_jax.files import digest, provenance, write_json
from mclr_jax.training.devices import banner

HERE = pathlib.Path(__file__).resolve()
SHORT = {"num_steps": 20, "log_every": 5, "checkpoint_every": 20, "eval_examples": 64}
UNET = {"network.channels": 16, "network.channel_mult": (1, 2), "network.num_blocks": 1,
        "network.attention_resolutions": (4,), "data.name": "digits", "sigma_data": 0.0,
        "batch_size": 32, "optimizer.warmup_steps": 10, "ema.snapshot_every": 10}  # fmt: skip
# Trainings by name: the config, and its changes; "@NAME" is the directory of another training.
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("digits", {}),
    "classifier": ("digits_classifier", {}),
    "digits_mclr": ("digits_mclr", {"init_from": "@digits",
                                    "companions.classifier": "@classifier"}),
    "mixture": ("mixture", {"sample_every": 20, "grad_accumulation": 2, "icr.every_steps": 20,
                            "icr.num_images": 512}),
    "mixture_mclr": ("mixture_mclr", {"init_from": "@mixture", "strength": (0.0, 2.0)}),
    "mixture_factors": ("mixture_mclr", {"init_from": "@mixture",
                                         "class_strengths": (1.0, 0.5, 2.0)}),
    "unet": ("cifar10", UNET),  # with dropout, augmentation and snapshots
    "lorenz63": ("lorenz63_forcing", {"data.trajectories": 64, "data.length": 128}),
}  # fmt: skip
# Of the section `runs`: trainings, and those sampled with flags of launch.sample.
RUNS = ("digits", "classifier", "digits_mclr", "unet", "mixture")
SAMPLES = [("digits", "--seed=1"), ("digits", "--guidance_scale=2 --ema=none"),
           ("unet", "--ema=0.075"), ("digits_mclr", "--interpolation=0.5")]  # fmt: skip
# Wrong configs: a word is a case of flags --config.WORD, of which "&" joins several.
FLAGS = {
    "digits": """sede=1 network.widht=8 optimizer.lr=1 num_steps=abc num_steps=1.5 num_steps=0
        seed=-1 batch_size=0 grad_accumulation=7 optimizer=adam optimizer.learning_rate=nan
        optimizer.learning_rate=inf optimizer.learning_rate=-1e-3 optimizer.schedule=cosin
        ema.ramp_up=2 ema.power_stds=(0.5,) ema.power_stds=a sampler.method=hun
        sampler.sigma_min=100 sampler.rho=0 noise.name=loguniform noise.name=lognormla
        network.name=unet network.name=my.module:Net network.name=json:dumps network.patch_size=3
        network.heads=5 network.dropout=1.5 network.dtype=float16 objective.name=mcrl
        objective.name=mclr objective.label_dropout=2 objective.beta=1 preconditioning.name=edn
        network.name=mlp_classifier weight=natrual weight=fused_snr parallel=ddp data.name=digit
        data.name=npz:/nowhere.npz data.name=zip: data.limit=-5 data.augment=1.5 data.flip=maybe
        data.test=npz:/nowhere.npz data.resolution=16 sigma_data=-1 strength=(2.0,1.0)
        strength=(1.0,) class_strengths=(1.0,2.0) icr.sigma=0 icr.every_steps=1&icr.layer=nope
        posterior.name=clasifier init_from=/nowhere init_from=@classifier companions.weka=x
        require_accelerator=True""",
    "digits_mclr": """companions.classifier= posterior.name=
        init_from=/nowhere companions.classifier=/nowhere companions.classifier=@digits
        init_from=@classifier objective.negatives=posteriors objective.sigma_interval=(2.0,1.0)
        objective.negative_share=0.3 objective.beta=-1 network.width=48 class_strengths=(1.0,2.0)
        strength=(0.0,2.0)&class_strengths=(1,1,1,1,1,1,1,1,1,-1.0) objective.name=cca
        objective.name=ddo objective.name=classify data.name=mixture network.name=mlp_classifier""",
    "cifar10": "data.name=tfds:cifar11 network.architecture=edm3 network.channels=7",
    "lorenz63_forcing": "data.system=lorenz64 data.frames=0 noise.shared=2 noise.shred=1",
}
# The same by a line of a config file, in which `c` is the config.
LINES = {
    "digits": (
        "c.num_steps = '10'", "c.batch_size = True", "c.optimizer.learning_rate = '1e-3'",
        "c.data.flip = 1", "c.network.width = 96.0", "c.ema.power_stds = 0.1",
        "c.ema.power_stds = (0.1, 'a')", "c.sampler = None", "c.sampler.name = 'heun'",
        "c.noise = {'name': 'lognormal', 'mean': 'x', 'std': 1.2}", "c.noise.name = 3",
        "del c.optimizer", "del c.network", "del c.data.name", "c.objective = {'beta': 1.0}",
        "c.companions = 'runs/x'", "c.companions.weak = 3", "c.posterior.levels = 2",
        "c.extra = {'a': 1}", "c.seed = None", "c.network.depth = (1, 2)", "c.icr.num_images = 1",
        "c.strength = (0.0, 1.0, 2.0)", "c.weight = None", "raise KeyError('x')",
    ),
    "cifar10": ("c.network.dropout = '0.1'", "c.network.architecture = 3"),
}  # fmt: skip
COMMANDS = [f"--config=configs/{rest}" for rest in (
    "digits.py", "digit.py --workdir=@x", "digits.py --workdir=@x oops",
    "digits.py --workdir=@x --sede=1", "digits.py --workdir=@digits --config.network.width=48",
    "digits.py --workdir=@digits --config.data.limit=100",
    "digits_mclr.py --workdir=@digits --config.init_from=@digits "
    "--config.companions.classifier=@classifier",
)]  # fmt: skip
# Of the section `speed`: a config, its changes, the steps of a window; images of 32x32 are in @.
IMAGES = {"data.name": "npz:@images.npz", "batch_size": 16, "objective.label_dropout": 0.0}
SPEED: dict[str, tuple[str, dict[str, Any], int]] = {
    "digits": ("digits", {}, 20),
    "unet": ("cifar10", IMAGES | {
        "network.channels": 32, "network.channel_mult": (1, 2, 2), "network.num_blocks": 2,
        "network.attention_resolutions": (8,), "network.dtype": "float32"}, 4),
    "dit": ("digits", IMAGES | {"network.width": 192, "network.depth": 6}, 4),
}  # fmt: skip
SIDES = ("before", "after")
WINDOWS, ROUNDS = 11, 5  # of the sections `speed` and `startup`


# ---- in the process of a checkout ----------------------------------------------------------------


def config_of(file: str, changes: dict[str, Any], folder: str) -> Any:
    """configs/FILE.py with changes of JSON, in which lists are tuples, and "@" is the folder."""
    config = importlib.import_module(f"configs.{file}").get_config()
    for key, value in changes.items():
        value = value.replace("@", f"{folder}/") if isinstance(value, str) else value
        value = tuple(value) if isinstance(value, list) else value
        config.update_from_flattened_dict({key: value})
    return config


def train_all(folder: str, parallel: str) -> dict[str, str]:
    """Train all TRAININGS in a layout of devices; a digest of samples of each denoiser by name."""
    from mclr_jax import generate, runs
    from mclr_jax.main import train

    found = {}
    for name, (file, changes) in TRAININGS.items():
        train(config_of(file, SHORT | changes | {"parallel": parallel}, folder), f"{folder}/{name}")
        run = runs.load(f"{folder}/{name}")
        if not run.model.is_classifier:
            labels, params = np.resize(np.arange(run.model.null_label), 12), run.weights()[0]
            found[name] = digest(generate.generate(run.model, params, labels, run.sampler, seed=3))
    return found


def refusals(cases: list[list[str]], log: str) -> list[dict[str, Any]]:
    """Exit status and last line of `launch.train` with these flags, each in a forked process.

    A process ends where it has traced the training step, which accepts the config.
    """
    from mclr_jax.training.devices import Devices

    for module in ("launch.common", "launch.hosts", "mclr_jax.main", "sklearn.datasets"):
        importlib.import_module(module)

    def initialise(self: Any, draw: Any, complete: Any) -> Any:
        shapes = jax.eval_shape(lambda: complete(draw()))
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    def compile_step(self: Any, update: Any, original: Any = Devices.compile) -> Any:
        def traced(*arguments: Any) -> None:
            jax.eval_shape(original(self, update), *arguments)
            os._exit(0)

        return traced

    Devices.initialise, Devices.compile = initialise, compile_step  # type: ignore

    def child(arguments: list[str]) -> None:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        signal.alarm(200)
        sys.argv = ["launch.train", *arguments]
        runpy.run_module("launch.train", run_name="__main__", alter_sys=True)

    found = []
    for arguments in cases:
        process = multiprocessing.get_context("fork").Process(target=child, args=(arguments,))
        process.start()
        process.join()
        text = pathlib.Path(log).read_text().replace(os.getcwd(), "ROOT")
        last = re.sub(r"^\d\d:\d\d:\d\d ", "", (text.strip().splitlines() or [""])[-1])
        last = "an error without a message: " * ("Traceback (most recent" in text) + last
        found.append([process.exitcode, last if process.exitcode else "trains"])
    return found


def windows(name: str, folder: str, workdir: str) -> None:
    """Train without end; print the s and CPU s of each window of steps, then wait for a line."""
    from mclr_jax.main import train
    from mclr_jax.training.loop import Hook

    file, changes, steps = SPEED[name]
    long = {"num_steps": 10**6, "log_every": steps, "eval_examples": 0, "checkpoint_every": 0}
    began = time.monotonic(), time.process_time()

    def wait(moment: Any) -> None:
        nonlocal began
        jax.block_until_ready(moment.state)
        print(time.monotonic() - began[0], time.process_time() - began[1], flush=True)
        sys.stdin.readline()
        began = time.monotonic(), time.process_time()

    train(config_of(file, long | changes, folder), workdir, [Hook(steps, wait)])


# ---- beside both ---------------------------------------------------------------------------------


class Checkout:
    """A folder with the repository, and the processes that run in it."""

    def __init__(self, root: str, revision: str, cache: pathlib.Path):
        self.root, self.cache = pathlib.Path(root).resolve(), cache
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        self.revision = revision or subprocess.check_output(git, cwd=root, text=True).strip()

    def start(self, *what: Any, devices: int = 1, cache: Any = None, **options: Any) -> Any:
        """A process of `python WHAT`, or of a function of this file with arguments."""
        if callable(what[0]):
            what = (HERE, what[0].__name__, json.dumps(what[1:], default=str))
        options_of_xla = os.environ.get("XLA_FLAGS", "")
        environment = os.environ | {
            "PYTHONPATH": str(self.root), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{options_of_xla} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(cache or self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }  # fmt: skip
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([sys.executable, *map(str, what)], cwd=self.root, text=True,
                                env=environment, **pipes | options)  # fmt: skip

    def call(self, *what: Any, **options: Any) -> Any:
        """The result of a function, or the output of a command, which must succeed."""
        process = self.start(*what, **options)
        out, error = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{what} in {self.root} failed: {error[-3000:]}")
        return json.loads(out.splitlines()[-1]) if callable(what[0]) else out

    def train(self, name: str, folder: pathlib.Path, base: pathlib.Path, steps: int = 20) -> dict:
        """Contents of TRAININGS[name] by launch.train; with a constant rate more steps continue."""
        file, changes = TRAININGS[name]
        changes = SHORT | changes | {"num_steps": steps, "optimizer.schedule": "constant"}
        self.call(
            "-m",
            "launch.train",
            f"--config=configs/{file}.py",
            f"--workdir={folder / name}",
            *(f"--config.{k}={v}".replace("@", f"{base}/") for k, v in changes.items()),
        )
        return contents(folder / name, steps)

    def sample(self, run: pathlib.Path, flags: str) -> dict[str, Any]:
        """What launch.sample writes."""
        out = self.cache / "samples.npz"
        self.call("-m", "launch.sample", f"--workdir={run}", "--num_samples=12", "--steps=6",
                  f"--out={out}", *flags.split())  # fmt: skip
        return {"arrays": digest(dict(np.load(out))), "picture": of_files(out.with_suffix(".png"))}


def of_files(*paths: pathlib.Path) -> str:
    return digest([np.frombuffer(path.read_bytes(), np.uint8) for path in paths])


def contents(run: pathlib.Path, step: int = 20) -> dict[str, Any]:
    """What a training wrote: metrics, pictures, its models, and all arrays of a checkpoint."""
    path, store = run / "checkpoints" / str(step) / "state", ocp.PyTreeCheckpointer()
    tree = store.metadata(path).item_metadata.tree
    kind = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    said = json.loads((run / "run.json").read_text())
    keys = ("model", "companions", "data", "frozen", "start")
    return {
        "metrics": of_files(run / "metrics.jsonl"),
        "state": digest(store.restore(path, restore_args=kind)),
        "pictures": of_files(*sorted(run.glob("samples/*"))),
        "description": [said.get(key) for key in keys],
    }


def row(what: str, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    different = [key for key in before if before[key] != after[key]]
    print(what, "DIFFERENT: " + ", ".join(different) if different else "equal", flush=True)
    return {"what": what, "compared": list(before), "different": different}


def bits(pair: list[Checkout], folder: pathlib.Path) -> list[dict]:
    rows = []
    for parallel in ("pmap", "data", "fsdp"):
        places = [folder / side / parallel for side in SIDES]
        drawn = [checkout.call(train_all, place, parallel, devices=4)
                 for checkout, place in zip(pair, places, strict=True)]  # fmt: skip
        for name in TRAININGS:
            found = [contents(place / name) | {"samples": samples.get(name)}
                     for place, samples in zip(places, drawn, strict=True)]  # fmt: skip
            rows.append(row(f"{name}, {parallel}", *found))
    return rows


def runs(pair: list[Checkout], folder: pathlib.Path) -> list[dict]:
    """Of 40 steps the last 20 are those of the checkout after, in the directory of the first 20."""
    (before, after), mclr = pair, "digits_mclr"
    base, straight = folder / "base", folder / "straight"
    written = {name: before.train(name, base, base) for name in RUNS}
    whole = {name: before.train(name, straight, base, 40) for name in RUNS}
    rows = [row(f"{name} sampled, {flags}", *(c.sample(base / name, flags) for c in pair))
            for name, flags in SAMPLES]  # fmt: skip
    rows.append(row("digits fine-tuned", written[mclr], after.train(mclr, folder, base)))
    shutil.rmtree(base / "classifier")
    for name in ("digits", "unet", "mixture"):
        rows.append(row(f"{name} continued", whole[name], after.train(name, base, base, 40)))
    shutil.rmtree(base / "digits")
    continued = after.train(mclr, base, base, 40)
    rows.append(row(f"{mclr} continued, its companions deleted", whole[mclr], continued))
    (name, flags), places = SAMPLES[-1], (straight / mclr, base / mclr)
    found = [c.sample(place, flags) for c, place in zip(pair, places, strict=True)]
    return [*rows, row(f"{name} sampled after that, {flags}", *found)]


def errors(pair: list[Checkout], folder: pathlib.Path) -> list[dict]:
    """Also prints a table in Markdown."""
    made, held, cases = folder / "made", folder / "runs", {}
    for name in ("digits", "classifier"):
        pair[0].train(name, made, made)

    def add(file: str, what: str, *flags: str, path: str = "") -> None:
        changes = {**dict(TRAININGS.values()).get(file, {}), **SHORT, "num_steps": 1}
        given = [f"--config.{key}={value}" for key, value in changes.items()]
        config = path or f"configs/{file}.py"
        cases[f"{file}: {what}"] = [
            f"--config={config}",
            f"--workdir=@{len(cases)}",
            *given,
            *flags,
        ]

    for file, words in FLAGS.items():
        for word in words.split():
            add(file, word, *(f"--config.{part}" for part in word.split("&")))
    for file, lines in LINES.items():
        for line in lines:
            path = folder / f"{file}_{len(cases)}.py"
            path.write_text(f"from configs import {file}\ndef get_config():\n"
                            f"    c = {file}.get_config()\n    with c.ignore_type():\n"
                            f"        {line}\n    return c\n")  # fmt: skip
            add(file, line, path=str(path))
    cases |= {command: command.split() for command in COMMANDS}
    commands = [[x.replace("@", f"{held}/") for x in command] for command in cases.values()]
    found = []
    for checkout in pair:
        shutil.rmtree(held, ignore_errors=True)
        shutil.copytree(made, held)
        told = checkout.call(refusals, commands, folder / "log")
        found.append([(status, text.replace(f"{folder}/", "")) for status, text in told])
    print("| case | before | after |\n|---|---|---|")
    for what, one, other in zip(cases, *found, strict=True):
        texts = [f"{status} {text}" for status, text in (one, other)]
        shown = (what, texts[0], "the same" if one == other else texts[1])
        print("|", " | ".join(text.replace("|", "\\|") for text in shown), "|")
    return [{"what": what, "before": one, "after": other}
            for what, one, other in zip(cases, *found, strict=True)]  # fmt: skip


def startup(pair: list[Checkout], folder: pathlib.Path) -> list[dict]:
    """The cache of compiled programs is empty in the cold case, and filled in the warm one."""

    def seconds(checkout: Checkout, *what: Any, until: str = "", cache: Any = None) -> list[float]:
        began, used = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = checkout.start(*what, cache=cache, stdout=subprocess.DEVNULL)
        if not any(until and until in line for line in process.stderr) and until:
            raise RuntimeError(f"{what} in {checkout.root} ended before {until!r}.")
        wall = time.monotonic() - began
        process.kill()
        process.communicate()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        return [wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime]

    times: dict[str, list[list[float]]] = {}
    train = ("-m", "launch.train", "--config=configs/digits.py")
    for number in range(ROUNDS):
        for side, checkout in enumerate(pair):
            place = folder / f"{number}_{side}"
            found = {"import launch.train": seconds(checkout, "-c", "import launch.train")}
            for case in ("cold", "warm"):
                found[f"first step, {case}"] = seconds(
                    checkout, *train, f"--workdir={place}_{case}", until="Compiled in", cache=place
                )
            for name, values in found.items():
                for kind, value in zip(("s", "CPU s"), values, strict=True):
                    times.setdefault(f"{name}, {kind}", [[], []])[side].append(value)
    return [ratios(name, *found) for name, found in times.items()]


def speed(pair: list[Checkout], folder: pathlib.Path) -> list[dict]:
    images = np.random.default_rng(0).integers(0, 256, (256, 32, 32, 3), np.uint8)
    np.savez(folder / "images.npz", images=images, labels=np.arange(256) % 10)
    rows = []
    for name, (_, _, steps) in SPEED.items():
        devices = len(os.sched_getaffinity(0)) if name == "unet" else 1  # as in launch.train
        processes = [
            c.start(windows, name, folder, folder / f"{name}_{side}", devices=devices,
                    stderr=subprocess.DEVNULL) for side, c in zip(SIDES, pair, strict=True)
        ]  # fmt: skip
        rates = np.zeros((2, len(pair), WINDOWS))
        for number in range(WINDOWS):
            for side, process in enumerate(processes):
                process.stdin.write("\n" * (number > 0))
                process.stdin.flush()
                seconds = np.array(process.stdout.readline().split(), float)
                rates[:, side, number] = steps / seconds
        for process in processes:
            process.kill()
            process.communicate()
        for kind, found in zip(("s", "CPU s"), rates[:, :, 1:].tolist(), strict=True):
            rows.append(ratios(f"{name}, steps/{kind}", *found))  # the first window compiles
    return rows


def ratios(what: str, before: list[float], after: list[float]) -> dict[str, Any]:
    """Medians, and the median of the ratios of neighbours in time."""
    pairs = [b / a for a, b in zip(before, after, strict=True)]
    found = {"before": statistics.median(before), "after": statistics.median(after),
             "ratio": statistics.median(pairs)}  # fmt: skip
    print(what, {key: round(value, 3) for key, value in found.items()}, flush=True)
    return {"what": what, **found, "all": {"before": before, "after": after}}


SECTIONS = {"bits": bits, "runs": runs, "errors": errors, "startup": startup, "speed": speed}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", required=True)
    parser.add_argument("--after", default=str(HERE.parent.parent))
    parser.add_argument("--before_revision", default="", help="of a folder without git")
    parser.add_argument("--after_revision", default="")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--folder", type=pathlib.Path, help="new; keeps the runs")
    parser.add_argument("--out", type=pathlib.Path,
                        default=HERE.parent / "results" / "revisions.json")  # fmt: skip
    args = parser.parse_args()
    result = json.loads(args.out.read_text()) if args.out.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or pathlib.Path(temporary)).resolve()
        given = (args.before, args.before_revision), (args.after, args.after_revision)
        pair = [Checkout(root, revision, folder / "cache") for root, revision in given]
        for name in args.sections.split(","):
            (folder / name).mkdir(parents=True)
            began, rows = time.time(), SECTIONS[name](pair, folder / name)
            revisions = {side: c.revision for side, c in zip(SIDES, pair, strict=True)}
            seconds = round(time.time() - began)
            result[name] = {**provenance(), **revisions, "device": banner(), "seconds": seconds,
                            "rows": rows}  # fmt: skip
            write_json(args.out, result)


if __name__ == "__main__":
    if sys.argv[1] in ("train_all", "refusals", "windows"):
        print(json.dumps(globals()[sys.argv[1]](*json.loads(sys.argv[2]))))
    else:
        main()
