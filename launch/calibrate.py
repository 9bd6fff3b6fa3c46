"""Find guidance strengths by class, at which samples are as recognisable as held-out data.

  mclr calibrate --workdir=runs/digits --classifier=runs/digits_classifier \\
      --out=strengths.json
  mclr sample --workdir=runs/digits --guidance_scale=2 \\
      --class_strengths=strengths.json --out=digits.npz

The strength of a class is the smallest one at which the samples of the class have the same mean
probability of their class as held-out images, both with noise of level --sigma, according to a
classifier of noisy images (configs/NAME_classifier.py). Strengths are those of CFG, or with
--autoguidance those of autoguidance, or the network's input where config.strength is set, or with
--interpolation the places on the line from the weights that a run was fine-tuned from to its own.

The file has `class_strengths`, factors of `strength` = --max_strength: with them,
guidance_scale = 1 + strength gives each class its own strength; a smaller scale makes all weaker.
With --interpolation they are for fine-tuning anew, by the same config with config.class_strengths.
"""

import dataclasses

from absl import flags

from mclr_jax import calibrate
from mclr_jax.evaluation.features import noisy
from mclr_jax.files import write_json
from mclr_jax.labels import warn_untrained
from mclr_jax.launch import common
from mclr_jax.training.log import Progress

EMA, CHECKPOINT, BATCH_SIZE = common.define("ema", "checkpoint", "batch_size")
common.define("workdir", "init_from", "data", *common.GUIDANCE[1:])  # it finds class_strengths
CLASSIFIER = flags.DEFINE_string("classifier", None, "Directory of a classifier of noisy images.")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.json.")
MAX_STRENGTH = flags.DEFINE_float(
    "max_strength", 1.0, "Largest strength, guidance_scale - 1; no class gets a larger one."
)
GRID = flags.DEFINE_integer(
    "grid", 6, "Number of strengths, evenly spaced from 0 to --max_strength.", lower_bound=2
)
SAMPLES_PER_CLASS = flags.DEFINE_integer(
    "samples_per_class", 200, "Samples of each class at each strength.", lower_bound=2
)
SIGMA = flags.DEFINE_float("sigma", 0.3, "Noise level at which images are classified.")
SEED = flags.DEFINE_integer(
    "seed", 1, "Seed of the starting noise, another one than that of an evaluation.", lower_bound=0
)
INTERPOLATION = flags.DEFINE_bool(
    "interpolation", False, "Strengths are places of the weights, as --interpolation of "
    "mclr sample, in place of guidance."
)  # fmt: skip


def main() -> None:
    run = common.load()
    out = common.output(OUT.value, ".json")
    guided = common.guidance(run)
    classifier = noisy(CLASSIFIER.value, SIGMA.value, run.model.data, run.data.name)
    params, step = run.weights(EMA.value, CHECKPOINT.value)
    warn_untrained(run, [0], guided.at(1 if INTERPOLATION.value else 1 + MAX_STRENGTH.value))
    given = run, EMA.value, step, guided
    weights = calibrate.places(*given) if INTERPOLATION.value else None
    total = GRID.value * SAMPLES_PER_CLASS.value * run.model.null_label
    with Progress(total, "sample") as progress:
        found = calibrate.calibrate(
            run.model, params, run.sampler, classifier, run.source("test"), weights=weights,
            max_strength=MAX_STRENGTH.value, grid=GRID.value, sigma=SIGMA.value, seed=SEED.value,
            samples_per_class=SAMPLES_PER_CLASS.value, guided=guided,
            batch_size=BATCH_SIZE.value, progress=progress.update,
        )  # fmt: skip
    settings = {
        **common.made_by(step, params),
        "classifier": CLASSIFIER.value,
        "classifier_weights": classifier.digest,
        "sampler": dataclasses.asdict(run.sampler),
        **guided.settings(),
        "interpolation": INTERPOLATION.value,
    }
    write_json(out, found | settings)
    print(calibrate.table(found, run.class_names))
    print(f"Wrote {out}.")
    print(calibrate.use(found, "" if INTERPOLATION.value else str(out)))


if __name__ == "__main__":
    common.run(main, "workdir", "classifier", "out")
