"""Shared layers against formulas written out in NumPy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.networks import layers

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(("stride", "padding", "pad"), [(1, "SAME", 1), (2, "VALID", 0)])
def test_convolve_is_the_sum_over_the_window(stride, padding, pad):
    x, kernel = normal(2, 7, 5, 3), normal(3, 3, 3, 4)
    padded = np.pad(x, [(0, 0), (pad, pad), (pad, pad), (0, 0)])
    rows = range(0, padded.shape[1] - 2, stride)
    columns = range(0, padded.shape[2] - 2, stride)
    expected = np.stack(
        [
            np.stack(
                [
                    np.einsum("bijc,ijcd->bd", padded[:, r : r + 3, c : c + 3], kernel)
                    for c in columns
                ],
                axis=1,
            )
            for r in rows
        ],
        axis=1,
    )
    actual = layers.convolve(jnp.asarray(x), jnp.asarray(kernel), stride, padding)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_linear_on_images_is_a_1x1_convolution():
    x = normal(2, 4, 4, 6)
    module = layers.Linear(5, bias_scale=1.0)
    variables = module.init(jax.random.key(0), x)
    kernel, bias = variables["params"]["kernel"], variables["params"]["bias"]
    expected = layers.convolve(jnp.asarray(x), kernel[None, None]) + bias
    np.testing.assert_allclose(module.apply(variables, x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_initial_variance(kernel_size):
    """Uniform: variance bound^2 / 3, with EDM's xavier and kaiming bounds and PyTorch's bias."""
    inputs, outputs, area = 64, 128, kernel_size**2
    x = jnp.zeros((1, 4, 4, inputs))
    for init, variance in [
        (layers.xavier_uniform(0.5), 0.25 * 2 / (area * (inputs + outputs))),
        (layers.kaiming_uniform(3**-0.5), 1 / (3 * area * inputs)),
    ]:
        module = layers.Linear(outputs, kernel_size, kernel_init=init, bias_scale=1.0)
        params = module.init(jax.random.key(0), x)["params"]
        assert abs(np.var(params["kernel"]) / variance - 1) < 0.05
        bound = (area * inputs) ** -0.5
        assert 0.9 * bound < np.abs(params["bias"]).max() <= bound
        assert np.var(params["bias"]) == pytest.approx(bound**2 / 3, rel=0.3)


@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (8, 2), (48, 12), (256, 32)])
def test_group_norm(channels, groups):
    x = 3 * normal(2, 4, 5, channels) + 20  # a mean that a one-pass float32 variance would lose
    scale, bias = normal(channels), normal(channels)
    grouped = x.astype(np.float64).reshape(2, 20, groups, channels // groups)
    mean, variance = grouped.mean((1, 3), keepdims=True), grouped.var((1, 3), keepdims=True)
    expected = ((grouped - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * scale + bias
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    actual = layers.GroupNorm(1e-5).apply({"params": params}, x)
    np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_attention():
    q, k, v = normal(2, 6, 3, 4), normal(2, 6, 3, 4), normal(2, 6, 3, 4)
    expected = np.zeros_like(q)
    for b, h in np.ndindex(2, 3):
        weights = np.exp(q[b, :, h] @ k[b, :, h].T / 2)
        expected[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, h]
    np.testing.assert_allclose(layers.attention(q, k, v), expected, rtol=1e-4, atol=1e-5)


def test_resampling_by_two_taps_is_the_mean_and_the_nearest_neighbour():
    x = normal(2, 6, 4, 3)
    mean = x.reshape(2, 3, 2, 2, 2, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(layers.downsample(x), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(layers.upsample(x), x.repeat(2, axis=1).repeat(2, axis=2))


def test_four_tap_resampling_of_an_impulse():
    x = np.zeros((1, 4, 4, 1), np.float32)
    x[0, 1, 1] = 1.0
    column = np.array([0, 1, 3, 3, 1, 0, 0, 0]) / 4  # taps / 8, doubled so that means are kept
    up = layers.upsample(jnp.asarray(x), (1, 3, 3, 1))[0, :, :, 0]
    np.testing.assert_allclose(up, np.outer(column, column), atol=1e-6)
    down = layers.downsample(jnp.asarray(x), (1, 3, 3, 1))[0, :, :, 0]
    np.testing.assert_allclose(down, np.outer([3, 1], [3, 1]) / 64, atol=1e-6)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1), (1, 2, 3, 4)])
def test_upsampling_is_the_transpose_of_downsampling(taps):
    small, large = normal(1, 4, 3, 2), normal(1, 8, 6, 2)
    left = np.sum(np.asarray(layers.upsample(jnp.asarray(small), taps)) * large)
    right = 4 * np.sum(small * np.asarray(layers.downsample(jnp.asarray(large), taps)))
    assert left == pytest.approx(right, rel=1e-4, abs=1e-4)


class TwoDropouts(nn.Module):
    @nn.compact
    def __call__(self, x, keys):
        first = layers.Dropout(0.25, name="first")(x, keys)
        return first, layers.Dropout(0.25, name="second")(x, keys)


def test_dropout():
    x, keys = jnp.ones((40, 10, 100)), jax.random.split(jax.random.key(0), 40)
    first, second = TwoDropouts().apply({}, x, keys)
    kept = np.asarray(first != 0)
    np.testing.assert_allclose(first[kept], 1 / 0.75, rtol=1e-6)
    assert kept.mean() == pytest.approx(0.75, abs=0.01)  # 4.6 standard deviations of 40 000 draws
    both = np.mean(kept & np.asarray(second != 0))
    assert both == pytest.approx(0.75**2, abs=0.012)  # layers are independent
    pairs = np.mean(kept[:-1] & kept[1:])
    assert pairs == pytest.approx(0.75**2, abs=0.012)  # examples are independent
    part, _ = TwoDropouts().apply({}, x[17:20], keys[17:20])
    np.testing.assert_array_equal(part, first[17:20])
    np.testing.assert_array_equal(TwoDropouts().apply({}, x, None)[0], x)
