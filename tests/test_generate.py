import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import base
from mclr_jax import generate, guidance, noise, samplers
from mclr_jax.noise import normal_like, sample_keys
from mclr_jax.training import loop

# A network that has left its zero initialisation, so that labels and guidance matter.


@pytest.fixture(scope="module")
def trained():
    config = tiny.config("digits")
    experiment = loop.make_experiment(config, loop.load_source(config, "train"))
    key = jax.random.key(1)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(key, x.shape), jax.jit(experiment.init)()
    )
    return experiment, params


def test_samples_are_those_of_the_sampler_called_directly(trained):
    experiment, params = trained
    labels, grid = np.array([3, 1, 4]), noise.rho_grid(4, 0.01, 10.0)
    got = generate.generate(
        experiment, params, labels, seed=5, sigmas=grid, method="euler", guidance_scale=2.0
    )
    denoise = guidance.classifier_free(experiment.denoiser(params), 10, 2.0)
    x = np.float32(grid[0]) * normal_like(sample_keys(5, range(3)), jnp.zeros((3, 8, 8, 1)))
    expected = samplers.sample(denoise, x, jnp.asarray(labels), grid, "euler")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_autoguidance_puts_a_weaker_model_in_the_place_of_the_null_label(trained):
    experiment, params = trained
    config = tiny.config("digits", **{"network.width": 8})
    weak = loop.make_experiment(config, loop.load_source(config, "train"))
    weak_params = jax.tree.map(lambda x: x + 0.05, jax.jit(weak.init)())
    labels, grid = np.array([3, 1, 4]), noise.rho_grid(4, 0.01, 10.0)
    options = {"sigmas": grid, "method": "euler", "guidance_scale": 1.7, "interval": (0.1, 5.0)}
    got = generate.generate(experiment, params, labels, weak=(weak, weak_params), **options)
    guided = guidance.autoguidance(
        experiment.denoiser(params), weak.denoiser(weak_params), 1.7, (0.1, 5.0)
    )
    x = np.float32(grid[0]) * normal_like(sample_keys(0, range(3)), jnp.zeros((3, 8, 8, 1)))
    expected = samplers.sample(guided, x, jnp.asarray(labels), grid, "euler")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    alone = generate.generate(experiment, params, labels, **options)
    assert np.abs(got - alone).max() > 1e-3
    calls = generate.network_calls(experiment, weak=(weak, weak_params), **options)
    assert calls == 4 + sum(0.1 < level <= 5.0 for level in grid[:-1])


@pytest.mark.parametrize("churn", [None, samplers.Churn(5.0)])
def test_sample_i_is_the_same_in_any_batch_on_8_devices(trained, churn):
    experiment, params = trained
    labels = np.arange(20) % 10
    whole = generate.generate(experiment, params, labels, churn=churn)
    parts = generate.generate(experiment, params, labels, churn=churn, batch_size=8)
    np.testing.assert_allclose(whole, parts, rtol=1e-4, atol=1e-5)
    fewer = generate.generate(experiment, params, labels[:3], churn=churn)
    np.testing.assert_allclose(whole[:3], fewer, rtol=1e-4, atol=1e-5)
    other = generate.generate(experiment, params, labels, churn=churn, seed=1)
    assert np.abs(whole - other).max() > 0.1


@pytest.mark.parametrize("method", sorted(samplers.METHODS))
@pytest.mark.parametrize(("scale", "interval"), [(1.0, None), (2.0, None), (2.0, (0.1, 1.0))])
def test_network_calls_are_those_that_the_sampler_makes(trained, method, scale, interval):
    experiment, _ = trained
    grid, made = noise.rho_grid(5, 0.01, 10.0), []

    def denoise(x, sigma, label):
        jax.debug.callback(lambda: made.append(1))
        return 0.5 * x

    guided = guidance.classifier_free(denoise, 10, scale, interval)
    x, label = jnp.ones((2, 3)), jnp.array([0, 1])
    jax.block_until_ready(samplers.sample(guided, x, label, grid, method))
    jax.effects_barrier()
    arguments = {"sigmas": grid, "method": method, "guidance_scale": scale, "interval": interval}
    assert generate.network_calls(experiment, **arguments) == len(made)


def test_guidance_interval_and_grid_share_one_program(trained):
    experiment, params = trained
    labels = np.arange(8)
    run = generate.compiled(experiment, "heun", True, False, None)
    before = run._cache_size()
    for scale, interval, sigma_min in [
        (2.0, None, 0.01),
        (3.0, (0.1, 1.0), 0.01),
        (3.0, None, 0.1),
    ]:
        generate.generate(
            experiment, params, labels, guidance_scale=scale, interval=interval,
            sigmas=noise.rho_grid(5, sigma_min, 20.0),
        )  # fmt: skip
    assert run._cache_size() == before + 1


def test_null_labels_are_allowed_and_others_refused(trained):
    experiment, params = trained
    assert np.isfinite(generate.generate(experiment, params, np.array([10]))).all()
    with pytest.raises(ValueError, match=r"must lie in 0..10 .*got 0..11"):
        generate.generate(experiment, params, np.array([0, 11]))


def test_progress_counts_samples_and_not_padding(trained):
    experiment, params = trained
    seen = []
    generate.generate(experiment, params, np.arange(10), batch_size=8, progress=seen.append)
    assert seen == [8, 2]
    chex.assert_equal(generate.generate(experiment, params, np.arange(3)).shape, (3, 8, 8, 1))


def test_a_network_with_strength_takes_the_scale_as_its_input():
    """One call at any scale, and none of guidance outside the interval; no recompilation."""
    config = tiny.config("digits")
    config.objective = base.mclr()
    config.objective.update({"strength": (0.0, 2.0), "posterior": ""})
    experiment = loop.make_experiment(config, loop.load_source(config, "train"))
    key = jax.random.key(1)
    params = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(key, x.shape), jax.jit(experiment.init)()
    )
    labels, grid = np.array([3, 1, 4]), noise.rho_grid(4, 0.01, 10.0)
    x = np.float32(grid[0]) * normal_like(sample_keys(5, range(3)), jnp.zeros((3, 8, 8, 1)))
    run = generate.compiled(experiment, "euler", False, False, None)
    for scale, interval in [(1.0, None), (2.5, None), (2.5, (0.1, 1.0))]:
        got = generate.generate(experiment, params, labels, seed=5, sigmas=grid, method="euler",
                                guidance_scale=scale, interval=interval)  # fmt: skip

        def denoise(x, sigma, label, scale=scale, interval=interval):
            low, high = interval or (0.0, np.inf)
            strength = jnp.where((low < sigma) & (sigma <= high), scale - 1, 0)
            return experiment.denoiser(params, strength)(x, sigma, label)

        expected = samplers.sample(denoise, x, jnp.asarray(labels), grid, "euler")
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        if scale == 1:
            unguided = got
    assert np.abs(got - unguided).max() > 1e-3
    assert run._cache_size() == 1
