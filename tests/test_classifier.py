"""The classifiers are their descriptions in NumPy, and treat dropout and dtypes as promised."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import normal

from mclr_jax import backend
from mclr_jax.networks.classifier import ConvClassifier, MLPClassifier
from mclr_jax.networks.mlp import MLP
from mclr_jax.plan import flops
from mclr_jax.types import Condition

BATCH = 6
C_NOISE = np.linspace(-1.5, 1.0, BATCH, dtype=np.float32)
LABEL = np.int32([0, 1, 2, 3, 0, 1])
AUGMENT = normal(1, BATCH, 2)
STRENGTH = np.linspace(0.5, 4.0, BATCH, dtype=np.float32)
KEYS = jax.random.split(jax.random.key(2), BATCH)
CONDITION = Condition(LABEL, STRENGTH, AUGMENT)
OPTIONS = {"num_classes": 3, "dropout": 0.4, "augment_dim": 2, "takes_strength": True}
NETWORKS = {
    "mlp": MLPClassifier(width=16, depth=2, **OPTIONS),
    "conv": ConvClassifier(channels=(8, 12), **OPTIONS),
}
X = {
    "mlp": normal(0, BATCH, 2),
    "conv": normal(0, BATCH, 8, 4, 1),
}


@pytest.fixture(scope="module")
def variables():
    """Parameters of which no layer is zero or nearly so."""

    def randomised(name):
        init, rng = NETWORKS[name].init, np.random.default_rng(0)
        shapes = jax.eval_shape(init, KEYS[0], X[name], C_NOISE, CONDITION)["params"]

        def draw(path, leaf):
            mean = 1.0 if path[-1].key == "scale" else 0.0  # of a norm
            return np.float32(mean + 0.3 * rng.normal(size=leaf.shape))

        return jax.tree_util.tree_map_with_path(draw, shapes)

    return {name: {"params": randomised(name)} for name in NETWORKS}


@pytest.fixture(scope="module")
def apply():
    """The networks compiled, by name: one program with dropout keys and one without."""
    return {name: jax.jit(net.apply) for name, net in NETWORKS.items()}


def convolve(x, kernel, bias):
    """3x3 convolution of NHWC images with zeros around them, as a sum over its nine taps."""
    height, width = x.shape[1:3]
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    taps = [
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    ]
    return sum(taps) + bias


def group_norm(x, scale, bias):
    """Groups of 4 channels."""
    grouped = x.reshape(len(x), -1, x.shape[-1] // 4, 4)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-5)
    return normal.reshape(x.shape) * scale + bias


def silu(x):
    return x / (1 + np.exp(-x))


def test_the_convolutional_network_is_its_description_in_numpy(variables, apply):
    """Patches, a block at each size with the noise level in its embedding, and the mean."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["conv"]["params"])

    def layer(name, x, block=params):
        return x @ block[name]["kernel"] + block[name].get("bias", 0)

    angles = np.asarray(C_NOISE, np.float64)[:, None] * np.geomspace(0.5, 32, 16)
    embedding = layer("map_noise", np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    embedding += layer("map_augment", np.asarray(AUGMENT, np.float64))
    angles = np.log1p(np.asarray(STRENGTH, np.float64))[:, None] * [0.5, 1, 2, 4]
    strength = 8 * np.concatenate([np.sin(angles), 1 - np.cos(angles)], axis=1)
    embedding = silu(embedding + layer("map_strength", strength))

    x = np.asarray(X["conv"], np.float64)
    patches = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
    h = convolve(np.concatenate(patches, axis=-1), **params["in_conv"])
    for level in range(2):
        block = params[f"block{level}"]
        if level:
            h = (h[:, ::2, ::2] + h[:, 1::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, 1::2]) / 4
        scale, shift = np.split(layer("affine", embedding, block)[:, None, None], 2, axis=-1)
        hidden = convolve(silu(group_norm(h, **block["norm0"])), **block["conv0"])
        hidden = silu(group_norm(hidden, **block["norm1"]) * (1 + scale) + shift)
        skip = layer("skip", h, block) if level else h
        h = skip + convolve(hidden, **block["conv1"])
    features = silu(group_norm(h, **params["out_norm"])).mean(axis=(1, 2))
    expected = layer("out_linear", features)

    actual, found = NETWORKS["conv"].apply(
        variables["conv"], X["conv"], C_NOISE, CONDITION, mutable="intermediates"
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    (kept,) = found["intermediates"]["features"]
    np.testing.assert_allclose(kept, features, rtol=1e-4, atol=1e-4)


def test_the_mlp_ends_with_a_linear_map_of_the_activated_trunk(variables, apply):
    """The trunk is the MLP of tests/test_mlp.py, which is shown label 0 of its one label."""
    params, own = variables["mlp"]["params"], {"augment_dim": 2, "takes_strength": True}
    trunk = MLP(out_channels=16, num_classes=0, width=16, depth=2, **own)
    shown = CONDITION.replace(label=0 * LABEL)
    h = np.asarray(jax.jit(trunk.apply)({"params": params["trunk"]}, X["mlp"], C_NOISE, shown))
    expected = silu(h) @ params["out_linear"]["kernel"] + params["out_linear"]["bias"]
    actual = apply["mlp"](variables["mlp"], X["mlp"], C_NOISE, CONDITION)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_needs_keys_and_takes_one_for_each_example(name, variables, apply):
    def run(keys=None, apply=apply[name]):
        return apply(variables[name], X[name], C_NOISE, CONDITION.replace(dropout_keys=keys))

    plain = run()
    np.testing.assert_array_equal(run(), plain)
    dropped = run(KEYS)
    assert np.abs(dropped - plain).max(axis=1).min() > 1e-3
    other = run(KEYS.at[1].set(KEYS[0]))
    rows = np.arange(BATCH) != 1
    np.testing.assert_array_equal(other[rows], dropped[rows])
    assert np.abs(other[1] - dropped[1]).max() > 1e-3
    without = run(KEYS, jax.jit(NETWORKS[name].clone(dropout=0.0).apply))
    np.testing.assert_allclose(without, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_label_does_not_matter_and_optional_inputs_start_without_effect(name, variables, apply):
    def run(variables=variables[name], **condition):
        return apply[name](variables, X[name], C_NOISE, CONDITION.replace(**condition))

    def fresh(path, leaf):
        return 0 * leaf if path[-2].key in NETWORKS[name].optional_inputs else leaf

    np.testing.assert_array_equal(run(label=(LABEL + 1) % 4), run())
    plain = run(strength=0 * STRENGTH, augment=0 * AUGMENT)
    np.testing.assert_allclose(run(strength=None, augment=None), plain, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        run(jax.tree_util.tree_map_with_path(fresh, variables[name])), plain
    )


def test_the_mlp_takes_images_as_vectors(variables, apply):
    flat = jnp.asarray(X["conv"].reshape(BATCH, -1)[:, :2])
    expected = apply["mlp"](variables["mlp"], flat, C_NOISE, CONDITION)
    image = flat.reshape(BATCH, 2, 1, 1)
    actual = apply["mlp"](variables["mlp"], image, C_NOISE, CONDITION)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_changes_little(name, variables, apply):
    full = apply[name](variables[name], X[name], C_NOISE, CONDITION)
    half = NETWORKS[name].clone(dtype=jnp.bfloat16)
    half = jax.jit(half.apply)(variables[name], X[name], C_NOISE, CONDITION)
    assert half.dtype == jnp.float32
    assert 1e-6 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_recomputed_in_the_backward_pass_if_asked_for(name, variables):
    """More products, if nothing is kept, and the same gradients, here those of the MLP."""
    keys = CONDITION.replace(dropout_keys=KEYS)

    def gradient(**options):
        def loss(variables):
            net = NETWORKS[name].clone(**options)
            return jnp.mean(net.apply(variables, X[name], C_NOISE, keys) ** 2)

        return jax.grad(loss)

    def cost(**options):
        with backend.programs_for_others():
            return flops(jax.make_jaxpr(gradient(**options))(variables[name]).jaxpr)

    assert cost(remat=True) > 1.1 * cost()
    assert cost(remat=True, remat_policy="products") == cost()
    if name != "mlp":  # whose two programs compile in a third of the time
        return
    found, expected = (jax.jit(gradient(remat=again))(variables[name]) for again in (True, False))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
    )


def test_vectors_are_sent_to_the_other_classifier():
    with pytest.raises(ValueError, match=r"data have shape \(2,\).*mlp_classifier"):
        jax.eval_shape(ConvClassifier().init, KEYS[0], jnp.zeros((BATCH, 2)), C_NOISE, CONDITION)


@pytest.mark.parametrize(
    ("size", "patch", "channels", "message"),
    [
        ((6, 8), 2, (8, 8), "images are 6x8; patch_size 2 and 2 levels .* divisible by 4"),
        ((8, 4), 2, (8, 8, 8), "images are 8x4; patch_size 2 and 3 levels .* divisible by 8"),
        ((8, 9), 3, (8,), "images are 8x9; patch_size 3 and 1 levels .* divisible by 3"),
    ],
)
def test_indivisible_sizes_are_refused(size, patch, channels, message):
    net = ConvClassifier(channels=channels, patch_size=patch)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, KEYS[0], jnp.zeros((BATCH, *size, 1)), C_NOISE, CONDITION)
