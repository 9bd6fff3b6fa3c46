"""The InceptionV3 of FID: the network of the original TensorFlow graph, with its published weights.

The weights are a file that the user has: pt_inception-2015-12-05-6726825d.pth, which pytorch-fid
and torch-fidelity publish. Sources: Szegedy et al. 2015 (arXiv 1512.00567); Heusel et al. 2017
(arXiv 1706.08500). It differs from torchvision's: averages leave out the padding, the last block
takes a maximum, and there are 1008 classes.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mclr_jax.evaluation import convolutions
from mclr_jax.evaluation.convolutions import Weights
from mclr_jax.pretrained import torch_file

SIZE = 299


def load_weights(path: str | os.PathLike) -> Weights:
    """Weights as `apply` takes them.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is not the file described above.
    """
    return convert(torch_file.load(path))


def convert(state: Weights) -> Weights:
    """The published state dict -> what `apply` takes; ValueError if a weight is missing."""
    names = [key.removesuffix(".weight") for key in state if key.endswith(".conv.weight")]
    try:
        folded = convolutions.fold(state, {n: n.removesuffix("conv") + "bn" for n in names})
        classes = {"fc": state["fc.weight"].T}
        found: Any = (len(names), classes["fc"].shape)
    except KeyError as error:
        found = f"no {error}"
    if found != (94, (2048, 1008)):
        raise ValueError(
            f"The Inception weights have {found}; expected 94 convolutions with batch norms and a "
            "classifier (2048, 1008): the file pt_inception-2015-12-05-6726825d.pth."
        )
    return {key.replace(".conv", ""): value for key, value in (folded | classes).items()}


def resize(images: jax.Array, size: int = SIZE) -> jax.Array:
    """Bilinear, pixel i of the result at i * old / new, as TensorFlow 1 did: (B, size, size, C)."""
    for axis in (1, 2):
        old = images.shape[axis]
        place = np.arange(size) * (old / size)
        low = np.floor(place).astype(int)
        shape = [1] * images.ndim
        shape[axis] = size
        share = jnp.asarray((place - low).reshape(shape), images.dtype)
        lower, upper = (jnp.take(images, np.minimum(i, old - 1), axis=axis) for i in (low, low + 1))
        images = lower + share * (upper - lower)
    return images


def apply(weights: Weights, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, 1 or 3) in [-1, 1] -> pool3 features (B, 2048) and logits (B, 1008).

    The logits are without bias, as the inception score takes them.
    """
    x = convolutions.coloured(images)
    x = (resize(x * 127.5 + 127.5) - 128) / 128
    linear = functools.partial(convolutions.conv, weights)

    def conv(x, name, stride=1, padding="SAME"):
        return jax.nn.relu(linear(x, name, stride, padding))

    def chain(x, block, *names):
        for name in names:
            x = conv(x, f"{block}.{name}")
        return x

    def pooled(x, block, pool):
        return conv(pool(x), f"{block}.branch_pool")

    for name, stride, padding in (("1a_3x3", 2, "VALID"), ("2a_3x3", 1, "VALID"),
                                  ("2b_3x3", 1, "SAME")):  # fmt: skip
        x = conv(x, f"Conv2d_{name}", stride, padding)
    x = conv(_max(x, 2, "VALID"), "Conv2d_3b_1x1")
    x = _max(conv(x, "Conv2d_4a_3x3", 1, "VALID"), 2, "VALID")
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = jnp.concatenate([
            chain(x, block, "branch1x1"),
            chain(x, block, "branch5x5_1", "branch5x5_2"),
            chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
            pooled(x, block, _average),
        ], axis=-1)  # fmt: skip
    inner = chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
    x = jnp.concatenate([
        conv(x, "Mixed_6a.branch3x3", 2, "VALID"),
        conv(inner, "Mixed_6a.branch3x3dbl_3", 2, "VALID"),
        _max(x, 2, "VALID"),
    ], axis=-1)  # fmt: skip
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = jnp.concatenate([
            chain(x, block, "branch1x1"),
            chain(x, block, *(f"branch7x7_{i}" for i in (1, 2, 3))),
            chain(x, block, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5))),
            pooled(x, block, _average),
        ], axis=-1)  # fmt: skip
    left = chain(x, "Mixed_7a", "branch3x3_1")
    right = chain(x, "Mixed_7a", *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
    x = jnp.concatenate([
        conv(left, "Mixed_7a.branch3x3_2", 2, "VALID"),
        conv(right, "Mixed_7a.branch7x7x3_4", 2, "VALID"),
        _max(x, 2, "VALID"),
    ], axis=-1)  # fmt: skip
    for block, pool in (("Mixed_7b", _average), ("Mixed_7c", lambda x: _max(x, 1, "SAME"))):
        single = chain(x, block, "branch3x3_1")
        double = chain(x, block, "branch3x3dbl_1", "branch3x3dbl_2")
        x = jnp.concatenate([
            chain(x, block, "branch1x1"),
            *(conv(single, f"{block}.branch3x3_2{side}") for side in "ab"),
            *(conv(double, f"{block}.branch3x3dbl_3{side}") for side in "ab"),
            pooled(x, block, pool),
        ], axis=-1)  # fmt: skip
    features = x.mean((1, 2))
    return features, features @ weights["fc"]


def _max(x: jax.Array, stride: int, padding: str) -> jax.Array:
    window, strides = (1, 3, 3, 1), (1, stride, stride, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, strides, padding)


def _average(x: jax.Array) -> jax.Array:
    """3x3, of the pixels that there are."""

    def total(x):
        return lax.reduce_window(x, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

    return total(x) / total(jnp.ones((1, *x.shape[1:3], 1), x.dtype))
