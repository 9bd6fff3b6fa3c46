"""Cost of a config on TPUs or GPUs, found by their compilers on a machine without any.

  mclr plan digits --topology=v5e:4x4 --parallel=fsdp

Compiles the training step for the topology, the kind and grid of chips: v5e:1x1, v6e:2x4,
v5p:2x2x1, v5e:4x4*2 for two slices of 4x4, or GPUs as cuda:h100x8 (h100, h200, a100). Prints
memory, FLOPs, collectives and a lower bound of the time, from published peaks of the chip. Nothing
is trained. The data tell the shape of an example and the number of classes; without the data give
--shape and --num_classes. A companion of the objective is a run or, if there is no run runs/NAME,
what configs/NAME.py would train. --suggest tries what saves memory, if the step does not fit.
--sample_batch=N also compiles the drawing of N samples, with --guidance_scale for the cost of CFG.
docs/devices.md explains the keys of the JSON file.
"""

import functools

import jax
from absl import flags

from mclr_jax import inherit, plan
from mclr_jax.files import provenance, write_json
from mclr_jax.launch import common
from mclr_jax.training.devices import MODES

common.define("config")
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


def main() -> None:
    config = flags.FLAGS.config
    if PARALLEL.value:
        config.parallel = PARALLEL.value
    training = inherit.training(config)
    if GUIDANCE_SCALE.value != 1 and not SAMPLE_BATCH.value:
        raise ValueError("--guidance_scale is that of samples: set --sample_batch, too.")
    out = common.output(OUT.value, ".json") if OUT.value else None
    jax.config.update("jax_platforms", "cpu")  # not the TPU that libtpu would look for
    jax.config.update("jax_enable_compilation_cache", False)  # compile_seconds is that of compiling
    data = plan.data_info(training, common.numbers(SHAPE, int), NUM_CLASSES.value)
    cost = plan.planned(training, data, TOPOLOGY.value)
    print(plan.told(cost))
    if SAMPLE_BATCH.value:
        options = {"batch_size": SAMPLE_BATCH.value, "guidance_scale": GUIDANCE_SCALE.value}
        model = training.model(data)
        cost["sampling"] = plan.sampling(model, TOPOLOGY.value, training.sampler, **options)
        print(plan.sampling_told(cost["sampling"]))
    if SUGGEST.value and not cost["fits"]:
        say = functools.partial(print, flush=True)
        cost["suggestions"] = plan.suggestions(training, data, TOPOLOGY.value, say)
    elif not cost["fits"]:
        print("--suggest tries remat, bfloat16, accumulation and fsdp.")
    if out:
        write_json(out, provenance() | cost)


if __name__ == "__main__":
    common.run(main, "config", "topology")
