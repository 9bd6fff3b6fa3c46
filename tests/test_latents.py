"""Latents as data and as samples: EDM2's references, both conventions, and a way round.

Covers mclr_jax/data/latents.py, mclr_jax/latents.py and launch/encode.py.
"""

import dataclasses
import io
import json
import pathlib
import shutil
import zipfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import call
from pictures import npy, png, refused, write_zip
from PIL import Image
from safetensors.numpy import load_file

from mclr_jax import generate, latents, pretrained, runs
from mclr_jax.config import Training
from mclr_jax.data import pixels
from mclr_jax.data.latents import units_of
from mclr_jax.data.pipeline import stream
from mclr_jax.data.pixels import to_float
from mclr_jax.data.protocol import for_training, limit, sigma_data
from mclr_jax.data.sources import load
from mclr_jax.evaluation import evaluate
from mclr_jax.evaluation.features import Features
from mclr_jax.experiment import Experiment
from mclr_jax.images import MARGIN, picture
from mclr_jax.noise import sample_keys

FORMATS = pathlib.Path(__file__).parent / "data" / "formats"
ZIP = FORMATS / "datasets" / "img16-latents8.zip"
REFERENCE = dict(np.load(f"{ZIP}.reference.npz"))
PIPELINE = FORMATS / "diffusers" / "DiT-pipeline"
VAE = PIPELINE / "vae"
VAE_REFERENCE = dict(np.load(VAE.parent.with_name("DiT-pipeline.reference.npz")))
ALL = np.arange(12)


def ours(name):
    return np.moveaxis(REFERENCE[name], 1, -1)


@pytest.fixture
def source():
    return load(f"zip:{ZIP}", latents="edm2")


def test_edm2s_latents_for_the_same_noise(source):
    """x = (mean + noise * std) * scale + bias, with the constants of the file."""
    offset, scale = map(np.float64, units_of(source).values())
    np.testing.assert_allclose(1 / scale, REFERENCE["encoder_scale"], rtol=1e-6)
    bias = -offset / scale
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
    assert units_of(other)["offset"] == (0.0,) * 4
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
        ("mixed-shapes", "expected .* as the first"),
        ("object-array", "allow_pickle"),
        ("path-traversal", "standard deviations below 0"),
    ],
)
def test_broken_sets_of_latents(name, message):
    refused(message, f"zip:{FORMATS}/broken/latents-{name}.zip", latents="edm2")


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
    assert units_of(load(name, latents="stable_diffusion"))["scale"] == (1 / 0.18215,) * 4
    for given in ("edm2", ""):
        refused(f"of the kind 'stable_diffusion', and config.data.latents is '{given}'", name,
                latents=given)  # fmt: skip


def test_samples_in_latents_are_read_as_they_are(tmp_path, source):
    """The file of launch.sample has decoded images beside them."""
    x, labels = source[ALL]
    np.savez(path := tmp_path / "a.npz", images=np.zeros((12, 16, 16, 3)), latents=x, labels=labels)
    found = load(f"npz:{path}", latents="edm2")
    np.testing.assert_array_equal(found[ALL][0], x)
    assert (found.latents, units_of(found)) == ("edm2", units_of(source))
    assert load(f"npz:{path}").shape == (16, 16, 3)
    given = Training.parse(config(tmp_path, **{"data.generated": f"npz:{path}"}))
    np.testing.assert_array_equal(given.data.generated_source()[ALL][0], x)
    given = Training.parse(config(tmp_path, **{"data.name": f"npz:{path}"}))
    assert Experiment(given, tmp_path / "run").data.offset == units_of(source)["offset"]


def test_companions_have_the_same_units(tmp_path):
    """DiT's latents are not those of EDM2."""
    data = Experiment(Training.parse(config(tmp_path)), tmp_path / "run").data
    other = config(tmp_path, **{"data.latents": "stable_diffusion"})
    _, model = tiny.describe(tmp_path / "other", given=other)
    with pytest.raises(ValueError, match="for latents in other units"):
        runs.check_companion("reference", "there", model, data, "zip:a.zip")
    runs.check_companion("reference", "there", model, model.data, "zip:a.zip")


def test_the_way_round_gives_the_mean_and_std_of_the_autoencoder(tmp_path):
    """Encoded images, read again, are what the autoencoder gives, by either convention."""
    images = load(f"zip:{FORMATS}/datasets/img16-pixels.zip")
    network, params = latents.load(str(VAE))
    for kind, pixels_of in (("edm2", lambda x: x / 255), ("stable_diffusion", to_float)):
        latents.encode(images, str(VAE), kind, tmp_path / "a.zip")
        found = load(f"zip:{tmp_path}/a.zip", latents=kind)
        x = jnp.asarray(pixels_of(images[ALL][0]), jnp.float32)
        expected = network.apply({"params": params}, x, method="encode")
        got, labels = found.source[ALL]
        np.testing.assert_allclose(got, jnp.concatenate(expected, -1), rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(labels, images[ALL][1])
        assert found.num_classes == 9


def test_the_published_set_is_that_of_its_images(tmp_path):
    """EDM2's own tool has encoded the same images, and its names and arrays are ours."""
    images = load(f"zip:{FORMATS}/datasets/img16-pixels.zip")
    np.testing.assert_array_equal(np.moveaxis(images[ALL][0], -1, 1), REFERENCE["pixels"])
    latents.encode(images, str(VAE), "edm2", tmp_path / "a.zip")
    with zipfile.ZipFile(tmp_path / "a.zip") as ours, zipfile.ZipFile(ZIP) as theirs:
        assert {*ours.namelist()} == {*theirs.namelist()}
        assert {info.compress_type for info in ours.infolist()} == {zipfile.ZIP_STORED}
        about, labels = (json.loads(archive.read("dataset.json")) for archive in (ours, theirs))
        assert sorted(about["labels"]) == sorted(labels["labels"])
        for name in theirs.namelist():
            if name.endswith("npy"):
                a, b = (np.load(io.BytesIO(archive.read(name))) for archive in (ours, theirs))
                assert (a.dtype, a.shape) == (b.dtype, b.shape)
                np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


@pytest.fixture
def run(tmp_path):
    """The parts of a run that a decoder is made of."""
    experiment = Experiment(Training.parse(config(tmp_path)), tmp_path / "run")
    return experiment.training.data, experiment.model


def test_official_images_of_latents(run):
    """Those of EDM2: clamped to [0, 1], and truncated to 8 bits."""
    data, model = run
    mean, _ = np.split(ours("images"), 2, axis=-1)
    x = (mean - np.float32(model.data.offset)) / np.float32(model.data.scale)
    decode = latents.decoder(data, model)
    found, expected = decode(x, np.uint8), ours("decoded_of_final_mean_uint8")
    assert np.abs(found.astype(int) - expected).max() <= 1
    assert (found != expected).mean() < 0.002  # a fraction near 0 is cut off on either side
    np.testing.assert_allclose(decode(x), found / 127.5 - 1, atol=1e-6)
    assert latents.shown(x, decode).shape == (12, 16, 16, 3)


def test_decoding_of_stable_diffusion_has_the_range_of_images(run):
    data, model = run
    data = dataclasses.replace(data, latents="stable_diffusion")
    info = dataclasses.replace(model.data, offset=(), scale=())
    decode = latents.decoder(data, dataclasses.replace(model, data=info))
    raw = np.moveaxis(VAE_REFERENCE["vae/latent"], 1, -1)
    expected = np.clip(np.moveaxis(VAE_REFERENCE["vae/decoded"], 1, -1), -1, 1)
    np.testing.assert_allclose(decode(0.18215 * raw), expected, atol=1e-4)


def test_images_of_real_latents_are_measured(run, source):
    """As those of samples; images stay as they are."""
    decode = latents.decoder(*run)
    shown = latents.decoded(source, decode)
    found, labels = shown[ALL[:3]]
    np.testing.assert_array_equal(found, decode(source[ALL[:3]][0], np.uint8))
    assert (shown.shape, shown.num_classes, len(shown)) == ((16, 16, 3), 9, 12)
    np.testing.assert_array_equal(labels, source.labels[:3])
    images = load(f"zip:{FORMATS}/datasets/img16-pixels.zip")
    assert latents.decoded(images, decode) is images
    assert latents.decoded(source, None) is source


def test_latents_without_a_decoder_have_no_picture(run, caplog):
    data, model = run
    assert latents.decoder(dataclasses.replace(data, autoencoder=""), model) is None
    assert latents.shown(np.zeros((2, 8, 8, 4), np.float32), None) is None
    assert "the samples have 4 channels and are latents" in caplog.text
    np.testing.assert_array_equal(latents.shown(np.full((1, 4, 4, 3), 2.0), None), 1)
    with pytest.raises(ValueError, match="decode latents first"):
        picture(np.zeros((2, 8, 8, 4), np.float32), np.zeros(2, int))


def test_decoders_that_do_not_fit(run, tmp_path):
    data, model = run
    with pytest.raises(FileNotFoundError, match="name its folder by --autoencoder"):
        latents.decoder(dataclasses.replace(data, autoencoder=str(tmp_path / "none")), model)
    with pytest.raises(ValueError, match=r"data\.latents is empty: set it to one of edm2"):
        latents.decoder(dataclasses.replace(data, latents=""), model)
    other = dataclasses.replace(model, data=dataclasses.replace(model.data, shape=(8, 8, 3)))
    with pytest.raises(ValueError, match="latents of 4 channels; the model has 3"):
        latents.decoder(data, other)
    grey = load(write_zip(tmp_path / "a.zip", {"a.png": png(np.zeros((5, 4), np.uint8))}))
    with pytest.raises(ValueError, match="sides divisible by 2"):
        latents.encode(grey, str(VAE), "edm2", tmp_path / "b.zip")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_grey_images_are_encoded_in_grey(tmp_path):
    pixels_ = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    grey = load(write_zip(tmp_path / "a.zip", {"a.png": png(pixels_)}))
    colour = load(write_zip(tmp_path / "b.zip", {"a.png": png(np.stack([pixels_] * 3, -1))}))
    assert (grey.shape, colour.shape) == ((8, 8, 1), (8, 8, 3))
    for name, images in (("c", grey), ("d", colour)):
        latents.encode(images, str(VAE), "edm2", tmp_path / f"{name}.zip")
    both = (load(f"zip:{tmp_path}/{name}.zip", latents="edm2").source[ALL[:1]][0] for name in "cd")
    np.testing.assert_array_equal(*both)


def test_a_published_model_of_latents_gets_its_convention_and_an_autoencoder(tmp_path):
    """DiT's by the family; the folder of the autoencoder is not in a file."""
    path = FORMATS / "broken" / "DiT-good-tiny.pt"
    found = pretrained.read(path, "dit", heads=1, autoencoder=str(VAE))
    assert (found.facts["latents"], found.facts["autoencoder"]) == ("stable_diffusion", str(VAE))
    assert found.model.data.scale == (1 / 0.18215,) * found.model.data.shape[-1]
    assert "autoencoder" not in pretrained.read(path, "sit", heads=1).facts
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pretrained.read(path, "dit", heads=1, autoencoder=str(tmp_path))
    with pytest.raises(ValueError, match="images of 3 channels, not latents of 4"):
        pretrained.read(FORMATS / "broken" / "edm2-good-tiny.pkl", autoencoder=str(VAE))


def test_the_autoencoder_is_found_where_it_was_moved(tmp_path):
    """That of a training, and that of a published model; --autoencoder is another place."""
    (place := tmp_path / "a").mkdir()
    shutil.copytree(PIPELINE, place / "pipeline")
    vae = place / "pipeline" / "vae"
    tiny.describe(place / "run", given=config(tmp_path, **{"data.autoencoder": str(vae)}))
    pretrained.convert(place / "pipeline", place / "base")
    moved = place.rename(tmp_path / "b")
    for name in ("run", "base"):
        run = runs.load(moved / name)
        assert pathlib.Path(run.data.autoencoder).samefile(moved / "pipeline" / "vae")
        assert latents.decoder(run.data, run.model).network.latent_channels == 4
        assert runs.load(moved / name, autoencoder=str(VAE)).data.autoencoder == str(VAE)


@pytest.mark.slow
def test_the_whole_way_with_an_encoder_and_latents(tmp_path):
    """A pipeline is read, sampled, fine-tuned on images, moved, sampled and written again."""
    place = tmp_path / "a"
    shutil.copytree(PIPELINE, place / "pipeline")
    vae, steps = f"{place}/pipeline/vae", ["--steps=2", "--num_samples=4", "--labels=0,7"]
    call("encode", f"--data=zip:{FORMATS}/datasets/img16-pixels.zip", f"--autoencoder={vae}",
         "--latents=stable_diffusion", f"--out={place}/set.zip")  # fmt: skip
    call("convert", f"--input={place}/pipeline", f"--out={place}/base")
    call("sample", f"--workdir={place}/base", *steps, f"--out={place}/base.npz")
    with np.load(place / "base.npz") as file:
        x, images, labels = file["latents"], file["images"], file["labels"]
    assert (x.shape, labels.tolist()) == ((4, 8, 8, 4), [0, 7, 0, 7])
    network, params = latents.load(str(VAE))
    decoded = network.apply({"params": params}, x / 0.18215, method="decode")
    np.testing.assert_allclose(images, np.clip(decoded, -1, 1), atol=1e-4)
    assert Image.open(place / "base.png").size[1] == 2 * (2 * 16 + MARGIN) + MARGIN
    call("train", "--config=configs/finetune.py", f"--config.init_from={place}/base",
         f"--config.data.name=zip:{place}/set.zip", f"--config.data.test=zip:{place}/set.zip",
         "--config.data.latents=stable_diffusion", "--config.data.num_classes=1000",
         "--config.num_steps=2", "--config.batch_size=4", "--config.optimizer.warmup_steps=0",
         "--config.sample_every=2", "--config.eval_examples=4", "--config.sampler.num_steps=2",
         f"--workdir={place}/tuned")  # fmt: skip
    written = json.loads((place / "tuned" / "run.json").read_text())
    assert written["config"]["data"]["autoencoder"] == vae
    picture = np.asarray(Image.open(place / "tuned" / "samples" / "00000002.png"))
    moved = place.rename(tmp_path / "b")
    call("sample", f"--workdir={moved}/tuned", *steps, f"--out={moved}/tuned.npz")
    call("report", f"{moved}/base", f"{moved}/tuned", "--guidance_scales=1", "--per_class=1",
         f"--out={moved}/page.html")  # fmt: skip
    assert (moved / "page.html").read_text().count("data:image/png") == 2
    with np.load(moved / "tuned.npz") as file:
        assert file["images"].shape == (4, 16, 16, 3)
        assert np.abs(file["latents"] - x).max() > 1e-6
    call("convert", f"--workdir={moved}/tuned", f"--to={moved}/again")
    assert (moved / "again" / "vae" / "config.json").exists()
    before, after = (load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
                     for folder in (moved / "pipeline", moved / "again"))  # fmt: skip
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)
    assert picture.ndim == 3


def test_without_an_autoencoder_a_command_says_so(tmp_path):
    """Samples are kept, and a picture is made when the autoencoder is named."""
    transformer = PIPELINE / "transformer"
    call("convert", f"--input={transformer}", f"--out={tmp_path}/base")
    given = [f"--workdir={tmp_path}/base", "--steps=1", "--num_samples=2", "--labels=0,1"]
    log = call("sample", *given, f"--out={tmp_path}/a.npz")
    assert "No picture: the samples have 4 channels and are latents" in log
    assert not (tmp_path / "a.png").exists()
    call("sample", *given, f"--autoencoder={VAE}", f"--out={tmp_path}/b.npz")
    with np.load(tmp_path / "a.npz") as plain, np.load(tmp_path / "b.npz") as shown:
        assert {*plain} == {"images", "labels"}
        np.testing.assert_array_equal(plain["images"], shown["latents"])
    assert (tmp_path / "b.png").exists()


def test_samples_and_real_latents_are_measured_as_images(tmp_path):
    """An extractor that gives the mean colour sees decoded images, 8-bit ones, of both."""
    given = config(tmp_path)
    _, model = tiny.describe(tmp_path / "run", given=given)
    tiny.with_weights(tmp_path / "run", {"params": (params := tiny.weights(model))})
    run = dataclasses.replace(runs.load(tmp_path / "run"), averages=())
    seen = []

    def colours(pixels, labels, progress=lambda count: None):
        seen.append(pixels)
        return Features(
            to_float(jnp.asarray(pixels)).mean((1, 2)), np.zeros((len(labels), 0)), labels
        )

    extractor = mock.Mock(side_effect=colours, digest="", classes=0)
    extractor.name = "colours"
    decode = latents.decoder(run.data, run.model)
    source = latents.decoded(run.source("train"), decode)
    real = evaluate.real_statistics(extractor, source)
    expected = to_float(jnp.asarray(source[ALL][0])).mean((0, 1, 2))
    np.testing.assert_allclose(real.moments.mean, expected, atol=1e-5)
    (row,) = evaluate.evaluate(run, extractor, real, names=["frechet"], num_samples=18)
    assert row["autoencoder"] == decode.digest
    samples = generate.generate(run.model, params, np.resize(np.arange(9), 18), run.sampler)
    np.testing.assert_array_equal(seen[-1], decode(samples, np.uint8))
