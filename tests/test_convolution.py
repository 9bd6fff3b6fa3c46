"""Convolutions and their derivatives against their definition in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mclr_jax.networks.convolution import convolve

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def whole(*shape, random=RNG):
    """Whole numbers from -2 to 2: sums of their products are exact in float32."""
    return random.integers(-2, 3, shape).astype(np.float32)


def padded(x, size):
    """Float64, with zeros around each image such that a kernel of `size` keeps its size."""
    border = (size // 2, size // 2)
    return np.pad(np.asarray(x, np.float64), [(0, 0), border, border, (0, 0)])


def windows(x, size):
    """(row, column of the kernel, what it sees of x (B, H, W, C)); the last are views."""
    height, width = (length - size + 1 for length in x.shape[1:3])
    return [(i, j, x[:, i : i + height, j : j + width]) for i in range(size) for j in range(size)]


def convolution(x, kernel):
    """Stride 1, as large as x (B, H, W, C): float64, and written as its definition."""
    kernel = np.asarray(kernel, np.float64)
    seen = windows(padded(x, len(kernel)), len(kernel))
    return sum(window @ kernel[i, j] for i, j, window in seen)


def gradient_of_x(kernel, g):
    """Of sum(g * convolution(x, kernel))."""
    kernel, size = np.asarray(kernel, np.float64), len(kernel)
    result = padded(np.zeros((*g.shape[:3], kernel.shape[2])), size)
    for i, j, window in windows(result, size):
        window += g @ kernel[i, j].T
    border = size // 2
    return result[:, border : border + g.shape[1], border : border + g.shape[2]]


def gradient_of_kernel(x, g, size):
    """Of sum(g * convolution(x, kernel))."""
    result = np.zeros((size, size, x.shape[3], g.shape[3]))
    for i, j, window in windows(padded(x, size), size):
        result[i, j] = np.einsum("bhwc,bhwd->cd", window, g)
    return result


def assert_equal(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(a, e)


def half_square(x, kernel):
    """Its gradient in the convolution is the convolution itself, so all derivatives are known."""
    return jnp.sum(convolve(x, kernel) ** 2) / 2


gradients = jax.grad(half_square, (0, 1))


def expected_gradients(x, kernel):
    y = convolution(x, kernel)
    return gradient_of_x(kernel, y), gradient_of_kernel(x, y, len(kernel))


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    channels=st.integers(1, 5),
    features=st.integers(1, 5),
    size=st.sampled_from([3, 5]),
)
def test_convolve_and_its_derivatives(seed, batch, height, width, channels, features, size):
    """Value, gradients, their change along a direction (forward over reverse, and reverse over
    reverse: the Hessian is symmetric), images smaller than the kernel included."""
    random = np.random.default_rng(seed)
    x, dx = whole(2, batch, height, width, channels, random=random)
    kernel, dk = whole(2, size, size, channels, features, random=random)
    y, dy = convolution(x, kernel), convolution(dx, kernel) + convolution(x, dk)
    changes = (
        gradient_of_x(dk, y) + gradient_of_x(kernel, dy),
        gradient_of_kernel(dx, y, size) + gradient_of_kernel(x, dy, size),
    )

    @jax.jit
    def found(*inputs):
        reverse = jax.vjp(gradients, *inputs[:2])[1](inputs[2:])
        return *(jax.jvp(f, inputs[:2], inputs[2:]) for f in (convolve, gradients)), reverse

    value, (values, tangents), reverse = found(x, kernel, dx, dk)
    assert_equal(value, (y, dy))
    assert_equal(values, expected_gradients(x, kernel))
    assert_equal(tangents, changes)
    assert_equal(reverse, changes)


@pytest.mark.parametrize("axes", [(1, None), (None, 2), (0, 4)])
def test_mapped_convolutions(axes):
    """Gradients of mapped and mapped gradients, over x, the kernel or both."""
    shapes = (2, 6, 5, 3), (3, 3, 3, 4)
    x, kernel = (
        whole(*s) if a is None else np.moveaxis(whole(4, *s), 0, a)
        for s, a in zip(shapes, axes, strict=True)
    )
    each = [
        [v if a is None else v.take(i, a) for v, a in zip((x, kernel), axes, strict=True)]
        for i in range(4)
    ]
    expected = [np.stack(g) for g in zip(*(expected_gradients(*e) for e in each), strict=True)]
    assert_equal(jax.vmap(gradients, axes)(x, kernel), expected)
    total = jax.grad(lambda x, kernel: jax.vmap(half_square, axes)(x, kernel).sum(), (0, 1))
    expected = [
        e.sum(0) if a is None else np.moveaxis(e, 0, a) for e, a in zip(expected, axes, strict=True)
    ]
    assert_equal(total(x, kernel), expected)


def test_gradients_in_a_loop_keep_the_layout_that_xla_is_fast_in():
    """On the CPU others are computed 50 times slower, with the same result."""

    def layered(kernels, x):
        h = convolve(x, kernels[0])
        return half_square(jax.checkpoint(convolve)(h, kernels[1]), kernels[2])

    def train(kernels, batches):
        def step(kernels, x):
            slopes = jax.grad(layered)(kernels, x)
            return [k - 1e-3 * g for k, g in zip(kernels, slopes, strict=True)], None

        return jax.lax.scan(step, kernels, batches)[0]

    kernels = [normal(3, 3, *channels) / 4 for channels in ((2, 4), (4, 4), (4, 2))]
    batches = normal(2, 3, 6, 5, 2)
    lowered = jax.jit(train).lower(kernels, batches)
    layouts = re.findall(r"dim_numbers = ([^,]*, [^{]*?->\[.*?\])", lowered.as_text())
    assert len(layouts) >= 8  # 3 forward, 2 for inputs, 3 for kernels
    assert set(layouts) == {"[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"}

    expected = kernels
    for x in batches:
        hs = [x]
        for kernel in expected:
            hs.append(convolution(hs[-1], kernel))
        g, slopes = hs[-1], []
        for kernel, h in zip(expected[::-1], hs[-2::-1], strict=True):
            slopes.insert(0, gradient_of_kernel(h, g, 3))
            g = gradient_of_x(kernel, g)
        expected = [k - 1e-3 * s for k, s in zip(expected, slopes, strict=True)]
    for actual, e in zip(lowered.compile()(kernels, batches), expected, strict=True):
        np.testing.assert_allclose(actual, e, rtol=1e-5, atol=1e-6)


def test_convolutions_of_a_shared_batch():
    """A shard a device by pmap, and a batch that jit shares out: the kernel's gradients add up."""
    x, kernel = whole(8, 6, 5, 3), whole(3, 3, 3, 4)
    by_x, by_kernel = expected_gradients(x, kernel)
    shard = jax.pmap(gradients, in_axes=(0, None))(x[:, None], kernel)
    assert_equal((shard[0][:, 0], shard[1].sum(0)), (by_x, by_kernel))
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    assert_equal(jax.jit(gradients)(split, kernel), (by_x, by_kernel))


@pytest.mark.parametrize(("stride", "padding"), [(2, "VALID"), (1, "VALID"), (2, "SAME")])
def test_convolve_with_other_strides_and_paddings(stride, padding):
    x, kernel = whole(2, 7, 5, 3), whole(3, 3, 3, 4)
    expected = convolution(x, kernel)
    if padding == "VALID":  # windows inside the image
        expected = expected[:, 1:-1, 1:-1]
    actual = convolve(x, kernel, stride, padding)
    assert_equal([actual], [expected[:, ::stride, ::stride]])


def test_convolve_with_an_even_kernel():
    """XLA puts the odd zero at the end."""
    x, kernel = whole(2, 5, 6, 3), whole(2, 2, 3, 4)
    larger = np.pad(kernel, [(1, 0), (1, 0), (0, 0), (0, 0)])
    assert_equal([convolve(x, kernel)], [convolution(x, larger)])
