"""The MLP is its description in NumPy, learns an exact denoiser, and takes frames."""

import re
from functools import partial

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import normal

from mclr_jax.denoiser import EDM, denoiser, natural_weight
from mclr_jax.mixture import GaussianMixture
from mclr_jax.networks.mlp import MLP
from mclr_jax.types import Condition


def test_learns_the_exact_denoiser():
    """Regressed on noisy data alone, its error to E[x0 | x, label] is a fraction of that target's.

    Two classes of two sharp components each: stds a tenth of the distances, and the null label.
    """
    means = jnp.array([[[-1.0, 0.0], [0.5, 0.8]], [[0.0, -0.8], [1.0, 0.0]]])
    halves = jnp.full((2, 2), 0.5)
    mixture = GaussianMixture(means, halves / 5, halves, halves[0])
    net, steps = MLP(num_classes=2, width=64, depth=2), 400

    def draw(key, size):
        data_key, noise_key, sigma_key, drop_key = jax.random.split(key, 4)
        clean, label = mixture.sample(data_key, size)
        sigma = jnp.exp(1.2 * jax.random.normal(sigma_key, (size,)) - 1.2)
        noisy = clean + sigma[:, None] * jax.random.normal(noise_key, (size, 2))
        label = jnp.where(jax.random.bernoulli(drop_key, 0.2, (size,)), 2, label)
        return clean, (noisy, sigma, label)

    def denoise(params, inputs):
        return denoiser(EDM(0.7), partial(net.apply, {"params": params}))(*inputs)

    def loss(params, key):
        clean, inputs = draw(key, 128)
        weight = natural_weight(EDM(0.7), inputs[1])
        return jnp.mean(weight[:, None] * (denoise(params, inputs) - clean) ** 2)

    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    def step(carry, key):
        params, state = carry
        updates, state = optimiser.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def errors():
        clean, inputs = draw(jax.random.key(2), 4096)
        first = inputs[0][:1], inputs[1][:1], Condition(inputs[2][:1])
        params = net.init(jax.random.key(0), *first)["params"]
        keys = jax.random.split(jax.random.key(1), steps)
        params = jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]
        exact = mixture.denoise(*inputs)
        return jnp.mean((denoise(params, inputs) - exact) ** 2), jnp.mean((exact - clean) ** 2)

    error, irreducible = errors()
    assert error < 0.05 * irreducible


NET = MLP(num_classes=3, width=16, depth=2, augment_dim=2, takes_strength=True)
X = normal(0, 6, 2)
C_NOISE = np.linspace(-1.5, 1.0, 6, dtype=np.float32)
LABEL = np.int32([0, 1, 2, 3, 0, 1])
AUGMENT = normal(1, 6, 2)
STRENGTH = np.linspace(0.5, 4.0, 6, dtype=np.float32)
PLAIN = X, C_NOISE, Condition(LABEL)


@pytest.fixture(scope="module")
def params():
    return jax.jit(NET.init)(jax.random.key(3), *PLAIN)["params"]


def described(params, x, c_noise, condition):
    """The MLP in NumPy, of what its docstrings say; with float64 parameters."""

    def layer(name, x, block=params):
        return x @ block[name]["kernel"] + block[name].get("bias", 0)

    def silu(x):
        return x / (1 + np.exp(-x))

    angles = c_noise[:, None] * np.geomspace(0.5, 32, 16)
    embedding = layer("map_noise", np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    embedding += params["map_label"]["embedding"][condition.label]
    angles = np.log1p(np.asarray(condition.strength, np.float64))[:, None] * [0.5, 1, 2, 4]
    strength = 8 * np.concatenate([np.sin(angles), 1 - np.cos(angles)], axis=1)
    embedding += layer("map_strength", strength) + layer("map_augment", condition.augment)
    embedding = silu(layer("map_layer", silu(embedding)))
    h = layer("in_linear", x)
    for name in ("block0", "block1"):
        block = params[name]
        scale, shift = np.split(layer("affine", embedding, block), 2, axis=1)
        h = h + layer("linear1", silu(layer("linear0", h, block) * (1 + scale) + shift), block)
    return layer("out_linear", silu(h))


def test_it_is_its_description_in_numpy(params):
    moved = cases.moved(params, 5)
    condition = Condition(LABEL, STRENGTH, AUGMENT)
    got = jax.jit(NET.apply)({"params": moved}, X, C_NOISE, condition)
    told = jax.tree.map(lambda a: np.asarray(a, np.float64), (moved, X, C_NOISE))
    np.testing.assert_allclose(got, described(*told, condition), rtol=1e-4, atol=1e-4)


def test_one_frame_is_the_vector(params):
    expected = jax.jit(NET.apply)({"params": params}, *PLAIN)
    apply = jax.jit(NET.clone(per_frame=True).apply)
    actual = apply({"params": params}, X[:, None], C_NOISE[:, None], Condition(LABEL))
    np.testing.assert_array_equal(actual[:, 0], expected)


def test_the_level_of_each_frame_matters_to_every_frame():
    net, x, c_noise = NET.clone(per_frame=True), X.reshape(2, 3, 2), C_NOISE.reshape(2, 3)
    variables = jax.jit(net.init)(jax.random.key(3), x, c_noise, Condition(LABEL[:2]))
    apply = jax.jit(net.apply)
    plain = apply(variables, x, c_noise, Condition(LABEL[:2]))
    assert plain.shape == x.shape
    for frame in range(3):
        changed = apply(
            variables, x, jnp.asarray(c_noise).at[:, frame].add(0.1), Condition(LABEL[:2])
        )
        assert np.abs(changed - plain).max(axis=2).min() > 1e-3


@pytest.mark.parametrize(
    ("x", "c_noise", "expected"),
    [
        ((2, 3, 2), (2,), "True expects x (B, F, d), c_noise (B, F)"),
        ((2, 3, 2), (2, 4), "True expects x (B, F, d), c_noise (B, F)"),
        ((2, 3), (2, 3), "True expects x (B, F, d), c_noise (B, F)"),
        ((2, 3, 2), (2, 3), "False expects x (B, d), c_noise (B,)"),
    ],
)
def test_other_shapes_are_refused(x, c_noise, expected):
    init = NET.clone(per_frame=expected.startswith("True")).init
    message = f"x has shape {x} and c_noise {c_noise}; per_frame={expected}"
    with pytest.raises(ValueError, match=re.escape(message)):
        init(jax.random.key(0), jnp.zeros(x), jnp.zeros(c_noise), Condition(LABEL[:2]))
