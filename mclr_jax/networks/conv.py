"""Faster 3x3 convolutions on the CPU: Winograd's algorithm, in matrix products that XLA does well.

XLA:CPU's own convolution reaches 0.8 to 1.0 of PyTorch's speed forward on one thread, and 0.3 to
0.8 of it in the gradient of the weights. Winograd's takes 2.25 (m = 2) or 4 (m = 4) times fewer
multiplications.
Speeds by shape: `benchmarks/convolution.py`. Elsewhere than on the CPU this is XLA's convolution.

Sources: Winograd 1980; Lavin and Gray 2016 (arXiv:1509.09308), from which the notation is: in one
dimension m outputs are y = A^T [(G w) * (B^T x)] for 3 weights w and m + 2 inputs x.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Tile size m: B^T (m + 2, m + 2), G (m + 2, 3), A^T (m, m + 2).
TRANSFORMS = {
    2: (
        np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]),
        np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]]) / 2,
        np.array([[1, 1, 1, 0], [0, 1, -1, -1]]),
    ),
    4: (
        np.array(
            [
                [4, 0, -5, 0, 1, 0],
                [0, -4, -4, 1, 1, 0],
                [0, 4, -4, -1, 1, 0],
                [0, -2, -1, 2, 1, 0],
                [0, 2, -1, -2, 1, 0],
                [0, 4, 0, -5, 0, 1],
            ]
        ),
        np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24,
        np.array(
            [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
        ),
    ),
}
MIN_CHANNELS = 16  # below, the transforms cost more than the products save
MIN_PRODUCTS = 2**21  # B H W C D: below, a second more of compilation is not worth microseconds
CACHED_ELEMENTS = 2**17  # of x at once: its transform is 4 times that, 2 MB, and stays in the cache

NHWC = lax.conv_dimension_numbers((1, 1, 1, 1), (1, 1, 1, 1), ("NHWC", "HWIO", "NHWC"))


def fast_conv(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated`, faster on the CPU where `winograd_conv` applies.

    For `nn.Conv(..., conv_general_dilated=fast_conv)`. It applies to float32 3x3 convolutions in
    NHWC and HWIO with stride 1 and padding "SAME", even sizes, at least 16 channels in and out,
    and not for tiny ones.
    Where it applies, forward-mode differentiation (`jax.jvp`) raises, on every platform.

    With a batch sharded over several CPU devices under `jax.jit` the result is right, but the batch
    is gathered first if it is processed in pieces; `jax.pmap` and `shard_map` see one shard only.
    """
    specification = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    applies = (
        specification == NHWC
        and rhs.shape[:2] == (3, 3)
        and lhs.dtype == rhs.dtype == jnp.float32
        and preferred_element_type in (None, jnp.float32)
        and feature_group_count == batch_group_count == 1
        and all(set(d or (1,)) == {1} for d in (window_strides, lhs_dilation, rhs_dilation))
        and (padding == "SAME" or np.array_equal(padding, ((1, 1), (1, 1))))
        and all(size > 0 and size % 2 == 0 for size in lhs.shape[1:3])
        and min(rhs.shape[2:]) >= MIN_CHANNELS
        and lhs.size * rhs.shape[3] >= MIN_PRODUCTS
    )
    if applies:
        return winograd_conv(lhs, rhs)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )


@jax.custom_vjp
def winograd_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolve x (B, H, W, C) with kernel (3, 3, C, D), zero-padded, H and W even -> (B, H, W, D).

    The value takes m = 2, which is as accurate as XLA's own; both gradients take m = 4 where it
    divides H and W, which is faster and errs by 1e-5 of the largest element. On a TPU or GPU all
    three are XLA's own.
    """
    cpu = functools.partial(_convolve, 2)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=_plain)


def _save(x, kernel):
    return winograd_conv(x, kernel), (x, kernel)


def _gradients(saved, g):
    return lax.platform_dependent(*saved, g, cpu=_backward, default=_plain_backward)


winograd_conv.defvjp(_save, _gradients)


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)


def _plain_backward(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
    return jax.vjp(_plain, x, kernel)[1](g)


def _backward(x: jax.Array, kernel: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    m = 2 if x.shape[1] % 4 or x.shape[2] % 4 else 4
    return _convolve(m, g, kernel[::-1, ::-1].swapaxes(2, 3)), _kernel_gradient(m, x, g)


@functools.partial(jax.jit, static_argnums=0)
def _convolve(m: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """F(m x m, 3x3): x (B, H, W, C), kernel (3, 3, C, D) -> (B, H, W, D)."""
    _, g, a = TRANSFORMS[m]
    channels, features = kernel.shape[2:]
    flat = kernel.reshape(9, -1)
    kernels = [  # the columns of G w G^T, each (m + 2, C, D)
        (jnp.asarray(np.kron(g, row), x.dtype) @ flat).reshape(-1, channels, features) for row in g
    ]

    def piece(x: jax.Array) -> jax.Array:
        products = [
            jnp.einsum("ibhwc,icd->ibhwd", tiles, kernel)
            for tiles, kernel in zip(_tiles(x, m), kernels, strict=True)
        ]
        columns = [jnp.stack(_combine(a, list(column)), axis=2) for column in _combine(a, products)]
        return jnp.stack(columns, axis=4).reshape(*x.shape[:3], -1)

    pieces = _pieces(x, features)
    if len(pieces) == 1:
        return piece(x)
    return lax.map(piece, pieces).reshape(*x.shape[:3], -1)


@functools.partial(jax.jit, static_argnums=0)
def _kernel_gradient(m: int, x: jax.Array, g: jax.Array) -> jax.Array:
    """The transpose of `_convolve` in its kernel: g (B, H, W, D) -> (3, 3, C, D)."""
    _, g_matrix, a = TRANSFORMS[m]
    channels, features = x.shape[3], g.shape[3]

    def piece(x: jax.Array, g: jax.Array) -> list[jax.Array]:
        pairs = zip(_windows(a.T, g, m), _tiles(x, m), strict=True)
        # D before C: XLA's product is faster where the larger of its operands is not transposed.
        return [jnp.einsum("ibhwd,ibhwc->idc", g, tiles) for g, tiles in pairs]

    def add(total, xg):
        return jax.tree.map(jnp.add, total, piece(*xg)), None

    xs, gs = _pieces(x, features), _pieces(g, channels)
    columns = piece(xs[0], gs[0])
    if len(xs) > 1:
        columns, _ = lax.scan(add, columns, (xs[1:], gs[1:]))
    parts = [
        jnp.asarray(np.kron(g_matrix.T, row[:, None]), x.dtype) @ column.reshape(m + 2, -1)
        for row, column in zip(g_matrix, columns, strict=True)
    ]
    total = functools.reduce(jnp.add, parts)
    return total.reshape(3, 3, features, channels).swapaxes(2, 3)


def _pieces(x: jax.Array, other_channels: int) -> jax.Array:
    """(B, H, W, C) -> (P, B / P, H, W, C) such that the transform of B / P images is cached."""
    batch, height, width, channels = x.shape
    most = CACHED_ELEMENTS // (height * width * max(channels, other_channels))
    size = max(n for n in range(1, max(1, min(most, batch)) + 1) if batch % n == 0)
    return x.reshape(batch // size, size, height, width, channels)


def _tiles(x: jax.Array, m: int) -> list[jax.Array]:
    """B^T x B for each tile of x (B, H, W, C)."""
    for border in (((0, 0), (1, 1), (0, 0), (0, 0)), ((0, 0), (0, 0), (1, 1), (0, 0))):
        x = jnp.pad(x, border)  # one at a time: both together take XLA 4 times as long to compile
    return _windows(TRANSFORMS[m][0], x, m)


def _windows(matrix: np.ndarray, x: jax.Array, m: int) -> list[jax.Array]:
    """M x M^T for square windows of x (B, H, W, C) that start m apart, M (n, k).

    Returns:
      One (n, B, H', W', C) for each column of the result; its leading axis is the row.
    """
    size = matrix.shape[1]
    height, width = (length - size + 1 for length in x.shape[1:3])
    rows = jnp.stack(_combine(matrix, [x[:, i : i + height : m] for i in range(size)]))
    return _combine(matrix, [rows[:, :, :, j : j + width : m] for j in range(size)])


def _combine(matrix: np.ndarray, arrays: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    """M a for a list of arrays, written out without the zeros of M."""

    def combination(row):
        terms = [(c.item(), a) for c, a in zip(row, arrays, strict=True) if c]
        return functools.reduce(jnp.add, [a if c == 1 else c * a for c, a in terms])

    return [combination(row) for row in matrix]
