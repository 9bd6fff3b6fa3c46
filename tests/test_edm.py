"""Official EDM weights give the official outputs; wrong weights give a named error."""

import json
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from mclr_jax import noise, samplers
from mclr_jax.denoiser import EDM, denoiser
from mclr_jax.networks.unet import UNet
from mclr_jax.pretrained import edm

DATA = Path(__file__).parent / "data"


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
    return arrays, state, net


@pytest.mark.parametrize("architecture", ["ddpmpp", "ncsnpp", "adm"])
def test_official_outputs(architecture):
    arrays, state, net = load(architecture)
    params = edm.convert(state, net)

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
    params = edm.convert(state, net)
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

    def without(*names):
        return {k: v for k, v in state.items() if k not in names}

    with pytest.raises(ValueError, match=r"'enc.8x8_block0.qkv.weight' is missing.*\(32, 96\)"):
        edm.convert(without(name), net)
    with pytest.raises(ValueError, match=r"qkv.weight' has shape \(96, 31, 1, 1\).*\(32, 96\)"):
        edm.convert(state | {name: state[name][:, 1:]}, net)
    with pytest.raises(ValueError, match=r"'extra.weight' of shape \(5,\) is unexpected"):
        edm.convert(state | {"model.extra.weight": np.zeros(5)}, net)
    filters = {k: np.zeros((1, 1, 4, 4)) for k in state if k.endswith("resample_filter")}
    with pytest.raises(ValueError, match=r"resample_filter' has shape \(1, 1, 4, 4\)"):
        edm.convert(state | filters, net)
    with pytest.raises(ValueError, match="not weights of an EDM U-Net"):
        edm.convert({}, net)


def test_augmentation_weights_are_read_and_the_strength_starts_at_zero():
    """CIFAR-10 checkpoints have a map_augment that the fixtures lack; none has a map_strength."""
    _, state, net = load("ddpmpp")
    weight = np.random.default_rng(0).normal(size=(16, 9)).astype(np.float32)
    net = net.clone(augment_dim=9, takes_strength=True)
    params = edm.convert(state | {"model.map_augment.weight": weight}, net)
    np.testing.assert_array_equal(params["map_augment"]["kernel"], weight.T)
    np.testing.assert_array_equal(params["map_strength"]["kernel"], np.zeros((8, 16)))
