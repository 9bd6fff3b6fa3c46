"""Tests of the Winograd convolution: against XLA's own, in value, gradients and use."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mclr_jax.networks import conv
from mclr_jax.networks.conv import fast_conv, winograd_conv


@pytest.fixture(autouse=True)
def small_counts(monkeypatch):
    """Convolutions of any size take the fast path, and no trace outlives its constants."""
    monkeypatch.setattr(conv, "MIN_PRODUCTS", 0)
    jax.clear_caches()
    yield
    jax.clear_caches()


DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def plain(x, kernel):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def fast(x, kernel):
    return fast_conv(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def value_and_gradients(f):
    """f(x, kernel), and both gradients for the cotangent g."""

    def run(x, kernel, g):
        y, pullback = jax.vjp(f, x, kernel)
        return y, *pullback(g)

    return run


def inputs(batch=3, height=8, width=12, channels=16, features=24, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, height, width, channels), dtype)
    kernel = jax.random.normal(keys[1], (3, 3, channels, features), dtype) / (9 * channels) ** 0.5
    return x, kernel, jax.random.normal(keys[2], (batch, height, width, features), dtype)


def assert_close(got, expected, tolerance=1e-4):
    """Within `tolerance` of each result's largest element: sums cancel, so elements may be tiny."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("m", [2, 4])
def test_transforms_are_exact_in_integers(m):
    """A^T [(G w) * (B^T x)] is the correlation of w and x, and an impulse gives the weights."""
    b, g, a = conv.TRANSFORMS[m]
    w, x = np.array([2.0, -3.0, 5.0]), np.arange(m + 2.0) ** 2
    np.testing.assert_allclose(a @ ((g @ w) * (b @ x)), np.correlate(x, w, "valid"), rtol=1e-12)


@settings(max_examples=3, deadline=None)
@given(
    batch=st.integers(1, 4),
    height=st.integers(1, 6).map(lambda n: 2 * n),
    width=st.integers(1, 6).map(lambda n: 2 * n),
    channels=st.integers(1, 24),
    features=st.integers(1, 24),
    cached=st.sampled_from([1, 2**11, 2**17]),
)
def test_value_and_gradients(batch, height, width, channels, features, cached):
    arguments = inputs(batch, height, width, channels, features)
    expected = value_and_gradients(plain)(*arguments)
    saved, conv.CACHED_ELEMENTS = conv.CACHED_ELEMENTS, cached  # whole batch or in pieces
    jax.clear_caches()
    try:
        assert_close(jax.jit(value_and_gradients(winograd_conv))(*arguments), expected)
    finally:
        conv.CACHED_ELEMENTS = saved
        jax.clear_caches()


def test_accuracy_of_large_sums():
    """64 x 16 x 16 terms in each weight's gradient: the error stays near float32's."""
    arguments = inputs(64, 16, 16, 32, 32)
    expected = value_and_gradients(plain)(*arguments)
    assert_close(jax.jit(value_and_gradients(fast))(*arguments), expected, 3e-5)


@pytest.mark.parametrize(
    ("x_shape", "kernel_shape", "strides", "options"),
    [
        ((2, 8, 8, 16), (3, 3, 16, 16), (2, 2), {}),
        ((2, 8, 8, 16), (3, 3, 16, 16), (1, 1), {"rhs_dilation": (2, 2)}),
        (
            (2, 8, 8, 16),
            (3, 3, 16, 16),
            (1, 1),
            {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))},
        ),
        ((2, 8, 8, 32), (3, 3, 16, 16), (1, 1), {"feature_group_count": 2}),
        ((2, 8, 8, 16), (1, 1, 16, 16), (1, 1), {}),
        ((2, 7, 7, 16), (3, 3, 16, 16), (1, 1), {}),
        ((2, 8, 8, 3), (3, 3, 3, 16), (1, 1), {}),
    ],
)
def test_falls_back(x_shape, kernel_shape, strides, options):
    x, kernel = jnp.ones(x_shape), jnp.ones(kernel_shape)
    options = {"padding": "SAME", "dimension_numbers": DIMENSIONS, **options}
    got, expected = (
        jax.make_jaxpr(lambda x, k, f=f: f(x, k, strides, **options))(x, kernel)
        for f in (fast_conv, lax.conv_general_dilated)
    )
    assert str(got) == str(expected)


def test_tiny_ones_fall_back(monkeypatch):
    monkeypatch.setattr(conv, "MIN_PRODUCTS", 2**21)
    x, kernel, _ = inputs()
    assert "winograd" not in str(jax.make_jaxpr(fast)(x, kernel))
    assert "winograd" in str(jax.make_jaxpr(fast)(jnp.tile(x, (30, 1, 1, 1)), kernel))


def test_other_layouts_and_bfloat16_fall_back():
    x, kernel, g = inputs(dtype=jnp.bfloat16)
    got, expected = (value_and_gradients(f)(x, kernel, g) for f in (fast, plain))
    assert_close(got, expected, 0)
    x, kernel, _ = inputs()
    x = jnp.moveaxis(x, -1, 1)
    got, expected = (
        f(x, kernel, (1, 1), "SAME", dimension_numbers=("NCHW", "HWIO", "NCHW"))
        for f in (fast_conv, lax.conv_general_dilated)
    )
    assert_close([got], [expected], 0)


def test_in_linen():
    x, _, _ = inputs()
    module = nn.Conv(24, (3, 3), conv_general_dilated=fast_conv)
    params = module.init(jax.random.key(1), x)
    assert "winograd_conv" in str(jax.make_jaxpr(module.apply)(params, x))
    got, expected = module.apply(params, x), nn.Conv(24, (3, 3)).apply(params, x)
    assert_close([got], [expected])


def test_other_platforms_lower_to_plain_convolutions():
    arguments = inputs()
    counts = {}
    for name, f in (("fast", fast), ("plain", plain)):
        traced = jax.jit(value_and_gradients(f)).trace(*arguments)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        counts[name] = text.count("stablehlo.convolution"), text.count("stablehlo.dot_general")
    assert counts["fast"] == counts["plain"] == (3, 0)


def test_vmap_and_pmap():
    x, kernel, g = inputs(batch=8)
    stacked = tuple(a.reshape(2, 4, *a.shape[1:]) for a in (x, g))
    expected = jax.vmap(value_and_gradients(plain), (0, None, 0))(stacked[0], kernel, stacked[1])
    for transform in (jax.vmap, jax.pmap):
        got = transform(value_and_gradients(fast), in_axes=(0, None, 0))
        assert_close(got(stacked[0], kernel, stacked[1]), expected)
    kernels = jnp.stack([kernel, 2 * kernel])
    assert_close([jax.vmap(fast)(stacked[0], kernels)], [jax.vmap(plain)(stacked[0], kernels)])


def test_sharded_batch(monkeypatch):
    monkeypatch.setattr(conv, "CACHED_ELEMENTS", 2**12)  # in pieces
    jax.clear_caches()
    x, kernel, g = inputs(batch=16)
    expected = value_and_gradients(plain)(x, kernel, g)
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    split, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    arguments = (jax.device_put(x, split), jax.device_put(kernel, replicated))
    run = jax.jit(value_and_gradients(fast), out_shardings=(split, split, replicated))
    assert_close(run(*arguments, jax.device_put(g, split)), expected)
    jax.clear_caches()
