"""Shared layers against formulas written out in NumPy."""

import contextlib
import types
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn.initializers import variance_scaling

from mclr_jax import backend
from mclr_jax.networks import layers
from mclr_jax.networks.mlp import MLP
from mclr_jax.networks.unet import UNet

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_initial_variance(kernel_size):
    """Uniform: variance bound^2 / 3, with EDM's xavier and kaiming bounds and PyTorch's bias."""
    inputs, outputs, area = 16, 4096, kernel_size**2
    x = jnp.zeros((1, 4, 4, inputs))
    for init, variance in [
        (variance_scaling(0.25, "fan_avg", "uniform"), 0.25 * 2 / (area * (inputs + outputs))),
        (variance_scaling(1 / 3, "fan_in", "uniform"), 1 / (3 * area * inputs)),
    ]:
        module = layers.Linear(outputs, kernel_size, kernel_init=init, bias_scale=1.0)
        params = module.init(jax.random.key(0), x)["params"]
        assert abs(np.var(params["kernel"]) / variance - 1) < 0.05
        bound = (area * inputs) ** -0.5
        assert 0.9 * bound < np.abs(params["bias"]).max() <= bound
        assert np.var(params["bias"]) == pytest.approx(bound**2 / 3, rel=0.04)  # 3 sigma


@pytest.mark.parametrize(
    ("channels", "groups", "spread", "mean"), [(3, 1, 3, 20), (48, 12, 3e-3, 0), (256, 32, 3, 20)]
)
def test_group_norm(channels, groups, spread, mean):
    """A mean that a one-pass float32 variance would lose; a variance near epsilon."""
    x = spread * normal(2, 4, 5, channels) + np.float32(mean)
    scale, bias = normal(channels), normal(channels)
    grouped = x.astype(np.float64).reshape(2, 20, groups, channels // groups)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    variance = grouped.var((1, 3), keepdims=True)
    params = {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}
    for epsilon in (1e-5, 1e-6):
        expected = (centred / np.sqrt(variance + epsilon)).reshape(x.shape) * scale + bias
        actual = layers.GroupNorm(epsilon).apply({"params": params}, x)
        np.testing.assert_allclose(actual, expected, atol=2e-5)


def test_group_norm_of_bfloat16_has_float32_statistics():
    x = jnp.asarray(normal(2, 4, 5, 8) + 20, jnp.bfloat16)
    module = layers.GroupNorm(1e-5, jnp.bfloat16)
    y = module.apply(module.init(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16
    grouped = np.asarray(x, np.float64).reshape(2, 20, 2, 4)
    centred = grouped - grouped.mean((1, 3), keepdims=True)
    expected = centred / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
    np.testing.assert_allclose(
        np.asarray(y, np.float64), expected.reshape(x.shape), rtol=2**-8, atol=1e-6
    )


def test_group_norm_wants_groups_of_one_size():
    with pytest.raises(ValueError, match="46 channels; 11 groups of equal size are expected"):
        layers.GroupNorm().init(jax.random.key(0), jnp.zeros((1, 2, 2, 46)))


def softmax_attention(q, k, v):
    """Of one head, float64: q, k, v (N, D)."""
    logits = q.astype(np.float64) @ k.astype(np.float64).T / np.sqrt(q.shape[1])
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True) @ v.astype(np.float64)


def test_attention():
    q, k, v = normal(3, 2, 6, 3, 7)
    actual = layers.attention(q, k, v)
    assert actual.shape == q.shape
    for b, h in np.ndindex(2, 3):
        expected = softmax_attention(q[b, :, h], k[b, :, h], v[b, :, h])
        np.testing.assert_allclose(actual[b, :, h], expected, rtol=1e-5, atol=1e-5)


def test_attention_of_bfloat16_has_a_float32_softmax():
    """Logits 100 + j / 8, which bfloat16 rounds to halves; inputs and values it holds exactly."""
    steps = np.arange(8.0)
    q = np.tile([16.0, 1.0, 0.0, 0.0], (8, 1))
    k = np.stack([np.full(8, 12.5), steps / 4, 0 * steps, 0 * steps], axis=1)
    v = np.eye(8, 4)
    inputs = (jnp.asarray(a[None, :, None], jnp.bfloat16) for a in (q, k, v))
    actual = layers.attention(*inputs)
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(actual[0, :, 0], np.float64), softmax_attention(q, k, v), rtol=2**-7
    )


@pytest.mark.parametrize(
    ("dtype", "width", "bias", "others", "expected"),
    [
        (jnp.bfloat16, 64, False, False, "cudnn"),
        (jnp.float16, 72, False, False, "cudnn"),
        (jnp.float32, 64, False, False, "xla"),
        (jnp.bfloat16, 12, False, False, "xla"),
        (jnp.bfloat16, 136, False, False, "xla"),
        (jnp.bfloat16, 64, True, False, "xla"),
        (jnp.bfloat16, 64, False, True, "xla"),
    ],
)
def test_on_a_gpu_attention_is_fused_where_cudnn_can(
    dtype, width, bias, others, expected, monkeypatch
):
    asked = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(layers, "_cudnn_attention", lambda: True)
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *_, implementation: asked.append(implementation)
    )
    q = jnp.zeros((1, 4, 2, width), dtype)
    with backend.programs_for_others() if others else contextlib.nullcontext():
        layers.attention(q, q, q, jnp.zeros((1, 2, 4, 4)) if bias else None)
    assert asked == [expected]


@pytest.mark.parametrize(
    ("platform", "capability", "fused"),
    [("cuda 13000", "9.0", True), ("cuda 13000", "10.0", True), ("cuda 12080", "7.5", False),
     ("rocm 60300", "9.0", False)],
)  # fmt: skip
def test_fused_attention_is_for_cards_since_ampere(platform, capability, fused, monkeypatch):
    client = types.SimpleNamespace(platform_version=platform)
    card = types.SimpleNamespace(client=client, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [card])
    assert layers._cudnn_attention.__wrapped__() == fused


def kept_for_gradients(function, x):
    """Shape and type of what the gradient of `function` at x needs of the forward pass."""
    return [(a.shape, a.dtype) for a in jax.tree.leaves(jax.vjp(function, x)[1]) if a.ndim]


def check_derivatives(function, plain, x):
    """The gradient, the derivative along a line and a second derivative are those of `plain`."""
    along, weight = normal(*x.shape), normal(*x.shape)

    def derivatives(f):
        def slope(x):
            return jax.grad(lambda x: (f(x) * weight).sum())(x)

        return jax.jvp(f, (x,), (along,))[1], *jax.jvp(slope, (x,), (along,))

    for found, expected in zip(derivatives(function), derivatives(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gelu_and_its_derivatives():
    x = normal(3, 4) * 2
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x.astype(np.float64) ** 3)
    np.testing.assert_allclose(layers.gelu(x), x * (1 + np.tanh(inner)) / 2, rtol=1e-5, atol=1e-6)
    check_derivatives(layers.gelu, partial(jax.nn.gelu, approximate=True), x)
    small = jnp.asarray(x, jnp.bfloat16)
    assert kept_for_gradients(layers.gelu, small) == [(x.shape, jnp.bfloat16)]


def test_layer_norm_and_its_derivatives():
    x = 3 * normal(2, 5, 8) + 1
    centred = x - x.astype(np.float64).mean(axis=-1, keepdims=True)
    expected = centred / np.sqrt(x.astype(np.float64).var(axis=-1, keepdims=True) + 1e-6)
    norm = partial(layers.layer_norm, dtype=jnp.float32)
    np.testing.assert_allclose(norm(x), expected, atol=1e-5)

    def plain(x):
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / jnp.sqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)

    check_derivatives(norm, plain, x)


def test_the_gradient_of_layer_norm_of_bfloat16_keeps_bfloat16():
    x = jnp.asarray(3 * normal(2, 5, 64) + 1, jnp.bfloat16)
    norm, weight = partial(layers.layer_norm, dtype=jnp.bfloat16), normal(*x.shape)
    kept = kept_for_gradients(norm, x)
    assert sorted(kept, key=str) == [((2, 5, 1), jnp.float32), (x.shape, jnp.bfloat16)]

    def loss(x, norm):
        return (norm(x).astype(jnp.float32) * weight).sum()

    found = jax.grad(loss)(x, norm)
    expected = jax.grad(loss)(x.astype(jnp.float32), partial(layers.layer_norm, dtype=jnp.float32))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.01)


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


@pytest.mark.parametrize(
    ("network", "options", "message"),
    [
        (MLP, {"width": 2**31}, "network.width is 2147483648; expected .* at most 65536"),
        (MLP, {"depth": 1.5}, "network.depth is 1.5; expected an integer"),
        (UNet, {"channel_mult": (1, 0)}, r"network.channel_mult\[1\] is 0; expected an integer"),
        (UNet, {"channel_mult": ()}, r"network.channel_mult is \(\); expected a value for each"),
    ],
)
def test_sizes_that_no_network_can_have_are_refused(network, options, message):
    with pytest.raises(ValueError, match=message):
        network(**options)
    network(width=3) if network is MLP else network(channel_mult=(1, 2))
