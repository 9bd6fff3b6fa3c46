"""Convolutions of NHWC images, whose gradients on the CPU are fast inside loops too.

XLA:CPU has fast kernels for the layout NHWC, HWIO -> NHWC alone. It rewrites the convolutions of
gradients to this layout, but not inside loops, where a gradient then takes 50 times as long. On the
CPU, a convolution of stride 1 with `margins` zeros at each end of height and width is therefore a
primitive, whose transposes are convolutions of this layout. The primitive is bilinear, so that it
has derivatives of any order.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mclr_jax import backend

NHWC = ("NHWC", "HWIO", "NHWC")


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: Any = "SAME") -> jax.Array:
    """x (B, H, W, C), kernel (kh, kw, C, D) of its dtype -> (B, H', W', D); XLA's `padding`."""
    margins = tuple(size // 2 for size in kernel.shape[:2])
    odd = all(size % 2 for size in kernel.shape[:2])
    if backend.traced_for() == "cpu" and stride == 1 and padding == "SAME" and odd:
        return convolution_p.bind(x, kernel, margins=margins)
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=NHWC)


def _by_xla(x: jax.Array, kernel: jax.Array, *, margins: tuple[int, ...]) -> jax.Array:
    padding = [(margin, margin) for margin in margins]
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=NHWC)


def _transpose_x(g: jax.Array, x: Any, kernel: jax.Array, *, margins: tuple[int, ...]):
    flipped = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    rest = tuple(size - 1 - m for size, m in zip(kernel.shape[:2], margins, strict=True))
    return convolution_p.bind(g, flipped, margins=rest)


def _transpose_kernel(g: jax.Array, x: jax.Array, kernel: Any, *, margins: tuple[int, ...]):
    """Batch and channels are swapped: each channel of x is correlated with each channel of g."""
    x, g = jnp.transpose(x, (3, 1, 2, 0)), jnp.transpose(g, (1, 2, 0, 3))
    return convolution_p.bind(x, g, margins=margins).transpose(1, 2, 0, 3)


def _batched(arguments, axes, *, margins: tuple[int, ...]):
    """Kernels are mapped one by one: XLA's own rule, grouped convolution, is slow on the CPU."""
    (x, kernel), (x_axis, kernel_axis) = arguments, axes
    convolution = partial(convolution_p.bind, margins=margins)
    if x_axis is None:
        return lax.map(partial(convolution, x), jnp.moveaxis(kernel, kernel_axis, 0)), 0
    x = jnp.moveaxis(x, x_axis, 0)
    if kernel_axis is None:  # the mapped axis joins the batch
        y = convolution(x.reshape(-1, *x.shape[2:]), kernel)
        return y.reshape(*x.shape[:2], *y.shape[1:]), 0
    return lax.map(lambda pair: convolution(*pair), (x, jnp.moveaxis(kernel, kernel_axis, 0))), 0


convolution_p = Primitive("convolution")
convolution_p.def_impl(jax.jit(_by_xla, static_argnames="margins"))
convolution_p.def_abstract_eval(
    lambda x, kernel, *, margins: jax.core.ShapedArray(
        jax.eval_shape(partial(_by_xla, margins=margins), x, kernel).shape, x.dtype
    )
)
mlir.register_lowering(convolution_p, mlir.lower_fun(_by_xla, multiple_results=False))
ad.defbilinear(convolution_p, _transpose_x, _transpose_kernel)
batching.primitive_batchers[convolution_p] = _batched
