import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mclr_jax import generate, guidance, samplers
from mclr_jax.config import Training
from mclr_jax.data import sources
from mclr_jax.denoiser import Epsilon, Velocity
from mclr_jax.generate import Guidance
from mclr_jax.model import DataInfo, Model
from mclr_jax.noise import normal_like, sample_keys
from mclr_jax.samplers import Sampler
from mclr_jax.types import Condition

SAMPLER = Sampler("heun", 3, 0.01, 40.0)
EULER = Sampler("euler", 4, 0.01, 10.0)
GRID = EULER.grid()


def make(**changes):
    """A model of one linear map, or what is changed, and random parameters."""
    training = Training.parse(tiny.config("digits", **tiny.LINEAR | changes))
    model = training.model(training.data_info(sources.load("digits")))
    return model, tiny.weights(model, 1)


@pytest.fixture(scope="module")
def trained():
    return make()


@pytest.fixture(scope="module")
def told():
    """A network with the strength as its input."""
    return make(strength=(0.0, 2.0))


@pytest.fixture(scope="module")
def weaker():
    return make(**{"network.name": "dit", "network.width": 8})


def by_sampler(denoise, labels, seed=0, grid=GRID):
    """What the sampler makes of a denoiser that is called directly."""
    x = np.float32(grid[0]) * normal_like(sample_keys(seed, range(3)), jnp.zeros((3, 8, 8, 1)))
    return samplers.sample(denoise, x, jnp.asarray(labels), grid, "euler")


def test_samples_are_those_of_the_sampler_called_directly(trained):
    model, params = trained
    labels = np.array([3, 1, 4])
    got = generate.generate(model, params, labels, EULER, guided=Guidance(2.0), seed=5)
    expected = by_sampler(guidance.classifier_free(model.denoise(params), 10, 2.0), labels, 5)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    assert generate.generate(model, params, np.array([]), EULER).shape == (0, 8, 8, 1)


def test_autoguidance_puts_a_weaker_model_in_the_place_of_the_null_label(trained, weaker):
    model, params = trained
    weak, weak_params = weaker
    labels = np.array([3, 1, 4])
    cfg = Guidance(1.7, interval=(0.1, 5.0))
    auto = dataclasses.replace(cfg, weak=(weak, weak_params))
    got = generate.generate(model, params, labels, EULER, guided=auto)
    guided = guidance.autoguidance(
        model.denoise(params), weak.denoise(weak_params), 1.7, (0.1, 5.0)
    )
    np.testing.assert_allclose(got, by_sampler(guided, labels), rtol=1e-4, atol=1e-4)
    alone = generate.generate(model, params, labels, EULER, guided=cfg)
    assert np.abs(got - alone).max() > 1e-3
    assert auto.calls(model, EULER) == 4 + sum(0.1 < level <= 5.0 for level in GRID[:-1])


def test_domain_guidance_asks_the_source_at_its_own_null_label(trained):
    """D + (w - 1) (D - D_source(null)), of a source with 4 classes; DoG's equation."""
    model, params = trained
    source = dataclasses.replace(
        model, network=model.network.clone(num_classes=4),
        data=dataclasses.replace(model.data, num_classes=4),
    )  # fmt: skip
    weights, labels = tiny.weights(source, 5), np.array([3, 9, 4])
    guided = Guidance(1.7, interval=(0.1, 5.0), weak=(source, weights), domain=True)
    got = generate.generate(model, params, labels, EULER, guided=guided)

    def by_hand(x, sigma, label):
        own, null = model.denoise(params)(x, sigma, label), jnp.full(3, 4)
        away = own - source.denoise(weights)(x, sigma, null)
        return own + jnp.where((sigma > 0.1) & (sigma <= 5.0), 0.7, 0.0)[:, None, None, None] * away

    np.testing.assert_allclose(got, by_sampler(by_hand, labels), rtol=1e-4, atol=1e-4)
    assert "domain_guidance" in guided.settings()
    untaught = dataclasses.replace(source, data=dataclasses.replace(source.data, has_null=False))
    with pytest.raises(ValueError, match="no answer without a class"):
        generate.generate(model, params, labels, EULER, guided=Guidance(
            1.7, weak=(untaught, weights), domain=True))  # fmt: skip


def test_sample_i_is_the_same_in_any_batch_on_8_devices(trained):
    """With its first noise and that of the steps; progress counts samples and not padding."""
    labels, seen = np.arange(20) % 10, []

    def draw(labels, **options):
        return generate.generate(*trained, labels, SAMPLER, churn=samplers.Churn(5.0), **options)

    whole = draw(labels)
    parts = draw(labels, batch_size=8, progress=seen.append)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)
    assert seen == [8, 8, 4]
    fewer = draw(labels[:3])
    assert fewer.shape == (3, 8, 8, 1)
    np.testing.assert_allclose(whole[:3], fewer, rtol=1e-4, atol=1e-5)
    assert np.abs(whole[:3] - draw(labels[:3], seed=1)).max() > 0.1


def ends(grid, low, high):
    """An interval whose ends are levels of a grid: the upper one is inside."""
    return float(np.float32(grid[low])), float(np.float32(grid[high]))


LEVELS = ends(Sampler("euler", 5, 0.01, 10.0).grid(), 3, 1)


@pytest.mark.parametrize("method", sorted(samplers.METHODS))
@pytest.mark.parametrize(
    ("scale", "interval"), [(1.0, None), (2.0, None), (2.0, (0.1, 1.0)), (2.0, LEVELS)]
)
def test_network_calls_are_those_that_the_sampler_makes(trained, method, scale, interval):
    """N and 2 N - 1 for Heun, at scale 2 twice as many."""
    model, _ = trained
    sampler, made = Sampler(method, 5, 0.01, 10.0), []

    def denoise(x, sigma, label):
        jax.debug.callback(lambda: made.append(1))
        return 0.5 * x

    guided = guidance.classifier_free(denoise, 10, scale, interval)
    x, label = jnp.ones((2, 3)), jnp.array([0, 1])
    keys = sample_keys(0, range(2))
    jax.block_until_ready(samplers.sample(guided, x, label, sampler.grid(), method, keys=keys))
    jax.effects_barrier()
    assert Guidance(scale, interval=interval).calls(model, sampler) == len(made)
    if interval is None:
        assert len(made) == scale * (9 if method == "heun" else 5)


def test_guidance_interval_and_grid_share_one_program(trained):
    model, params = trained
    labels = np.arange(8)
    run = generate.compiled(model, "heun", True, False, None, None, False)
    before = run._cache_size()
    for scale, interval, sigma_min in [
        (2.0, None, 0.01),
        (3.0, (0.1, 1.0), 0.01),
        (3.0, None, 0.1),
    ]:
        generate.generate(
            model, params, labels, Sampler("heun", 5, sigma_min, 20.0),
            guided=Guidance(scale, interval=interval),
        )  # fmt: skip
    assert run._cache_size() == before + 1


@pytest.mark.parametrize("kind", ["null label", "weak model", "strength as input"])
def test_each_class_has_the_guidance_of_its_own_scale(trained, weaker, told, kind):
    """1 + (2.5 - 1) s_c, and the whole 2.5 at the null label, without recompilation."""
    as_input = kind == "strength as input"
    model, params = told if as_input else trained
    weak = weaker if kind == "weak model" else None
    labels, factors = np.array([3, 1, 4, 10]), np.zeros(10)
    factors[[3, 1, 4]] = 0.4, 2.0, 0.0

    def draw(scale, class_strengths=None):
        guided = Guidance(scale, class_strengths, (0.1, 5.0), weak)
        return generate.generate(model, params, labels, EULER, guided=guided, seed=5)

    run = generate.compiled(model, "euler", not as_input, False, weak and weak[0], None, False)
    got = draw(2.5, factors)
    programs = run._cache_size()
    for row, scale in enumerate([1.6, 4.0, 1.0, 2.5]):
        scale += 1e-9 * (scale == 1)  # 1 in float32; exactly 1 would be another program
        expected = draw(scale)
        np.testing.assert_allclose(got[row], expected[row], rtol=1e-4, atol=1e-4)
        assert scale == 2.5 or np.abs(expected[row] - expected[(row + 1) % 4]).max() > 1e-3
    assert run._cache_size() == programs
    np.testing.assert_array_equal(draw(0.1, [1] * 10), draw(0.1))


def test_classes_without_guidance_need_no_second_call(trained):
    model, params = trained

    def calls(scale=2.0, factors=None, weak=None):
        return Guidance(scale, factors, None, weak).calls(model, EULER)

    assert calls(factors=[0.0] * 10) == calls(1.0) == 4
    assert calls(factors=[0.0] * 9 + [0.1]) == calls() == 8
    assert calls(factors=[0.0] * 10, weak=(model, params)) == 4


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(("changes", "message"), [
    ({"scale": NAN}, "guidance_scale is nan"),
    ({"scale": INF}, "guidance_scale is inf"),
    ({"interval": (5.0, 1.0)}, r"interval is \(5.0, 1.0\); expected 0 <= low < high"),
    ({"interval": (NAN, 1.0)}, "interval is"),
    ({"channels": 0}, "guidance_channels is 0; expected an integer of at least 1"),
    ({"churn": samplers.Churn(NAN)}, "churn.amount is nan"),
    ({"churn": samplers.Churn(noise_scale=-1.0)}, "churn.noise_scale is -1.0"),
    ({"seed": -1}, "seed is -1; expected an integer of at least 0 and at most 4294967295"),
    ({"seed": 2**32}, "seed is 4294967296"),
    ({"class_strengths": [1.0] * 9}, "class_strengths has 9 values; expected 10, one per class"),
    ({"class_strengths": [1.0] * 9 + [-0.5]}, r"class_strengths\[9\] is -0.5; expected"),
    ({"class_strengths": np.append(NAN, np.ones(9))}, r"class_strengths\[0\] is nan"),
    ({"class_strengths": 0.5}, "class_strengths is 0.5; expected any number of values"),
    ({"labels": np.array([2**32])}, "must lie in 0..10"),
    ({"labels": np.array([0, 11])}, r"must lie in 0..10 .*got 0..11"),
    ({"labels": np.array([0.5])}, "labels of float64; expected integers"),
    ({"labels": np.broadcast_to(np.int8(0), 10**13)}, r"0 samples .* need 2.56e\+06 GB"),
])  # fmt: skip
def test_values_that_spoil_samples_are_refused(trained, changes, message):
    options = {"labels": np.array([3])} | changes
    ours = {name: options.pop(name) for name in changes.keys() & Guidance.__annotations__}
    with pytest.raises(ValueError, match=message):
        generate.generate(*trained, sampler=SAMPLER, guided=Guidance(**ours), **options)


def test_samples_that_are_not_finite_are_an_error(trained):
    model, params = trained
    with pytest.raises(FloatingPointError, match=r"sample 0, .*guidance_scale=1e\+38"):
        generate.generate(model, params, np.arange(3), SAMPLER, guided=Guidance(1e38))


def test_a_network_with_strength_takes_the_scale_as_its_input(told):
    """One call at any scale, and none of guidance outside the interval; no recompilation."""
    model, params = told
    labels = np.array([3, 1, 4])
    run = generate.compiled(model, "euler", False, False, None, None, False)
    for scale, interval in [(1.0, None), (2.5, None), (2.5, (0.1, 1.0)), (2.5, ends(GRID, 2, 0))]:
        guided = Guidance(scale, interval=interval)
        got = generate.generate(model, params, labels, EULER, guided=guided, seed=5)

        def denoise(x, sigma, condition, scale=scale, interval=interval):
            low, high = interval or (0.0, np.inf)
            strength = jnp.where((low < sigma) & (sigma <= high), scale - 1, 0)
            return model.denoise(params)(x, sigma, Condition(condition.label, strength))

        np.testing.assert_allclose(got, by_sampler(denoise, labels, 5), rtol=1e-4, atol=1e-4)
        if scale == 1:
            unguided = got
    assert np.abs(got - unguided).max() > 1e-3
    assert run._cache_size() == 1
    with pytest.raises(ValueError, match="guidance_channels needs guidance by a second call"):
        generate.generate(model, params, labels, EULER, guided=Guidance(2.0, channels=1))


def test_flows_by_time_and_sigma_end_at_the_same_samples():
    """Euler's method is the same in both on the linear path; guidance is in sigma for both."""
    model, params = make(preconditioning={"name": "velocity", "data_at": 0})
    labels, guided = np.array([3, 1, 4]), Guidance(2.0, interval=(0.3, 3.0), channels=1)
    sampler = Sampler("ode_euler", 8)
    got = generate.generate(model, params, labels, sampler, guided=guided, seed=5)
    times = np.linspace(1, 0, 9)
    grid = times / np.maximum(1 - times, 1e-5)
    denoise = guidance.classifier_free(model.denoise(params), 10, 2.0, (0.3, 3.0))
    np.testing.assert_allclose(got, by_sampler(denoise, labels, 5, grid), rtol=2e-3, atol=2e-3)
    assert guided.calls(model, sampler) == 8 + sum((0.3 < grid) & (grid <= 3))
    other = dataclasses.replace(model, preconditioning=Velocity(1))
    with pytest.raises(ValueError, match="The weak model has Velocity"):
        generate.generate(
            model, params, labels, sampler, guided=Guidance(2.0, weak=(other, params))
        )


class Constant(nn.Module):
    """Another noise and another place of the variance for a class than without one."""

    out_channels: int = 4

    @nn.compact
    def __call__(self, x, c_noise, condition):
        rows = jnp.array([1.0, 2.0, 0.5, 0.5]), jnp.array([0.5, 0.8, -0.5, -0.5])
        is_class = (condition.label < 2)[:, None, None, None]
        return jnp.where(is_class, *rows) + 0 * x[..., :1]


@pytest.mark.parametrize(("channels", "guided"), [(None, 2), (1, 1), (9, 2)])
def test_the_variance_of_ddpm_and_channels_beyond_the_guided_are_those_of_the_class(
    channels, guided
):
    model = Model(Constant(), Epsilon(), DataInfo((2, 2, 2), 2, 1.0))
    sampler, labels = Sampler("ddpm", 3, spacing="even"), jnp.zeros(4, int)
    run = generate.program(model, "ddpm", True, channels=channels)
    table = sampler.table(model.preconditioning)
    got = run(({}, {}), 5, jnp.arange(4), labels, table, jnp.full(3, 2.0), (0.0, np.inf), None)

    def by_hand(x, sigma, condition):
        denoise = model.denoise_with_range({})
        strong, weak = (denoise(x, sigma, jnp.full(4, label)) for label in (0, 2))
        return strong.at[..., :guided].add((strong - weak)[..., :guided])

    keys = sample_keys(5, range(4))
    noise = normal_like(keys, jnp.zeros((4, 2, 2, 2)))
    keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 1)
    expected = samplers.draw(by_hand, noise, labels, table, "ddpm", keys=keys)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    network = dataclasses.replace(model, network=Constant(out_channels=2))
    assert model.has_range
    assert not network.has_range
