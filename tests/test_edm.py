"""Official EDM weights give the official outputs; wrong weights give a named error."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import nvlabs
import pytest
import tiny
from nvlabs import error, loaded

from mclr_jax import noise, pretrained, samplers
from mclr_jax.denoiser import EDM, IDDPM, VE, VP, denoiser
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.unet import UNet
from mclr_jax.pretrained import edm, names, tensors
from mclr_jax.types import Condition

DATA = Path(__file__).parent / "data"
OLD, NEW = (sorted((DATA / "formats" / name).glob("*.pkl")) for name in ("edm", "edm2"))


def load(architecture):
    """Fixture arrays, its state dict and the matching network."""
    arrays = dict(np.load(DATA / f"edm_{architecture}.npz"))
    kwargs = json.loads(str(arrays["meta.json"]))["kwargs"]
    net = UNet(
        architecture,
        out_channels=kwargs["img_channels"],
        num_classes=kwargs["label_dim"],
        channels=kwargs["model_channels"],
        channel_mult=tuple(kwargs["channel_mult"]),
        num_blocks=kwargs["num_blocks"],
        attention_resolutions=tuple(kwargs["attn_resolutions"]),
    )
    prefix = "state_dict/"
    state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
    return arrays, {k: v for k, v in state.items() if "resample_filter" not in k}, net


def convert(state, net):
    model = Model(net, EDM(0.5), DataInfo((16, 16, 3), net.num_classes, 0.5))
    return names.to_params(state, shapes_of(model), edm.names(net))


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_official_outputs(architecture):
    arrays, state, net = load(architecture)
    params = convert(state, net)

    @jax.jit
    def denoise(params, x, sigma, label):
        return denoiser(EDM(0.5), partial(net.apply, {"params": params}))(x, sigma, label)

    x = arrays["input/x"].transpose(0, 2, 3, 1)
    labels = arrays["input/labels_onehot"].argmax(axis=1)
    for name, label in {"denoised": labels, "denoised_null": np.full_like(labels, 10)}.items():
        expected = arrays[f"output/{name}"].transpose(0, 2, 3, 1)
        actual = denoise(params, x, arrays["input/sigma"], label)
        error = np.abs(actual - expected).max(axis=(1, 2, 3)) / np.abs(expected).max(axis=(1, 2, 3))
        assert error.max() < 1e-5


def test_official_heun_trajectory():
    """18 Heun steps of EDM's own sampler on the DDPM++ weights, float64 there and float32 here."""
    _, state, net = load("ddpmpp")
    params = convert(state, net)
    with np.load(DATA / "edm_ddpmpp_heun_trajectory.npz") as reference:
        latents = reference["latents"].transpose(0, 2, 3, 1)
        expected = reference["samples"].transpose(0, 2, 3, 1)
        labels = reference["labels_onehot"].argmax(axis=1)
        grid = noise.rho_grid(int(reference["num_steps"]))
    denoise = denoiser(EDM(0.5), partial(net.apply, {"params": params}))
    run = jax.jit(partial(samplers.sample, denoise))
    got = run(grid[0].astype(np.float32) * latents, labels, grid.astype(np.float32))
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_qkv_order():
    """Two heads of five channels: the official view and ours hold the same q, k and v."""
    heads, channels = 2, 5
    value = np.random.default_rng(0).normal(size=(7, 3 * heads * channels))
    official = value.reshape(7, heads, channels, 3)
    ours = edm.reorder_qkv(value, heads).reshape(7, heads, 3 * channels)
    for index, part in enumerate(np.split(ours, 3, axis=-1)):
        np.testing.assert_array_equal(part, official[..., index])


def test_wrong_weights_are_named():
    _, state, net = load("ddpmpp")
    name = "model.enc.8x8_block0.qkv.weight"
    shape = r"\(96, 32, 1, 1\)"
    with pytest.raises(ValueError, match=rf"'{name}' is missing.*{shape}"):
        convert({k: v for k, v in state.items() if k != name}, net)
    with pytest.raises(ValueError, match=rf"'{name}' is .*\(96, 31, 1, 1\).*{shape}"):
        convert(state | {name: state[name][:, 1:]}, net)
    with pytest.raises(ValueError, match=r"extra.weight' of shape \(5,\) is unexpected"):
        convert(state | {"model.extra.weight": np.zeros(5)}, net)


def test_augmentation_weights_are_read_and_the_strength_starts_at_zero():
    """CIFAR-10 checkpoints have a map_augment that the fixtures lack; none has a map_strength."""
    _, state, net = load("ddpmpp")
    weight = np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32)
    net = net.clone(augment_dim=9, takes_strength=True)
    params = convert(state | {"model.map_augment.weight": weight}, net)
    np.testing.assert_array_equal(params["map_augment"]["kernel"], weight.T)
    np.testing.assert_array_equal(params["map_strength"]["kernel"], np.zeros((8, 16)))


# ---- snapshots -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", OLD + NEW, ids=lambda path: path.stem)
def test_snapshots_give_the_official_outputs(path):
    """Denoised and raw, with and without a label and with augmentation; EDM2's log-variance."""
    checkpoint, arrays = loaded(path)
    model, params = checkpoint.model, checkpoint.params
    x, sigma = arrays["input/x"].transpose(0, 2, 3, 1), arrays["input/sigma"]
    label = jnp.asarray(arrays.get("input/labels", np.zeros(len(x))), jnp.int32)
    augment = jnp.asarray(arrays.get("input/augment_labels", np.zeros((len(x), 9))))
    condition = Condition(
        jnp.concatenate([label, jnp.full_like(label, model.null_label), label]),
        augment=jnp.concatenate([0 * augment, 0 * augment, augment]),
    )
    thrice = np.concatenate([x] * 3), np.tile(sigma, 3), condition
    denoised, raw = nvlabs.answers(model, params, *thrice)
    found = {
        f"output/{name}{kind}": part.transpose(0, 3, 1, 2)
        for name, whole in {"denoised": denoised, "raw": raw}.items()
        for kind, part in zip(("", "_null", "_augment"), jnp.split(whole, 3), strict=True)
    }
    limit = 2e-5
    if checkpoint.family == "edm2":
        limit = 5e-6
        u = model.network.apply({"params": params}, jnp.log(sigma) / 4, method="log_variance")
        found["output/logvar"] = u
    names_of_outputs = {key for key in arrays if "output/" in key}
    assert names_of_outputs <= found.keys()
    for name in names_of_outputs:
        assert error(found[name], arrays[name]) < limit, name


# Arguments of the official constructors, and their fields here.
ARGUMENTS = {
    "model_channels": "channels", "channel_mult": "channel_mult", "num_blocks": "num_blocks",
    "channel_mult_emb": "channel_mult_emb", "attn_resolutions": "attention_resolutions",
    "dropout": "dropout", "augment_dim": "augment_dim",
}  # fmt: skip
EDM2_USUAL = {"channel_mult": [1, 2, 3, 4], "num_blocks": 3, "attn_resolutions": [16, 8],
              "channels_per_head": 64}  # fmt: skip


@pytest.mark.parametrize("path", OLD + NEW, ids=lambda path: path.stem)
def test_hyper_parameters_are_those_of_the_constructor(path):
    checkpoint, arrays = loaded(path)
    told = json.loads(str(arrays["meta.json"]))["kwargs"]
    net, data = checkpoint.model.network, checkpoint.model.data
    usual = EDM2_USUAL if checkpoint.family == "edm2" else {}
    for key, value in (usual | told).items():
        if hasattr(net, name := ARGUMENTS.get(key, key)):
            assert getattr(net, name) == (tuple(value) if isinstance(value, list) else value), key
    if checkpoint.family == "edm":
        assert net.settings == (
            told["embedding_type"], told.get("encoder_type", "standard"),
            told.get("decoder_type", "standard"), tuple(told.get("resample_filter", [1, 1])),
            told["channel_mult_noise"],
        )  # fmt: skip
    assert data.shape == (told["img_resolution"],) * 2 + (told["img_channels"],)
    assert (data.num_classes, data.sigma_data) == (told["label_dim"], 0.5)
    assert data.has_null == (not told["label_dim"])
    kind = VP if "VPPrecond" in str(arrays["meta.json"]) else EDM
    assert checkpoint.model.preconditioning == kind()


@pytest.mark.parametrize("path", OLD + NEW, ids=lambda path: path.stem)
def test_what_was_read_is_given_back_bit_for_bit(path):
    expected, found = tensors.load(path)["ema"].tensors(), pretrained.state(loaded(path)[0])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


# ---- options that the snapshots do not vary ------------------------------------------------------

SONG = {"channels": 8, "channel_mult": (1, 2, 1), "num_blocks": 1, "dropout": 0.1}
OPTIONS = {
    "skip": UNet("ddpmpp", num_classes=4, attention_resolutions=(4,), encoder="skip",
                 decoder="skip", embedding="positional", resample_filter=(1.0, 2.0, 2.0, 1.0),
                 channel_mult_noise=3, channel_mult_emb=2, **SONG),
    "residual": UNet("ddpmpp", num_classes=0, attention_resolutions=(), encoder="residual",
                     decoder="standard", embedding="fourier", resample_filter=(1.0, 1.0),
                     channel_mult_noise=1, **SONG),
    "asymmetric": UNet("ddpmpp", num_classes=4, attention_resolutions=(8, 2), encoder="standard",
                       decoder="skip", embedding="fourier", channel_mult_noise=2,
                       resample_filter=(1.0, 3.0, 2.0, 4.0), **SONG),
    "adm": UNet("adm", num_classes=4, attention_resolutions=(8,), channel_mult_emb=3,
                channels_per_head=64, channels=64, channel_mult=(2, 1), num_blocks=1),
}  # fmt: skip


def random_params(net, shape):
    model = Model(net, EDM(), DataInfo(shape, net.num_classes, 0.5))
    return tiny.weights(model, 0, 0.3)


def snapshot(net, state, size, class_name="EDMPrecond", **attributes):
    """The content of a file that the official code would write of such a network."""
    adm = net.architecture == "adm"
    taps = np.float32(net.settings[3])
    state = dict(state)
    told = {name: getattr(net, field) for name, field in ARGUMENTS.items()}
    if not adm:
        names_of_settings = ("embedding_type", "encoder_type", "decoder_type", "resample_filter",
                             "channel_mult_noise")  # fmt: skip
        told |= dict(zip(names_of_settings, net.settings, strict=True))

    def classes(name):
        out, depth = name.rpartition(".")[2], name.count(".")
        if name == "model":
            kind = "DhariwalUNet" if adm else "SongUNet"
            return kind, {"label_dropout": 0, "_init_kwargs": told}
        if out.startswith("norm") or out.endswith("_norm"):
            return "GroupNorm", {"eps": 1e-5 if adm else 1e-6}
        if depth == 2 and out[0].isdigit() and "conv" not in out and "aux" not in out:
            features = state[f"{name}.conv0.weight"].shape[0]
            heads = (features // 64 if adm else 1) if f"{name}.qkv.weight" in state else 0
            return "UNetBlock", {
                "out_channels": features, "num_heads": heads, "adaptive_scale": adm,
                "skip_scale": 1.0 if adm else np.sqrt(0.5), "dropout": net.dropout,
            }  # fmt: skip
        if name == "model.map_noise":
            return "FourierEmbedding", {}
        return ("Conv2d", {"fused_resample": "residual" in out}) if depth > 1 else ("Linear", {})

    flat = np.float32(np.outer(taps, taps) / taps.sum() ** 2)[None, None]
    for name in {n.rpartition(".")[0] for n in state}:
        block, _, layer = name.rpartition(".")
        if (block.endswith(("_up", "_down")) and layer == "conv0") or "residual" in layer:
            state[f"{name}.resample_filter"] = flat
    attributes = {"img_resolution": size, "img_channels": 3, "label_dim": net.num_classes,
                  "sigma_data": 0.5} | attributes  # fmt: skip
    return {"ema": nvlabs.module(class_name, state, classes, **attributes)}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_read_and_given_back(name):
    net = OPTIONS[name]
    params = random_params(net, (8, 8, 3))
    state = names.to_state(params, edm.names(net))
    found = edm.read(snapshot(net, state, 8))
    assert found.model.network == net
    assert jax.tree.all(jax.tree.map(np.array_equal, found.params, params))
    back = pretrained.state(found)
    assert all((back[k] == state[k]).all() for k in state)
    assert back.keys() - state.keys() == {k for k in back if k.endswith("resample_filter")}


@pytest.mark.parametrize("name", ["skip", "residual", "asymmetric"])
def test_options_against_a_second_implementation(name):
    net = OPTIONS[name]
    params = random_params(net, (8, 8, 3))
    state = names.to_state(params, edm.names(net))
    state = {k.removeprefix("model."): v for k, v in state.items()}
    x = np.random.default_rng(1).normal(size=(3, 8, 8, 3)).astype(np.float32)
    clock, label = np.float32([-1.0, 0.2, 0.9]), np.arange(3)
    one_hot = np.eye(max(net.num_classes, 3), dtype=np.float32)[label]
    second = jax.jit(nvlabs.Song(state, {"taps": net.settings[3], "embedding": net.settings[0]}))
    expected = second(x.transpose(0, 3, 1, 2), clock, one_hot)
    found = jax.jit(net.apply)({"params": params}, x, clock, Condition(label))
    assert error(found.transpose(0, 3, 1, 2), expected) < 2e-5


def test_narrow_blocks_of_adm_have_no_attention():
    """64 channels of level 1 are one head, 32 of level 2 none, at heights that ask for it."""
    net = OPTIONS["adm"].clone(channels=32, attention_resolutions=(8, 4))
    shapes = random_params(net, (8, 8, 3))
    assert {n for n, block in shapes.items() if "qkv" in block} == {
        "enc_8x8_block0", "dec_8x8_block0", "dec_8x8_block1",
    }  # fmt: skip
    older = random_params(net.clone(channels_per_head=0), (8, 8, 3))
    assert {"dec_4x4_in0", "enc_4x4_block0"} <= {n for n, b in older.items() if "qkv" in b}


BASELINES = {
    "VEPrecond": (VE(0.03, 90.0), {"sigma_min": 0.03, "sigma_max": 90.0}),
    "VPPrecond": (VP(18.0, 0.2, 500, 1e-4),
                  {"beta_d": 18.0, "beta_min": 0.2, "M": 500, "epsilon_t": 1e-4}),
    "iDDPMPrecond": (IDDPM(0.01, 0.002, 50), {"C_1": 0.002, "C_2": 0.01, "M": 50}),
}  # fmt: skip


@pytest.mark.parametrize("class_name", BASELINES)
def test_the_preconditioning_is_that_of_the_class_and_its_attributes(class_name):
    """iDDPM has a variance, whose channels are dropped, and its table of levels in the file."""
    expected, attributes = BASELINES[class_name]
    net = OPTIONS["residual"]
    discrete = class_name == "iDDPMPrecond"
    net = net.clone(out_channels=6) if discrete else net
    state = names.to_state(random_params(net, (8, 8, 3)), edm.names(net))
    if discrete:
        state["u"] = np.float32(np.append(expected.table[::-1], 0))
    found = edm.read(snapshot(net, state, 8, class_name, **attributes))
    assert found.model.preconditioning == expected
    assert found.model.network.out_channels == (6 if discrete else 3)
    if discrete:
        np.testing.assert_array_equal(found.rest["u"], state["u"])
        state["u"] = state["u"] * 1.1
        with pytest.raises(ValueError, match="u is"):
            edm.read(snapshot(net, state, 8, class_name, **attributes))


def test_networks_that_are_not_of_the_official_code_are_refused():
    net = OPTIONS["adm"]
    state = names.to_state(random_params(net, (8, 8, 3)), edm.names(net))

    def refused(match, change, class_name="EDMPrecond", state=state):
        content = snapshot(net, state, 8, class_name)
        change(content["ema"].modules())
        with pytest.raises(ValueError, match=match):
            edm.read(content)

    def attribute(name, key, value):
        return lambda modules: modules[name].update({key: value})

    def inner(class_name):
        return lambda modules: setattr(modules["model"], "class_name", class_name)

    block = "model.enc.8x8_block0"
    refused("num_heads is 1, expected 2", attribute(block, "num_heads", 1))
    refused("skip_scale is 0.5, expected 1.0", attribute(block, "skip_scale", 0.5))
    refused("eps is 0.1, expected 1e-05", attribute(f"{block}.norm0", "eps", 0.1))
    refused(r"dropout is 0.3, expected 0.0", attribute(block, "dropout", 0.3))
    refused("network has no key 'depth'", attribute("model", "_init_kwargs", {"depth": 3}))
    refused("channels is 'many'", attribute("model", "_init_kwargs", {"model_channels": "many"}))
    refused("inner network is a VQ; expected one of SongUNet", inner("VQ"))
    refused("no attribute sigma_data", lambda modules: modules[""].pop("sigma_data"))
    refused("a WildPrecond; expected one of EDMPrecond", lambda modules: None, "WildPrecond")
    other = attribute(
        "model.enc.4x4_down.conv0", "_buffers", {"resample_filter": np.eye(2)[None, None]}
    )
    refused("resample_filter is", other)
    named = {k: v for k, v in state.items() if k != "model.enc.4x4_block0.conv1.weight"}
    refused("'model.enc.4x4_block0.conv1.weight' is missing", lambda modules: None, state=named)
