"""The DINOv2 graph against timm's, with the same random weights."""

import pathlib

import jax
import numpy as np
import pytest
from test_inception import images, random_weights

from mclr_jax.evaluation import dinov2, evaluate, features, metrics
from mclr_jax.pretrained import torch_file

FIXTURE = pathlib.Path(__file__).parent / "data" / "dinov2.npz"
WIDTH, DEPTH = 128, 2


def weights_of(kind: str) -> dict[str, np.ndarray]:
    """Small sizes under the published names."""
    gated = kind == "gated, registers"
    layers = {"norm": (WIDTH,), "patch_embed.proj": (WIDTH, 3, 14, 14)}
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        layers |= {f"{block}.norm1": (WIDTH,), f"{block}.norm2": (WIDTH,),
                   f"{block}.attn.qkv": (3 * WIDTH, WIDTH),
                   f"{block}.attn.proj": (WIDTH, WIDTH),
                   f"{block}.mlp.{'w12' if gated else 'fc1'}": (688 if gated else 512, WIDTH),
                   f"{block}.mlp.{'w3' if gated else 'fc2'}": (WIDTH, 344 if gated else 512),
                   }  # fmt: skip
    gammas = [f"blocks.{i}.ls{j}.gamma" for i in range(DEPTH) for j in (1, 2)]
    shapes = {f"{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in layers.items()}
    shapes |= {name: (WIDTH,) for name in gammas}
    shapes |= {"cls_token": (1, 1, WIDTH), "mask_token": (1, WIDTH)}
    shapes["pos_embed"] = (1, 1 + 37 * 37, WIDTH)
    shapes |= {"register_tokens": (1, 4, WIDTH)} if gated else {}
    return random_weights(shapes)


@pytest.mark.parametrize("kind", ["plain", "gated, registers"])
def test_the_class_token_is_that_of_timm(kind):
    """FIXTURE: timm 1.0.31 on torch 2.13, narrowed ViT-S and ViT-g with registers for 518x518.

    Resized by torch's bicubic interpolation: images as EDM2 does it, positions as the DINOv2
    repository does it (timm has its own way without registers).
    """
    with np.load(FIXTURE) as file:
        expected = file[kind]
    weights = dinov2.convert(weights_of(kind))
    pixels = images() / np.float32(127.5) - 1
    found, logits = jax.jit(dinov2.apply)(weights, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert logits.shape == (2, 0)


def test_without_classes_there_is_neither_accuracy_nor_inception_score(monkeypatch):
    monkeypatch.setattr(torch_file, "load", lambda path: weights_of("plain"))
    monkeypatch.setattr(features, "BATCH", 8)
    extractor = features.load("dinov2:vit.pth")
    grey = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1)).astype(np.uint8)
    found = extractor(grey, np.arange(10) % 2)
    assert found.features.shape == (10, WIDTH)
    np.testing.assert_allclose(
        extractor(np.repeat(grey[8:], 3, -1), [0, 1]).features, found.features[8:], atol=1e-4
    )
    real = evaluate.RealStatistics(metrics.moments(found.features + 1), found, "")
    assert set(evaluate.measure(found, real, ("fd", "is"))) == {"frechet"}


def test_other_weights_are_refused():
    state = weights_of("plain")
    del state["blocks.1.ls2.gamma"]
    with pytest.raises(ValueError, match=r"no 'blocks.1.ls2.gamma'; .* dinov2_vitl14_pretrain"):
        dinov2.convert(state)
    with pytest.raises(ValueError, match="no 'pos_embed'"):
        dinov2.convert({})
