"""Images per second in training and sampling on the CPU: this project against PyTorch.

  python benchmarks/throughput.py             # writes benchmarks/results/throughput.json

Both train the same network by Adam with an average of the weights (ours through the project's own
update, on the devices that its commands take), and sample by 18 Heun steps. Every candidate is a
process on the same cores; the candidates run in alternation, a round each, and a number is that of
the fastest round. Needs the package and PyTorch (pip install -e '.[torch]'), and an idle machine.

What the project does for speed on the CPU, each also measured without it:

  memory   freed memory is kept: "mallopt" in the process, "huge" pages (GLIBC_TUNABLES), or neither
  devices  a JAX device for each core, each with its part of the batch
  loop     training steps in one compiled loop (1: no loop), and there gradients of convolutions
           written for XLA's kernels ("ours") or left to XLA ("xla")
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tasks import ROOT

from mclr_jax.files import provenance, write_json

RESULT = ROOT / "benchmarks" / "results" / "throughput.json"
UNET = {"channels": 32, "channel_mult": (1, 2, 2), "num_blocks": 2, "attention_resolutions": (8,)}
DIT = {"width": 192, "depth": 6, "heads": 3}
BATCH, LOOP, HUGE = 16, 8, "glibc.malloc.hugetlb=1"


def candidates(task: str, model: str, threads: int) -> dict[str, dict]:
    """Settings of each process by name; "ours" is what the commands of the project do."""
    per_core = threads if model == "unet" else 1
    ours = {"memory": "mallopt", "devices": per_core, "loop": 1, "gradients": "ours"}
    rows = {"ours": ours}
    if task == "training":
        rows["huge pages"] = ours | {"memory": "huge"}
    rows["memory not kept"] = ours | {"memory": ""}
    if threads > 1:
        other = threads + 1 - per_core  # of 1 and `threads` the other one
        rows[f"{other} device(s)"] = ours | {"devices": other}
        rows["none of these"] = ours | {"memory": "", "devices": 1}
    if task == "training":
        rows[f"loop of {LOOP}"] = ours | {"loop": LOOP}
        if model == "unet":
            rows[f"loop of {LOOP}, XLA's gradients"] = ours | {"loop": LOOP, "gradients": "xla"}
    for mode in ("eager", "compiled"):
        rows[f"torch {mode}"] = {"torch": mode}
        if model == "unet":
            rows[f"torch {mode}, channels_last"] = {"torch": mode, "channels_last": True}
    return rows


# ---- a candidate's process -----------------------------------------------------------------------


def our_task(model: str):
    """The task that is trained, and a batch (1, B, ...)."""
    import numpy as np
    from ml_collections import ConfigDict

    from configs import base
    from mclr_jax import experiment
    from mclr_jax.data.protocol import Arrays

    config = base.base()
    config.network = ConfigDict({"name": model, **(UNET if model == "unet" else DIT)})
    config.sigma_data, config.objective.label_dropout = 0.5, 0.0
    images = np.random.default_rng(0).normal(0, 0.5, (BATCH, 32, 32, 3)).astype(np.float32)
    source = Arrays(images, np.zeros(BATCH, np.int32), 10)
    task = experiment.make_task(config, experiment.data_info(config, source), {})
    batch = {"image": images, "label": source.labels, "index": np.arange(BATCH, dtype=np.int32)}
    return task, {name: rows[None] for name, rows in batch.items()}


def our_training(model: str, loop: int):
    """(function of a round, images of a round)."""
    import jax
    import numpy as np

    from mclr_jax.training.devices import Devices
    from mclr_jax.training.step import init_state, make_update

    task, batch = our_task(model)
    devices = Devices("pmap")
    shapes = jax.eval_shape(lambda: init_state(task))
    random = np.random.default_rng(0)  # zero-initialised layers would make some work vanish

    def filled(shape):
        if np.issubdtype(shape.dtype, np.floating):
            return random.normal(0, 0.03, shape.shape).astype(shape.dtype)
        return np.zeros(shape.shape, shape.dtype)

    state = devices.put_state(jax.tree.map(filled, shapes))
    update = devices.compile(make_update(task, devices.axis_name))
    data = devices.put_batches({n: np.repeat(x, loop, axis=0) for n, x in batch.items()})
    count = devices.put_state(np.int32(loop))
    holder = [state]

    def run():
        for _ in range(LOOP // loop):
            holder[0], _ = update(holder[0], {}, data, count)
        jax.block_until_ready(holder[0])

    return run, LOOP * BATCH


def our_sampling(model: str):
    import jax
    import numpy as np

    from mclr_jax import generate
    from mclr_jax.samplers import Sampler

    task, _ = our_task(model)
    shapes = jax.eval_shape(task.init)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda s: random.normal(0, 0.03, s.shape).astype(s.dtype), shapes)
    params = generate.replicated(jax.device_put(params))
    labels = np.zeros(BATCH, np.int32)
    return lambda: generate.generate(task.model, params, labels, Sampler()), BATCH


def torch_run(task: str, model: str, mode: str, channels_last: bool = False):
    import torch
    import torch_models

    from mclr_jax.noise import rho_grid

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = torch_models.UNet(**UNET) if model == "unet" else torch_models.DiT(**DIT)
    network = network.to(memory_format=layout)
    images = (torch.randn(BATCH, 3, 32, 32) / 2).to(memory_format=layout)
    label = torch.zeros(BATCH, dtype=torch.long)
    if task == "training":
        trainer = torch_models.Trainer(network, "default" if mode == "compiled" else "")
        return lambda: [trainer.step(images, label) for _ in range(LOOP)], LOOP * BATCH
    f = network if mode == "eager" else torch.compile(network)
    sigmas = torch.from_numpy(rho_grid(18))

    def run():
        torch_models.heun(lambda *args: torch_models.denoise(f, *args), 160 * images, label, sigmas)

    return run, BATCH


def settle(settings: dict) -> None:
    """What must be set before JAX starts."""
    from mclr_jax import cpu

    if settings["memory"] == "mallopt":
        assert cpu.keep_freed_memory()
    import jax

    jax.config.update("jax_num_cpu_devices", settings["devices"])
    if settings["gradients"] == "xla":
        from mclr_jax.networks import layers

        def plain(x, kernel, stride=1, padding="SAME"):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), padding, dimension_numbers=numbers
            )

        layers.convolve = plain


def worker(task: str, model: str, settings: dict) -> None:
    """Set up, say so, then run a round for every line of standard input."""
    if "torch" in settings:
        run, images = torch_run(
            task, model, settings["torch"], settings.get("channels_last", False)
        )
    else:
        settle(settings)
        run, images = (
            our_training(model, settings["loop"]) if task == "training" else our_sampling(model)
        )
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    print(json.dumps({"first_round_seconds": first}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        run()
        print(json.dumps({"rate": images / (time.perf_counter() - start)}), flush=True)


# ---- all of them in turns ------------------------------------------------------------------------


def measure(task: str, model: str, threads: int, rounds: int, skip: str) -> dict:
    """One row: images per second by candidate."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    processes, first = {}, {}
    rows = {
        name: settings
        for name, settings in candidates(task, model, threads).items()
        if not (skip and re.search(skip, name))
    }
    with tempfile.TemporaryDirectory() as cache:
        for name, settings in rows.items():
            environment = dict(os.environ)
            environment.pop("GLIBC_TUNABLES", None)
            if settings.get("memory") == "huge":
                environment["GLIBC_TUNABLES"] = HUGE
            # XLA's cache does not know the number of threads, and devices are another program.
            environment["JAX_COMPILATION_CACHE_DIR"] = f"{cache}/{settings.get('devices')}"
            worker = ["--worker", json.dumps([task, model, settings])]
            process = subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, cores)), sys.executable, __file__, *worker],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT,
            )  # fmt: skip
            first[name] = json.loads(process.stdout.readline())["first_round_seconds"]
            processes[name] = process
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(rounds):
            for name, process in processes.items():
                if number and "XLA's" in name:
                    continue  # once is enough: it is many times slower
                print(file=process.stdin, flush=True)
                rates[name].append(json.loads(process.stdout.readline())["rate"])
        for process in processes.values():
            process.stdin.close()
            process.wait()
    best = {name: round(max(values), 2) for name, values in rates.items()}
    torch_best = max(rate for name, rate in best.items() if name.startswith("torch"))
    return {
        "task": task,
        "model": model,
        "batch_size": BATCH,
        "threads": threads,
        "settings": rows,
        "images_per_second": best,
        "ours_over_torch": round(best["ours"] / torch_best, 3),
        "first_round_seconds": {name: round(value, 1) for name, value in first.items()},
    }


def profile(model: str) -> dict[str, float]:
    """Share of a training step's time on one thread by operation, of those with 1% or more."""
    import jax

    settle({"memory": "mallopt", "devices": 1, "gradients": "ours"})
    run, _ = our_training(model, 1)
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
        total: dict[str, float] = {}
        for plane in data.planes:
            for line in plane.lines:
                for event in line.events:
                    stats = dict(event.stats)
                    if "hlo_op" in stats:
                        kind = event.name.split(".")[0]
                        total[kind] = total.get(kind, 0.0) + event.duration_ns
    whole = sum(total.values())
    shares = {kind: round(t / whole, 3) for kind, t in total.items() if t / whole >= 0.01}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cases", default="training sampling", help="which tasks")
    parser.add_argument("--models", default="unet dit")
    parser.add_argument("--threads", default="1 2")
    parser.add_argument("--skip", default="", help="regular expression of candidates to leave out")
    parser.add_argument(
        "--profile", help="print where a training step of this model spends its time"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(*json.loads(args.worker))
        return
    if args.profile:
        print(json.dumps(profile(args.profile), indent=1))
        return
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    chip = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    result = {
        "machine": f"{chip or platform.processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch")},
        "python": platform.python_version(),
        **provenance(),
        "load_average": os.getloadavg(),
        "rows": [],
    }
    for task in args.cases.split():
        for model in args.models.split():
            for threads in map(int, args.threads.split()):
                result["rows"].append(measure(task, model, threads, args.rounds, args.skip))
                row = result["rows"][-1]
                print(task, model, threads, row["ours_over_torch"], row["images_per_second"],
                      row["first_round_seconds"], flush=True)  # fmt: skip
                write_json(RESULT, result)
    for model in args.models.split():
        output = subprocess.run(
            ["taskset", "-c", "0", sys.executable, __file__, f"--profile={model}"],
            check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        ).stdout  # fmt: skip
        result.setdefault("training_time_by_operation", {})[model] = json.loads(output)
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
