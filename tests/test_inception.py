"""The Inception graph against torch-fidelity's, with the same random weights."""

import pathlib
import zlib

import jax
import numpy as np
import pytest

from mclr_jax.evaluation import inception

FIXTURE = pathlib.Path(__file__).parent / "data" / "inception.npz"


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
def fixture():
    """torch-fidelity 0.4.0 on torch 2.13: names, shapes, and what it makes of `images`."""
    with np.load(FIXTURE) as file:
        rows = zip(file["names"].tolist(), file["shapes"].tolist(), strict=True)
        shapes = {name: tuple(size for size in shape if size) for name, shape in rows}
        return {"shapes": shapes, "features": file["features"], "logits": file["logits"]}


def test_features_and_logits_are_those_of_torch_fidelity(fixture):
    weights = inception.convert(random_weights(fixture["shapes"]))
    pixels = images() / np.float32(127.5) - 1
    found = jax.jit(inception.apply)(weights, pixels)
    for name, value in zip(("features", "logits"), found, strict=True):
        atol = 1e-4 * np.abs(fixture[name]).max()
        np.testing.assert_allclose(value, fixture[name], atol=atol)


def test_resizing_is_that_of_tensorflow_1():
    """By hand: pixel i of 6 made from 4 lies at 2 i / 3; beyond the last pixel it is repeated."""
    row = np.array([0.0, 3.0, 6.0, 30.0], np.float32)
    image = np.broadcast_to(row[None, None, :, None], (1, 4, 4, 1))
    resized = inception.resize(image, 6)[0, 0, :, 0]
    np.testing.assert_allclose(resized, [0, 2, 4, 6, 22, 30], rtol=1e-5)


def test_other_weights_are_refused(fixture):
    state = random_weights({k: s for k, s in fixture["shapes"].items() if "Mixed" not in k})
    with pytest.raises(ValueError, match=r"expected 94 convolutions .* pt_inception-2015-12-05"):
        inception.convert(state)
    del state["fc.weight"]
    with pytest.raises(ValueError, match=r"no 'fc.weight'"):
        inception.convert(state)
