"""Train on 8x8 digits, move guidance into the model by MCLR, and compare the samples.

  mclr demo --workdir=runs/demo

Trains configs/digits.py, the classifier configs/digits_classifier.py and, with both,
configs/digits_mclr.py. Draws three sets of samples from the same noise: unguided, with
classifier-free guidance, and unguided from the model that MCLR fine-tuned. A support vector
machine, trained on the real digits, judges the class of each sample. samples.png shows ten samples
per class of each set.
"""

import pathlib

from absl import flags

from mclr_jax import demo
from mclr_jax.launch import common

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory of the runs; made if missing.")
GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", 2.0, "Of the guided samples; beta of MCLR is this minus 1."
)
PER_CLASS = flags.DEFINE_integer("per_class", 50, "Samples of each class.", lower_bound=1)


def main() -> None:
    demo.demo(pathlib.Path(WORKDIR.value), GUIDANCE_SCALE.value, PER_CLASS.value, print)


if __name__ == "__main__":
    common.run(main)
