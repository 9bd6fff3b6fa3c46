"""Training by several processes on this machine, one killed; and the speed of the input.

  python benchmarks/hosts.py                   # all rows that are missing, in minutes each
  python benchmarks/hosts.py --only=pmap       # those whose name has this text

Each process runs the command that a host runs, `python -m launch.train --coordinator=...`, with
one CPU device. In a row "kill, LAYOUT" process 2 of 4 is killed by SIGKILL between two checkpoints
and all are started again by the same command; two processes, and one, continue a copy of the run
from its last checkpoint. Writes benchmarks/results/hosts.json.
"""

import functools
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import tasks
from compiled import LATENTS, XL
from robustness_files import archive, npy, png

from mclr_jax import chips, plan
from mclr_jax.config import Training
from mclr_jax.data import pipeline, sources
from mclr_jax.files import read_lines
from mclr_jax.training.devices import MODES

PROCESSES, STEPS, SAVED, KILLED = 4, 36, 12, 16
SMALL = {
    "network.width": 64, "network.depth": 1, "batch_size": 32, "log_every": 4,
    "num_steps": STEPS, "checkpoint_every": SAVED, "keep_checkpoints": 9, "eval_examples": 64,
}  # fmt: skip


def train(count: int, workdir: pathlib.Path, parallel: str, kill_at: int = 0) -> dict[str, Any]:
    """Train by `count` processes, which meet on this machine; kill process 2 after step `kill_at`.

    Returns the exit statuses, and the seconds from the kill to the end of the last process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "launch.train", "--config=configs/mixture.py"]
    command += [f"--workdir={workdir}", f"--coordinator={address}", f"--num_processes={count}"]
    command += [f"--config.{key}={x}" for key, x in {**SMALL, "parallel": parallel}.items()]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tasks.ROOT)}
    options = {"cwd": tasks.ROOT, "env": environment}
    processes = [subprocess.Popen([*command, f"--process_id={i}"], **options) for i in range(count)]
    killed = 0.0
    while kill_at and all(process.poll() is None for process in processes):
        if any(r["step"] >= kill_at for r in read_lines(workdir / "metrics.jsonl")):
            processes[2].send_signal(signal.SIGKILL)
            killed = time.monotonic()
            break
        time.sleep(0.05)
    statuses = [process.wait() for process in processes]
    if bool(kill_at) != any(statuses) or (kill_at and not killed):
        raise RuntimeError(f"{count} processes in {workdir} ended with statuses {statuses}.")
    return {"statuses": statuses, "seconds_to_end": time.monotonic() - killed if killed else None}


def content(workdir: pathlib.Path, at: int = STEPS) -> dict[str, np.ndarray]:
    """All arrays of the training state at a step, by their path in the checkpoint."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as reader:
        path = workdir.resolve() / "checkpoints" / str(at) / "state"
        stored = reader.metadata(path).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), stored)
        tree = reader.restore(path, restore_args=arguments)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(place): np.asarray(leaf) for place, leaf in leaves}


def difference(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Largest difference of two states, relative to the largest entry of each array."""
    assert one.keys() == other.keys()
    pairs = [(x, other[key]) for key, x in one.items() if x.dtype.kind == "f"]
    return max(float(np.abs(x - y).max() / max(np.abs(x).max(), 1e-30)) for x, y in pairs)


def kill(parallel: str) -> dict[str, Any]:
    """Kill one of four processes and start all again; continue by two, and by one."""
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        train(PROCESSES, folder / "whole", parallel)
        ended = train(PROCESSES, folder / "killed", parallel, KILLED)
        saved = sorted(int(p.name) for p in (folder / "killed" / "checkpoints").glob("[0-9]*"))
        others = {count: folder / f"by_{count}" for count in (2, 1)}
        for path in others.values():
            shutil.copytree(folder / "killed", path, ignore=shutil.ignore_patterns("lock"))
        train(PROCESSES, folder / "killed", parallel)
        whole, again = (content(folder / name) for name in ("whole", "killed"))
        apart = {}
        for count, path in others.items():
            train(count, path, parallel)
            apart[count] = difference(whole, content(path))
        checkpoint = folder / "whole" / "checkpoints" / str(STEPS)
        return {
            "parallel": parallel, "processes": PROCESSES, "steps": STEPS,
            "checkpoints_at_the_kill": saved, **ended,
            "same_bits": all(np.array_equal(whole[key], again[key]) for key in whole),
            "relative_difference_by_processes": apart,
            "checkpoint_bytes": sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()),
            "state_bytes": sum(array.nbytes for array in whole.values()),
            "temporary_checkpoints": len(list(checkpoint.parent.glob("*tmp*"))),
        }  # fmt: skip


# name -> (config, changes, shape of an example, classes): uint8 as PNG, latents as npy in a zip
INPUT: dict[str, tuple[str, dict[str, Any], tuple[int, int, int], int]] = {
    "fashion_mnist": ("fashion_mnist", {}, (28, 28, 1), 10),
    "cifar10": ("cifar10", {}, (32, 32, 3), 10),
    "DiT-XL/2": ("digits", XL, *LATENTS["DiT"]),
}
EXAMPLES, SECONDS = 8192, 10.0  # of the zip; of the measurement


def write_zip(path: pathlib.Path, shape: tuple[int, int, int], classes: int) -> None:
    """A zip of random images, PNG, or of float32 latents if they have four channels."""
    rng, (height, width, channels), files = np.random.default_rng(0), shape, {}
    for i in range(EXAMPLES):
        if channels == 4:
            latents = rng.normal(size=(channels, height, width))
            files[f"{i:06d}.npy"] = npy(latents.astype(np.float32))
        else:
            pixels = rng.integers(0, 256, shape, np.uint8)
            files[f"{i:06d}.png"] = png(pixels if channels == 3 else pixels[..., 0])
    labels = [[name, i % classes] for i, name in enumerate(files)]
    path.write_bytes(archive(files, {"labels": labels}))


def rate(stream: Any) -> float:
    """Examples a second that a stream gives, after its first batches."""
    for _ in range(20):
        next(stream)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < SECONDS:
        count += len(next(stream)["index"])
    return count / passed


def feed(name: str, in_memory: bool) -> dict[str, Any]:
    """Examples a second: read by one of 4 hosts, and at most trained on by 4 chips of TPU v5e.

    The bound is the peak of the chips over the FLOPs of an example in a step.
    """
    file, changes, shape, classes = INPUT[name]
    training = Training.parse(tasks.config_of(file, changes))
    task, size = training.task(plan.data_info(training, shape, classes), {}), training.batch_size
    with tempfile.TemporaryDirectory() as folder:
        write_zip(path := pathlib.Path(folder) / "images.zip", shape, classes)
        source = sources.load(f"zip:{path}", in_memory=in_memory)
        read = rate(pipeline.stream(source, size, 0, 0, 0, PROCESSES))
    flops = plan.step_flops(task, size) / size
    trained = 4 * chips.CHIPS["v5e"].flops / flops
    return {
        "read_per_second": read, "flops_per_example": flops, "trained_per_second_at_most": trained,
        "ratio": read / trained, "cores": len(os.sched_getaffinity(0)),
    }  # fmt: skip


ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"kill, {mode}": functools.partial(kill, mode) for mode in MODES},
    **{f"input, {name}, {where}": functools.partial(feed, name, where == "in memory")
       for name in INPUT for where in ("in memory", "read ahead")},
}  # fmt: skip


def main() -> None:
    only = tasks.parsed(__doc__, only=("", "rows whose name has this text")).only
    for name in (name for name in ROWS if only in name):
        tasks.Rows("hosts").row({"name": name}, ROWS[name])


if __name__ == "__main__":
    main()
