"""The InceptionV3 of FID: the network of the original TensorFlow graph, with its published weights.

The user downloads the file of weights, pt_inception-2015-12-05-6726825d.pth, which pytorch-fid and
torch-fidelity publish. Differences from torchvision's network: averages exclude the padding, the
last block pools by maximum, and there are 1008 classes. Sources: Szegedy et al. 2015 (arXiv
1512.00567); Heusel et al. 2017 (arXiv 1706.08500).
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mclr_jax.evaluation import backbone


def convert(state: backbone.Weights) -> backbone.Weights:
    """The published state dict -> weights for `apply`; ValueError if a weight is missing."""
    names = [key.removesuffix(".weight") for key in state if key.endswith(".conv.weight")]
    try:
        folded = backbone.fold(state, {n: n.removesuffix("conv") + "bn" for n in names})
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


def resize(images: jax.Array, size: int = 299) -> jax.Array:
    """Bilinear resize of TensorFlow 1, to (B, size, size, C): pixel i lies at i * old / new."""
    batch, height, width, channels = images.shape
    scale = jnp.array([size / height, size / width])
    images = jnp.pad(images, [(0, 0), (0, 1), (0, 1), (0, 0)], "edge")
    return jax.image.scale_and_translate(
        images, (batch, size, size, channels), (1, 2), scale, (1 - scale) / 2, "linear", False
    )


def apply(weights: backbone.Weights, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, 1 or 3) in [-1, 1] -> pool3 features (B, 2048) and logits (B, 1008)."""
    join = partial(jnp.concatenate, axis=-1)
    average = partial(nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False)
    maximum = partial(nn.max_pool, window_shape=(3, 3), padding="SAME")
    reduced = partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2))

    def conv(x, name, stride=1, padding="SAME"):
        return jax.nn.relu(backbone.conv(weights, x, name, stride, padding))

    def chain(x, block, path):  # "branch 1 2" is the convolutions branch_1 and branch_2
        branch, *layers = path.split()
        for layer in layers:
            x = conv(x, f"{block}.{branch}_{layer}")
        return x

    def mixed(x, block, *paths, pool=average):
        inner = [chain(x, block, path) for path in paths]
        return join([conv(x, f"{block}.branch1x1"), *inner, conv(pool(x), f"{block}.branch_pool")])

    x = (resize(backbone.coloured(images) * 127.5 + 127.5) - 128) / 128
    x = conv(x, "Conv2d_1a_3x3", 2, "VALID")
    x = conv(conv(x, "Conv2d_2a_3x3", 1, "VALID"), "Conv2d_2b_3x3")
    x = conv(reduced(x), "Conv2d_3b_1x1")
    x = reduced(conv(x, "Conv2d_4a_3x3", 1, "VALID"))
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = mixed(x, block, "branch5x5 1 2", "branch3x3dbl 1 2 3")
    left = conv(x, "Mixed_6a.branch3x3", 2, "VALID")
    right = chain(x, "Mixed_6a", "branch3x3dbl 1 2")
    right = conv(right, "Mixed_6a.branch3x3dbl_3", 2, "VALID")
    x = join([left, right, reduced(x)])
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        x = mixed(x, block, "branch7x7 1 2 3", "branch7x7dbl 1 2 3 4 5")
    left = conv(conv(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2, "VALID")
    right = chain(x, "Mixed_7a", "branch7x7x3 1 2 3")
    right = conv(right, "Mixed_7a.branch7x7x3_4", 2, "VALID")
    x = join([left, right, reduced(x)])
    for block, pool in (("Mixed_7b", average), ("Mixed_7c", maximum)):
        single, double = "branch3x3 1 2", "branch3x3dbl 1 2 3"
        x = mixed(x, block, f"{single}a", f"{single}b", f"{double}a", f"{double}b", pool=pool)
    features = x.mean((1, 2))
    return features, features @ weights["fc"]  # without bias, as in the inception score
