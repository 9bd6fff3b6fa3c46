"""Each convention against its publication, and all of them against each other.

For x0 ~ N(M, S^2) the exact E[x0 | x_sigma] and E[n | x_sigma] are known. Below, each network is
given by its own publication: what it answers as a function of what it is shown, the scaled sample
and its clock, with no use of sigma. All must then be one denoiser.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.denoiser import (
    EDM,
    IDDPM,
    VE,
    VP,
    Epsilon,
    V,
    Velocity,
    denoiser,
    fused_snr_weight,
    moments,
    natural_weight,
)
from mclr_jax.noise import rho_grid
from mclr_jax.samplers import Sampler
from mclr_jax.types import Condition

M, S = 0.7, 1.3


# ---- what each network answers, by its publication -----------------------------------------------


def gaussian(x, data, noise):
    """E[x0] and E[n] given x = data x0 + noise n, float64."""
    gain = data * S**2 / (data**2 * S**2 + noise**2)
    x0 = M + gain * (x - data * M)
    return x0, noise / (data**2 * S**2 + noise**2) * (x - data * M)


def edm(x, clock, sigma_data):
    """F = (D - c_skip x) / c_out at sigma = exp(4 c_noise); Karras et al. 2022, eq. 7, Table 1."""
    sigma = np.exp(4 * clock)
    root = np.sqrt(sigma**2 + sigma_data**2)
    x0, _ = gaussian(root * x, 1.0, sigma)
    return (x0 - sigma_data**2 / root * x) / (sigma * sigma_data / root)


def sit(x, clock):
    """x_t = t x0 + (1 - t) n, v = dx_t/dt = x0 - n; Ma et al. 2024, with data at time 1."""
    x0, noise = gaussian(x, clock, 1 - clock)
    return x0 - noise


def repa(x, clock):
    """x_t = (1 - t) x0 + t n, v = dx_t/dt = n - x0; Yu et al. 2024."""
    x0, noise = gaussian(x, 1 - clock, clock)
    return noise - x0


def alpha_bar_of_betas(first, last, steps):
    """prod (1 - beta_t), betas evenly spaced; Ho et al. 2020, eq. 4."""
    product, result = 1.0, []
    for t in range(steps):
        product *= 1 - (first + (last - first) * t / (steps - 1))
        result.append(product)
    return np.array(result)


def alpha_bar_of_sigmoid(start, end, tau, steps):
    """Jabri et al. 2022, Algorithm 1 (sigmoid), as betas that are at most 0.999."""

    def sigmoid(t):
        return 1 / (1 + np.exp(-t))

    v_start, v_end = sigmoid(start / tau), sigmoid(end / tau)
    gamma = [
        (v_end - sigmoid((start + (end - start) * t / steps) / tau)) / (v_end - v_start)
        for t in range(steps + 1)
    ]
    product, result = 1.0, []
    for now, after in itertools.pairwise(gamma):
        product *= 1 - min(1 - after / now, 0.999)
        result.append(product)
    return np.array(result)


def at_step(alpha_bar, clock):
    """sqrt(ab) and sqrt(1 - ab) at a step; between steps ln(sigma) is linear."""
    log_sigma = np.interp(clock, np.arange(len(alpha_bar)), np.log(1 / alpha_bar - 1) / 2)
    sigma = np.exp(log_sigma)
    return 1 / np.sqrt(1 + sigma**2), sigma / np.sqrt(1 + sigma**2)


def epsilon(x, clock, alpha_bar):
    """n of x_t = sqrt(ab) x0 + sqrt(1 - ab) n; Ho et al. 2020, eq. 14."""
    return gaussian(x, *at_step(alpha_bar, clock))[1]


def v(x, clock, alpha_bar):
    """sqrt(ab) n - sqrt(1 - ab) x0; Salimans and Ho 2022, App. D."""
    data, noise = at_step(alpha_bar, clock)
    x0, n = gaussian(x, data, noise)
    return data * n - noise * x0


def vp(x, clock, beta_d, beta_min, steps):
    """The noise at t = clock / (M - 1); Karras et al. 2022, Table 1, column VP."""
    t = clock / (steps - 1)
    sigma = np.sqrt(np.exp(beta_d / 2 * t**2 + beta_min * t) - 1)
    data = 1 / np.sqrt(sigma**2 + 1)
    return gaussian(x, data, data * sigma)[1]


def ve(x, clock):
    """(D - x) / sigma at ln(sigma / 2); Karras et al. 2022, Table 1, column VE."""
    return -gaussian(x, 1.0, 2 * np.exp(clock))[1]


def flow(x, clock, path, prediction, data_at):
    """The velocity along a path towards t = 1, the noise or the score (SiT, section 3)."""
    u = 1 - clock if data_at else clock
    vp = np.exp(-(u**2) * 19.9 / 4 - u / 20)
    data = {"linear": 1 - u, "cosine": np.cos(np.pi * u / 2), "vp": vp}[path]
    slopes = {"linear": -1 + 0 * u, "cosine": -np.pi / 2 * np.sin(np.pi * u / 2)}
    slope = slopes.get(path, -(u * 19.9 / 2 + 1 / 20) * vp)
    noise = u if path == "linear" else np.sqrt(1 - data**2)
    x0, n = gaussian(x, data, noise)
    if prediction != "velocity":
        return n if prediction == "noise" else -n / noise
    towards_noise = slope * x0 + (1 if path == "linear" else -data * slope / noise) * n
    return -towards_noise if data_at else towards_noise


CONVENTIONS = {
    "edm": (EDM(0.5), partial(edm, sigma_data=0.5)),
    "edm, other sigma_data": (EDM(1.7), partial(edm, sigma_data=1.7)),
    "velocity, data at 1": (Velocity(1), sit),
    "velocity, data at 0": (Velocity(0), repa),
    **{
        f"{path}, {prediction}, data at {data_at}": (
            Velocity(data_at, path, prediction),
            partial(flow, path=path, prediction=prediction, data_at=data_at),
        )
        for path in ("linear", "cosine", "vp")
        for prediction in ("velocity", "noise", "score")
        for data_at in (0, 1)
        if (path, prediction) != ("linear", "velocity")
    },
    "vp": (VP(29.0, 0.2, 500, 1e-7), partial(vp, beta_d=29.0, beta_min=0.2, steps=500)),
    "ve": (VE(1e-4, 1e4), ve),
    "epsilon": (
        Epsilon((1e-7, 0.03), 1000),
        partial(epsilon, alpha_bar=alpha_bar_of_betas(1e-7, 0.03, 1000)),
    ),
    "v": (
        V(-14.0, 6.0, 1.2, 700),
        partial(v, alpha_bar=alpha_bar_of_sigmoid(-14.0, 6.0, 1.2, 700)),
    ),
}


def network_of(answer):
    """The answer as a network, computed in float64 whatever it is shown."""

    def network(x, clock, condition):
        shape = clock.shape + (1,) * (x.ndim - clock.ndim)
        exact = answer(np.asarray(x, np.float64), np.asarray(clock, np.float64).reshape(shape))
        return jnp.asarray(exact, x.dtype)

    return network


def noisy(low, high):
    """sigma (60,), x (60, 4) and the exact E[x0 | x], float64."""
    sigma = np.geomspace(low, high, 60)
    x = M + np.hypot(S, sigma)[:, None] * np.random.default_rng(0).normal(size=(60, 4))
    return sigma, x, gaussian(x, 1.0, sigma[:, None])[0]


@pytest.mark.parametrize("x64", [True, False], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_every_convention_is_the_same_denoiser(name, x64):
    """Over sigma in [1e-3, 1e3], with a level for each example and for each frame."""
    preconditioning, answer = CONVENTIONS[name]
    low, high = preconditioning.sigma_range
    assert low < 1e-3
    assert high > 1e3
    with jax.enable_x64(x64):
        for frames in ((), (5,)):
            sigma, x, exact = (a.reshape(-1, *frames, *a.shape[1:]) for a in noisy(1e-3, 1e3))
            given = jnp.asarray(x), jnp.asarray(sigma), jnp.zeros(len(x), int)
            got = np.asarray(denoiser(preconditioning, network_of(answer))(*given))
            assert got.dtype == (np.float64 if x64 else np.float32)
            tolerance = 1e-9 if x64 else 1e-6 * np.maximum(1, sigma)[..., None]
            assert np.all(np.abs(got - exact) <= tolerance)


# ---- tables and weights --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preconditioning", "alpha_bar", "levels"),
    [
        (Epsilon(), alpha_bar_of_betas(1e-4, 0.02, 1000), (0.0100, 157.4)),
        (V(), alpha_bar_of_sigmoid(-3.0, 3.0, 1.0, 1000), (0.0173, 1825)),
        (V(0.0, 2.5, 0.7, 40), alpha_bar_of_sigmoid(0.0, 2.5, 0.7, 40), None),
    ],
    ids=["DiT", "diffusion forcing", "another schedule"],
)
def test_steps_have_the_published_levels(preconditioning, alpha_bar, levels):
    expected = np.sqrt(1 / alpha_bar - 1)
    np.testing.assert_allclose(preconditioning.table, expected, rtol=1e-9)
    np.testing.assert_allclose(preconditioning.sigma_range, expected[[0, -1]], rtol=1e-9)
    if levels:  # to the digits that are given
        np.testing.assert_allclose(preconditioning.sigma_range, levels, rtol=2e-3)
    clock = preconditioning.scales(jnp.asarray(expected, jnp.float32)).c_noise
    np.testing.assert_allclose(clock, np.arange(len(expected)), atol=2e-3)
    outside = jnp.array([expected[0] / 3, expected[-1] * 3])  # held at the ends
    np.testing.assert_array_equal(preconditioning.scales(outside).c_noise, [0, len(expected) - 1])


def iddpm_levels(steps, c_1, c_2):
    """u_j of Karras et al. 2022, Table 1, column iDDPM, from u_M = 0 down to j = 0."""

    def alpha_bar(j):
        return np.sin(np.pi / 2 * j / (steps * (c_2 + 1))) ** 2

    u = np.zeros(steps + 1)
    for j in range(steps, 0, -1):
        ratio = np.maximum(alpha_bar(j - 1) / alpha_bar(j), c_1)
        u[j - 1] = np.sqrt((u[j] ** 2 + 1) / ratio - 1)
    return u


@pytest.mark.parametrize("choice", [(1000, 0.001, 0.008), (40, 0.02, 0.1)])
def test_iddpm_has_the_noise_at_the_nearest_of_its_steps(choice):
    """The network's clock is M - 1 - j for the nearest level u_j, which may be u_M = 0."""
    steps, c_1, c_2 = choice
    u = iddpm_levels(steps, c_1, c_2)
    preconditioning = IDDPM(c_2, c_1, steps)
    np.testing.assert_allclose(preconditioning.table, u[-2::-1], rtol=1e-6)
    np.testing.assert_allclose(preconditioning.sigma_range, u[[-2, 0]], rtol=1e-6)
    with jax.enable_x64(True):
        sigma = np.concatenate([np.geomspace(u[-2] / 5, u[0] * 3, 500), u[:-1]])
        scales = preconditioning.scales(jnp.asarray(sigma))
        nearest = np.abs(sigma[:, None] - u).argmin(-1)
        np.testing.assert_array_equal(scales.c_noise, steps - 1 - nearest)
        np.testing.assert_allclose(preconditioning.rounded(sigma), u[nearest], rtol=1e-6)
        x = M + np.hypot(S, sigma)[:, None] * np.random.default_rng(0).normal(size=(len(sigma), 4))

        def network(scaled, clock, condition):  # the noise, whatever the clock
            return jnp.asarray(gaussian(x, 1.0, sigma[:, None])[1])

        given = jnp.asarray(x), jnp.asarray(sigma), jnp.zeros(len(x), int)
        got = denoiser(preconditioning, network)(*given)
        np.testing.assert_allclose(got, gaussian(x, 1.0, sigma[:, None])[0], atol=1e-6)
        np.testing.assert_allclose(scales.c_in, 1 / np.sqrt(1 + sigma**2))


def test_vp_and_ve_have_the_published_ranges():
    """EDM's networks of the baselines: attributes sigma_min and sigma_max of the pickles."""
    np.testing.assert_allclose(VP().sigma_range, (0.0010004, 152.17), rtol=1e-4)
    assert VE().sigma_range == (0.02, 100.0)


@pytest.mark.parametrize("name", CONVENTIONS)
def test_the_natural_weight_makes_the_loss_the_networks_own(name):
    """weight |D - D'|^2 = |F - F'|^2 for any two networks."""
    preconditioning, answer = CONVENTIONS[name]
    sigma, x, _ = noisy(0.02, 100.0)
    given = jnp.asarray(x), jnp.asarray(sigma), jnp.zeros(len(x), int)

    def other(x, clock, condition):
        return network_of(answer)(x, clock, condition) + 0.3 * jnp.cos(jnp.arange(4.0))

    one, two = (denoiser(preconditioning, n)(*given) for n in (network_of(answer), other))
    weighted = natural_weight(preconditioning, given[1]) * ((one - two) ** 2).mean(-1)
    own = ((0.3 * np.cos(np.arange(4))) ** 2).mean()
    np.testing.assert_allclose(weighted, np.full(len(x), own), rtol=2e-3)


# ---- dataclasses ---------------------------------------------------------------------------------


def test_conventions_compare_by_value():
    others = {EDM(0.6), Velocity(0), Epsilon((1e-4, 0.03)), Epsilon(steps=9), V(tau=2.0), V(-2.0),
              VP(18.0), VE(0.01), IDDPM(0.01)}  # fmt: skip
    assert len(others) == 9
    for make in (EDM, Velocity, Epsilon, V, VP, VE, IDDPM):
        one, same = make(), make()
        _ = one.sigma_range  # what it has computed and kept must not count
        assert one == same
        assert hash(one) == hash(same)
        assert one not in others


# ---- the wrapper ---------------------------------------------------------------------------------


def test_preconditioning_of_edm_table_1():
    """Every coefficient, seen through a network that reports its inputs."""
    sigma, x = np.geomspace(0.002, 80, 30), np.array([3.0, -1.0])

    def network(x_in, c_noise, condition):
        return x_in * c_noise[:, None] + condition.label[:, None]

    for sigma_data in (0.1, 0.5, 2.0):
        total = (sigma**2 + sigma_data**2)[:, None]
        raw = x / np.sqrt(total) * (np.log(sigma[:, None]) / 4) + 5
        expected = sigma_data**2 / total * x + sigma[:, None] * sigma_data / np.sqrt(total) * raw
        inputs = jnp.tile(x, (30, 1)), jnp.asarray(sigma), jnp.full(30, 5)
        got = denoiser(EDM(sigma_data), network)(*inputs)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_the_network_is_shown_a_level_for_each_example_and_the_condition_as_it_is():
    seen = []

    def network(x, clock, condition):
        seen.append((clock, condition))
        return 0 * x

    x, condition = jnp.ones((3, 2)), Condition(jnp.arange(3), strength=jnp.ones(3))
    denoise = denoiser(EDM(), network)
    by_number, by_array = denoise(x, 2.0, condition), denoise(x, jnp.full(3, 2.0), condition)
    np.testing.assert_array_equal(by_number, by_array)
    for clock, shown in seen:
        np.testing.assert_allclose(clock, np.full(3, np.log(2) / 4), rtol=1e-6)
        assert shown is condition


def test_channels_that_are_no_answer_are_left_out():
    """DiT gives the variance behind the noise; a network may compute in another type."""

    def network(x, clock, condition):
        return jnp.concatenate([x, jnp.full_like(x, jnp.nan)], axis=-1).astype(jnp.bfloat16)

    x = jnp.ones((2, 4, 4, 3))
    got = denoiser(Epsilon(), network)(x, jnp.ones(2), jnp.zeros(2, int))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.full(x.shape, 1 - 0.5**0.5), rtol=1e-2)


# ---- variances and weights of frames -------------------------------------------------------------


@pytest.mark.parametrize("preconditioning", [EDM(0.7), V()])
def test_moments_are_the_denoiser_and_a_variance(preconditioning):
    """v = c_out^2 e^s: for EDM sigma^2 S^2 / (sigma^2 + S^2) e^s, with s behind the answer."""
    x = jax.random.normal(jax.random.key(0), (3, 4, 2))
    sigma = jnp.exp(jax.random.normal(jax.random.key(1), (3, 4)))

    def network(x, clock, condition):
        s = jnp.stack([0.001 * clock, 0.1 * x[..., 1]], axis=-1)
        return jnp.concatenate([jnp.sin(x), s, 9 * x], axis=-1)  # and channels without a meaning

    mean, variance = moments(preconditioning, network, True)(x, sigma, jnp.zeros(3, int))
    scales = preconditioning.scales(sigma)
    expected = denoiser(preconditioning, network)(x, sigma, jnp.zeros(3, int))
    np.testing.assert_array_equal(mean, expected)
    is_edm = isinstance(preconditioning, EDM)
    c_out = sigma * 0.7 / np.sqrt(sigma**2 + 0.49) if is_edm else scales.c_out
    s = np.stack([0.001 * scales.c_noise, 0.1 * scales.c_in * x[..., 1]], axis=-1)
    np.testing.assert_allclose(variance, c_out[..., None] ** 2 * np.exp(s), rtol=1e-5)
    _, plain = moments(preconditioning, network, False)(x, sigma, jnp.zeros(3, int))
    np.testing.assert_allclose(plain, np.tile(c_out[..., None] ** 2, 2), rtol=1e-5)


def test_the_fused_weight_is_its_recursion():
    """Frame by frame, in plain Python, with the average of the frames before."""
    sigma = np.exp(np.random.default_rng(0).normal(size=(4, 7)))
    sigma[0] = [0.1, 0.2, 5.0, 0.3, 9.0, 0.447, 0.448]  # the signal-to-noise ratio 5 among them
    for preconditioning, own in [(EDM(1.0), 1 + sigma**-2), (EDM(0.5), 4 + sigma**-2)]:
        found = fused_snr_weight(preconditioning, jnp.asarray(sigma, jnp.float32))
        for row in range(4):
            average = before = 0.0
            for k in range(7):
                ratio = sigma[row, k] ** -2
                s, r = min(ratio, 5) / 5, ratio / 5
                f = 1 - (1 - 0.96 * before) * (1 - s)
                g = 1 - (1 - 0.96 * before) * (1 - r)
                expected = own[row, k] * 5 * f / (5 * g + 1)
                np.testing.assert_allclose(found[row, k], expected, rtol=1e-4)
                average = s if k == 0 else 0.96 * average + 0.04 * s
                before = average
    with pytest.raises(
        ValueError, match=r"shape \(4,\); weight 'fused_snr' needs a level for each"
    ):
        fused_snr_weight(EDM(), jnp.ones(4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EDM(0.0), r"sigma_data is 0.0; expected a number of at least 1e-09"),
        (lambda: Velocity(2), r"data_at is 2\. Known: 0, 1\."),
        (lambda: Epsilon(steps=1), r"steps is 1; expected an integer of at least 2"),
        (lambda: Epsilon(betas=(0.02, 0.0001)), r"betas is .*0 <= low < high <= 1"),
        (lambda: Epsilon(betas=(0.0, 0.02)), r"betas=\(0.0, 0.02\).*levels above 0 that rise"),
        (lambda: V(tau=0.0), r"tau is 0.0; expected a number above 0"),
        (lambda: V(start=1e30), r"start=1e\+30.*levels above 0 that rise"),
    ],
)
def test_processes_that_cannot_be_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_grid_of_iddpm_has_levels_of_its_process_alone():
    """Karras et al. 2022, Algorithm 1 with Table 1: sigma(t_i) are rounded to u_j."""
    u = iddpm_levels(1000, 0.001, 0.008)
    grid = Sampler(num_steps=18, sigma_max=1e5).grid(IDDPM())
    plain = rho_grid(18, u[-2], u[0])
    expected = [u[np.abs(u - level).argmin()] for level in plain]
    np.testing.assert_allclose(grid, expected, rtol=1e-6)
    assert np.abs(grid[1:-1] / plain[1:-1] - 1).max() > 1e-4
