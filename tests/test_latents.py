"""Latents as data and as samples: EDM2's references, both conventions, and a way round.

Covers mclr_jax/data/latents.py, mclr_jax/latents.py and launch/encode.py.
"""

import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_formats import npy, refused, write_zip

from mclr_jax.config import Training
from mclr_jax.data import pixels
from mclr_jax.data.pipeline import stream
from mclr_jax.data.protocol import for_training, limit, sigma_data
from mclr_jax.data.sources import load
from mclr_jax.experiment import Experiment
from mclr_jax.noise import sample_keys

FORMATS = pathlib.Path(__file__).parent / "data" / "formats"
ZIP = FORMATS / "datasets" / "img16-latents8.zip"
REFERENCE = dict(np.load(f"{ZIP}.reference.npz"))
VAE = FORMATS / "diffusers" / "DiT-pipeline" / "vae"
ALL = np.arange(12)


def ours(name):
    return np.moveaxis(REFERENCE[name], 1, -1)


@pytest.fixture
def source():
    return load(f"zip:{ZIP}", latents="edm2")


def test_edm2s_latents_for_the_same_noise(source):
    """x = (mean + noise * std) * scale + bias, with the constants of the file."""
    np.testing.assert_allclose(1 / np.float64(source.scale), REFERENCE["encoder_scale"], rtol=1e-6)
    bias = -np.float64(source.offset) / source.scale
    np.testing.assert_allclose(bias, REFERENCE["encoder_bias"], rtol=1e-6)
    moments, labels = for_training(source, ALL)
    np.testing.assert_array_equal(labels, REFERENCE["labels_onehot"].argmax(1))
    mean, std = np.split(moments, 2, axis=-1)
    x = mean + std * ours("noise")
    np.testing.assert_allclose(x, ours("final_latents"), rtol=1e-5, atol=1e-6)
    assert (source.shape, source.num_classes, len(source)) == ((8, 8, 4), 9, 12)


def test_the_two_conventions_differ(source):
    """0.18215 for all channels of DiT, SiT and REPA, whose files look the same."""
    other = load(f"zip:{ZIP}", latents="stable_diffusion")
    np.testing.assert_allclose(for_training(other, ALL)[0], 0.18215 * ours("images"), rtol=1e-6)
    assert other.offset == (0.0,) * 4
    assert np.abs(for_training(source, ALL)[0] - for_training(other, ALL)[0]).max() > 0.5


def test_draws_have_the_mean_and_spread_of_their_example():
    moments = jnp.asarray(np.r_[np.full(4, 3.0), 0.5, 1, 2, 4].reshape(1, 1, 1, 8), jnp.float32)
    moments = jnp.broadcast_to(moments, (64, 16, 16, 8))
    x = pixels.from_moments(moments, sample_keys(0, jnp.arange(64)), 4)
    np.testing.assert_allclose(x.mean((0, 1, 2)), [3] * 4, atol=0.15)
    np.testing.assert_allclose(x.std((0, 1, 2)), [0.5, 1, 2, 4], rtol=0.03)
    assert not np.allclose(x[0], x[1])
    np.testing.assert_array_equal(pixels.from_moments(x, None, 4), x)


def config(tmp_path, **changes):
    """The config of a small DiT on the latents."""
    return tiny.config(
        "digits",
        **{
            "data.name": f"zip:{ZIP}", "data.test": f"zip:{ZIP}", "data.latents": "edm2",
            "data.autoencoder": str(VAE), "batch_size": 8, "sigma_data": 0.0, **changes,
        },
    )  # fmt: skip


class Spy:
    """An objective that keeps what it gets, and has no loss."""

    needs = frozenset({"other", "generated"})

    def __call__(self, models, problem, batch, keys):
        self.batch = batch
        return jnp.zeros(len(keys)), {}


def test_noise_is_drawn_anew_in_each_step_and_by_the_example_alone(tmp_path):
    experiment = Experiment(Training.parse(config(tmp_path)), tmp_path / "run")
    task = dataclasses.replace(experiment.task, objective=(spy := Spy()))
    moments, labels = for_training(experiment.source, ALL)
    batch = {f"{name}{kind}": value for name in ("", "other_", "generated_")
             for kind, value in (("image", moments), ("label", labels))}  # fmt: skip
    mean, std = np.split(moments, 2, axis=-1)

    def draw(step, rows=ALL):
        keys = sample_keys(step, jnp.asarray(rows))
        task.loss({}, {}, {name: value[rows] for name, value in batch.items()}, keys, False)
        found = spy.batch.x0, spy.batch.other, spy.batch.generated[0]
        return [np.asarray((x - mean[rows]) / std[rows]) for x in found]

    first, part, later = draw(0), draw(0, ALL[3:6]), draw(1)
    for whole, rows in zip(first, part, strict=True):
        np.testing.assert_array_equal(whole[3:6], rows)
    noise = [x.ravel() for x in (*first, *later)]
    np.testing.assert_allclose(np.corrcoef(noise), np.eye(6), atol=0.08)
    np.testing.assert_allclose(np.std(noise, axis=1), 1, atol=0.05)


def test_training_streams_moments_and_others_get_latents(tmp_path, source):
    """A subset, in memory or not, gives the same; measurements see one draw of each example."""
    subset = limit(source, 5, seed=0)
    moments, labels = for_training(source, ALL)
    batch = next(stream(subset, 5, seed=3))
    assert batch["image"].shape == (5, 8, 8, 8)
    for image, label in zip(batch["image"], batch["label"], strict=True):
        row = next(i for i in range(12) if np.array_equal(moments[i], image))
        assert row in subset.indices
        assert labels[row] == label
    lazy = load(f"zip:{ZIP}", latents="edm2", in_memory=False)
    np.testing.assert_array_equal(lazy[ALL][0], source[ALL][0])
    np.testing.assert_array_equal(source[ALL[[7, 2]]][0], source[ALL][0][[7, 2]])
    mean, std = np.split(moments, 2, axis=-1)
    noise = (source[ALL][0] - mean) / std
    np.testing.assert_allclose([noise.mean(), noise.std()], [0, 1], atol=0.05)
    expected = np.sqrt((std**2 + mean**2).mean() - mean.mean() ** 2)
    assert sigma_data(source) == pytest.approx(expected, rel=0.02)


def test_a_training_knows_the_units_of_its_latents(tmp_path):
    data = Experiment(Training.parse(config(tmp_path)), tmp_path / "run").data
    assert (data.shape, data.num_classes) == ((8, 8, 4), 9)
    np.testing.assert_allclose(data.offset, [5.81, 3.25, 0.12, -2.15])
    np.testing.assert_allclose(np.divide(data.scale, 2), [4.17, 4.62, 3.71, 3.28])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.latents": ""}, "seems to hold latents.*set config.data.latents"),
        ({"data.name": "digits"}, "'edm2'; the examples of digits are no latents, but images"),
        ({"data.name": f"zip:{FORMATS}/datasets/img16-pixels.zip"}, "no latents, but images"),
        ({"data.latents": "edm"}, "latents is 'edm'. Did you mean 'edm2'"),
    ],
)
def test_the_convention_must_be_said(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        _ = Experiment(Training.parse(config(tmp_path, **changes)), tmp_path / "run").source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("label-missing", "1 images have no label"),
        ("mixed-shapes", "standard deviations below 0"),
        ("object-array", "allow_pickle"),
        ("path-traversal", "standard deviations below 0"),
    ],
)
@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_sets_of_latents(name, message, in_memory):
    path = FORMATS / "broken" / f"latents-{name}.zip"
    refused(message, f"zip:{path}", latents="edm2", in_memory=in_memory)


MOMENTS = np.ones((8, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (MOMENTS[:7], r"shape \(4, 4, 7\) .* as many means as standard deviations"),
        (MOMENTS[0], "axis|shape"),
        (MOMENTS.astype(np.uint8), "uint8"),
        (MOMENTS - 1.5, "standard deviations below 0"),
        (MOMENTS * np.inf, "not finite"),
        (MOMENTS[:6], "'edm2' have 4 channels; got 3"),
    ],
)
def test_arrays_that_are_no_moments(tmp_path, array, message):
    name = write_zip(tmp_path / "a.zip", {"00000/img-mean-std-00000000.npy": npy(array)})
    refused(message, name, latents="edm2")


def test_sets_are_read_in_memory_and_of_one_shape(tmp_path, monkeypatch):
    """A name that leads out of the set writes nothing there."""
    monkeypatch.chdir(tmp_path)
    name = write_zip(tmp_path / "a.zip", {"../b.npy": npy(MOMENTS), "/c.npy": npy(MOMENTS)})
    assert len(load(name, latents="edm2")) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]
    mixed = write_zip(tmp_path / "a.zip", {"a.npy": npy(MOMENTS), "b.npy": npy(MOMENTS[:, 1:])})
    refused(r"b\.npy .*shape \(3, 4, 8\), expected \(4, 4, 8\) as the first", mixed, latents="edm2")


def test_a_set_that_says_its_convention_is_read_by_it_alone(tmp_path):
    about = json.dumps({"labels": [["a.npy", 0]], "latents": "stable_diffusion"})
    name = write_zip(tmp_path / "a.zip", {"a.npy": npy(MOMENTS), "dataset.json": about}, ...)
    assert load(name, latents="stable_diffusion").scale == (1 / 0.18215,) * 4
    for given in ("edm2", ""):
        refused(f"of the kind 'stable_diffusion', and config.data.latents is '{given}'", name,
                latents=given)  # fmt: skip
