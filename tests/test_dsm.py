import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Level

from mclr_jax import noise
from mclr_jax.denoiser import EDM, natural_weight
from mclr_jax.objectives.base import Batch, perturb
from mclr_jax.objectives.dsm import DSM
from mclr_jax.types import Condition, label_of

LEVELS = noise.LogNormal(-0.4, 1.2)
WEIGHT = functools.partial(natural_weight, EDM(1.0))


def run(denoise, x0, label, keys, label_dropout=0.0, levels=LEVELS, weight=WEIGHT, frames=()):
    problem = cases.problem(levels, weight=weight, frames=frames)
    batch = Batch(x0, Condition(label))
    return DSM(label_dropout)(cases.models(denoise), problem, batch, keys)


@pytest.mark.parametrize("frames", [(), (3,)])
def test_the_loss_of_a_useless_denoiser_is_known(frames):
    """D = 0 on data of one point x0: the error is |x0|^2 / d and the loss weight(sigma) times it.

    E[weight] with sigma_data = 1 is E[1 + sigma^-2] = 1 + exp(-2 m + 2 s^2) for ln sigma ~ N(m, s);
    with a level for each frame it is so for every frame.
    """
    keys = jax.random.split(jax.random.key(0), 200_000)
    x0 = jnp.broadcast_to(jnp.array([3.0, 4.0]), (200_000, *frames, 2))
    options = {"levels": noise.LogNormal(0.5, 0.4), "frames": frames}
    loss, metrics = run(lambda x, s, c: 0 * x, x0, jnp.zeros(200_000, int), keys, **options)
    np.testing.assert_allclose(metrics["error"].parts[0], 12.5, rtol=1e-6)
    expected = 12.5 * (1 + np.exp(-2 * 0.5 + 2 * 0.4**2))
    np.testing.assert_allclose(loss.mean(), expected, rtol=0.01)
    # independent levels: the mean over frames has a variance of 1 / F
    weight = 12.5**2 * np.exp(-4 * 0.5 + 4 * 0.4**2) * (np.exp(4 * 0.4**2) - 1)
    np.testing.assert_allclose(loss.var(), weight / np.prod(frames), rtol=0.1)


def test_frames_are_weighted_by_their_own_levels():
    """Diffusion forcing: mean over frames of weight(sigma_f) |D_f - x_f|^2."""
    x0 = jax.random.normal(jax.random.key(0), (50, 3, 4))
    seen = []

    def denoise(x, sigma, condition):
        seen.append((x, sigma))
        return 0.5 * x

    keys = jax.random.split(jax.random.key(1), 50)
    loss, metrics = run(denoise, x0, jnp.zeros(50, int), keys, frames=(3,))
    ((x, sigma),) = seen
    assert sigma.shape == (50, 3)
    error = ((0.5 * x - x0) ** 2).mean(-1)
    np.testing.assert_allclose(loss, ((1 + sigma**-2) * error).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(metrics["error"].parts[0], error.mean(-1), rtol=1e-5)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_the_exact_denoiser_is_the_minimum(direction):
    """Moving the exact denoiser by e raises the error by |e|^2 / d (Pythagoras)."""
    mix = reference.mixture()
    x0, label = mix.sample(jax.random.key(1), 100_000)
    keys = jax.random.split(jax.random.key(2), 100_000)

    def moved(x, sigma, condition):
        return mix.denoise(x, sigma, condition) + direction * 0.3 * jnp.tanh(x)

    exact, _ = run(mix.denoise, x0, label, keys, weight=jnp.ones_like)
    worse, _ = run(moved, x0, label, keys, weight=jnp.ones_like)
    x = perturb(cases.problem(LEVELS), x0, Condition(label), keys, 0.0).x
    expected = ((0.3 * jnp.tanh(x)) ** 2).mean()
    np.testing.assert_allclose(worse.mean() - exact.mean(), expected, rtol=0.05)


# ---- learned variances ---------------------------------------------------------------------------


def with_moments(moments, x0, power=0.5, weight=WEIGHT, seed=0, levels=LEVELS):
    """The loss (B,) and metrics of DSM for x0 (B, F, d), whose network gives `moments`."""
    frames = x0.shape[1:2]
    problem = cases.problem(levels, weight=weight, frames=frames)
    models = cases.models(lambda *inputs: moments(*inputs)[0])._replace(moments=moments)
    batch = Batch(x0, Condition(jnp.zeros(len(x0), int)))
    keys = jax.random.split(jax.random.key(seed), len(x0))
    return DSM(0.0, power)(models, problem, batch, keys)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_loss_with_a_variance_is_its_formula(power):
    """(r^2 e^-s + s) / 2 e^(power s) for each coordinate, r and e^s in units of c_out."""
    x0 = jax.random.normal(jax.random.key(0), (50, 3, 2))
    seen = []

    def moments(x, sigma, condition):
        seen.append((x, sigma))
        c_out = (sigma / jnp.sqrt(1 + sigma**2))[..., None]
        return 0.5 * x, c_out**2 * jnp.exp(jnp.sin(x))

    loss, metrics = with_moments(moments, x0, power)
    ((x, sigma),) = seen
    c_out = (sigma / np.sqrt(1 + sigma**2))[..., None]
    r, s = (0.5 * x - x0) / c_out, np.sin(x)
    expected = (r**2 * np.exp(-s) + s) / 2 * np.exp(power * s)
    np.testing.assert_allclose(loss, expected.mean((1, 2)), rtol=1e-4, atol=1e-5)
    found = {name: sums.parts[0] for name, sums in metrics.items()}
    np.testing.assert_allclose(found["error"], ((0.5 * x - x0) ** 2).mean((1, 2)), rtol=1e-5)
    ratio = (r**2 * np.exp(-s)).mean((1, 2))
    np.testing.assert_allclose(found["error_ratio"], ratio, rtol=1e-4)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_the_exact_moments_are_the_minimum(power):
    """x0 ~ N(0, 0.5^2): no gradient at the exact mean and variance, and a positive one above."""
    x0 = 0.5 * jax.random.normal(jax.random.key(0), (40_000, 2, 1))

    def loss(mean, log_variance):
        def moments(x, sigma, condition):
            gain = (0.25 / (0.25 + sigma**2))[..., None]
            v = gain * sigma[..., None] ** 2 * jnp.exp(log_variance)
            return (gain + mean) * x, jnp.broadcast_to(v, x.shape)

        return with_moments(moments, x0, power)[0].mean()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
    assert np.abs(gradient(0.0, 0.0)).max() < 0.02
    for step in (-0.2, 0.2):
        assert np.sign(step) * gradient(step / 2, 0.0)[0] > 0.05
        assert np.sign(step) * gradient(0.0, step)[1] > 0.05


def test_power_1_trains_the_mean_like_the_square_error():
    """And with another weight, which enters by the same power."""
    x0 = jax.random.normal(jax.random.key(0), (50, 3, 2))

    def gradient(power, weight):
        def mean_loss(a):
            moments = lambda x, sigma, condition: (a * x, jnp.exp(x))  # noqa: E731
            return with_moments(moments, x0, power, weight)[0].mean()

        return jax.grad(mean_loss)(0.3)

    def plain(a):
        denoise = lambda x, sigma, condition: a * x  # noqa: E731
        keys = jax.random.split(jax.random.key(0), 50)
        return run(denoise, x0, jnp.zeros(50, int), keys, frames=(3,))[0].mean()

    np.testing.assert_allclose(2 * gradient(1.0, WEIGHT), jax.grad(plain)(0.3), rtol=1e-4)
    four = lambda sigma: 4 * WEIGHT(sigma)  # noqa: E731
    for power in (0.0, 0.5, 1.0):
        np.testing.assert_allclose(
            gradient(power, four), 4**power * gradient(power, WEIGHT), rtol=1e-4
        )
    with pytest.raises(ValueError, match=r"objective\.variance_power is 2\.0"):
        DSM(variance_power=2.0)


def test_label_dropout_shows_the_null_label_at_its_rate():
    seen = []

    def denoise(x, sigma, condition):
        seen.append(np.asarray(label_of(condition)))
        return x

    keys = jax.random.split(jax.random.key(0), 20_000)
    labels = jnp.arange(20_000) % 3
    run(denoise, jnp.ones((20_000, 1)), labels, keys, 0.1)
    assert abs((seen[0] == 3).mean() - 0.1) < 0.008
    np.testing.assert_array_equal(seen[0][seen[0] != 3], np.asarray(labels)[seen[0] != 3])


def test_each_example_depends_on_its_own_key_alone():
    mix = reference.mixture()
    x0, label = mix.sample(jax.random.key(1), 8)
    keys = jax.random.split(jax.random.key(2), 8)
    together, _ = run(mix.denoise, x0, label, keys, 0.5)
    apart, _ = run(mix.denoise, x0[5:7], label[5:7], keys[5:7], 0.5)
    np.testing.assert_allclose(together[5:7], apart, rtol=1e-5)
    other, _ = run(mix.denoise, x0, label, keys.at[1].set(keys[0]), 0.5)
    rows = np.arange(8) != 1
    np.testing.assert_array_equal(other[rows], together[rows])
    assert other[1] != together[1]


def test_the_condition_reaches_the_network_whole():
    seen = []

    def denoise(x, sigma, condition):
        seen.append(condition)
        return x

    keys = jax.random.split(jax.random.key(0), 5)
    given = Condition(jnp.arange(5) % 3, jnp.arange(5.0), jnp.ones((5, 9)), keys)
    batch = Batch(jnp.ones((5, 2)), given)
    DSM(0.0)(cases.models(denoise), cases.problem(Level(1.0)), batch, keys)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.all(a == b)), seen[0], given))
