"""Images of any place against any reference: the same numbers as of a run, or by hand."""

import json
import pickle
import shutil

import numpy as np
import pytest
from commands import call
from PIL import Image

from mclr_jax.data import sources
from mclr_jax.data.protocol import drawn
from mclr_jax.evaluation import compare, evaluate, features, metrics

NAMES = evaluate.METRICS


def three(weights, images):
    """Features that can be computed by hand: the first three pixels."""
    del weights
    return images.reshape(len(images), -1)[:, :3], np.zeros((len(images), 0))


PIXELS = features.Extractor("three pixels", {}, three)


def in_folder(path, source, rows, names=str):
    """The images of a source as PNG files."""
    for row, (image, label) in enumerate(zip(*source[rows], strict=True)):
        folder = path / names(label)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(folder / f"{row:05d}.png")
    return str(path)


@pytest.mark.parametrize("form", ["edm", "clean-fid", "guided-diffusion", "edm2", "ours"])
def test_statistics_files_give_the_distance_of_two_gaussians(tmp_path, form):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)): with C2 = 4 C1, |m1 - m2|^2 + tr C1."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (500, 4, 4, 1), np.uint8)
    x = pixels.reshape(500, -1)[:, :3] / 127.5 - 1
    mu, sigma = x.mean(0) + np.array([0.5, 0, -1]), 4 * np.cov(x.T)
    samples, path = tmp_path / "samples.npz", tmp_path / "statistics.npz"
    np.savez(samples, arr_0=pixels)  # guided-diffusion's samples, without classes
    more = {}
    if form == "edm2":
        path = path.with_suffix(".pkl")
        pair = {"mu": mu, "sigma": sigma}
        path.write_bytes(pickle.dumps({"fid": {"mu": np.ones(7), "sigma": np.eye(7)}, "own": pair}))
    elif form == "ours":
        compare.write_statistics(path, metrics.Moments(77, mu, sigma))
        with np.load(path) as file:  # as EDM and clean-fid read it
            np.testing.assert_array_equal(file["mu"], mu)
            np.testing.assert_array_equal(file["sigma"], sigma)
    else:
        if form == "guided-diffusion":
            more = {"arr_0": pixels[:200], "mu_s": np.ones(5), "sigma_s": np.eye(5)}
        np.savez(path, mu=mu.astype(np.float32), sigma=sigma.astype(np.float32), **more)
    real = compare.reference(str(path), PIXELS)
    assert real.moments.count == (77 if form == "ours" else 0)
    row = compare.compare(compare.source(str(samples)), PIXELS, real)
    assert row["frechet"] == pytest.approx(1.25 + sigma.trace() / 4, rel=1e-4)
    assert (row["samples"], row["reference_examples"]) == (500, real.moments.count)
    assert "per_class_frechet" not in row  # there are no classes
    assert ("recall" in row) == (form == "guided-diffusion")
    if form == "guided-diffusion":
        assert row["precision"] == metrics.precision_recall(x[:200], x)[0] < 1


def test_statistics_of_other_features_name_both_sizes(tmp_path):
    path = tmp_path / "imagenet.npz"
    np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises(
        ValueError, match=r"imagenet.npz has .* 2048 features; three pixels has 3\."
    ):
        compare.reference(str(path), PIXELS)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"shape \(3,\) and sigma of shape \(3, 2\); expected"):
        compare.reference(str(path), PIXELS)
    np.savez(path, sigma=np.zeros((3, 3)))
    with pytest.raises(ValueError, match=r"it has \['sigma'\]; expected `images` or `arr_0`"):
        compare.reference(str(path), PIXELS)
    with pytest.raises(FileNotFoundError, match="no folder or file nowhere; expected one, or a"):
        compare.source("nowhere")


def test_folders_and_files_of_the_same_images_are_equal(evaluated, tmp_path):
    """Whatever holds them: 8-bit images, a zip, floats of mclr sample, one-hot labels."""
    _, extractor, real = evaluated
    digits, rows = sources.load("digits"), np.arange(120)
    pixels, labels = digits[rows]
    folder = in_folder(tmp_path / "classes", digits, rows)
    flat = in_folder(tmp_path / "flat", digits, rows, lambda label: "")
    shutil.make_archive(str(tmp_path / "flat"), "zip", flat)
    floats = pixels / np.float32(127.5) - 1 + np.float32(0.001)
    np.savez(tmp_path / "own.npz", images=floats, labels=labels)
    np.savez(tmp_path / "hot.npz", arr_0=pixels, arr_1=np.eye(10)[labels])
    fake = extractor(pixels, labels)
    expected = evaluate.measure(fake, real, NAMES)
    for place in (folder, tmp_path / "own.npz", tmp_path / "hot.npz"):
        row = compare.compare(compare.source(str(place)), extractor, real)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6), place
    for place in (flat, f"{flat}.zip"):
        row = compare.compare(compare.source(place), extractor, real)
        assert row["frechet"] == pytest.approx(expected["frechet"], rel=1e-6)
        assert not {"accuracy", "per_class_frechet", "inter_class_frechet"} & row.keys()
    three = in_folder(tmp_path / "three", digits, rows[labels < 3])  # of the ten of the reference
    row = compare.compare(compare.source(three), extractor, real, NAMES[1:3])
    assert "inter_class_frechet" in row
    assert "per_class_frechet" not in row
    some = compare.compare(compare.source(folder), extractor, real, ["kernel"], 40, seed=1)
    chosen = drawn(digits_of := compare.source(folder), 40, 1, by_class=True)
    part = evaluate.measure(extractor(*digits_of[chosen]), real, ["kernel"])
    assert (some["samples"], some["kernel"]) == (40, pytest.approx(part["kernel"], rel=1e-6))
    larger = compare.source(folder, resolution=16)
    assert (larger.shape, compare.source("digits").shape) == ((16, 16, 1), (8, 8, 1))


def test_the_command_compares_images_without_a_run(evaluated, tmp_path):
    folder, extractor, _ = evaluated
    test = sources.load("digits", "test")
    held_out = in_folder(tmp_path / "test", test, np.arange(300))
    options = [f"--features=classifier:{folder / 'classifier'}", f"--cache={tmp_path / 'cache'}"]
    log = call(
        "evaluate", *options, f"--samples={held_out}", "--reference=digits",
        f"--write_statistics={tmp_path / 's.npz'}", f"--out={tmp_path / 'x.json'}",
    )  # fmt: skip
    assert f"300 images of {held_out}; reference: 1,497 images, digits." in log
    assert "Frechet distances depend on the number of samples, 300: compare equal ones" in log
    (row,) = json.loads((tmp_path / "x.json").read_text())["rows"]
    x, y = (metrics.moments(extractor(*s[np.arange(len(s))]).features)
            for s in (test, sources.load("digits")))  # fmt: skip
    assert row["frechet"] == pytest.approx(metrics.frechet_distance(x, y), rel=1e-5)
    assert row["accuracy"] <= 1
    assert {"per_class_frechet", "coverage", "command", "device"} < row.keys()
    given = ["--metrics=frechet,kernel", f"--reference={tmp_path / 's.npz'}"]
    log = call("evaluate", *options, *given, f"--samples={held_out}")
    assert f"{row['frechet']:.4g}" in log
    assert "No kernel: the reference has statistics, no images." in log
    of_run = [*options, *given, f"--workdir={folder / 'base'}", "--num_samples=20"]
    assert "scale 1" in call("evaluate", *of_run)  # a table alone
    call("evaluate", *of_run, f"--out={tmp_path / 'y.json'}")
    found = json.loads((tmp_path / "y.json").read_text())
    assert found.keys() == {"rows"}
    assert found["rows"][0]["reference_examples"] == 1497
    for arguments, message in [
        (["--samples=x"], "Name a run by --workdir, or images by --samples and --reference"),
        (["--samples=x", "--workdir=x", "--out=x.json"], "the samples are those of the run"),
    ]:
        assert message in call("evaluate", *options, *arguments, expect=2)
