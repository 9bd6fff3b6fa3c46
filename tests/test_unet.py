"""The U-Nets apart from official weights (tests/test_edm.py): attention, initial values, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import normal

from mclr_jax.networks import layers
from mclr_jax.networks.unet import UNet
from mclr_jax.types import Condition

BATCH, SIZE = 3, 4
X = normal(0, BATCH, SIZE, SIZE, 3)
C_NOISE = np.linspace(-1.5, 1.0, BATCH, dtype=np.float32)
LABEL = np.int32([0, 4, 5])  # 5 is the null label
PLAIN = X, C_NOISE, Condition(LABEL)


def small(architecture):
    """One level of 8 channels with attention in encoder and decoder."""
    return UNet(
        architecture,
        num_classes=5,
        channels=8,
        channel_mult=(1,),
        num_blocks=1,
        attention_resolutions=(SIZE,),
        augment_dim=2,
        takes_strength=True,
    )


def test_attention_heads():
    """Without channels_per_head those of earlier versions, which descriptions of runs mean."""
    assert [UNet("adm").heads(width) for width in (192, 32)] == [3, 1]
    official = UNet("adm", channels_per_head=64)
    assert [official.heads(width) for width in (192, 64, 63)] == [3, 1, 0]
    assert UNet("ddpmpp").heads(256) == 1


def test_descriptions_of_earlier_versions_mean_the_same():
    """Fields that are absent have the values that the code had; names are those of the paper."""
    assert UNet("ddpmpp").settings == ("positional", "standard", "standard", (1, 1), 1)
    assert UNet("ncsnpp").settings == ("fourier", "residual", "standard", (1, 3, 3, 1), 2)
    assert UNet("adm").settings == ("positional", "standard", "standard", (1, 1), 1)


@pytest.mark.parametrize(("resolution", "attends"), [(8, True), (4, False)])
def test_attention_is_where_the_height_is_named(resolution, attends):
    """Blocks of an image 8 high and 4 wide, named by both sizes, as in official weights."""
    net = small("ddpmpp").clone(attention_resolutions=(resolution,))
    shapes = tiny.params(net, np.zeros((BATCH, 8, 4, 3)), *PLAIN[1:])
    assert ("qkv" in shapes["enc_8x4_block0"]) == attends
    decoder = {name: "qkv" in shapes[f"dec_8x4_{name}"] for name in ("block0", "block1")}
    assert decoder == {"block0": False, "block1": attends}
    assert "qkv" in shapes["dec_8x4_in0"]  # always


@pytest.mark.parametrize("architecture", ["ncsnpp", "adm"])
def test_initial_weights(architecture):
    """The output starts at zero (ADM) or a hundred thousandth of its usual size."""
    net = small(architecture)
    output, variables = jax.jit(net.init_with_output)(jax.random.key(3), *PLAIN)
    params = variables["params"]
    for name in net.optional_inputs:
        np.testing.assert_array_equal(params[name]["kernel"], 0)
    layer = params["enc_4x4_block0"]
    if architecture == "adm":
        np.testing.assert_array_equal(output, 0)
        np.testing.assert_array_equal(layer["conv1"]["kernel"], 0)
        assert np.abs(layer["conv0"]["bias"]).max() > 0
    else:
        assert 0 < np.abs(output).max() < 1e-3
        np.testing.assert_array_equal(layer["conv0"]["bias"], 0)
        bound = 0.2**0.5 * np.sqrt(6 / (8 + 24))
        assert 0.9 * bound < np.abs(layer["qkv"]["kernel"]).max() <= bound


def test_fourier_frequencies_stay_fixed():
    net = small("ncsnpp")
    loss = lambda params: jnp.mean(net.apply({"params": params}, *PLAIN) ** 2)  # noqa: E731
    slopes = jax.jit(jax.grad(loss))(tiny.params(net, *PLAIN))
    np.testing.assert_array_equal(slopes["map_noise_freqs"], 0)
    assert np.abs(slopes["map_layer0"]["kernel"]).max() > 0


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("vit", {}, r"architecture is 'vit'\. Known: adm, ddpmpp"),
        ("adm", {"channel_mult": (1, 1, 1, 1)}, r"images are 4x4; .* 4 levels .* divisible by 8"),
        ("adm", {"channels": 5}, r"channels is 5; expected an even number"),
        ("adm", {"patch_size": 3}, r"patch_size 3 and 1 levels .* divisible by 3"),
        (
            "ddpmpp",
            {"resample_filter": (1.0, 2.0, 1.0), "channel_mult": (1, 1)},
            r"expected an even number of taps",
        ),
    ],
)
def test_unknown_architectures_and_indivisible_sizes_are_refused(architecture, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny.params(small(architecture).clone(**changes), *PLAIN)


def test_patches_are_stacked_as_channels_and_put_back():
    """With patches of 2 it is the network of half the size, four times the channels."""
    images = jnp.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    stacked = layers.space_to_depth(images, 2)
    np.testing.assert_array_equal(stacked[1, 0, 1], images[1, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(layers.depth_to_space(stacked, 2), images)

    plain = small("adm").clone(out_channels=12)
    x = jax.random.normal(jax.random.key(3), (BATCH, 2 * SIZE, 2 * SIZE, 3))
    inside = layers.space_to_depth(x, 2)
    params = {"params": tiny.params(plain, inside, *PLAIN[1:])}
    expected = layers.depth_to_space(jax.jit(plain.apply)(params, inside, *PLAIN[1:]), 2)
    patched = plain.clone(out_channels=3, patch_size=2)
    got = jax.jit(patched.apply)(params, x, *PLAIN[1:])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
