"""The MLP learns an exact denoiser, and treats labels, noise level and dropout as promised."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mclr_jax import denoiser
from mclr_jax.mixture import GaussianMixture
from mclr_jax.networks.mlp import MLP

# Compiling is most of the time here: a network runs once or twice.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def test_learns_the_exact_denoiser():
    """Regressed on noisy data alone, its error to E[x0 | x, label] is a fraction of that target's.

    Two classes of two sharp components each: stds a tenth of the distances, and the null label.
    """
    means = jnp.array([[[-1.0, 0.0], [0.5, 0.8]], [[0.0, -0.8], [1.0, 0.0]]])
    mixture = GaussianMixture(
        means, jnp.full((2, 2), 0.1), jnp.full((2, 2), 0.5), jnp.full((2,), 0.5)
    )
    net = MLP(num_classes=2, width=64, depth=4)
    steps, batch = 500, 128

    def draw(key, size):
        label_key, part_key, data_key, noise_key, sigma_key, drop_key = jax.random.split(key, 6)
        label = jax.random.randint(label_key, (size,), 0, 2)
        part = jax.random.randint(part_key, (size,), 0, 2)
        clean = means[label, part] + 0.1 * jax.random.normal(data_key, (size, 2))
        sigma = jnp.exp(1.2 * jax.random.normal(sigma_key, (size,)) - 1.2)
        noisy = clean + sigma[:, None] * jax.random.normal(noise_key, (size, 2))
        label = jnp.where(jax.random.bernoulli(drop_key, 0.2, (size,)), 2, label)
        return clean, noisy, sigma, label

    def denoise(params, noisy, sigma, label):
        apply = partial(net.apply, {"params": params})
        return denoiser.edm(apply, sigma_data=0.7)(noisy, sigma, label)

    def loss(params, key):
        clean, noisy, sigma, label = draw(key, batch)
        weight = (sigma**2 + 0.7**2) / (sigma * 0.7) ** 2
        return jnp.mean(weight[:, None] * (denoise(params, noisy, sigma, label) - clean) ** 2)

    optimiser = optax.adam(optax.cosine_decay_schedule(2e-3, steps))

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            updates, state = optimiser.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

    clean, noisy, sigma, label = jit(draw, static_argnums=1)(jax.random.key(2), 4096)
    params = jit(net.init)(jax.random.key(0), noisy[:1], sigma[:1], label[:1])["params"]
    exact = jax.jit(mixture.denoise)(noisy, sigma, label)
    actual = jit(denoise)(train(params), noisy, sigma, label)
    irreducible = jnp.mean((exact - clean) ** 2)
    error = jnp.mean((actual - exact) ** 2) / irreducible
    print("excess", error)
    assert error < 0.05


NET = MLP(out_channels=2, num_classes=3, width=16, depth=2, dropout=0.5, augment_dim=2)
X = jax.random.normal(jax.random.key(0), (6, 2))
C_NOISE = jnp.linspace(-1.5, 1.0, 6)
LABEL = jnp.array([0, 1, 2, 3, 0, 1])
AUGMENT = jax.random.normal(jax.random.key(1), (6, 2))
KEYS = jax.random.split(jax.random.key(2), 6)


@pytest.fixture(scope="module")
def params():
    return jit(NET.init)(jax.random.key(3), X, C_NOISE, LABEL, AUGMENT)["params"]


def test_dropout_of_an_example_ignores_its_batch(params):
    apply = jit(NET.apply)
    variables = {"params": params}
    whole = apply(variables, X, C_NOISE, LABEL, None, KEYS)
    part = apply(variables, X[4:], C_NOISE[4:], LABEL[4:], None, KEYS[4:])
    np.testing.assert_allclose(whole[4:], part, rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole, apply(variables, X, C_NOISE, LABEL), atol=1e-3)


def test_each_input_matters_and_no_augmentation_is_zero(params):
    @jit
    def apply(x=X, c_noise=C_NOISE, label=LABEL, augment=None):
        return NET.apply({"params": params}, x, c_noise, label, augment)

    plain = apply()
    np.testing.assert_array_equal(apply(augment=jnp.zeros_like(AUGMENT)), plain)
    for changed in (
        apply(x=X + 0.1),
        apply(c_noise=C_NOISE + 0.1),
        apply(label=(LABEL + 1) % 4),
        apply(augment=AUGMENT),
    ):
        assert np.abs(changed - plain).max(axis=1).min() > 1e-3


def test_bfloat16_and_remat_change_little(params):
    @partial(jit, static_argnums=1)
    def apply(params, net):
        return net.apply({"params": params}, X, C_NOISE, LABEL)

    @partial(jit, static_argnums=1)
    @jax.grad
    def gradient(params, net):
        return jnp.mean(net.apply({"params": params}, X, C_NOISE, LABEL, None, KEYS) ** 2)

    half, full = apply(params, NET.clone(dtype=jnp.bfloat16)), apply(params, NET)
    assert half.dtype == jnp.float32
    assert 1e-6 < np.abs(half - full).max() < 0.04 * np.abs(full).max()
    gradients = [gradient(params, net) for net in (NET, NET.clone(remat=True))]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *gradients)
