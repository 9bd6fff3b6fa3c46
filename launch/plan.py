"""What a config costs on TPUs or GPUs, found by their compilers on a machine without any.

  python -m launch.plan --config=configs/digits.py --topology=v5e:4x4 --parallel=fsdp

Compiles the training step for the topology, the kind and grid of chips: v5e:1x1, v6e:2x4,
v5p:2x2x1, v5e:4x4*2 for two slices of 4x4, or GPUs as cuda:h100x8 (h100, h200, a100). Prints
memory, FLOPs, collectives and a lower bound of the time, from published peaks of the chip. Nothing
is trained. The data tell the shape of an example and the number of classes; without the data give
--shape and --num_classes. A companion of the objective is a run or, if there is no run runs/NAME,
what configs/NAME.py would train. --suggest tries what saves memory, if the step does not fit.
--sample_batch=N also compiles the drawing of N samples, with --guidance_scale for the cost of CFG.
docs/devices.md explains the keys of the JSON file.
"""

import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from launch import common
from mclr_jax import backend, experiment, generate, main, plan, runs
from mclr_jax.data import sources
from mclr_jax.files import flat, provenance, write_json
from mclr_jax.model import DataInfo, Model
from mclr_jax.samplers import Sampler
from mclr_jax.schema import construct, fields, resolve
from mclr_jax.training.devices import MODES

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, configs/NAME.py.")
TOPOLOGY = flags.DEFINE_string("topology", None, "Kind and grid of chips; see above.")
PARALLEL = flags.DEFINE_enum("parallel", None, MODES, "Default: the config's.")
SHAPE = flags.DEFINE_list("shape", None, "Shape of an example, as 32,32,3, without the data.")
NUM_CLASSES = flags.DEFINE_integer("num_classes", 0, "Classes, with --shape.", lower_bound=0)
SUGGEST = flags.DEFINE_bool("suggest", False, "Try what saves memory, if the step does not fit.")
SAMPLE_BATCH = flags.DEFINE_integer(
    "sample_batch", 0, "Samples of a call of the sampler to compile, too; 0: none.", lower_bound=0
)
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 1.0, "Of these samples; 1 is none.")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.json.")

# Changes of a config that save memory, beside more parts of a batch.
REMEDIES: Mapping[str, Any] = {
    "network.remat": True,
    "network.dtype": "bfloat16",
    "parallel": "fsdp",
}


def data_info(config: Any, shape: list[int] | None, num_classes: int) -> DataInfo:
    """The shape of the data, measured unless it is given.

    ValueError: a shape without classes. FileNotFoundError: neither a shape nor the data.
    """
    if shape:
        if not (classes := num_classes or config.data.num_classes):
            raise ValueError("--shape is given without --num_classes; both are needed.")
        if min(shape) < 1:
            raise ValueError(f"--shape is {shape}; expected positive sizes, such as 32,32,3.")
        share = (1 / classes,) * classes
        return DataInfo(tuple(shape), classes, config.sigma_data or 1.0, share)
    try:
        return experiment.data_info(config, sources.from_config(config.data, "train", config.seed))
    except FileNotFoundError as error:
        hint = "Without the data give their shape, such as --shape=32,32,3 --num_classes=10."
        raise FileNotFoundError(f"{error}. {hint}") from error


def companions(config: Any, data: DataInfo) -> dict[str, Model]:
    """The models that the objective reads: those of runs or, for runs/NAME, of configs/NAME.py."""

    def model(name: str, path: str) -> Model:
        if (pathlib.Path(path) / "run.json").exists():
            return runs.load(path).model
        file = pathlib.Path("configs") / f"{pathlib.Path(path).name}.py"
        if not file.exists():
            raise FileNotFoundError(
                f"Companion {name!r}: {path} is no run, and there is no {file} to train it from; "
                "set the companion to the directory of a run, or to runs/NAME of a config."
            )
        return experiment.make_model(runpy.run_path(str(file))["get_config"](), data)

    return {name: model(name, path) for name, path in runs.companion_paths(config).items()}


def sampler(config: Any) -> Sampler:
    return construct(Sampler, config.sampler, "sampler")


def planned(
    config: Any, data: DataInfo, topology: str, models: Mapping[str, Model] | None = None
) -> dict[str, Any]:
    """`plan.plan` of a config; `models` are the companions, by default those of `companions`."""
    models = companions(config, data) if models is None else models
    task = experiment.make_task(config, data, models)
    calls = 0 if task.model.is_classifier else generate.network_calls(task.model, sampler(config))
    with backend.programs_for_others():
        steps = main.steps_per_dispatch(config)
    return plan.plan(
        task, topology, config.parallel, batch_size=config.batch_size, steps_per_dispatch=steps,
        num_steps=config.num_steps, network_calls=calls,
    )  # fmt: skip


def suggestions(config: Any, data: DataInfo, topology: str) -> dict[str, dict[str, Any]]:
    """Keys that save memory, one by one and together -> the memory needed, and whether it fits."""
    given, found = flat(config.to_dict()), {}
    known = fields(resolve(experiment.NETWORKS, config.network.name, "network"))
    possible = {"grad_accumulation": 4 * config.grad_accumulation}
    for key, value in REMEDIES.items():
        section, _, name = key.rpartition(".")
        if given.get(key) != value and (not section or name in known):
            possible[key] = value
    alone = [{key: value} for key, value in possible.items()]
    if "network.remat" in possible:  # less is computed again, and more is kept
        alone.append({"network.remat": True, "network.remat_policy": "weight_products"})
    for change in [*alone, possible]:
        changed = ConfigDict(config.to_dict())
        changed.update_from_flattened_dict(change)
        name = ", ".join(f"{key}={value}" for key, value in change.items())
        try:
            cost = planned(changed, data, topology)
        except ValueError as error:  # the parts of the batch are too small
            print(f"{name}: not possible ({error})", flush=True)
            continue
        found[name] = {key: cost[key] for key in ("fits", "memory_per_chip_bytes")}
        print(f"{name}: {_memory(cost)}", flush=True)
    return found


def _bytes(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.3g} GiB"


def _memory(cost: Mapping[str, Any]) -> str:
    parts = {k: v for k, v in cost["memory_per_chip_bytes"].items() if v is not None}
    listed = ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())
    return f"{listed or 'unknown'}: {'fits' if cost['fits'] else 'DOES NOT FIT'}"


def _listed(lines: Mapping[str, str]) -> str:
    return "\n".join(f"{name:21s} {line}" for name, line in lines.items())


def sampling_text(cost: Mapping[str, Any]) -> str:
    """What `plan.sampling` found, for humans."""
    each = cost["thousand_samples"]
    lines = {
        "sampling": f"{cost['batch_size']} at once, guidance scale {cost['guidance_scale']:g}, "
        f"{each['network_calls']} network calls each",
        "... memory per chip": _memory(cost),
        "... 1,000 samples": f"{each['flops']:.4g} FLOPs, at least {each['chip_seconds']:.3g} "
        "chip-seconds",
        "... compiled in": f"{cost['compile_seconds']:.1f} s",
    }
    return _listed(lines)


def text(cost: Mapping[str, Any]) -> str:
    """The cost as a table for humans."""
    each, roofline, samples = (
        cost[key] for key in ("flops_per_example", "roofline", "thousand_samples")
    )
    chip = roofline["chip"]
    exchanged = (f"{kind} {each['count']} ({each['bytes'] / 2**20:.3g} MiB)"
                 for kind, each in cost["collectives"].items())  # fmt: skip
    seconds = ", ".join(f"{name} {value:.2e}" for name, value in roofline["seconds"].items())
    peaks = (f"{chip['flops'] / 1e12:g} TFLOP/s, memory {chip['bandwidth'] / 1e9:g} GB/s, "
             f"links {chip['link'] / 1e9:g} GB/s ({chip['source']})")  # fmt: skip
    lines = {
        "topology": f"{cost['topology']}: {cost['chips']} chips of "
        f"{_bytes(cost['chip_memory_bytes'])}; parallel={cost['parallel']}",
        "step": f"{cost['batch_size']} examples, {cost['steps_per_dispatch']} steps in a dispatch",
        "parameters": f"{cost['parameters']:,}, and frozen {cost['frozen_parameters']:,}",
        "memory per chip": _memory(cost),
        "FLOPs": f"{cost['flops_per_step']:.4g} a step; of one example {each['forward']:.4g} "
        f"forward, {each['step']:.4g} in a step",
        "collectives per step": ", ".join(exchanged) or "none",
        "seconds per step": f"at least {roofline['seconds_per_step']:.2e} ({seconds})",
        "peaks assumed": peaks,
        "whole training": f"at least {cost['device_hours']:.3g} chip-hours",
        "1,000 samples": f"{samples['network_calls']} network calls each, "
        f"{samples['flops']:.4g} FLOPs, at least {samples['chip_seconds']:.3g} chip-seconds",
        "compiled in": f"{cost['compile_seconds']:.1f} s",
    }
    return _listed(lines)


def command() -> None:
    config = CONFIG.value
    if PARALLEL.value:
        config.parallel = PARALLEL.value
    main.check(config)
    if GUIDANCE_SCALE.value != 1 and not SAMPLE_BATCH.value:
        raise ValueError("--guidance_scale is that of samples: set --sample_batch, too.")
    out = common.output(OUT.value, ".json") if OUT.value else None
    jax.config.update("jax_platforms", "cpu")  # not the TPU that libtpu would look for
    jax.config.update("jax_enable_compilation_cache", False)  # compile_seconds is that of compiling
    data = data_info(config, common.numbers(SHAPE, int), NUM_CLASSES.value)
    cost = planned(config, data, TOPOLOGY.value)
    print(text(cost))
    if SAMPLE_BATCH.value:
        model = experiment.make_model(config, data)
        options = {"batch_size": SAMPLE_BATCH.value, "guidance_scale": GUIDANCE_SCALE.value}
        cost["sampling"] = plan.sampling(model, TOPOLOGY.value, sampler(config), **options)
        print(sampling_text(cost["sampling"]))
    if SUGGEST.value and not cost["fits"]:
        cost["suggestions"] = suggestions(config, data, TOPOLOGY.value)
    elif not cost["fits"]:
        print("--suggest tries remat, bfloat16, accumulation and fsdp.")
    if out:
        write_json(out, provenance() | cost)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "topology"])
    common.run(command)
