"""Train on 8x8 digits, move guidance into the model by MCLR, and compare the samples.

  mclr demo --workdir=runs/demo

Trains configs/digits.py, the classifier configs/digits_classifier.py and, with both,
configs/digits_mclr.py. Draws three sets of samples from the same noise: unguided, with
classifier-free guidance, and unguided from the model that MCLR fine-tuned. A support vector
machine, trained on the real digits, judges the class of each sample. samples.png shows ten samples
per class of each set.
"""

import pathlib

import numpy as np
import sklearn.svm
from absl import flags

from mclr_jax import generate, images, runs
from mclr_jax.configs import digits, digits_classifier, digits_mclr
from mclr_jax.data import sources
from mclr_jax.files import provenance, write_json
from mclr_jax.launch import common
from mclr_jax.main import train
from mclr_jax.schema import in_range
from mclr_jax.training.devices import banner

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory of the runs; made if missing.")
GUIDANCE_SCALE = flags.DEFINE_float(
    "guidance_scale", 2.0, "Of the guided samples; beta of MCLR is this minus 1."
)
PER_CLASS = flags.DEFINE_integer("per_class", 50, "Samples of each class.", lower_bound=1)


def main() -> None:
    in_range("--guidance_scale", GUIDANCE_SCALE.value, 1.0, 1000.0)
    in_range("--per_class", PER_CLASS.value, 1, 100_000)
    workdir = pathlib.Path(WORKDIR.value)
    train(digits.get_config(), workdir / "base")
    train(digits_classifier.get_config(), workdir / "classifier")
    config = digits_mclr.get_config()
    config.init_from = str(workdir / "base")
    config.companions.classifier = str(workdir / "classifier")
    config.objective.beta = GUIDANCE_SCALE.value - 1
    train(config, workdir / "mclr")

    real, real_labels = (source := sources.load("digits", "all"))[np.arange(len(source))]
    classifier = sklearn.svm.SVC(gamma=5.0).fit(_features(real / 127.5 - 1), real_labels)
    labels = np.resize(np.arange(source.num_classes), PER_CLASS.value * source.num_classes)
    grids, table = [], []
    print(f"\nAccuracy judged by a classifier of real digits, {len(labels)} samples each:")
    print(f"  {'':8s} {'accuracy':>8s} {'network calls':>13s}")
    rows = ("base", "base", 1.0), ("CFG", "base", GUIDANCE_SCALE.value), ("MCLR", "mclr", 1.0)
    for name, directory, scale in rows:
        run, guided = runs.load(workdir / directory), generate.Guidance(scale)
        params, step = run.weights()
        samples = generate.generate(run.model, params, labels, run.sampler, guided=guided)
        accuracy = float((classifier.predict(_features(samples)) == labels).mean())
        calls = guided.calls(run.model, run.sampler)
        table.append({"name": name, "steps": step, "accuracy": accuracy, "network_calls": calls})
        print(f"  {name:8s} {accuracy:8.1%} {calls:13d}")
        grids.append(images.picture(samples, labels))
    images.save(workdir / "samples.png", np.concatenate(grids, axis=1))
    result = {**provenance(), "guidance_scale": GUIDANCE_SCALE.value, "samples": len(labels),
              "table": table, "device": banner()}  # fmt: skip
    write_json(workdir / "result.json", result)
    print(f"Picture: {workdir / 'samples.png'}; numbers: {workdir / 'result.json'}")


def _features(pixels: np.ndarray) -> np.ndarray:
    """(n, 8, 8, 1) in [-1, 1] -> (n, 64), at the scale of the classifier's kernel."""
    return np.clip(pixels, -1, 1).reshape(len(pixels), -1) / 8


if __name__ == "__main__":
    common.run(main)
