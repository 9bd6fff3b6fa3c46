"""The U-Nets apart from official weights (tests/test_edm.py): initial values, dropout, dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from mclr_jax.networks import layers
from mclr_jax.networks.unet import UNet
from mclr_jax.types import Condition

BATCH, SIZE = 3, 4
X = normal(0, BATCH, SIZE, SIZE, 3)
C_NOISE = np.linspace(-1.5, 1.0, BATCH, dtype=np.float32)
LABEL = np.int32([0, 4, 5])  # 5 is the null label
AUGMENT = normal(1, BATCH, 2)
STRENGTH = np.float32([0.5, 1.0, 3.0])
PLAIN = X, C_NOISE, Condition(LABEL)
DROPPED = X, C_NOISE, Condition(LABEL, dropout_keys=jax.random.split(jax.random.key(2), BATCH))


def tiny(architecture):
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
        dropout=0.3,
    )


def randomised(net, x=X):
    """Parameters of which no layer is zero or nearly so."""
    shapes = jax.eval_shape(net.init, jax.random.key(3), x, *PLAIN[1:])["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), shapes)


def relative_error(actual, expected):
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_attention_heads():
    """Without channels_per_head those of earlier versions, which descriptions of runs mean."""
    assert [UNet("adm").heads(width) for width in (192, 32)] == [3, 1]
    official = UNet("adm", channels_per_head=64)
    assert [official.heads(width) for width in (192, 64, 63)] == [3, 1, 0]
    assert UNet("ddpmpp").heads(256) == 1


@pytest.mark.parametrize(("net", "size", "millions"), [
    (UNet(num_classes=0, augment_dim=9), 32, 55.7),
    (UNet(num_classes=0, augment_dim=9, channel_mult=(1, 2, 2, 2)), 64, 61.8),
    (UNet("adm", 3, 1000, 192, (1, 2, 3, 4), 3, (32, 16, 8), channels_per_head=64), 64, 295.9),
], ids=["CIFAR-10", "FFHQ", "ImageNet"])  # fmt: skip
def test_numbers_of_parameters_are_the_published_ones(net, size, millions):
    """Karras et al. 2022, Table 7."""
    inputs = jnp.zeros((1, size, size, 3)), jnp.zeros(1), Condition(jnp.zeros(1, jnp.int32))
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
    assert round(count / 1e6, 1) == millions


def test_descriptions_of_earlier_versions_mean_the_same():
    """Fields that are absent have the values that the code had; names are those of the paper."""
    assert UNet("ddpmpp").settings == ("positional", "standard", "standard", (1, 1), 1)
    assert UNet("ncsnpp").settings == ("fourier", "residual", "standard", (1, 3, 3, 1), 2)
    assert UNet("adm").settings == ("positional", "standard", "standard", (1, 1), 1)


@pytest.mark.parametrize(("resolution", "attends"), [(8, True), (4, False)])
def test_attention_is_where_the_height_is_named(resolution, attends):
    """Blocks of an image 8 high and 4 wide, named by both sizes, as in official weights."""
    net = tiny("ddpmpp").clone(attention_resolutions=(resolution,))
    x = jnp.zeros((BATCH, 8, 4, 3))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, *PLAIN[1:])["params"]
    assert ("qkv" in shapes["enc_8x4_block0"]) == attends
    decoder = {name: "qkv" in shapes[f"dec_8x4_{name}"] for name in ("block0", "block1")}
    assert decoder == {"block0": False, "block1": attends}
    assert "qkv" in shapes["dec_8x4_in0"]  # always


@pytest.mark.parametrize("architecture", ["ncsnpp", "adm"])
def test_initial_weights(architecture):
    """The output starts at zero (ADM) or a hundred thousandth of its usual size."""
    net = tiny(architecture)
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


def test_dropout_optional_inputs_and_bfloat16():
    net = tiny("ddpmpp")
    params = {"params": randomised(net)}
    apply = jax.jit(net.apply)
    plain = apply(params, *PLAIN)

    dropped = apply(params, *DROPPED)
    turned = apply(params, *jax.tree.map(lambda a: a[::-1], DROPPED))
    assert relative_error(dropped, plain) > 1e-2
    assert relative_error(turned[::-1], dropped) < 1e-4  # an example's mask ignores its batch

    def error(strength, augment, params=params):
        output = apply(params, X, C_NOISE, Condition(LABEL, strength, augment))
        return relative_error(output, plain)

    fresh = {name: {"kernel": 0 * params["params"][name]["kernel"]} for name in net.optional_inputs}
    assert error(STRENGTH, AUGMENT, {"params": params["params"] | fresh}) < 1e-5
    assert error(0 * STRENGTH, 0 * AUGMENT) < 1e-5
    assert error(STRENGTH, 0 * AUGMENT) > 1e-2
    assert error(0 * STRENGTH, AUGMENT) > 1e-2

    half = jax.jit(net.clone(dtype=jnp.bfloat16).apply)(params, *PLAIN)
    assert half.dtype == jnp.float32
    assert 1e-4 < relative_error(half, plain) < 0.05


def test_remat_changes_no_gradient_and_fourier_frequencies_stay_fixed():
    net = tiny("ncsnpp")
    params = randomised(net)

    def gradient(net):
        def loss(params):
            output = net.apply({"params": params}, *DROPPED)
            return jnp.mean(output**2)

        return jax.jit(jax.grad(loss))(params)

    plain, remat = gradient(net), gradient(net.clone(remat=True))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max()),
        remat, plain,
    )  # fmt: skip
    np.testing.assert_array_equal(plain["map_noise_freqs"], 0)
    assert np.abs(plain["map_layer0"]["kernel"]).max() > 0


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
        jax.eval_shape(tiny(architecture).clone(**changes).init, jax.random.key(3), *PLAIN)


def test_patches_are_stacked_as_channels_and_put_back():
    """With patches of 2 it is the network of half the size, four times the channels."""
    images = jnp.arange(2 * 4 * 4 * 3.0).reshape(2, 4, 4, 3)
    stacked = layers.space_to_depth(images, 2)
    np.testing.assert_array_equal(stacked[1, 0, 1], images[1, :2, 2:].reshape(-1))
    np.testing.assert_array_equal(layers.depth_to_space(stacked, 2), images)

    plain = tiny("adm").clone(out_channels=12)
    x = jax.random.normal(jax.random.key(3), (BATCH, 2 * SIZE, 2 * SIZE, 3))
    inside = layers.space_to_depth(x, 2)
    params = {"params": randomised(plain, inside)}
    expected = layers.depth_to_space(jax.jit(plain.apply)(params, inside, *PLAIN[1:]), 2)
    patched = plain.clone(out_channels=3, patch_size=2)
    got = jax.jit(patched.apply)(params, x, *PLAIN[1:])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
