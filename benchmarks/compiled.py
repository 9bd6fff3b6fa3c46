"""What configs cost on TPUs and GPUs, from their compilers (mclr_jax/plan.py); none is needed.

  python benchmarks/compiled.py               # all rows that are missing, in minutes each
  python benchmarks/compiled.py --row=digits  # those whose name begins like this
  python benchmarks/compiled.py --parameters  # parameters.json: the size of every config's network
  python benchmarks/compiled.py --published   # published_costs.json: counted, without a compiler

Writes benchmarks/results/compiled.json, row by row. It needs `pip install -e '.[tpu-compile]'`,
and for the rows of GPUs '.[gpu-compile]': rows whose compiler is missing are left out.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import tasks

from mclr_jax import chips, plan
from mclr_jax.config import Training
from mclr_jax.files import provenance, write_json
from mclr_jax.objectives.dsm import DSM

# Shape of an example and number of classes, so that no data set need be there.
DATA = {
    "mixture": ((2,), 3),
    "digits": ((8, 8, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
    "tfds:cifar10": ((32, 32, 3), 10),
    "lorenz63": ((32, 3), 1),
    "lorenz96": ((32, 40), 1),
    "kuramoto_sivashinsky": ((32, 128), 1),
    "navier_stokes": ((16, 64, 64, 1), 1),
}
# Latents of ImageNet, at 256x256 and, for EDM2, at 512x512; by the beginning of a row's name.
LATENTS = {"DiT": ((32, 32, 4), 1000), "SiT": ((32, 32, 4), 1000), "EDM2": ((64, 64, 4), 1000)}
# DiT-XL/2 as changes of a config; each block is recomputed, and one program serves all.
XL = {"network.patch_size": 2, "network.width": 1152, "network.depth": 28, "network.heads": 16,
      "network.dtype": "bfloat16", "network.remat": True, "network.scan_blocks": True,
      "batch_size": 256, "num_steps": 400_000}  # fmt: skip
CLASSIFIER = {"network.name": "conv_classifier", "network.channels": (128, 256, 256),
              "network.patch_size": 1, "network.dtype": "bfloat16"}  # fmt: skip
HALF = {"objective.negative_share": 0.5}
MODES = ("pmap", "data", "fsdp")
# These have a network only when there are data.
NO_NETWORK = {"__init__", "base", "finetune", "mclr_null", "transfer", "trajectories"}
# Published models, fine-tuned for the 28 epochs of ImageNet of guidance-free training (arXiv
# 2501.15420). EDM2 has no null label: its wrong answer is that of a smaller network.
TUNED = {"network.dtype": "bfloat16", "network.remat": True, "batch_size": 256,
         "num_steps": 28 * 1_281_167 // 256}  # fmt: skip
KEPT = {"network.remat_policy": "weight_products"}
NULL = XL | KEPT | TUNED
WEAK = TUNED | {"network.name": "edm2", "objective.wrong": "weak",
                "companions.weak": "runs/fashion_mnist"}  # fmt: skip
LARGE = [("v5e:4x4", "fsdp"), ("cuda:h200x8", "fsdp")]
BOTH = [("v5e:4x4", "fsdp"), ("cuda:h100x8", "data")]
PUBLISHED = {
    "DiT-XL/2, null answer": NULL | {"preconditioning.name": "epsilon"},
    "SiT-XL/2, null answer": NULL | {"preconditioning.name": "velocity"},
    "EDM2-S, weak answer": WEAK | {"network.channels": 192},
    "EDM2-XXL, weak answer": WEAK | {"network.channels": 448},
}
ONE_CARD, ONE = PUBLISHED["DiT-XL/2, null answer"] | {"batch_size": 64}, ("cuda:h100x1", "pmap")
# name -> (config, changes, topologies and layouts)
CASES: dict[str, tuple[str, dict[str, Any], list[tuple[str, str]]]] = {
    "digits": ("digits", {}, [("v5e:1x1", "pmap"), *(("v5e:2x2", mode) for mode in MODES)]),
    "digits, MCLR": ("digits_mclr", HALF, [("v5e:2x2", "data")]),
    "DiT-XL/2": ("digits", XL, [
        ("v5e:4x4", "fsdp"), ("v5e:4x4", "data"), ("v6e:2x2", "fsdp"), ("v5p:4x4x4", "fsdp"),
        ("v5e:4x4*2", "fsdp"), ("cuda:h100x8", "data"), ("cuda:h100x8", "fsdp"),
    ]),
    "DiT-XL/2, weight products kept": ("digits", XL | KEPT, BOTH),
    "DiT-XL/2, not recomputed": ("digits", XL | {"network.remat": False}, BOTH),
    "DiT-XL/2, MCLR": ("digits_mclr", XL | HALF, BOTH),
    "fashion_mnist": ("fashion_mnist", {}, [("v5e:1x1", "pmap"), ("v5e:2x2", "data")]),
    "fashion_mnist, MCLR": ("fashion_mnist_mclr", {}, [
        *(("v5e:2x2", mode) for mode in MODES), ("v5e:1x1", "pmap")]),
    "fashion_mnist, classifier": ("fashion_mnist_classifier", {}, [("v5e:1x1", "pmap")]),
    "fashion_mnist, MCLR, null answer": ("fashion_mnist_mclr_null", {}, [("v5e:1x1", "pmap")]),
    "cifar10": ("cifar10", {}, [("v5e:4x4", "data")]),
    "cifar10, MCLR": ("cifar10_mclr", {}, []),
    "DiT-XL/2's classifier": ("digits_classifier", CLASSIFIER | {
        "batch_size": 256, "num_steps": TUNED["num_steps"]}, LARGE),
    **{name: ("fashion_mnist_mclr_null", found, LARGE) for name, found in PUBLISHED.items()},
    "DiT-XL/2, null answer, on one card": ("fashion_mnist_mclr_null", ONE_CARD, [ONE]),
    "DiT-XL/2, null answer, rank 8": (
        "fashion_mnist_mclr_null", ONE_CARD | {"adapter.rank": 8}, [ONE]),
}  # fmt: skip
# Sampling: name -> topologies and samples at once, each unguided and with CFG.
SAMPLED = {
    "digits": [("v5e:1x1", 256)],
    "DiT-XL/2": [("v5e:1x1", 64), ("v5e:4x4", 1024), ("cuda:h100x8", 1024)],
    "cifar10": [("v5e:1x1", 256)],
}
SCALES = (1.0, 1.5)


class Case:
    """A row of CASES: what is trained, on which data, with which frozen models."""

    def __init__(self, name: str):
        file, changes, _ = CASES[name]
        self.training = Training.parse(tasks.config_of(file, changes))
        latent = next((latent for k, latent in LATENTS.items() if name.startswith(k)), None)
        shape, classes = latent or DATA[self.training.data.name]
        self.data = plan.data_info(self.training, shape, classes)
        configs = {key: pathlib.Path(path).name for key, path in self.training.runs.items()}
        weak = {k: x for k, x in changes.items() if k.startswith("network.")}
        weak["network.channels"] = 128  # EDM2-XS
        own = {"reference": changes, "classifier": CLASSIFIER, "weak": weak} if latent else {}
        others = {k: tasks.config_of(file, own.get(k, {})) for k, file in configs.items()}
        self.models = {key: Training.parse(c).model(self.data) for key, c in others.items()}

    def step(self, topology: str, parallel: str) -> dict[str, Any]:
        training = dataclasses.replace(self.training, parallel=parallel)
        return plan.planned(training, self.data, topology, self.models)

    def relative(self) -> float:
        """FLOPs of a step over those of DSM with the same batch."""
        dsm = dataclasses.replace(self.training, objective=DSM())
        steps = (each.task(self.data, self.models) for each in (self.training, dsm))
        mclr, plain = (plan.step_flops(task, self.training.batch_size) for task in steps)
        return mclr / plain

    def samples(self, topology: str, **options: Any) -> dict[str, Any]:
        model = self.training.model(self.data)
        return plan.sampling(model, topology, self.training.sampler, **options)


def counted(name: str) -> list[dict[str, Any]]:
    """What follows from the shapes alone, for each topology of a case: no compiler is needed.

    State and frozen weights are divided among the chips, as `fsdp` does; the hours are those of the
    products at the chip's peak.
    """
    case, found = Case(name), []
    task, batch = case.training.task(case.data, case.models), case.training.batch_size
    state, frozen, *_ = plan.shapes(task, batch)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((state, frozen)))
    flops = plan.step_flops(task, batch)
    for topology, count in (("v5e:4x4", 16), ("cuda:h200x8", 8)):
        cards = topology.startswith("cuda")
        chip = chips.KINDS_OF_CHIP["NVIDIA H200"] if cards else chips.CHIPS["v5e"]
        seconds = flops / count / chip.flops
        found.append({
            "name": name, "topology": topology, "chips": count, "batch_size": batch,
            "parameters": tasks.parameters(task.model), "flops_per_step": flops,
            "step_flops_relative_to_dsm": case.relative() if name in PUBLISHED else None,
            "state_bytes_per_chip": held / count, "chip_memory_bytes": chip.memory,
            "hours": seconds * case.training.num_steps / 3600,
        })  # fmt: skip
    return found


def count(file: str) -> dict[str, Any]:
    """The row of configs/FILE.py in parameters.json."""
    config = tasks.config_of(file)
    shape, classes = DATA[config.data.get("system", config.data.name)]
    if "frames" in config.data:
        shape = (config.data.frames, *shape[1:])
    training = Training.parse(config)
    model = training.model(plan.data_info(training, shape, classes))
    return {"config": f"configs/{file}.py", "network": config.network.name,
            "data": config.data.name, "shape": shape, "classes": classes,
            "parameters": tasks.parameters(model)}  # fmt: skip


def write(name: str, rows: list[dict[str, Any]]) -> None:
    write_json(tasks.RESULTS / f"{name}.json", {**provenance(), "rows": rows})


def main() -> None:
    flags = tasks.parsed(
        __doc__, row=("", "beginning of the names of rows"),
        parameters=(False, "write parameters.json alone"),
        published=(False, "write published_costs.json alone"),
    )  # fmt: skip
    if flags.parameters:
        files = {path.stem for path in (tasks.ROOT / "configs").glob("*.py")} - NO_NETWORK
        return write("parameters", [count(file) for file in sorted(files)])
    if flags.published:
        names = (*PUBLISHED, "DiT-XL/2's classifier")
        return write("published_costs", [row for name in names for row in counted(name)])
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # seconds are those of compiling
    stored = tasks.Rows("compiled")
    if "mclr_over_dsm" not in stored.content():
        pairs = [name for name in CASES if f"{name}, MCLR" in CASES]
        ratios = {name: Case(f"{name}, MCLR").relative() for name in pairs}
        write_json(stored.path, stored.content() | {"mclr_over_dsm": ratios})

    def add(kind: str, name: str, find: Callable, **asked: Any) -> None:
        if not name.startswith(flags.row):
            return
        file, changes, _ = CASES[name]

        def make() -> dict[str, Any]:
            cost = find(Case(name), **asked)
            if name.endswith(" answer"):
                cost["step_flops_relative_to_dsm"] = Case(name).relative()
            return {"config": file, "changes": changes, **cost, "jax": jax.__version__}

        try:
            stored.row({"name": name, **asked}, make, kind)
        except chips.MissingCompilerError as error:
            print(f"{name} for {asked['topology']}: {error}\n", flush=True)

    for name, (_, _, places) in CASES.items():
        for topology, parallel in places:
            add("rows", name, Case.step, topology=topology, parallel=parallel)
    for name, sizes in SAMPLED.items():
        for (topology, size), scale in itertools.product(sizes, SCALES):
            asked = {"topology": topology, "batch_size": size, "guidance_scale": scale}
            add("sampling", name, Case.samples, **asked)


if __name__ == "__main__":
    main()
