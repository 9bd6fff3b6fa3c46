"""Speed of 3x3 convolutions on the CPU: `fast_conv`, XLA as is, and PyTorch, GFLOP/s each.

Counts the multiplications of the direct algorithm for all of them. Each number is the best of
several rounds in which all candidates take turns: CPU time with one thread, wall time with two.

  python benchmarks/convolution.py            # writes benchmarks/results/convolution.json
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

SHAPES = (  # batch, size, channels
    (16, 32, 32),
    (16, 32, 64),
    (16, 32, 128),
    (16, 16, 64),
    (16, 8, 64),
    (64, 28, 64),
    (64, 14, 128),
    (128, 8, 64),
)
RESULT = Path(__file__).parent / "results" / "convolution.json"


def measure(threads: int, rounds: int, shapes) -> list[dict]:
    """GFLOP/s by shape, pass and candidate; JAX takes its thread count from the CPU affinity."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    import jax
    import numpy as np
    import torch
    from jax import lax

    from mclr_jax.networks.conv import fast_conv

    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    formats = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}

    def jax_passes(convolution, x, w, g):
        def f(x, w):
            return convolution(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        passes = {
            "forward": f,
            "input_gradient": lambda x, w, g: jax.vjp(lambda x: f(x, w), x)[1](g),
            "kernel_gradient": lambda x, w, g: jax.vjp(lambda w: f(x, w), w)[1](g),
        }
        arguments = {name: (x, w) if name == "forward" else (x, w, g) for name in passes}
        return {
            name: (jax.jit(run).lower(*arguments[name]).compile(), arguments[name])
            for name, run in passes.items()
        }

    def torch_passes(memory_format, x, w, g):
        x, g = (
            torch.from_numpy(a).permute(0, 3, 1, 2).contiguous(memory_format=memory_format)
            for a in (x, g)
        )
        w = torch.from_numpy(w).permute(3, 2, 0, 1).contiguous(memory_format=memory_format)

        def backward(*mask):
            return lambda: torch.ops.aten.convolution_backward(
                g, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*mask, False]
            )

        return {
            "forward": (lambda: torch.conv2d(x, w, padding=1), ()),
            "input_gradient": (backward(True, False), ()),
            "kernel_gradient": (backward(False, True), ()),
        }

    rows = []
    for batch, size, channels in shapes:
        random = np.random.default_rng(0)
        x, g = random.normal(size=(2, batch, size, size, channels)).astype(np.float32)
        w = random.normal(size=(3, 3, channels, channels)).astype(np.float32)
        on_device = [jax.numpy.asarray(a) for a in (x, w, g)]
        candidates = {
            "fast_conv": jax_passes(fast_conv, *on_device),
            "xla": jax_passes(lax.conv_general_dilated, *on_device),
        }
        for name, memory_format in formats.items():
            candidates[f"torch_{name}"] = torch_passes(memory_format, x, w, g)
        for name in candidates["xla"]:
            best = dict.fromkeys(candidates, float("inf"))
            for _ in range(rounds):
                for candidate, passes in candidates.items():
                    run, arguments = passes[name]
                    jax.block_until_ready(run(*arguments))
                    start = clock()
                    for _ in range(3):
                        jax.block_until_ready(run(*arguments))
                    best[candidate] = min(best[candidate], (clock() - start) / 3)
            flops = 2 * batch * size**2 * 9 * channels**2
            speed = {candidate: round(flops / t / 1e9, 1) for candidate, t in best.items()}
            rows.append(
                {"threads": threads, "shape": [batch, size, size, channels], "pass": name, **speed}
            )
            print(json.dumps(rows[-1]), flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="measure here, and write no result")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="only the first so many")
    args = parser.parse_args()
    if args.threads:
        measure(args.threads, args.rounds, SHAPES[: args.shapes])
        return
    rows = []
    for threads in (1, 2):  # a process each, since the pools of threads are made once
        command = [sys.executable, __file__, "--threads", str(threads)]
        command += ["--rounds", str(args.rounds), "--shapes", str(args.shapes)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows += [json.loads(line) for line in output.splitlines()]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({**environment(), "gflops": rows}, indent=1) + "\n")


def environment() -> dict:
    """Machine, versions, command."""
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "machine": f"{model or platform.processor()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch")},
        "python": platform.python_version(),
        "command": " ".join(["python", *sys.argv]),
        "load_average": os.getloadavg(),
    }


if __name__ == "__main__":
    main()
