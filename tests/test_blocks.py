"""Features of blocks and sweeps over noise levels, against the same computed apart."""

import dataclasses
import functools
import json

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from commands import call

from mclr_jax import runs
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.networks import dit
from mclr_jax.networks.emulator import Emulator
from mclr_jax.networks.layers import space_to_depth
from mclr_jax.networks.unet import UNet
from mclr_jax.representation import blocks, icr, perturb, sweep

ROWS = np.arange(0, 1400, 14)
LAYERS = ("blocks.0", "blocks.1")
SHOWN = perturb.Augmentation(flip=False)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run on digits: its directory, model and parameters."""
    workdir = tmp_path_factory.mktemp("blocks") / "run"
    cases.untrained(workdir, tiny.config("digits", **{"network.depth": 2}))
    return workdir, *runs.load_model(workdir)


def model_of(config, source="digits"):
    return Training.parse(config).model(Training.parse(config).data_info(sources.load(source)))


@functools.partial(jax.jit, static_argnums=(0, 3))
def by_hand(model, params, x, sigma, labels):
    """Block outputs of a DiT, its blocks applied one by one."""
    network, sigma_data = model.network, model.data.sigma_data
    x = x / np.sqrt(sigma**2 + sigma_data**2)

    def dense(name, h):
        return h @ params[name]["kernel"] + params[name]["bias"]

    p, width = network.patch_size, network.width
    h = space_to_depth(x, p).reshape(len(x), -1, p * p * x.shape[-1])
    h = dense("x_embedder", h) + dit.position_embedding(width, 8 // p, 8 // p)
    t = jnp.full(len(x), np.log(sigma) / 4 * network.time_scale)
    t = dense("t_embedder_2", nn.silu(dense("t_embedder_0", dit.timestep_embedding(t))))
    condition = nn.silu(t + params["y_embedder"]["embedding"][labels])
    block, found = dit.Block(network.heads, network.mlp_ratio, 0.0, jnp.float32), []
    for i in range(network.depth):
        own = jax.tree.map(lambda a, i=i: a[i], params["blocks"])
        h, _ = block.apply({"params": own}, h, 0, condition, None)
        found.append(h.mean(1))
    return found


def test_features_are_the_blocks_outputs_averaged_over_positions(written):
    _, model, params = written
    assert blocks.sizes(model) == {"blocks.0": 16, "blocks.1": 16}
    source, sigma = sources.load("digits"), 0.3
    found = list(blocks.extract(model, params, source, ROWS, sigma, layers=LAYERS, batch_size=48))
    assert [h["blocks.0"].shape for h in found] == [(2, 48, 16), (2, 48, 16), (2, 4, 16)]
    images = source[ROWS][0].astype(np.float32) / 127.5 - 1
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), ROWS)
    told = list(blocks.extract(model, params, source, ROWS, sigma, layers=LAYERS, batch_size=48,
                               at_labels=True))  # fmt: skip
    for view in range(2):
        view_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, view)
        noisy = perturb.view(images, sigma, view_keys, perturb.NONE)
        for batches, labels in ((found, np.full(100, 10)), (told, source[ROWS][1])):
            outputs = by_hand(model, params, noisy, sigma, labels)
            for name, expected in zip(LAYERS, outputs, strict=True):
                got = np.concatenate([h[name][view] for h in batches])
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_any_network_names_its_blocks_in_the_order_of_the_calls():
    mixture = model_of(tiny.config("mixture"), "mixture")
    assert blocks.sizes(mixture) == {"block0": 16}
    judge = model_of(tiny.classifier("digits"))
    assert blocks.sizes(judge) == {"trunk/block0": 16}
    config = tiny.config("digits")
    config.network = {
        "name": "unet", "channels": 8, "channel_mult": (1, 2), "num_blocks": 1,
        "attention_resolutions": (4,), "dtype": "float32",
    }  # fmt: skip
    unet = model_of(config)
    assert isinstance(unet.network, UNet)
    assert blocks.sizes(unet) == {
        "enc_8x8_block0": 8, "enc_4x4_down": 8, "enc_4x4_block0": 16, "dec_4x4_in0": 16,
        "dec_4x4_in1": 16, "dec_4x4_block0": 16, "dec_4x4_block1": 16, "dec_8x8_up": 16,
        "dec_8x8_block0": 8, "dec_8x8_block1": 8,
    }  # fmt: skip
    assert blocks.choose(unet) == ("dec_4x4_in1",)  # the middle one
    with pytest.raises(ValueError, match=r"layer 'dec_4x4_blok1'. Did you mean 'dec_4x4_block1'"):
        blocks.choose(unet, ["dec_4x4_blok1"])


class Plain(nn.Module):
    """A network without blocks."""

    @nn.compact
    def __call__(self, x, c_noise, condition):
        return nn.Dense(x.shape[-1])(x)


def test_a_network_without_blocks_is_refused(written):
    _, model, _ = written
    with pytest.raises(ValueError, match="Plain has no module whose class name ends in Block"):
        blocks.choose(dataclasses.replace(model, network=Plain()))


def test_one_device_finds_what_eight_do(written):
    _, model, params = written
    assert jax.device_count() == 8
    source = sources.load("digits")
    layers = LAYERS[:1]
    found = sweep.accumulate(model, params, source, ROWS, 0.3, layers, SHOWN)[layers[0]]
    one = jax.devices()[0]
    images = jax.device_put(source[ROWS][0].astype(np.float32) / 127.5 - 1, one)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), ROWS)
    h = []
    for view in range(2):
        view_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, view)
        x = perturb.view(images, 0.3, view_keys, SHOWN)
        features = jax.jit(model.block_features(params))(x, jnp.full(len(x), 0.3))
        h.append(features[layers[0]])
    assert h[0].sharding.device_set == {one}
    whole = icr.views(np.stack(h), source.labels[ROWS], 10)
    assert icr.ratio(found) == pytest.approx(icr.ratio(whole), rel=1e-4)
    np.testing.assert_allclose(found.by_class, whole.by_class, rtol=1e-4, atol=1e-4)


def test_a_probe_separates_what_is_separable():
    rng = np.random.default_rng(0)
    labels = np.arange(300) % 3
    features = np.eye(3)[labels] * 8 + rng.normal(size=(300, 3))
    assert sweep.probe_accuracy(features, labels, features[::-1], labels[::-1]) == 1
    assert sweep.probe_accuracy(rng.normal(size=(300, 3)), labels, features, labels) < 0.7


def test_errors_say_what_to_do(written):
    _, model, params = written
    source = sources.load("digits")
    with pytest.raises(ValueError, match=r"20 images for features of length 16; .*least 32"):
        sweep.sweep(model, params, source, augmentation=SHOWN, num_images=20)
    with pytest.raises(ValueError, match=r"sigma 0.0; expected above 0"):
        sweep.sweep(model, params, source, augmentation=SHOWN, sigmas=[0.0], num_images=100)
    with pytest.raises(ValueError, match=r"Unknown layer 'block.0'. Did you mean 'blocks.0'"):
        sweep.sweep(model, params, source, augmentation=SHOWN, layers=["block.0"])
    with pytest.raises(ValueError, match="Emulator is an emulator; expected a denoiser or a cl"):
        blocks.choose(dataclasses.replace(model, network=Emulator()))


def test_data_of_one_class_have_no_probe(written):
    _, model, params = written
    one = dataclasses.replace(
        model,
        data=dataclasses.replace(model.data, num_classes=1),
        network=dataclasses.replace(model.network, num_classes=1),
    )
    params = params | {"y_embedder": jax.tree.map(lambda x: x[:2], params["y_embedder"])}
    digits = sources.load("digits")
    options = {"sigmas": [0.3], "num_images": 40, "augmentation": SHOWN}
    (row,) = sweep.sweep(one, params, digits, digits, **options)
    assert row.keys() >= {"icr", "effective_rank"}
    assert "probe_accuracy" not in row


def test_the_command_writes_rows_and_a_figure(written, tmp_path, monkeypatch):
    """The probe is fitted to training digits and tested on held-out ones."""
    workdir, model, params = written
    out = tmp_path / "icr.json"
    log = call(
        "icr", f"--workdir={workdir}", "--sigmas=0.1,1", "--layers=all", "--num_images=200",
        f"--out={out}",
    )  # fmt: skip
    result = json.loads(out.read_text())
    assert [(row["layer"], row["sigma"]) for row in result["rows"]] == [
        ("blocks.0", 0.1), ("blocks.1", 0.1), ("blocks.0", 1.0), ("blocks.1", 1.0)
    ]  # fmt: skip
    for row in result["rows"]:
        assert 0 < row["icr_plain"] < row["icr"] < 1.5
        assert 0 < row["probe_accuracy"] <= 1
        assert 1 <= row["effective_rank"] <= 16
    digits, test = sources.load("digits"), sources.load("digits", "test")
    options = {"sigmas": [0.1], "layers": ["blocks.0"], "num_images": 200, "augmentation": SHOWN}
    held_out, seen = (
        sweep.sweep(model, params, digits, other, **options)[0]["probe_accuracy"]
        for other in (test, digits)
    )
    assert seen != held_out == pytest.approx(result["rows"][0]["probe_accuracy"], abs=0.01)
    assert result["settings"]["num_images"] == 200
    assert result["settings"]["command"].startswith("python -m launch.icr")
    assert "probe_accuracy" in log
    drawn, draw = [], sweep.figure
    monkeypatch.setattr(sweep, "figure", lambda curves: drawn.append({*curves}) or draw(curves))
    call("icr", f"--workdir={workdir}", "--sigmas=0.1,1", "--num_images=200", "--at_labels",
         f"--compare={out}", "--noprobe", f"--out={tmp_path / 'told.json'}")  # fmt: skip
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["settings"]["at_labels"]
    assert told["rows"][0]["icr"] != result["rows"][0]["icr"]
    assert drawn == [{"blocks.0", "icr: blocks.0", "icr: blocks.1"}]
    for content in ('{"rows": [{"step": 1}]}', "no JSON"):  # said before anything is measured
        (tmp_path / "no.json").write_text(content)
        log = call("icr", f"--workdir={workdir}", f"--compare={tmp_path / 'no.json'}",
                   f"--out={tmp_path / 'none.json'}", expect=1)  # fmt: skip
        assert "no.json is no file of mclr icr (" in log
        assert not (tmp_path / "none.json").exists()
    assert out.with_suffix(".png").stat().st_size > 1000
