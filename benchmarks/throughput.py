"""Images per second in training and sampling, on the CPU: this project against PyTorch.

Both train the same network by Adam with an average of the weights, and sample by 18 Heun steps.
Set JAX_COMPILATION_CACHE_DIR to compile only once: the U-Net's step takes minutes on this machine.
The candidates take turns in one process, and each number is its fastest round: CPU time with one
thread, wall time with two (where other processes on the machine disturb it).

  python benchmarks/throughput.py             # writes benchmarks/results/throughput.json
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

RESULT = Path(__file__).parent / "results" / "throughput.json"
UNET = {"channels": 32, "channel_mult": (1, 2, 2), "num_blocks": 2, "attention_resolutions": (8,)}
DIT = {"width": 192, "depth": 6, "heads": 3}
LOOP = 8  # training steps of one dispatch


def our_network(model: str):
    from mclr_jax.networks.dit import DiT
    from mclr_jax.networks.unet import UNet

    return UNet(**UNET, out_channels=3) if model == "unet" else DiT(**DIT, out_channels=3)


def our_step(network):
    """(init, step): the state of training, and step(state, batch, key) -> (state, loss)."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from mclr_jax import denoiser
    from mclr_jax.noise import LogNormal, edm_weight
    from mclr_jax.objectives.dsm import dsm

    optimizer = optax.adam(1e-4)

    def loss(params, batch, key):
        denoise = denoiser.edm(lambda *args: network.apply({"params": params}, *args), 0.5)
        keys = jax.random.split(key, len(batch["label"]))
        value, _ = dsm(
            denoise,
            batch["image"],
            batch["label"],
            keys,
            noise=LogNormal(),
            weight=lambda sigma: edm_weight(sigma, 0.5),
            null_label=10,
        )
        return value.mean()

    def init():
        arguments = jnp.zeros((1, 32, 32, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
        shapes = jax.eval_shape(network.init, jax.random.key(0), *arguments)["params"]
        random = np.random.default_rng(0)  # the initialisers take a minute to compile
        params = jax.tree.map(
            lambda s: jnp.asarray(random.normal(0, 0.03, s.shape), s.dtype), shapes
        )
        return params, optimizer.init(params), jax.tree.map(jnp.copy, params)

    def step(state, batch, key):
        params, opt_state, average = state
        value, gradients = jax.value_and_grad(loss)(params, batch, key)
        updates, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, updates)
        return (params, opt_state, optax.incremental_update(params, average, 1e-3)), value

    return init, step


def our_training(model: str, batch_size: int, loops: bool = True):
    """Runs by name (each: images it trains on, function without arguments), parameters, FLOPs."""
    import jax
    import jax.numpy as jnp

    init, step = our_step(our_network(model))
    key = jax.random.key(1)
    batches = {
        "image": jax.random.normal(key, (LOOP, batch_size, 32, 32, 3)) / 2,
        "label": jnp.zeros((LOOP, batch_size), jnp.int32),
    }
    batch = jax.tree.map(lambda x: x[0], batches)

    def loop(state, batches, key, count):
        def body(i, carry):
            batch = jax.tree.map(lambda x: x[i], batches)
            return step(carry[0], batch, jax.random.fold_in(key, i))

        return jax.lax.fori_loop(0, count, body, (state, jnp.zeros(())))

    state = init()
    one = jax.jit(step, donate_argnums=0).lower(state, batch, key).compile()
    states = {"one": state, "many": init()}

    def run(name, compiled, *arguments):
        states[name], value = compiled(states[name], *arguments)
        value.block_until_ready()

    runs = {"ours": (batch_size, lambda: run("one", one, batch, key))}
    if loops:
        many = jax.jit(loop, donate_argnums=0).lower(state, batches, key, LOOP).compile()
        images = LOOP * batch_size
        runs[f"ours_{LOOP}_steps"] = images, lambda: run("many", many, batches, key, LOOP)
    parameters = sum(p.size for p in jax.tree.leaves(states["one"][0]))
    with xla_convolutions():  # of the program as written: compiled, XLA counts no custom fusion
        again = jax.jit(lambda *arguments: step(*arguments))  # a new function is traced anew
        flops = again.lower(states["one"], batch, key).cost_analysis()["flops"]
    return runs, parameters, flops / batch_size


def our_sampling(model: str, batch_size: int):
    import jax
    import jax.numpy as jnp

    from mclr_jax import denoiser
    from mclr_jax.noise import rho_grid
    from mclr_jax.samplers import sample

    network = our_network(model)
    params = our_step(network)[0]()[0]

    def run(params, x, label):
        denoise = denoiser.edm(lambda *args: network.apply({"params": params}, *args), 0.5)
        return sample(denoise, x, label, rho_grid(18))

    x = 80 * jax.random.normal(jax.random.key(0), (batch_size, 32, 32, 3))
    label = jnp.zeros(batch_size, jnp.int32)
    compiled = jax.jit(run).lower(params, x, label).compile()
    return {"ours": (batch_size, lambda: compiled(params, x, label).block_until_ready())}


def torch_runs(task: str, model: str, batch_size: int, compiled: bool):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        from benchmarks import torch_models
    except ImportError:
        import torch_models  # run as a script

    from mclr_jax.noise import rho_grid

    network = torch_models.UNet(**UNET) if model == "unet" else torch_models.DiT(**DIT)
    x, label = torch.randn(batch_size, 3, 32, 32) / 2, torch.zeros(batch_size, dtype=torch.long)
    parameters = sum(p.numel() for p in network.parameters())
    with FlopCounterMode(display=False) as counter:
        torch_models.loss(network, x, label).backward()
    flops = counter.get_total_flops() / batch_size
    formats = {"": torch.contiguous_format}
    if model == "unet":
        formats["_channels_last"] = torch.channels_last
    sigmas, runs = torch.from_numpy(rho_grid(18)), {}
    for suffix, memory_format in formats.items():
        for mode in ("eager", "compiled") if compiled else ("eager",):
            network = torch_models.UNet(**UNET) if model == "unet" else torch_models.DiT(**DIT)
            network = network.to(memory_format=memory_format)
            images = x.to(memory_format=memory_format)
            if task == "training":
                trainer = torch_models.Trainer(network, mode == "compiled")
                run = lambda t=trainer, images=images: t.step(images, label)  # noqa: E731
            else:
                f = network if mode == "eager" else torch.compile(network)

                def run(f=f, images=images):
                    denoise = lambda *args: torch_models.denoise(f, *args)  # noqa: E731
                    return torch_models.heun(denoise, 160 * images, label, sigmas)

            runs[f"torch_{mode}{suffix}"] = batch_size, run
    return runs, parameters, flops


@contextlib.contextmanager
def xla_convolutions():
    """Networks traced in this context use XLA's convolutions."""
    from jax import lax

    from mclr_jax.networks import layers

    def convolve(x, kernel, stride=1, padding="SAME"):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, kernel, (stride, stride), padding, dimension_numbers=numbers
        )

    with mock.patch.object(layers, "convolve", convolve):
        yield


def measure(task, model, batch_size, threads, rounds, compiled, ablate) -> dict:
    """One row: images per second by candidate. JAX takes its threads from the CPU affinity."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import torch

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    started = time.perf_counter()
    if task == "training":
        runs, parameters, flops = our_training(model, batch_size)
    else:
        runs, parameters, flops = our_sampling(model, batch_size), None, None
    compile_seconds = time.perf_counter() - started
    if ablate and model == "unet":
        with xla_convolutions():
            if task == "training":
                plain = our_training(model, batch_size, loops=False)[0]
            else:
                plain = our_sampling(model, batch_size)
        runs |= {f"{name}_xla_convolution": run for name, run in plain.items()}
    theirs, their_parameters, their_flops = torch_runs(task, model, batch_size, compiled)
    runs |= theirs
    best = dict.fromkeys(runs, float("inf"))
    for number in range(rounds + 1):  # the first round warms up
        for name, (images, run) in runs.items():
            start = clock()
            run()
            if number:
                best[name] = min(best[name], (clock() - start) / images)
    rates = {name: round(1 / seconds, 2) for name, seconds in best.items()}
    ours = max(rate for name, rate in rates.items() if name.startswith("ours"))
    torch_best = max(rate for name, rate in rates.items() if name.startswith("torch"))
    return {
        "task": task,
        "model": model,
        "batch_size": batch_size,
        "threads": threads,
        "images_per_second": rates,
        "ours_over_torch": round(ours / torch_best, 3),
        "parameters": {"ours": parameters, "torch": their_parameters},
        "training_gflop_per_image": {"ours": flops and flops / 1e9, "torch": their_flops / 1e9},
        "our_compilation_seconds": round(compile_seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compiled", action="store_true", help="also torch.compile (slow start)")
    parser.add_argument("--ablate", action="store_true", help="also ours with XLA's convolutions")
    parser.add_argument("--row", help="task,model,batch,threads: only this one, and no result")
    parser.add_argument("--cases", default="training,16 training,64 sampling,16", help="task,batch")
    args = parser.parse_args()
    if args.row:
        task, model, batch_size, threads = args.row.split(",")
        options = int(batch_size), int(threads), args.rounds, args.compiled, args.ablate
        print(json.dumps(measure(task, model, *options)))
        return
    from convolution import environment

    cases = [case.split(",") for case in args.cases.split()]
    rows: list[dict] = []
    RESULT.parent.mkdir(exist_ok=True)
    for threads in (1, 2):  # a process each, since the pools of threads are made once
        for model in ("unet", "dit"):
            for task, batch_size in cases:
                command = [sys.executable, __file__, *sys.argv[1:]]
                command += ["--row", f"{task},{model},{batch_size},{threads}"]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                rows.append(json.loads(output.stdout.splitlines()[-1]))
                print(json.dumps(rows[-1]), flush=True)
                RESULT.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
