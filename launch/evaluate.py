"""Measure a trained run: distances to real images, class accuracy, diversity, cost.

  python -m launch.evaluate --workdir=runs/digits --features=classifier:runs/digits_classifier \\
      --num_samples=1000 --guidance_scales=1,1.5,2 --out=digits.json

Prints a row for each guidance scale, interpolation and average of the weights, and a row for
held-out real images, at most as many, drawn by --seed: the floor. Each row of samples is stored in
WORKDIR/evaluation when it is complete, and the same command makes only the missing rows. --metrics
names any of

  fd        Frechet distance of the features, to the training set
  fd_class  the same for each class, averaged
  fd_inter  mean Frechet distance between the classes of the samples: class separation
  is        inception score, in the extractor's classes
  kid       kernel distance (unbiased)
  pr        precision and recall
  dc        density and coverage

and every row has the class accuracy, network calls and samples per second. With --memorized it has
the share of samples that copy a training image: their distance to it, in pixels, is less than a
third of the distance to the second nearest image.

All measures of a model of latents are of decoded images; --data may name the images themselves.
Several processes share the work and process 0 writes the files: --coordinator as in launch.train.
"""

import pathlib

from absl import flags, logging

from mclr_jax import latents, runs
from mclr_jax.data.protocol import drawn
from mclr_jax.evaluation import evaluate, features
from mclr_jax.files import write_json
from mclr_jax.launch import common, hosts
from mclr_jax.training.devices import is_first
from mclr_jax.training.log import Progress

WORKDIR, SEED, INIT_FROM, DATA, BATCH_SIZE, AUTOENCODER = common.define(
    "workdir", "seed", "init_from", "data", "batch_size", "autoencoder"
)
common.define(*common.GUIDANCE)
OUT = flags.DEFINE_string("out", None, "File to write, NAME.json.")
FEATURES = flags.DEFINE_string(
    "features", None,
    "Extractor: classifier:WORKDIR, efficientnet_lite0, inception:FILE or dinov2:FILE.",
)  # fmt: skip
JUDGE = flags.DEFINE_string("judge", None, "Extractor that judges accuracy; default: --features.")
METRICS = flags.DEFINE_list("metrics", sorted(evaluate.METRICS), "What to measure; see above.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 10_000, "Of each row.", lower_bound=2)
GUIDANCE_SCALES = flags.DEFINE_list("guidance_scales", ["1"], "Scales, as 1,1.5,2.")
MEMORIZED = flags.DEFINE_bool("memorized", False, "Look for copies of training images.")
EMAS = flags.DEFINE_list("emas", [""], "Averages of the weights, as --ema of launch.sample.")
INTERPOLATIONS = flags.DEFINE_list(
    "interpolations", ["1"], "Of a fine-tuned run, as --interpolation of launch.sample: 0,0.5,1."
)
CACHE = flags.DEFINE_string(
    "cache", "~/.cache/mclr_jax/references", "Folder of the real data's statistics."
)


def main() -> None:
    hosts.connect(WORKDIR.value)
    scales = common.numbers(GUIDANCE_SCALES, float) or [1.0]
    places = common.numbers(INTERPOLATIONS, float) or [1.0]
    run = runs.load(WORKDIR.value, INIT_FROM.value, DATA.value, AUTOENCODER.value)
    first = is_first()
    out = common.output(OUT.value, ".json") if first else None
    common.use_cores(run.model.network)
    guided = common.guidance(run)
    extractor = features.load(FEATURES.value)
    judge = features.load(JUDGE.value) if JUDGE.value else None
    decode = latents.decoder(run.data, run.model)
    train, test = (latents.decoded(run.source(split), decode) for split in ("train", "test"))
    if isinstance(train, latents.Decoded) != isinstance(test, latents.Decoded):
        logging.warning("Some of the real examples are images, others decoded latents: the floor "
                        "has the error of the autoencoder, too.")  # fmt: skip
    cache = pathlib.Path(CACHE.value).expanduser()
    with Progress(len(train), "real image", quiet=not first) as progress:
        real = evaluate.real_statistics(extractor, train, cache, progress.update)
    shown = {"names": METRICS.value, "judge": judge, "training": train if MEMORIZED.value else None}
    held_out, labels = test[drawn(test, NUM_SAMPLES.value, SEED.value, by_class=True)]
    floor = {
        "samples": len(labels), **evaluate.judged(held_out, labels, extractor, real, **shown)
    }  # fmt: skip
    total = NUM_SAMPLES.value * len(scales) * len(EMAS.value) * len(places)
    with Progress(total, "sample", quiet=not first) as progress:
        rows = evaluate.evaluate(
            run, extractor, real, **shown, num_samples=NUM_SAMPLES.value, seed=SEED.value,
            guided=guided, guidance_scales=scales, averages=EMAS.value, interpolations=places,
            batch_size=BATCH_SIZE.value, progress=progress.update,
        )  # fmt: skip
    if out is None:
        return
    write_json(out, {"floor": floor, "rows": rows})
    columns = [*(key for key in floor if key != "samples"), "network_calls"]
    table = {"real, held out": floor} | {
        f"{r['average']} scale {r['guidance_scale']:g}".strip()
        + (f" interpolation {r['interpolation']:g}" if "interpolation" in r else ""): r
        for r in rows
    }
    width = max(map(len, table))
    print(" " * width, *(f"{name[:12]:>12s}" for name in columns))
    for name, row in table.items():
        cells = (f"{row[c]:12.4g}" if c in row else f"{'':12s}" for c in columns)
        print(f"{name:{width}s}", *cells)
    print(evaluate.remark(rows, floor))
    print(f"Wrote {out}.")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir", "features", "out"])
    common.run(main)
