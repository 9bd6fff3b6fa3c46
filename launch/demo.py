"""Train on 8x8 digits, sample them without and with guidance, and judge the samples.

  python -m launch.demo --workdir=runs/demo

The run is configs/digits.py. A support vector machine trained on the real digits says how many
samples of each class it takes for that class; the picture samples.png shows ten of each, without
guidance on the left and with it on the right, from the same noise.
"""

import json
import pathlib

import numpy as np
import sklearn.svm
from absl import flags

from configs import digits
from launch import common
from mclr_jax import generate, images, run
from mclr_jax.data import sources
from mclr_jax.training.devices import banner
from mclr_jax.training.loop import train

WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "Directory of the run; made if missing.")
GUIDANCE_SCALE = flags.DEFINE_float("guidance_scale", 2.0, "Of the guided samples.")
PER_CLASS = flags.DEFINE_integer("per_class", 50, "Samples of each class.", lower_bound=1)


def main() -> None:
    workdir = pathlib.Path(WORKDIR.value)
    train(digits.get_config(), workdir)
    experiment = run.load_experiment(workdir)
    params, step = run.load_weights(workdir)

    real, real_labels = (source := sources.load("digits", "all"))[np.arange(len(source))]
    classifier = sklearn.svm.SVC(gamma=5.0).fit(_features(real / 127.5 - 1), real_labels)
    labels = np.resize(np.arange(experiment.null_label), PER_CLASS.value * experiment.null_label)
    grids, accuracies = [], {}
    print(f"\nSamples that a classifier of real digits takes for their class (of {len(labels)}):")
    for name, scale in [("no guidance", 1.0), ("guidance", GUIDANCE_SCALE.value)]:
        samples = generate.generate(experiment, params, labels, guidance_scale=scale)
        accuracy = accuracies[name] = float(
            (classifier.predict(_features(samples)) == labels).mean()
        )
        print(f"  {name:12s} (scale {scale:g}): {accuracy:6.1%}")
        grids.append(images.picture(samples, labels))
    images.save(workdir / "samples.png", np.concatenate(grids, axis=1))
    result = {
        "command": f"python -m launch.demo --guidance_scale={GUIDANCE_SCALE.value:g}",
        "steps": step,
        "samples": len(labels),
        "accuracy": accuracies,
        "device": banner(),
    }
    run.write_atomically(workdir / "result.json", json.dumps(result, indent=1) + "\n")
    print(f"Picture: {workdir / 'samples.png'}; numbers: {workdir / 'result.json'}")


def _features(pixels: np.ndarray) -> np.ndarray:
    """(n, 8, 8, 1) in [-1, 1] -> (n, 64), at the scale that the classifier's kernel suits."""
    return np.clip(pixels, -1, 1).reshape(len(pixels), -1) / 8


if __name__ == "__main__":
    common.run(main)
