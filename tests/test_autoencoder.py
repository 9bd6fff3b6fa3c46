"""The autoencoder: latents and images of diffusers' own, from its folders, new and old.

Covers mclr_jax/networks/autoencoder.py and the autoencoders of mclr_jax/pretrained/diffusers.py.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mclr_jax.pretrained import diffusers

FOLDER = pathlib.Path(__file__).parent / "data" / "formats" / "diffusers" / "DiT-pipeline"
REFERENCE = dict(np.load(FOLDER.with_name("DiT-pipeline.reference.npz")))
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The names of parts in files before diffusers 0.17.
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def ours(name):
    """A reference array (B, C, H, W) in our order."""
    return np.moveaxis(REFERENCE[f"vae/{name}"], 1, -1)


def apply(network, params, method, x):
    return jax.jit(lambda p, x: network.apply({"params": p}, x, method=method))(params, x)


def close(actual, expected):
    error = np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max()
    assert error < 1e-5, error


def folder(tmp_path, change=lambda config: config, rename=lambda state: state):
    """A copy of the autoencoder's folder with another config and other tensors."""
    shutil.copytree(FOLDER / "vae", copy := tmp_path / "vae")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(change(config)))
    save_file(rename(load_file(copy / WEIGHTS)), copy / WEIGHTS)
    return copy


@pytest.fixture(scope="module")
def vae():
    return diffusers.autoencoder(FOLDER / "vae")


def test_official_latents_and_images(vae):
    mean, std = apply(*vae, "encode", ours("image"))
    close(mean, ours("mean"))
    close(std, ours("std"))
    close(apply(*vae, "decode", ours("latent")), ours("decoded"))


def test_the_log_variance_is_limited(vae):
    network, params = vae
    bias = np.r_[np.zeros(4), 90, -90, 90, -90].astype(np.float32)
    params = {**params, "quant_conv": {**params["quant_conv"], "bias": bias}}
    _, std = apply(network, params, "encode", ours("image"))
    np.testing.assert_allclose(std[..., 0], np.exp(10), rtol=1e-5)
    np.testing.assert_allclose(std[..., 1], np.exp(-15), rtol=1e-5)


def test_old_files_have_other_names_and_no_scale(vae, tmp_path):
    def old(state):
        for new, name in OLD.items():
            state = {k.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): v
                     for k, v in state.items()}  # fmt: skip
        assert sum("proj_attn" in name for name in state) == 4
        return state

    newer = ("latents_", "mid_block_", "scaling_", "shift_", "use_", "force_")

    def config(found):
        return {key: value for key, value in found.items() if not key.startswith(newer)}

    network, params = diffusers.autoencoder(folder(tmp_path, config, old))
    assert network == vae[0]
    assert network.scaling_factor == 0.18215
    jax.tree.map(np.testing.assert_array_equal, params, vae[1])


def test_parts_that_a_config_leaves_out(vae, tmp_path):
    """Without the two convolutions of latents, these are what the others give and take."""

    def rename(state):
        return {k: v for k, v in state.items() if "quant" not in k and "attentions" not in k}

    absent = {"use_quant_conv": False, "use_post_quant_conv": False,
              "mid_block_add_attention": False, "shift_factor": 0.06}  # fmt: skip
    network, params = diffusers.autoencoder(folder(tmp_path, lambda c: {**c, **absent}, rename))
    assert params.keys() == {"encoder", "decoder"}
    assert network.shift_factor == 0.06
    whole, other = vae
    still = jax.tree.map(np.zeros_like, other["encoder"]["mid_block.attentions.0"])
    eye = {"kernel": np.eye(8, dtype=np.float32), "bias": np.zeros(8, np.float32)}
    encoder = other["encoder"] | {"mid_block.attentions.0": still}
    other = other | {"quant_conv": eye, "encoder": encoder}
    found, expected = (apply(*pair, "encode", ours("image"))
                       for pair in ((network, params), (whole, other)))  # fmt: skip
    jax.tree.map(close, found, expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("act_fn", "relu", "act_fn is 'relu'; only 'silu'"),
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"], "down_block_types"),
        ("latents_mean", [0.0] * 4, "no key 'latents_mean'"),
        ("_class_name", "VQModel", "'VQModel'; only 'AutoencoderKL'"),
        ("layers_per_block", 0, "layers_per_block is 0"),
        ("norm_num_groups", 5, "5 groups of equal size"),
        ("block_out_channels", "many", "block_out_channels is 'many'"),
        ("layers_per_block", 2, "do not fit .*up_blocks.0.resnets.2.* is missing"),
        ("latent_channels", 3, "expected real numbers of shape"),
    ],
)
def test_other_autoencoders_are_refused_by_name(tmp_path, key, value, message):
    with pytest.raises(ValueError, match=message):
        diffusers.autoencoder(folder(tmp_path, lambda config: {**config, key: value}))


def test_folders_without_an_autoencoder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        diffusers.autoencoder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no config of diffusers"):
        diffusers.autoencoder(tmp_path)
    (copy := folder(tmp_path)).joinpath(WEIGHTS).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"found no diffusion_pytorch_model\.safetensors or"
    ):
        diffusers.autoencoder(copy)
