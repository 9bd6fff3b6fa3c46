"""The InceptionV3 of FID: the network of the original TensorFlow graph, with its published weights.

The weights are a file that the user has: pt_inception-2015-12-05-6726825d.pth, which pytorch-fid
and torch-fidelity publish. Sources: Szegedy et al. 2015 (arXiv 1512.00567); Heusel et al. 2017
(arXiv 1706.08500). It differs from torchvision's: averages leave out the padding, the last block
takes a maximum, and there are 1008 classes.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mclr_jax.evaluation import convolutions
from mclr_jax.evaluation.convolutions import Weights

SIZE = 299


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
    batch, height, width, channels = images.shape
    scale = jnp.array([size / height, size / width])
    images = jnp.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], "edge")  # the last pixel goes on
    return jax.image.scale_and_translate(
        images, (batch, size, size, channels), (1, 2), scale, (1 - scale) / 2, "linear", False
    )


def apply(weights: Weights, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, 1 or 3) in [-1, 1] -> pool3 features (B, 2048) and logits (B, 1008).

    The logits are without bias, as the inception score takes them.
    """
    join = partial(jnp.concatenate, axis=-1)
    average = partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
    maximum = partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
    reduced = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))

    def conv(x, name, stride=1, padding="SAME"):
        return jax.nn.relu(convolutions.conv(weights, x, name, stride, padding))

    def chain(x, branch, length):
        for i in range(1, length + 1):
            x = conv(x, f"{branch}_{i}")
        return x

    def outer(x, block, pool=average):  # the first and the last branch
        return conv(x, f"{block}.branch1x1"), conv(pool(x), f"{block}.branch_pool")

    def mixed(x, block, **lengths):
        first, last = outer(x, block)
        return join([first, *(chain(x, f"{block}.{b}", n) for b, n in lengths.items()), last])

    x = (resize(convolutions.coloured(images) * 127.5 + 127.5) - 128) / 128
    x = conv(x, "Conv2d_1a_3x3", 2, "VALID")
    x = conv(conv(x, "Conv2d_2a_3x3", 1, "VALID"), "Conv2d_2b_3x3")
    x = conv(reduced(x), "Conv2d_3b_1x1")
    x = reduced(conv(x, "Conv2d_4a_3x3", 1, "VALID"))
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = mixed(x, block, branch5x5=2, branch3x3dbl=3)
    left = conv(x, "Mixed_6a.branch3x3", 2, "VALID")
    right = conv(chain(x, "Mixed_6a.branch3x3dbl", 2), "Mixed_6a.branch3x3dbl_3", 2, "VALID")
    x = join([left, right, reduced(x)])
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = mixed(x, block, branch7x7=3, branch7x7dbl=5)
    left = conv(chain(x, "Mixed_7a.branch3x3", 1), "Mixed_7a.branch3x3_2", 2, "VALID")
    right = conv(chain(x, "Mixed_7a.branch7x7x3", 3), "Mixed_7a.branch7x7x3_4", 2, "VALID")
    x = join([left, right, reduced(x)])
    for block, pool in (("Mixed_7b", average), ("Mixed_7c", maximum)):
        first, last = outer(x, block, pool)
        single, double = f"{block}.branch3x3", f"{block}.branch3x3dbl"
        singles = [conv(chain(x, single, 1), f"{single}_2{side}") for side in "ab"]
        doubles = [conv(chain(x, double, 2), f"{double}_3{side}") for side in "ab"]
        x = join([first, *singles, *doubles, last])
    features = x.mean((1, 2))
    return features, features @ weights["fc"]
