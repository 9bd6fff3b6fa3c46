import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from mclr_jax import guidance, samplers
from mclr_jax.denoiser import EDM, Epsilon, V
from mclr_jax.noise import normal_like, rho_grid, sample_keys


@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("method", ["euler", "heun", "dpmpp_2m"])
def test_trajectories_end_where_the_reference_ends(method, gamma):
    ref = reference.load("mixture_samplers")
    with jax.enable_x64(True):
        sigmas = jnp.asarray(ref["sampler/sigmas"])
        denoise = guidance.classifier_free(reference.mixture().denoise, 3, 1 + gamma)
        x_init = sigmas[0] * jnp.asarray(ref["x_unit_noise"])
        labels = jnp.asarray(ref["labels"], jnp.int32)
        got = samplers.sample(denoise, x_init, labels, sigmas, method)
        np.testing.assert_allclose(got, ref[f"sampler/{method}/gamma{gamma}"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_order_of_convergence(method, order):
    """The error of one Gaussian class, whose ODE has the exact solution below, falls as h^order.

    x(sigma) = m + (x(sigma_max) - m) sqrt((s^2 + sigma^2) / (s^2 + sigma_max^2)). The grid stops at
    a sigma well above 0 and its last step is exact to far below the error measured.
    """
    mean, std, sigma_max = 1.5, 0.5, 10.0

    def denoise(x, sigma, label):
        return mean + std**2 / (std**2 + sigma[:, None] ** 2) * (x - mean)

    with jax.enable_x64(True):
        x = jnp.linspace(-20.0, 20.0, 9)[:, None]
        exact = mean + (x - mean) * std / np.sqrt(std**2 + sigma_max**2)
        errors = []
        for steps in (64, 128, 256):
            sigmas = jnp.asarray(rho_grid(steps, 1e-7, sigma_max))
            got = samplers.sample(denoise, x, jnp.zeros(9, jnp.int32), sigmas, method)
            errors.append(float(jnp.abs(got - exact).max()))
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(rates, order, atol=0.2)


@pytest.mark.parametrize("amount", [3.0, 40.0])  # below and above the bound sqrt(2) - 1
def test_churn_matches_algorithm_2_written_out(amount):
    """EDM Algorithm 2 with S_churn, S_min, S_max, S_noise, in plain Python; S_min and S_max are
    levels of the grid, which are inside."""
    mix = reference.mixture()
    sigmas = np.float32(rho_grid(10, 0.01, 20.0))
    low, high = float(sigmas[7]), float(sigmas[2])
    churn = samplers.Churn(amount=amount, sigma_min=low, sigma_max=high, noise_scale=1.01)
    keys, labels = sample_keys(7, range(4)), jnp.array([0, 1, 2, 3])
    x = x_init = sigmas[0] * normal_like(keys, jnp.zeros((4, 2)))
    call = 0
    for s, s_next in itertools.pairwise(sigmas):
        s_hat = s
        if churn.sigma_min <= s <= churn.sigma_max:
            s_hat = s * (1 + min(churn.amount / 10, np.sqrt(2) - 1))
            noise = normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, call), x)
            x = x + np.sqrt(s_hat**2 - s**2) * churn.noise_scale * noise
        d = (x - mix.denoise(x, s_hat, labels)) / s_hat
        x_euler = x + (s_next - s_hat) * d
        if s_next > 0:
            d_next = (x_euler - mix.denoise(x_euler, s_next, labels)) / s_next
            x = x + (s_next - s_hat) * (d + d_next) / 2
        else:
            x = x_euler
        call += 2
    got = samplers.sample(mix.denoise, x_init, labels, sigmas, churn=churn, keys=keys)
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


def test_the_defaults_are_those_of_edm():
    """Karras et al. 2022, Table 1, and Table 5 for ImageNet-64."""
    assert samplers.Churn() == (40.0, 0.05, 50.0, 1.003)
    roots = 80 ** (1 / 7) + np.arange(18) / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))
    np.testing.assert_allclose(samplers.Sampler().grid(), [*roots**7, 0], rtol=1e-12)
    assert samplers.Sampler().method == "heun"


def test_a_grid_stays_within_the_levels_that_a_model_knows():
    sampler = samplers.Sampler(num_steps=5, sigma_min=0.05, sigma_max=90.0, rho=5.0)
    for levels, low, high in [
        ((0.0, np.inf), 0.05, 90.0),
        ((0.1, 70.0), 0.1, 70.0),
        ((0.01, 157.0), 0.05, 90.0),
    ]:
        model = types.SimpleNamespace(sigma_range=levels)
        np.testing.assert_array_equal(sampler.grid(model), rho_grid(5, low, high, 5.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "huen"}, "Unknown sampler 'huen'"),
        ({"sigmas": np.array([3.0, 1.0])}, "end in 0"),
        ({"sigmas": np.array([1.0, 3.0, 0.0])}, "must fall"),
        ({"sigmas": np.array([0.0])}, r"shape \(1,\)"),
        ({"churn": samplers.Churn()}, "per-sample keys"),
        ({"churn": samplers.Churn(), "method": "dpmpp_2m"}, "single-step"),
        ({"method": "ancestral"}, "needs per-sample keys"),
        ({"method": "ancestral", "churn": samplers.Churn(), "keys": sample_keys(0, [0])},
         "without fresh noise of its own"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(arguments, message):
    call = {"sigmas": rho_grid(3)} | arguments
    with pytest.raises(ValueError, match=message):
        samplers.sample(lambda x, s, c: x, jnp.ones((1, 1)), jnp.zeros(1, int), **call)


# ---- fresh noise ---------------------------------------------------------------------------------


def variance_by_hand(grid, second_order, std=0.5):
    """Of the samples of N(0, std^2), x and the D before as sums of independent normal variables."""
    x, before, h_before = np.array([grid[0]]), None, None
    for start, stop in itertools.pairwise(grid):
        d = std**2 / (std**2 + start**2) * x
        estimate, h = d, np.log(start / stop) if stop else 0
        if second_order and before is not None and stop:
            padded = np.append(before, np.zeros(len(d) - len(before)))
            estimate = d + h / (2 * h_before) * (d - padded)
        keep = (stop / start) ** 2
        x = np.append(keep * x + (1 - keep) * estimate, stop * np.sqrt(1 - keep))
        before, h_before = d, h
    return (x**2).sum()


def test_the_spread_of_ancestral_sampling_converges():
    """The variance of one Gaussian as h and as h^2; 16 steps of second order beat 100 of first."""
    errors = {}
    for second in (False, True):
        grids = [np.append(np.geomspace(20, 1e-4, n), 0) for n in (16, 100, 200, 400)]
        errors[second] = np.array([variance_by_hand(grid, second) / 0.25 - 1 for grid in grids])
        rates = np.log2(errors[second][1:-1] / errors[second][2:])
        np.testing.assert_allclose(rates, 1 + second, atol=0.1)
    keys = sample_keys(0, range(40_000))
    x_init = 20 * normal_like(keys, jnp.zeros((40_000, 1)))
    grid = np.append(np.geomspace(20, 0.006, 16), 0)
    for method, second in [("ancestral", False), ("ancestral_2m", True)]:
        x = samplers.sample(
            lambda x, s, c: 0.25 / (0.25 + s[:, None] ** 2) * x, x_init, jnp.zeros(40_000, int),
            grid, method, keys=jax.vmap(jax.random.fold_in, (0, None))(keys, 1),
        )  # fmt: skip
        np.testing.assert_allclose(x.var(), variance_by_hand(grid, second), rtol=0.03)
    first, second = (abs(np.sqrt(variance_by_hand(grid, order) / 0.25) - 1) for order in (0, 1))
    assert first > 0.2
    assert second < 0.04


def test_ancestral_steps_are_those_of_ddpm():
    mix, grid, labels = reference.mixture(), rho_grid(6, 0.01, 20.0), jnp.arange(4)
    keys = sample_keys(2, range(4))
    x_init = 20 * normal_like(keys, jnp.zeros((4, 2)))

    x = x_init
    for number, (start, stop) in enumerate(itertools.pairwise(grid)):
        d = mix.denoise(x, jnp.full(4, start), labels)
        fresh = stop * np.sqrt(1 - (stop / start) ** 2)
        x = d + np.sqrt(stop**2 - fresh**2) * (x - d) / start
        noise = normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, number + 1), x)
        x = x + fresh * noise
    found = samplers.sample(mix.denoise, x_init, labels, grid, "ancestral", keys=keys)
    np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 10**20}, "num_steps is 1.*at most 100000"),
        ({"sigma_min": 1e-30}, "sigma_min is 1e-30; expected a number of at least 1e-09"),
        ({"sigma_max": "80"}, "sigma_max is '80'; expected a number"),
        ({"rho": 1e-30}, "rho is 1e-30; expected a number of at least 0.1 and at most 100"),
        ({"sigma_min": 5.0, "sigma_max": 2.0}, "expected 0 < sigma_min < sigma_max"),
    ],
)
def test_grids_that_cannot_be_computed_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        samplers.Sampler(**options)


# ---- DDPM and DDIM -------------------------------------------------------------------------------


def alpha_bar(sigmas):
    return 1 / (1 + np.asarray(sigmas) ** 2)


@pytest.mark.parametrize("place", [-1.0, 0.4, 1.0, None])
def test_the_noise_of_ddpm_lies_between_the_posterior_variance_and_beta(place):
    """In x_t = sqrt(alpha_bar) x, as arXiv 2102.09672, eq. 15; without a place it is beta."""
    grid = np.append(Epsilon().table[[999, 600, 200, 0]], 0.0)
    bar = alpha_bar(grid)
    keys = sample_keys(0, range(3))
    x = 2.0 * normal_like(keys, jnp.zeros((3, 5)))  # x_t
    expected = np.asarray(x)
    for call in range(4):
        now, then = bar[call], bar[call + 1]
        beta = 1 - now / then
        low = beta * (1 - then) / (1 - now)
        f = (1 if place is None else place) / 2 + 0.5
        d = 0.5 * expected
        mean = np.sqrt(then) * beta / (1 - now) * d
        mean += np.sqrt(now / then) * (1 - then) / (1 - now) * expected
        noise = normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, call + 1), x)
        expected = mean if call == 3 else mean + np.sqrt(beta**f * low ** (1 - f)) * noise

    def denoise(x, sigma, condition):
        found = 0.5 * x / jnp.sqrt(1 + sigma[:, None] ** 2)
        return found if place is None else jnp.append(found, jnp.full_like(x, place), axis=-1)

    x = x / np.sqrt(bar[0])
    got = samplers.sample(denoise, x, jnp.zeros(3, int), grid, "ddpm", keys=keys)
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)


def test_ddpm_leaves_frames_that_wait_or_are_finished_as_they_are():
    grid = np.array([[9.0, 0.0, 9.0], [3.0, 0.0, 9.0], [0.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    keys = sample_keys(0, range(2))
    x = normal_like(keys, jnp.zeros((2, 3, 4)))
    got = samplers.sample(lambda x, s, c: 0.5 * x, x, jnp.zeros(2, int), grid, "ddpm", keys=keys)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[:, 1], x[:, 1])
    assert (got[:, [0, 2]] != x[:, [0, 2]]).all()


def test_ddim_is_between_euler_and_ancestral_sampling():
    mix, grid, labels = reference.mixture(), rho_grid(6, 0.01, 20.0), jnp.arange(4)
    keys = sample_keys(2, range(4))
    x = 20 * normal_like(keys, jnp.zeros((4, 2)))

    def end(method, eta=0.0):
        return samplers.sample(mix.denoise, x, labels, grid, method, keys=keys, eta=eta)

    np.testing.assert_array_equal(end("ddim"), end("euler"))
    np.testing.assert_array_equal(end("ddim", 1.0), end("ancestral"))
    assert np.abs(end("ddim", 0.5) - end("ddim")).max() > 0.01


@pytest.mark.parametrize(
    ("spacing", "count", "steps"),
    [
        ("even", 4, [0, 333, 666, 999]),
        ("even", 3, [0, 500, 999]),  # 499.5, to even
        ("even", 1, [0]),
        ("ddim", 4, [0, 250, 500, 750]),
        ("ddim", 3, [0, 334, 668]),
        ("leading", 3, [0, 333, 666]),
    ],
)
def test_grids_of_steps(spacing, count, steps):
    grid = samplers.Sampler(num_steps=count, spacing=spacing).grid(Epsilon())
    np.testing.assert_array_equal(grid, np.append(Epsilon().table[steps][::-1], 0))


def test_even_steps_are_rounded_like_those_of_dit():
    """Its sum of 15 times 49.95 is below 749.25 - 0.5 at 20 intervals, where the product is not."""
    for count in range(2, 1001):
        sampler = samplers.Sampler(num_steps=count, spacing="even")
        place, expected = 0.0, []
        for _ in range(count):
            expected.append(round(place))
            place += 999 / (count - 1)
        found = sampler.grid(Epsilon())
        np.testing.assert_array_equal(found, np.append(Epsilon().table[expected][::-1], 0))


@pytest.mark.parametrize(
    ("model", "count", "spacing"),
    [(EDM(), 10, "even"), (None, 10, "ddim"), (V(steps=9), 10, "leading"), (V(), 300, "ddim")],
)
def test_steps_that_a_process_has_not_are_refused(model, count, spacing):
    with pytest.raises(ValueError, match=f"spacing is '{spacing}' with {count} steps"):
        samplers.Sampler(num_steps=count, spacing=spacing).grid(model)


def test_keys_of_later_versions_are_told_where_they_count():
    first = {"method": "heun", "num_steps": 18, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
    assert samplers.Sampler().settings() == first
    found = samplers.Sampler("ddim", spacing="even", eta=0.5).settings()
    assert found == first | {"method": "ddim", "spacing": "even", "eta": 0.5}
