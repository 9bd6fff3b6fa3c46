"""The classifiers are their descriptions in NumPy, which read no label."""

import functools

import jax
import numpy as np
import pytest
import tiny
from tiny import normal

from mclr_jax.networks.classifier import ConvClassifier, MLPClassifier
from mclr_jax.networks.mlp import MLP
from mclr_jax.types import Condition

BATCH = 6
C_NOISE = np.linspace(-1.5, 1.0, BATCH, dtype=np.float32)
LABEL = np.int32([0, 1, 2, 3, 0, 1])
AUGMENT = normal(1, BATCH, 2)
STRENGTH = np.linspace(0.5, 4.0, BATCH, dtype=np.float32)
CONDITION = Condition(LABEL, STRENGTH, AUGMENT)
OPTIONS = {"num_classes": 3, "augment_dim": 2, "takes_strength": True}
NETWORKS = {
    "mlp": MLPClassifier(width=16, depth=2, **OPTIONS),
    "conv": ConvClassifier(channels=(8, 12), **OPTIONS),
}
X = {
    "mlp": normal(0, BATCH, 2),
    "conv": normal(0, BATCH, 8, 4, 1),
}


@functools.cache
def drawn(name):
    """Random parameters, none of which is zero."""
    return {"params": tiny.params(NETWORKS[name], X[name], C_NOISE, CONDITION)}


@jax.jit
def mlp(x):
    return NETWORKS["mlp"].apply(drawn("mlp"), x, C_NOISE, CONDITION)


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


def test_the_convolutional_network_is_its_description_in_numpy():
    """Patches, a block at each size with the noise level in its embedding, and the mean."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), drawn("conv")["params"])

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
        drawn("conv"), X["conv"], C_NOISE, CONDITION, mutable="intermediates"
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
    (kept,) = found["intermediates"]["features"]
    np.testing.assert_allclose(kept, features, rtol=1e-4, atol=1e-4)


def test_the_mlp_ends_with_a_linear_map_of_the_activated_trunk():
    """The trunk is the MLP of tests/test_mlp.py, which is shown label 0 of its one label."""
    params = drawn("mlp")["params"]
    trunk = MLP(out_channels=16, width=16, depth=2, **OPTIONS | {"num_classes": 0})
    shown = CONDITION.replace(label=0 * LABEL)
    h = np.asarray(jax.jit(trunk.apply)({"params": params["trunk"]}, X["mlp"], C_NOISE, shown))
    expected = silu(h) @ params["out_linear"]["kernel"] + params["out_linear"]["bias"]
    np.testing.assert_allclose(mlp(X["mlp"]), expected, rtol=1e-4, atol=1e-4)


def test_the_mlp_takes_images_as_vectors():
    image = X["mlp"].reshape(BATCH, 2, 1, 1)
    np.testing.assert_allclose(mlp(image), mlp(X["mlp"]), rtol=1e-5, atol=1e-6)


def test_vectors_are_sent_to_the_other_classifier():
    with pytest.raises(ValueError, match=r"data have shape \(2,\).*mlp_classifier"):
        tiny.params(ConvClassifier(), X["mlp"], C_NOISE, CONDITION)


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
        tiny.params(net, np.zeros((BATCH, *size, 1)), C_NOISE, CONDITION)
