"""MCLR on 8x8 digits from beginning to end: two trainings, a classifier, and samples compared."""

import pathlib
from collections.abc import Callable

import numpy as np

from mclr_jax import generate, images, runs
from mclr_jax.configs import digits, digits_classifier, digits_mclr
from mclr_jax.data import sources
from mclr_jax.files import provenance, write_json
from mclr_jax.main import train
from mclr_jax.schema import in_range
from mclr_jax.training.devices import banner


def demo(
    workdir: pathlib.Path, guidance_scale: float, per_class: int, say: Callable[[str], None]
) -> None:
    """Accuracy of samples without guidance, with CFG and after MCLR: `workdir`/result.json.

    A support vector machine that was fitted to the real digits judges the classes. `say` is called
    with a line for each kind of samples; `workdir`/samples.png shows some.
    """
    in_range("--guidance_scale", guidance_scale, 1.0, 1000.0)
    in_range("--per_class", per_class, 1, 100_000)
    train(digits.get_config(), workdir / "base")
    train(digits_classifier.get_config(), workdir / "classifier")
    config = digits_mclr.get_config()
    config.init_from = str(workdir / "base")
    config.companions.classifier = str(workdir / "classifier")
    config.objective.beta = guidance_scale - 1
    train(config, workdir / "fine_tuned")

    import sklearn.svm  # slow to import

    real, real_labels = (source := sources.load("digits", "all"))[np.arange(len(source))]
    classifier = sklearn.svm.SVC(gamma=5.0).fit(_features(real / 127.5 - 1), real_labels)
    labels = np.resize(np.arange(source.num_classes), per_class * source.num_classes)
    drawn, table = {}, []
    say(f"\nAccuracy judged by a classifier of real digits, {len(labels)} samples each:")
    say(f"  {'':8s} {'accuracy':>8s} {'network calls':>13s}")
    rows = ("base", "base", 1.0), ("CFG", "base", guidance_scale), ("MCLR", "fine_tuned", 1.0)
    for name, directory, scale in rows:
        run, guided = runs.load(workdir / directory), generate.Guidance(scale)
        params, step = run.weights()
        samples = generate.generate(run.model, params, labels, run.sampler, guided=guided)
        accuracy = float((classifier.predict(_features(samples)) == labels).mean())
        calls = guided.calls(run.model, run.sampler)
        table.append({"name": name, "steps": step, "accuracy": accuracy, "network_calls": calls})
        say(f"  {name:8s} {accuracy:8.1%} {calls:13d}")
        drawn[name] = samples
    images.save(workdir / "samples.png", images.side_by_side(drawn, labels))
    result = {**provenance(), "guidance_scale": guidance_scale, "samples": len(labels),
              "table": table, "device": banner()}  # fmt: skip
    write_json(workdir / "result.json", result)
    say(f"Picture: {workdir / 'samples.png'}; numbers: {workdir / 'result.json'}")


def _features(pixels: np.ndarray) -> np.ndarray:
    """(n, 8, 8, 1) in [-1, 1] -> (n, 64), at the scale of the classifier's kernel."""
    return np.clip(pixels, -1, 1).reshape(len(pixels), -1) / 8
