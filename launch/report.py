"""Compare runs on one web page: samples side by side, metrics, curves, and how configs differ.

  mclr report runs/digits runs/digits_mclr --out=report.html --guidance_scales=1,1.5,2

The page is one file, without server, network or scripts. Samples of all runs start from the same
noise, at the selected guidance scale. The metrics are the rows that mclr evaluate has stored.
"""

from absl import flags

from mclr_jax import cpu, extras, runs
from mclr_jax.evaluation import report
from mclr_jax.files import write_atomically
from mclr_jax.launch import common
from mclr_jax.training.log import Progress

OUT = flags.DEFINE_string("out", None, "File to write, NAME.html.")
GUIDANCE_SCALES = flags.DEFINE_list("guidance_scales", ["1", "1.5", "2"], "Scales to sample at.")
PER_CLASS = flags.DEFINE_integer("per_class", 6, "Samples of each class.", lower_bound=1)
(SEED,) = common.define("seed")
common.define(*common.GUIDANCE)


def main(*workdirs: str) -> None:
    extras.needed("matplotlib", "figures")
    scales = common.numbers(GUIDANCE_SCALES, float) or []
    found = [runs.load(workdir) for workdir in workdirs]
    guidances, models = [common.guidance(run) for run in found], [run.model for run in found]
    out = common.output(OUT.value, ".html")
    cpu.use_cores(models[0].network)
    classes = sum(model.null_label for model in models if not model.is_classifier)
    with Progress(classes * len(scales) * PER_CLASS.value, "sample") as progress:
        options = {"seed": SEED.value, "progress": progress.update}
        pages = [
            report.read(workdir, scales, PER_CLASS.value, guided, **options)
            for workdir, guided in zip(workdirs, guidances, strict=True)
        ]
    write_atomically(out, report.page(pages))
    print(f"Wrote {out}.")


if __name__ == "__main__":
    usage = "No run was named: mclr report DIR [DIR ...] --out=report.html"
    common.run(main, "out", usage=usage, several=True)
