"""Images per second in training and sampling on the CPU: this project against PyTorch.

  python benchmarks/throughput.py             # writes benchmarks/results/throughput.json

Both train the same network by Adam with an average of the weights (ours through the project's own
update, on the devices that its commands take), and sample by 18 Heun steps. Every candidate is a
process on the same cores; the candidates run in alternation, a round each, and a number is that of
the fastest round. Needs the package and an idle machine, and to compare PyTorch (pip install -e
'.[torch]').

What the project does for speed on the CPU, each also measured without it:

  memory   freed memory is kept: "mallopt" in the process, "huge" pages (GLIBC_TUNABLES), or neither
  devices  a JAX device for each core, each with its part of the batch
  loop     training steps in one compiled loop (1: no loop), and there gradients of convolutions
           written for XLA's kernels ("ours") or left to XLA ("xla")
"""

import collections
import importlib.util
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from alternation import Candidate, Holder, Step, Worker, numbers
from tasks import RESULTS, ROOT, parsed, serve

from mclr_jax.files import provenance, write_json

UNET = {"channels": 32, "channel_mult": (1, 2, 2), "num_blocks": 2, "attention_resolutions": (8,)}
DIT = {"width": 192, "depth": 6, "heads": 3}
BATCH, LOOP, ROUNDS, HUGE = 16, 8, 7, "glibc.malloc.hugetlb=1"


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
    for mode in ("eager", "compiled") if importlib.util.find_spec("torch") else ():
        rows[f"torch {mode}"] = {"torch": mode}
        if model == "unet":
            rows[f"torch {mode}, channels_last"] = {"torch": mode, "channels_last": True}
    return rows


def our_run(task: str, model: str, loop: int) -> tuple[Callable, int]:
    """(function of a round, images of a round)."""
    import jax

    from mclr_jax import generate
    from mclr_jax.config import Training
    from mclr_jax.configs import base
    from mclr_jax.model import DataInfo, shapes_of
    from mclr_jax.samplers import Sampler
    from mclr_jax.training.devices import replicated

    config = base.base()
    config.network = base.options(model, **(UNET if model == "unet" else DIT))
    config.objective.label_dropout = 0.0
    trained = Training.parse(config).task(DataInfo((32, 32, 3), 10, 0.5), {})
    if task == "training":
        step = Step(Candidate(trained, "pmap", loop, devices=tuple(jax.devices())), BATCH)
        step.load()
        holder = Holder(trained, step.devices)
        return lambda: holder.run(step, LOOP // loop), LOOP * BATCH
    own, labels = trained.model, np.zeros(BATCH, np.int32)
    params = replicated(jax.device_put(numbers(shapes_of(own))))
    return lambda: generate.generate(own, params, labels, Sampler()), BATCH


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

        layers.convolve = lambda x, kernel, stride=1, padding="SAME": jax.lax.conv_general_dilated(
            x, kernel, (stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def worker(task: str, model: str, settings: dict) -> None:
    """Set up, say so, then run a round for every line of standard input."""
    if mode := settings.get("torch"):
        run, images = torch_run(task, model, mode, settings.get("channels_last", False))
    else:
        settle(settings)
        run, images = our_run(task, model, settings["loop"])

    def rounds(count: int) -> dict[str, float]:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return {"rate": count * images / (time.perf_counter() - start)}

    serve({"first_round_seconds": images / rounds(1)["rate"]}, rounds)


def measure(task: str, model: str, threads: int) -> dict:
    """One row: images per second by candidate."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    rows = candidates(task, model, threads)
    workers: dict[str, Worker] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, settings in rows.items():
            huge = {"GLIBC_TUNABLES": HUGE if settings.get("memory") == "huge" else ""}
            # XLA's cache does not know the number of threads, and devices are another program.
            kept = {"JAX_COMPILATION_CACHE_DIR": f"{cache}/{settings.get('devices')}"}
            workers[name] = Worker(
                "throughput.py", "--worker", json.dumps([task, model, settings]),
                prefix=["taskset", "-c", cores], environment={**os.environ, **huge, **kept},
            )  # fmt: skip
        rates: dict[str, list[float]] = {name: [] for name in rows}
        for number in range(ROUNDS):
            for name, each in workers.items():
                if not (number and "XLA's" in name):  # once is enough: it is many times slower
                    rates[name].append(each.run(1)["rate"])
        for each in workers.values():
            each.close()
    best = {name: round(max(values), 2) for name, values in rates.items()}
    torch = max((rate for name, rate in best.items() if name.startswith("torch")), default=None)
    first = {name: round(each.origin["first_round_seconds"], 1) for name, each in workers.items()}
    return {
        "task": task, "model": model, "batch_size": BATCH, "threads": threads, "settings": rows,
        "images_per_second": best,
        "ours_over_torch": torch and round(best["ours"] / torch, 3),
        "first_round_seconds": first,
    }  # fmt: skip


def profile(model: str) -> dict[str, float]:
    """Share of a training step's time on one thread by operation, of those with 1% or more."""
    import jax

    settle({"memory": "mallopt", "devices": 1, "gradients": "ours"})
    run, _ = our_run("training", model, 1)
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data, total = jax.profiler.ProfileData.from_file(str(file)), collections.Counter()
        for line in (line for plane in data.planes for line in plane.lines):
            for event in line.events:
                if "hlo_op" in dict(event.stats):
                    total[event.name.split(".")[0]] += event.duration_ns
    whole = sum(total.values())
    return {kind: round(t / whole, 3) for kind, t in total.most_common() if t / whole >= 0.01}


def main() -> None:
    flags = parsed(
        __doc__, row=("", "beginning of rows, such as 'training unet'"),
        profile=("", "print the time of a step of this model by operation"),
        out=(RESULTS / "throughput.json", "file to write"), worker=("", "of a process of a row"),
    )  # fmt: skip
    if flags.worker:
        return worker(*json.loads(flags.worker))
    if flags.profile:
        return print(json.dumps(profile(flags.profile), indent=1))
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    chip = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    known = (name for name in ("jax", "jaxlib", "torch") if importlib.util.find_spec(name))
    result: dict = {
        "machine": f"{chip or platform.processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in known}, "python": platform.python_version(),
        **provenance(), "load_average": os.getloadavg(), "rows": [],
    }  # fmt: skip
    for case in itertools.product(("training", "sampling"), ("unet", "dit"), (1, 2)):
        if " ".join(map(str, case)).startswith(flags.row):
            result["rows"].append(row := measure(*case))
            print(*case, row["images_per_second"], row["first_round_seconds"], flush=True)
            write_json(flags.out, result)
    shares = result["training_time_by_operation"] = {}
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        command = ["taskset", "-c", "0", sys.executable, __file__, f"--profile={model}"]
        shares[model] = json.loads(subprocess.check_output(command, text=True, cwd=ROOT))
    write_json(flags.out, result)


if __name__ == "__main__":
    main()
