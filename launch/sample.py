"""Draw samples from a trained run, and a picture of them.

  mclr sample --workdir=runs/digits --num_samples=100 --seed=0 --sampler=heun \\
      --steps=18 --guidance_scale=2.0 --out=digits.npz
  mclr sample --compare=runs/base,runs/base:2,runs/mclr --num_samples=40 --out=compared.png

Writes the arrays `images` ((N, H, W, C) float32 in [-1, 1]) and `labels` ((N,) int32), and beside
them a PNG with a row for each class. Samples of a model of latents are decoded, and the latents are
there too, as `latents`; without an autoencoder `images` are the latents, of which there is no PNG.
Sample i depends on the seed, i and its label alone: a run of more samples begins with the same
ones. The labels repeat all classes, or --labels; null: no class.
With --compare it writes one picture of several runs, from the same noise: a row for each class, and
columns for each run, under its name.
Several processes share the work and process 0 writes the files: --coordinator as in mclr train.
"""

import pathlib

import numpy as np
from absl import flags

from mclr_jax import images, runs, samplers, sampling
from mclr_jax.labels import chosen
from mclr_jax.launch import common
from mclr_jax.samplers import Sampler
from mclr_jax.schema import fields
from mclr_jax.training.devices import is_first
from mclr_jax.training.log import Progress

WORKDIR, SEED, EMA, CHECKPOINT, INTERPOLATION, BATCH_SIZE = common.define(
    "workdir", "seed", "ema", "checkpoint", "interpolation", "batch_size"
)
common.define("init_from", "autoencoder", *common.GUIDANCE, *common.HOSTS)
OUT = flags.DEFINE_string(
    "out", None, "File to write, NAME.npz; NAME.png goes beside it. With --compare NAME.png alone."
)
COMPARE = flags.DEFINE_list(
    "compare", None, "Runs to compare, RUN or RUN:SCALE with the guidance scale: directories, or "
    "their names beside --workdir, as base:1,base:2,mclr."
)  # fmt: skip
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 100, "How many samples.", lower_bound=1)
LABELS = flags.DEFINE_list("labels", None, "Classes, as cat,dog or 0,1, or null, repeated.")
OWN_NAMES = {"method": "sampler", "num_steps": "steps"}
SAMPLER = common.of_keys(Sampler, {key: OWN_NAMES.get(key, key) for key in fields(Sampler)})
GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", 1.0, "Guidance: weak + scale * (conditional - weak), weak the null label."
)
CHURN = flags.DEFINE_float("churn", 0.0, "S_churn of EDM's stochastic sampler; 0: deterministic.")


def main() -> None:
    common.connect(WORKDIR.value or ".")
    if WORKDIR.value is None and not COMPARE.value:
        common.stop("Name a run by --workdir, or several by --compare.")
    out = common.output(OUT.value, ".png" if COMPARE.value else ".npz") if is_first() else None
    count = NUM_SAMPLES.value
    if COMPARE.value:
        beside = pathlib.Path(WORKDIR.value or ".")
        given = COMPARE.value, beside, LABELS.value, count
        picture, written = sampling.side_by_side(*given, common.load, _draw), [out]
        if out:
            images.save(out, picture)
    else:
        run = common.load()
        labels = np.resize(chosen(LABELS.value, run), count)
        drawn = _draw(run, labels, GUIDANCE_SCALE.value)
        written = sampling.write(out, run, labels, drawn) if out else []
    if out:
        print(f"Wrote {' and '.join(map(str, written))}.")


def _draw(run: runs.Run, labels: np.ndarray, scale: float) -> sampling.Drawn:
    given = {key: flag.value for key, flag in SAMPLER.items()}
    weights = EMA.value, CHECKPOINT.value, INTERPOLATION.value
    churn = samplers.Churn(CHURN.value) if CHURN.value else None
    with Progress(len(labels), "sample") as progress:
        return sampling.draw(
            run, labels, common.guidance(run, scale), given, weights, seed=SEED.value, churn=churn,
            batch_size=BATCH_SIZE.value, progress=progress.update,
        )  # fmt: skip


if __name__ == "__main__":
    common.run(main, "out")
