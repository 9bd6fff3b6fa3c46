"""What configs cost on TPUs and GPUs, from their compilers (mclr_jax/plan.py); none is needed.

  python benchmarks/compiled.py               # all rows that are missing, in minutes each
  python benchmarks/compiled.py --row=digits  # those whose name begins like this

Writes benchmarks/results/compiled.json, row by row. It needs `pip install -e '.[tpu-compile]'`,
and for the rows of GPUs '.[gpu-compile]': rows whose compiler is missing are left out.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from typing import Any

import jax
import parameters
import tasks

from launch import plan as command
from mclr_jax import experiment, plan
from mclr_jax.files import provenance, write_json
from mclr_jax.model import DataInfo

OUT = tasks.RESULTS / "compiled.json"
LATENTS = (32, 32, 4), 1000  # of ImageNet at 256x256
# DiT-XL/2 as changes of a config; each block is recomputed, and one program serves all.
XL = {"network.patch_size": 2, "network.width": 1152, "network.depth": 28, "network.heads": 16,
      "network.dtype": "bfloat16", "network.remat": True, "network.scan_blocks": True,
      "batch_size": 256, "num_steps": 400_000}  # fmt: skip
CLASSIFIER = {"name": "conv_classifier", "channels": (128, 256, 256), "patch_size": 1,
              "dtype": "bfloat16"}  # fmt: skip
HALF = {"objective.negative_share": 0.5}
MODES = ("pmap", "data", "fsdp")
# name -> (config, changes, topologies and layouts)
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "digits": ("digits", {}, [("v5e:1x1", "pmap"), *(("v5e:2x2", mode) for mode in MODES)]),
    "digits, MCLR": ("digits_mclr", HALF, [("v5e:2x2", "data")]),
    "DiT-XL/2": ("digits", XL, [
        ("v5e:4x4", "fsdp"), ("v5e:4x4", "data"), ("v6e:2x2", "fsdp"), ("v5p:4x4x4", "fsdp"),
        ("v5e:4x4*2", "fsdp"), ("cuda:h100x8", "data"), ("cuda:h100x8", "fsdp"),
    ]),
    "DiT-XL/2, weight products kept": ("digits", XL | {"network.remat_policy": "weight_products"}, [
        ("v5e:4x4", "fsdp"), ("cuda:h100x8", "data"),
    ]),
    "DiT-XL/2, not recomputed": ("digits", XL | {"network.remat": False}, [
        ("v5e:4x4", "fsdp"), ("cuda:h100x8", "data"),
    ]),
    "DiT-XL/2, MCLR": ("digits_mclr", XL | HALF, [("v5e:4x4", "fsdp"), ("cuda:h100x8", "data")]),
    "fashion_mnist": ("fashion_mnist", {}, [("v5e:1x1", "pmap"), ("v5e:2x2", "data")]),
    "fashion_mnist, MCLR": ("fashion_mnist_mclr", {}, [
        *(("v5e:2x2", mode) for mode in MODES), ("v5e:1x1", "pmap"),
    ]),
    "fashion_mnist, classifier": ("fashion_mnist_classifier", {}, [("v5e:1x1", "pmap")]),
    "fashion_mnist, MCLR, null answer": ("fashion_mnist_mclr_null", {}, [("v5e:1x1", "pmap")]),
    "cifar10": ("cifar10", {}, [("v5e:4x4", "data")]),
    "cifar10, MCLR": ("cifar10_mclr", {}, []),
}  # fmt: skip
# Sampling: name -> topologies and samples at once, each unguided and with CFG.
SAMPLED = {
    "digits": [("v5e:1x1", 256)],
    "DiT-XL/2": [("v5e:1x1", 64), ("v5e:4x4", 1024), ("cuda:h100x8", 1024)],
    "cifar10": [("v5e:1x1", 256)],
}
SCALES = (1.0, 1.5)


def case(name: str) -> tuple[Any, DataInfo, dict[str, Any]]:
    """The config, the data and the frozen models of a case."""
    file, changes, _ = CASES[name]
    config = tasks.config_of(file, changes)
    shape, classes = LATENTS if name.startswith("DiT") else parameters.DATA[config.data.name]
    data = DataInfo(shape, classes, config.sigma_data or 1.0, (1 / classes,) * classes)
    if not name.startswith("DiT"):
        return config, data, command.companions(config, data)
    judge = tasks.config_of("digits_classifier", {"network.name": CLASSIFIER["name"]})
    judge.network.update(CLASSIFIER)
    models = {"reference": config, "classifier": judge}
    return config, data, {key: experiment.make_model(each, data) for key, each in models.items()}


def ratios() -> dict[str, float]:
    """FLOPs of a step of MCLR over those of DSM with the same batch, for each pair of cases."""
    found = {}
    for name in (name for name in CASES if f"{name}, MCLR" in CASES):
        steps = []
        for each in (name, f"{name}, MCLR"):
            config, data, models = case(each)
            steps.append(plan.step_flops(experiment.make_task(config, data, models), 64))
        found[name] = steps[1] / steps[0]
    return found


def step(config: Any, data: DataInfo, models: dict, topology: str, parallel: str) -> dict:
    config.parallel = parallel
    return command.planned(config, data, topology, models)


def samples(config: Any, data: DataInfo, models: dict, topology: str, **options: Any) -> dict:
    model = experiment.make_model(config, data)
    return plan.sampling(model, topology, command.sampler(config), **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", default="", help="beginning of the names of rows")
    chosen = parser.parse_args().row
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # seconds are those of compiling
    result = json.loads(OUT.read_text()) if OUT.exists() else {"rows": []}
    if "mclr_over_dsm" not in result:
        result["mclr_over_dsm"] = ratios()

    def add(rows: list, name: str, find: Callable, text: Callable, **asked: Any) -> None:
        """A row that is asked for and not there yet."""
        if not name.startswith(chosen) or tasks.made(rows, {"name": name, **asked}):
            return
        try:
            row = find(*case(name), **asked)
        except plan.MissingCompilerError as error:
            print(f"{name} for {asked['topology']}: {error}\n", flush=True)
            return
        file, changes, _ = CASES[name]
        origin = {"name": name, "config": file, "changes": changes}
        rows.append({**origin, **row, **provenance(), "jax": jax.__version__})
        write_json(OUT, result)
        print(f"{name}\n{text(row)}\n", flush=True)

    steps, drawn = result["rows"], result.setdefault("sampling", [])
    for name, (_, _, places) in CASES.items():
        for topology, parallel in places:
            add(steps, name, step, command.text, topology=topology, parallel=parallel)
    for name, sizes in SAMPLED.items():
        for (topology, size), scale in itertools.product(sizes, SCALES):
            asked = {"topology": topology, "batch_size": size, "guidance_scale": scale}
            add(drawn, name, samples, command.sampling_text, **asked)


if __name__ == "__main__":
    main()
