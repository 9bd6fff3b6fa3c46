"""Measure a trained run, or any images: distances to real images, accuracy, diversity, cost.

  mclr evaluate --workdir=runs/digits --features=classifier:runs/digits_classifier \\
      --num_samples=1000 --guidance_scales=1,1.5,2 --out=digits.json
  mclr evaluate --samples=FOLDER --reference=FOLDER --features=efficientnet_lite0

For a run it prints a row for each guidance scale, interpolation and average of the weights, and a
row for held-out real images, at most as many, drawn by --seed: the floor. Each row of samples is
stored in WORKDIR/evaluation when it is complete, and the same command makes only the missing rows.

Without a run, --samples and --reference are folders, zips or npz files of images, or data sources
as in config.data.name, at --resolution; --reference may be a file of statistics (mu and sigma, of
EDM, EDM2, guided-diffusion or clean-fid), for a run, too. --write_statistics writes such a file.

--metrics names any of

  frechet              Frechet distance of the features (FD), to the training set
  per_class_frechet    the same for each class, averaged
  inter_class_frechet  mean Frechet distance between the classes of the samples: class separation
  inception_score      in the extractor's classes
  kernel               kernel distance (KID, unbiased)
  precision, recall    share of samples near real images; of real images near samples
  density, coverage    the same by numbers of neighbours

and every row has the class accuracy, network calls and samples per second. With --memorized it has
the share of samples that copy a training image: their distance to it, in pixels, is less than a
third of the distance to the second nearest image; and copy_ratio, the ratio of these distances that
a hundredth of the samples is below. A picture shows the samples with the lowest ratios beside their
nearest training images.

All measures of a model of latents are of decoded images; --data may name the images themselves.
Several processes share the work and process 0 writes the files: --coordinator as in mclr train.
"""

import pathlib

from absl import flags

from mclr_jax.data.protocol import Source
from mclr_jax.evaluation import compare, evaluate, features
from mclr_jax.files import write_json
from mclr_jax.launch import common
from mclr_jax.training.devices import is_first
from mclr_jax.training.log import Progress

WORKDIR, SEED, BATCH_SIZE, RESOLUTION = common.define("workdir", "seed", "batch_size", "resolution")
common.define("init_from", "data", "autoencoder", *common.GUIDANCE, *common.HOSTS)
OUT = flags.DEFINE_string("out", None, "File to write, NAME.json.")
SAMPLES = flags.DEFINE_string("samples", None, "Images to measure, in place of those of a run.")
REFERENCE = flags.DEFINE_string(
    "reference", None, "Real images or statistics of them; default: the data of the run."
)
WRITE_STATISTICS = flags.DEFINE_string(
    "write_statistics", None, "File to write, NAME.npz: mu and sigma of the reference."
)
FEATURES = flags.DEFINE_string(
    "features", None,
    "Extractor: classifier:WORKDIR, efficientnet_lite0, inception:FILE or dinov2:FILE.",
)  # fmt: skip
JUDGE = flags.DEFINE_string("judge", None, "Extractor that judges accuracy; default: --features.")
METRICS = flags.DEFINE_list("metrics", [*evaluate.METRICS], "What to measure; see above.")
NUM_SAMPLES = flags.DEFINE_integer(
    "num_samples", None, "Of each row; default: 10,000, or all of --samples.", lower_bound=2
)
GUIDANCE_SCALES = flags.DEFINE_list("guidance_scales", ["1"], "Scales, as 1,1.5,2.")
MEMORIZED = flags.DEFINE_bool("memorized", False, "Look for copies of training images.")
EMAS = flags.DEFINE_list("emas", [""], "Averages of the weights, as --ema of mclr sample.")
INTERPOLATIONS = flags.DEFINE_list(
    "interpolations", ["1"], "Of a fine-tuned run, as --interpolation of mclr sample: 0,0.5,1."
)
CACHE = flags.DEFINE_string("cache", evaluate.CACHE, "Folder of the real data's statistics.")


def main() -> None:
    if WORKDIR.value is not None and SAMPLES.value is not None:
        common.stop("With --workdir the samples are those of the run: leave out --samples.")
    images = REFERENCE.value and (SAMPLES.value or WRITE_STATISTICS.value)
    if WORKDIR.value is None and not images:
        common.stop("Name a run by --workdir, or images by --samples and --reference.")
    common.connect(WORKDIR.value or ".")
    out = common.output(OUT.value, ".json") if OUT.value and is_first() else None
    written = common.output(WRITE_STATISTICS.value, ".npz") if WRITE_STATISTICS.value else None
    rows, floor = _images(written) if WORKDIR.value is None else _run(written)
    if rows and is_first():
        print(evaluate.table(rows, floor))
        print(evaluate.remark(rows, floor))
        print("".join(evaluate.pictures(rows, WORKDIR.value or "")), end="")
    if rows and out:
        write_json(out, {"floor": floor, "rows": rows} if floor else {"rows": rows})
        print(f"Wrote {out}.")


def _real(
    extractor: features.Extractor, written: pathlib.Path | None, source: Source | None = None
) -> evaluate.RealStatistics:
    """Statistics of --reference, or of a source; written, if there is a file for them."""
    cache = pathlib.Path(CACHE.value).expanduser()
    given = REFERENCE.value or source, extractor, RESOLUTION.value, cache
    with Progress(source and len(source), "real image") as progress:
        real = compare.reference(*given, progress.update)
    if written and is_first():
        compare.write_statistics(written, real.moments)
        print(f"Wrote {written}.")
    return real


def _images(written: pathlib.Path | None) -> tuple[list, dict]:
    """The row of --samples, if they are given."""
    samples = compare.source(SAMPLES.value, RESOLUTION.value) if SAMPLES.value else None
    extractor = features.load(FEATURES.value)
    real = _real(extractor, written)
    if samples is None:
        return [], {}
    given = samples, extractor, real, METRICS.value, NUM_SAMPLES.value or 0, SEED.value
    with Progress(NUM_SAMPLES.value or len(samples), "sample") as progress:
        row = compare.compare(*given, progress.update)
    row |= {"samples_from": SAMPLES.value, "reference_from": REFERENCE.value}
    print(compare.described(row))
    return [row], {}


def _run(written: pathlib.Path | None) -> tuple[list, dict]:
    """The rows of a run, and the floor, if --reference does not replace its data."""
    scales = common.numbers(GUIDANCE_SCALES, float) or [1.0]
    places = common.numbers(INTERPOLATIONS, float) or [1.0]
    run, count = common.load(), NUM_SAMPLES.value or 10_000
    guided = common.guidance(run)
    extractor = features.load(FEATURES.value)
    judge = features.load(JUDGE.value) if JUDGE.value else None
    needed = MEMORIZED.value or not REFERENCE.value
    train, test = evaluate.real_data(run) if needed else (None, None)
    real = _real(extractor, written, train)
    options = {"names": compare.permitted(METRICS.value, real), "judge": judge, "seed": SEED.value,
               "num_samples": count, "training": train if MEMORIZED.value else None}  # fmt: skip
    floor = {}
    if test is not None and not REFERENCE.value:
        floor = evaluate.floor(test, extractor, real, **options, flip=run.data.flip)
    total = count * len(scales) * len(EMAS.value) * len(places)
    with Progress(total, "sample") as progress:
        rows = evaluate.evaluate(
            run, extractor, real, **options, floor=floor, guided=guided, guidance_scales=scales,
            averages=EMAS.value, interpolations=places, batch_size=BATCH_SIZE.value,
            progress=progress.update,
        )  # fmt: skip
    return rows, floor


if __name__ == "__main__":
    common.run(main, "features")
