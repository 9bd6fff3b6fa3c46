"""Measure the representation of a trained run: ICR and a linear probe against the noise level.

  mclr icr --workdir=runs/digits --sigmas=0.05,0.1,0.2,0.5,1,2 --out=icr.json

The Invariant Contamination Ratio (arXiv 2606.09718) is the share of a block's features that
changes when the image is perturbed (crop, flip, colour jitter, noise). It needs no labels and no
samples. Prints a table, writes it as JSON with its provenance, and writes a figure. Every row has

  icr             bias-corrected; icr_plain is the paper's, which depends on --num_images;
                  icr_within_classes is that of features less the mean of their class: a network
                  that is told the class (--at_labels) passes it on
  invariance      Tr Sigma_s, residual Tr Sigma_xi, expansion Tr Sigma_h at unit length
  effective_rank  of the features
  probe_accuracy  of logistic regression, on held-out images
"""

import pathlib

from absl import flags

from mclr_jax import extras
from mclr_jax.files import write_atomically, write_json
from mclr_jax.labels import warn_untrained
from mclr_jax.launch import common
from mclr_jax.representation import blocks, perturb, sweep
from mclr_jax.training.log import Progress

_, _, EMA, CHECKPOINT = common.define("workdir", "data", "ema", "checkpoint")
OUT = flags.DEFINE_string("out", None, "File to write, NAME.json; NAME.png goes beside it.")
SIGMAS = flags.DEFINE_list("sigmas", [f"{s:g}" for s in sweep.SIGMAS], "Noise levels, as 0.1,1.")
LAYERS = flags.DEFINE_list("layers", [], "Names of blocks; default: the middle one; all: all.")
NUM_IMAGES = flags.DEFINE_integer(
    "num_images", 4096, "Training images, at least twice the length of the features.", lower_bound=2
)
PROBE = flags.DEFINE_bool("probe", True, "Fit a linear probe too.")
AT_LABELS = flags.DEFINE_bool(
    "at_labels", False, "Read features at the class of each image, not at the null label."
)
COMPARE = flags.DEFINE_string(
    "compare", None, "File of mclr icr of another run, which the figure shows, too."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the perturbations.", lower_bound=0)
BATCH_SIZE = flags.DEFINE_integer("batch_size", blocks.BATCH, "Images at a time.", lower_bound=1)


def main() -> None:
    extras.needed("matplotlib", "figures")
    sigmas = common.numbers(SIGMAS, float) or []
    run = common.load()
    out = common.output(OUT.value, ".json")
    layers = blocks.choose(run.model, LAYERS.value)
    others = sweep.compared(pathlib.Path(COMPARE.value)) if COMPARE.value else {}
    warn_untrained(run, [] if AT_LABELS.value else [run.model.null_label])
    params, step = run.weights(EMA.value, CHECKPOINT.value)
    train, test = run.source("train"), run.source("test") if PROBE.value else None
    with Progress(None, "image") as progress:
        rows = sweep.sweep(
            run.model, params, train, test, sigmas=sigmas, layers=layers, seed=SEED.value,
            augmentation=perturb.Augmentation(flip=run.data.mirrored),
            num_images=NUM_IMAGES.value, batch_size=BATCH_SIZE.value, progress=progress.update,
            at_labels=AT_LABELS.value,
        )  # fmt: skip
    settings = common.made_by(step, params) | {
        "num_images": min(NUM_IMAGES.value, len(train)), "seed": SEED.value,
        "at_labels": AT_LABELS.value,
    }  # fmt: skip
    write_json(out, {"settings": settings, "rows": rows})
    print(sweep.table(rows))
    write_atomically(out.with_suffix(".png"), sweep.figure(sweep.by_layer(rows) | others))
    print(f"Wrote {out}.")


if __name__ == "__main__":
    common.run(main, "workdir", "out")
