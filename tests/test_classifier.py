"""The classifiers learn an exact posterior, and treat noise and dropout as promised."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mclr_jax import backend
from mclr_jax.mixture import GaussianMixture
from mclr_jax.networks.classifier import ConvClassifier, MLPClassifier
from mclr_jax.networks.mlp import MLP
from mclr_jax.plan import flops
from mclr_jax.types import Condition

BATCH = 6
C_NOISE = jnp.linspace(-1.5, 1.0, BATCH)
LABEL = jnp.array([0, 1, 2, 3, 0, 1])
AUGMENT = jax.random.normal(jax.random.key(1), (BATCH, 2))
STRENGTH = jnp.linspace(0.5, 4.0, BATCH)
KEYS = jax.random.split(jax.random.key(2), BATCH)
CONDITION = Condition(LABEL, STRENGTH, AUGMENT)
OPTIONS = {"num_classes": 3, "dropout": 0.4, "augment_dim": 2, "takes_strength": True}
NETWORKS = {
    "mlp": MLPClassifier(width=16, depth=2, **OPTIONS),
    "conv": ConvClassifier(channels=(8, 12), **OPTIONS),
}
X = {
    "mlp": jax.random.normal(jax.random.key(0), (BATCH, 2)),
    "conv": jax.random.normal(jax.random.key(0), (BATCH, 8, 4, 1)),
}


def test_the_mlp_learns_the_exact_posterior():
    """Trained on labels alone, its cross-entropy exceeds that of Bayes' rule by under 3 percent.

    Two classes of two components each, mixed up as in an exclusive or.
    """
    means = jnp.array([[[-1.0, -0.8], [0.9, 1.0]], [[-0.8, 1.0], [1.0, -1.0]]])
    prior = jnp.array([0.7, 0.3])
    mixture = GaussianMixture(means, jnp.full((2, 2), 0.3), jnp.full((2, 2), 0.5), prior)
    net = MLPClassifier(num_classes=2, width=32, depth=2)
    steps, batch = 200, 128

    def draw(key, size):
        data_key, noise_key, sigma_key = jax.random.split(key, 3)
        clean, label = mixture.sample(data_key, size)
        sigma = jnp.exp(jax.random.normal(sigma_key, (size,)) - 0.7)
        return clean + sigma[:, None] * jax.random.normal(noise_key, (size, 2)), sigma, label

    def log_probs(params, x, sigma):
        scaled = x / jnp.sqrt(sigma**2 + 1)[:, None]
        null = Condition(jnp.full(len(x), 2))
        return jax.nn.log_softmax(net.apply({"params": params}, scaled, jnp.log(sigma) / 4, null))

    def cross_entropy(log_p, label):
        return -jnp.take_along_axis(log_p, label[:, None], axis=1).mean()

    def loss(params, key):
        x, sigma, label = draw(key, batch)
        return cross_entropy(log_probs(params, x, sigma), label)

    optimiser = optax.adam(optax.cosine_decay_schedule(8e-3, steps))

    @jax.jit
    def train(params):
        def step(carry, key):
            params, state = carry
            updates, state = optimiser.update(jax.grad(loss)(params, key), state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(1), steps)
        return jax.lax.scan(step, (params, optimiser.init(params)), keys)[0][0]

    x, sigma, label = jax.jit(draw, static_argnums=1)(jax.random.key(2), 8192)
    params = jax.jit(net.init)(jax.random.key(0), x[:1], sigma[:1], Condition(label[:1]))["params"]
    exact = jnp.log(jax.jit(mixture.posterior)(x, sigma))
    learned = jax.jit(log_probs)(train(params), x, sigma)
    best = cross_entropy(exact, label)
    excess = (cross_entropy(learned, label) - best) / best
    divergence = (jnp.exp(exact) * (exact - learned)).sum(-1).mean() / best
    print("excess", excess, "divergence", divergence)
    assert abs(excess) < 0.03
    assert divergence < 0.03


@pytest.fixture(scope="module")
def variables():
    """Parameters of which no layer is zero or nearly so."""

    def randomised(name):
        init, rng = NETWORKS[name].init, np.random.default_rng(0)
        shapes = jax.eval_shape(init, KEYS[0], X[name], C_NOISE, CONDITION)["params"]

        def draw(path, leaf):
            mean = 1.0 if path[-1].key == "scale" else 0.0  # of a norm
            return np.float32(mean + 0.3 * rng.normal(size=leaf.shape))

        return jax.tree_util.tree_map_with_path(draw, shapes)

    return {name: {"params": randomised(name)} for name in NETWORKS}


@pytest.fixture(scope="module")
def apply():
    """The networks compiled, by name: one program with dropout keys and one without."""
    return {name: jax.jit(net.apply) for name, net in NETWORKS.items()}


def convolve(x, kernel, bias):
    """3x3 convolution of NHWC images with zeros around them, as a sum over its nine taps."""
    height, width = x.shape[1:3]
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    taps = [
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    ]
    return sum(taps) + bias


def group_norm(x, scale, bias):
    """Groups of 4 channels."""
    grouped = x.reshape(len(x), -1, x.shape[-1] // 4, 4)
    centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=(1, 3), keepdims=True) + 1e-5)
    return normal.reshape(x.shape) * scale + bias


def silu(x):
    return x / (1 + np.exp(-x))


def test_the_convolutional_network_is_its_description_in_numpy(variables, apply):
    """Patches, a block at each size with the noise level in its embedding, and the mean."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["conv"]["params"])

    def layer(name, x, block=params):
        return x @ block[name]["kernel"] + block[name].get("bias", 0)

    angles = np.asarray(C_NOISE, np.float64)[:, None] * np.geomspace(0.5, 32, 16)
    embedding = layer("map_noise", np.concatenate([np.cos(angles), np.sin(angles)], axis=1))
    embedding += layer("map_augment", np.asarray(AUGMENT, np.float64))
    angles = np.log1p(np.asarray(STRENGTH, np.float64))[:, None] * [0.5, 1, 2, 4]
    strength = 8 * np.concatenate([np.sin(angles), 1 - np.cos(angles)], axis=1)
    embedding = silu(embedding + layer("map_strength", strength))

    x = np.asarray(X["conv"], np.float64)
    patches = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
    h = convolve(np.concatenate(patches, axis=-1), **params["in_conv"])
    for level in range(2):
        block = params[f"block{level}"]
        if level:
            h = (h[:, ::2, ::2] + h[:, 1::2, ::2] + h[:, ::2, 1::2] + h[:, 1::2, 1::2]) / 4
        scale, shift = np.split(layer("affine", embedding, block)[:, None, None], 2, axis=-1)
        hidden = convolve(silu(group_norm(h, **block["norm0"])), **block["conv0"])
        hidden = silu(group_norm(hidden, **block["norm1"]) * (1 + scale) + shift)
        skip = layer("skip", h, block) if level else h
        h = skip + convolve(hidden, **block["conv1"])
    features = silu(group_norm(h, **params["out_norm"])).mean(axis=(1, 2))
    expected = layer("out_linear", features)

    actual = apply["conv"](variables["conv"], X["conv"], C_NOISE, CONDITION)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_mlp_ends_with_a_linear_map_of_the_activated_trunk(variables, apply):
    """The trunk is the MLP of tests/test_mlp.py, which is shown label 0 of its one label."""
    params, own = variables["mlp"]["params"], {"augment_dim": 2, "takes_strength": True}
    trunk = MLP(out_channels=16, num_classes=0, width=16, depth=2, **own)
    shown = CONDITION.replace(label=0 * LABEL)
    h = np.asarray(jax.jit(trunk.apply)({"params": params["trunk"]}, X["mlp"], C_NOISE, shown))
    expected = silu(h) @ params["out_linear"]["kernel"] + params["out_linear"]["bias"]
    actual = apply["mlp"](variables["mlp"], X["mlp"], C_NOISE, CONDITION)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_what_the_last_layer_multiplies(name, variables):
    run = jax.jit(partial(NETWORKS[name].apply, mutable="intermediates"))
    logits, state = run(variables[name], X[name], C_NOISE, CONDITION)
    (features,) = state["intermediates"]["features"]
    last = variables[name]["params"]["out_linear"]
    expected = np.asarray(features) @ np.asarray(last["kernel"]) + np.asarray(last["bias"])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert features.dtype == jnp.float32


@pytest.mark.parametrize("name", NETWORKS)
def test_an_example_ignores_its_batch_with_and_without_dropout(name, variables, apply):
    order = np.array([3, 0, 5, 4, 1, 2])
    for keys, other_keys in [(None, None), (KEYS, jax.random.split(jax.random.key(8), BATCH))]:
        batch = X[name], C_NOISE, CONDITION.replace(dropout_keys=keys)
        # The other examples are changed, by ten times as much as there is.
        other = Condition(LABEL, 10 * STRENGTH + 1, 10 * AUGMENT + 1, other_keys)
        others = 10 * X[name] + 1, 10 * C_NOISE + 1, other
        whole = apply[name](variables[name], *batch)
        shuffled = apply[name](variables[name], *jax.tree.map(lambda a: a[order], batch))
        np.testing.assert_allclose(shuffled, whole[order], rtol=1e-4, atol=1e-5)
        mixed = jax.tree.map(lambda a, b: b.at[2].set(a[2]), batch, others)
        changed = apply[name](variables[name], *mixed)
        np.testing.assert_allclose(changed[2], whole[2], rtol=1e-4, atol=1e-5)
        assert np.abs(np.delete(changed - whole, 2, axis=0)).max(axis=1).min() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_dropout_needs_keys_and_takes_one_for_each_example(name, variables, apply):
    def run(keys=None, apply=apply[name]):
        return apply(variables[name], X[name], C_NOISE, CONDITION.replace(dropout_keys=keys))

    plain = run()
    np.testing.assert_array_equal(run(), plain)
    dropped = run(KEYS)
    assert np.abs(dropped - plain).max(axis=1).min() > 1e-3
    other = run(KEYS.at[1].set(KEYS[0]))
    rows = np.arange(BATCH) != 1
    np.testing.assert_array_equal(other[rows], dropped[rows])
    assert np.abs(other[1] - dropped[1]).max() > 1e-3
    without = run(KEYS, jax.jit(NETWORKS[name].clone(dropout=0.0).apply))
    np.testing.assert_allclose(without, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_input_but_the_label_matters(name, variables, apply):
    def run(variables=variables[name], x=X[name], c_noise=C_NOISE, **condition):
        condition = {"label": LABEL, "strength": 0 * STRENGTH, "augment": 0 * AUGMENT} | condition
        return apply[name](variables, x, c_noise, Condition(**condition))

    def fresh(path, leaf):
        return 0 * leaf if path[-2].key in NETWORKS[name].optional_inputs else leaf

    plain = run()
    for changed in (
        run(x=X[name][:, ::-1]),
        run(c_noise=C_NOISE + 0.1),
        run(strength=STRENGTH),
        run(augment=AUGMENT),
    ):
        assert np.abs(changed - plain).max(axis=1).min() > 1e-3
    np.testing.assert_array_equal(run(label=(LABEL + 1) % 4), plain)
    np.testing.assert_allclose(run(strength=None, augment=None), plain, rtol=1e-5, atol=1e-6)
    fresh = jax.tree_util.tree_map_with_path(fresh, variables[name])
    np.testing.assert_array_equal(run(fresh, strength=STRENGTH, augment=AUGMENT), plain)


def test_the_mlp_takes_images_as_vectors(variables, apply):
    flat = jnp.asarray(X["conv"].reshape(BATCH, -1)[:, :2])
    expected = apply["mlp"](variables["mlp"], flat, C_NOISE, CONDITION)
    image = flat.reshape(BATCH, 2, 1, 1)
    actual = apply["mlp"](variables["mlp"], image, C_NOISE, CONDITION)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_bfloat16_changes_little(name, variables, apply):
    full = apply[name](variables[name], X[name], C_NOISE, CONDITION)
    half = NETWORKS[name].clone(dtype=jnp.bfloat16)
    half = jax.jit(half.apply)(variables[name], X[name], C_NOISE, CONDITION)
    assert half.dtype == jnp.float32
    assert 1e-6 < np.abs(half - full).max() < 0.05 * np.abs(full).max()


@pytest.mark.parametrize("name", NETWORKS)
def test_blocks_are_recomputed_in_the_backward_pass_if_asked_for(name, variables):
    """More products, if nothing is kept, and the same gradients."""
    keys = CONDITION.replace(dropout_keys=KEYS)

    def gradient(**options):
        def loss(variables):
            net = NETWORKS[name].clone(**options)
            return jnp.mean(net.apply(variables, X[name], C_NOISE, keys) ** 2)

        return jax.grad(loss)

    def cost(**options):
        with backend.programs_for_others():
            return flops(jax.make_jaxpr(gradient(**options))(variables[name]).jaxpr)

    assert cost(remat=True) > 1.1 * cost()
    assert cost(remat=True, remat_policy="products") == cost()
    found, expected = (jax.jit(gradient(remat=again))(variables[name]) for again in (True, False))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
    )


def test_vectors_are_sent_to_the_other_classifier():
    with pytest.raises(ValueError, match=r"data have shape \(2,\).*mlp_classifier"):
        jax.eval_shape(ConvClassifier().init, KEYS[0], jnp.zeros((BATCH, 2)), C_NOISE, CONDITION)


@pytest.mark.parametrize(
    ("size", "patch", "channels", "message"),
    [
        ((6, 8), 2, (8, 8), "images are 6x8; patch_size 2 and 2 levels .* divisible by 4"),
        ((8, 4), 2, (8, 8, 8), "images are 8x4; patch_size 2 and 3 levels .* divisible by 8"),
        ((8, 9), 3, (8,), "images are 8x9; patch_size 3 and 1 levels .* divisible by 3"),
    ],
)
def test_indivisible_sizes_are_refused(size, patch, channels, message):
    net = ConvClassifier(channels=channels, patch_size=patch)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, KEYS[0], jnp.zeros((BATCH, *size, 1)), C_NOISE, CONDITION)
