"""The emulator's network against NumPy, and which places it sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax.denoiser import EDM
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.networks.emulator import Emulator
from mclr_jax.networks.mlp import MLP
from mclr_jax.types import as_condition

RNG = np.random.default_rng(0)
NONE = jnp.zeros(2), as_condition(jnp.zeros(2, jnp.int32))


def small_model(bias, offset=(), scale=(), **options):
    """A model of two coordinates whose only parameters that are not 0 are the output's bias."""
    network = Emulator(out_channels=2, width=4, hidden=3, depth=1, **options)
    model = Model(network, EDM(1.0), DataInfo((2, 2), 1, 1.0, (), offset, scale, 0.1))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes_of(model))
    params["out_linear"]["bias"] = np.float32(bias)
    return model, params


def drawn(network, shape):
    """The function of the network with random parameters, and these."""
    params = tiny.params(network, jnp.zeros((2, *shape)), *NONE)
    return lambda x: np.asarray(network.apply({"params": params}, jnp.float32(x), *NONE)), params


def silu(x):
    return x / (1 + np.exp(-x))


def test_it_is_its_formula_on_a_ring():
    """NumPy, place by place; the second half of the channels has the log variances."""
    network = Emulator(width=4, hidden=3, depth=2, reach=1, variance=True)
    run, params = drawn(network, (1, 5))
    x = RNG.normal(size=(2, 1, 5))

    def linear(name, h, inner=None):
        p = params[inner][name] if inner else params[name]
        return h @ p["kernel"] + p["bias"]

    h = x[..., None]

    def neighbours(h):  # before, own, after
        return np.stack([
            np.concatenate([h[:, :, (i + j) % 5] for j in (-1, 0, 1)], -1) for i in range(5)
        ], 2)  # fmt: skip

    h = linear("in_linear", neighbours(h))
    for block in ("block0", "block1"):
        u, v = np.split(linear("linear0", neighbours(h), block), 2, -1)
        h = h + linear("linear1", silu(u) * v, block)
    out = linear("out_linear", h)
    np.testing.assert_allclose(run(x), np.concatenate([out[..., 0], out[..., 1]], -1), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "options", "reached"),
    [
        ((2, 9), {"reach": 1}, {7, 8, 0, 1, 2}),
        ((2, 4), {"out_channels": 4}, {0, 1, 2, 3}),
        ((2, 5, 7, 1), {"reach": 1, "out_channels": 1},
         {7 * (i % 5) + j % 7 for i in (-2, -1, 0, 1, 2) for j in (-2, -1, 0, 1, 2)}),
        ((2, 6, 12, 1), {"reach": 1, "out_channels": 1, "patch_size": 2},
         {12 * i + j % 12 for i in range(6) for j in range(-4, 6)}),
    ],
)  # fmt: skip
def test_a_state_changes_its_own_frame_within_its_reach(shape, options, reached):
    """With one block, two times the reach, in patches; the same everywhere on a ring or a torus."""
    run, _ = drawn(Emulator(width=4, hidden=3, depth=1, **options), shape)
    x = RNG.normal(size=(2, *shape))
    changed = x.copy()
    changed[0, 1].flat[0] += 1
    difference = np.abs(run(changed) - run(x))
    assert {*np.flatnonzero(difference[0, 1])} == reached
    assert not difference[1].any()
    assert not difference[0, 0].any()
    if "reach" in options:
        np.testing.assert_allclose(run(np.roll(x, 2, 2)), np.roll(run(x), 2, 2), atol=1e-5)


def test_at_the_start_the_next_state_is_the_same():
    model, params = small_model([0.5, 0.0])
    x = RNG.normal(size=(3, 4, 2))
    mean, variance = model.forecast(params)(jnp.float32(x))
    np.testing.assert_allclose(mean, x + np.array([0.5, 0.0]), rtol=1e-6, atol=1e-6)
    assert variance is None
    start = model.init(jax.random.key(0))["out_linear"]
    assert not np.any(start["kernel"])


def test_other_shapes_and_uses_are_refused():
    for shape, options in [((4,), {}), ((1, 4, 4, 1), {}), ((2, 4, 4), {"reach": 1})]:
        with pytest.raises(ValueError, match=r"expected states \(B, F, d\), or fields"):
            Emulator(**options).init(jax.random.key(0), jnp.zeros((2, *shape)), *NONE)
    crowded = [((2, 8), 4, 3, 1), ((2, 9, 4, 1), 2, 1, 1), ((2, 8, 8, 1), 2, 1, 2)]
    for shape, reach, most, patch in crowded:  # some place would be twice
        network = Emulator(reach=reach, patch_size=patch)
        with pytest.raises(ValueError, match=rf"reach is {reach} .* expected at most {most}, by"):
            network.init(jax.random.key(0), jnp.zeros((2, *shape)), *NONE)
    with pytest.raises(ValueError, match=r"images are 9x4; patch_size 2 .* divisible by 2"):
        Emulator(reach=1, patch_size=2).init(jax.random.key(0), jnp.zeros((2, 2, 9, 4, 1)), *NONE)
    model, params = small_model([0.0, 0.0])
    with pytest.raises(ValueError, match="Emulator is an emulator: it gives the next state"):
        model.denoise(params)
    with pytest.raises(ValueError, match="is no emulator"):
        Model(MLP(width=4, depth=1), EDM(1.0), DataInfo((2,), 1, 1.0)).forecast(params)


def test_a_field_of_one_row_is_a_ring():
    """By the ring's own parameters; and its channels are those of a place."""
    ring, params = drawn(Emulator(out_channels=7, width=4, hidden=3, depth=1, reach=2), (1, 7))
    x = RNG.normal(size=(2, 1, 7))
    field = Emulator(out_channels=1, width=4, hidden=3, depth=1, reach=2)
    for shape in ((7, 1, 1), (1, 7, 1)):
        got = field.apply({"params": params}, jnp.float32(x.reshape(2, 1, *shape)), *NONE)
        np.testing.assert_allclose(got.reshape(2, 1, 7), ring(x), atol=1e-5)


def test_the_values_of_a_patch_are_channels_of_a_place():
    """By the same parameters for a field of such channels."""
    options = {"width": 4, "hidden": 3, "depth": 1, "reach": 1, "variance": True}
    run, params = drawn(Emulator(patch_size=2, **options), (1, 6, 6, 1))

    def patches(x, last):  # (2, 1, 6, 6, last) -> (2, 1, 3, 3, 4 last)
        x = np.asarray(x).reshape(2, 1, 3, 2, 3, 2, last)
        return x.transpose(0, 1, 2, 4, 3, 5, 6).reshape(2, 1, 3, 3, -1)

    x = RNG.normal(size=(2, 1, 6, 6, 1))
    inputs = {"params": params}, jnp.float32(patches(x, 1)), *NONE
    got = Emulator(**options).apply(*inputs)
    np.testing.assert_allclose(patches(run(x), 2), got, atol=1e-5)
