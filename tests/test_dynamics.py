"""Dynamical systems against exact solutions, other integrators and conservation laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from mclr_jax.assimilation.dynamics import (
    SYSTEMS,
    ExponentialStep,
    KuramotoSivashinsky,
    Lorenz63,
    Lorenz96,
    NavierStokes,
)

SMALL = NavierStokes(size=32, substeps=4)
GRID = np.mgrid[:32, :32] * (2 * np.pi / 32)


def integrated(slope, state, time):
    """An accurate solution at `time` by another integrator."""
    return solve_ivp(lambda _, x: slope(x), (0, time), state, rtol=1e-10, atol=1e-10).y[:, -1]


# ---- Lorenz --------------------------------------------------------------------------------------


def test_lorenz_63_is_that_of_scipy():
    def slope(state):
        x, y, z = state
        return np.array([10 * (y - x), x * (28 - z) - y, x * y - 8 * z / 3])

    state = np.array([[-3.0, -5.0, 20.0], [8.0, 2.0, 31.0]])
    with jax.enable_x64(True):
        errors = []
        for count in (10, 20):
            system, x = Lorenz63(time_step=0.25 / count), jnp.asarray(state)
            for _ in range(count):
                x = system.advance(x)
            expected = [integrated(slope, s, 0.25) for s in state]
            errors.append(np.abs(x - np.array(expected)).max())
    assert errors[0] < 0.02
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 4, atol=0.5)  # of order 4


def test_lorenz_96_is_its_formula_and_keeps_energy_without_forcing_and_damping():
    x = np.random.default_rng(0).normal(size=40)
    expected = [(x[(i + 1) % 40] - x[i - 2]) * x[i - 1] - x[i] + 8 for i in range(40)]
    np.testing.assert_allclose(Lorenz96().slope(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5)

    class Undamped(Lorenz96):
        def slope(self, state):
            return super().slope(state) + state

    system, state = Undamped(time_step=0.01, forcing=0.0), jnp.asarray(3 * x, jnp.float32)
    for _ in range(20):
        state = system.advance(state)
    assert np.abs(state - 3 * x).max() > 1
    np.testing.assert_allclose((state**2).sum(), 9 * (x**2).sum(), rtol=1e-4)
    step = Lorenz96().advance(jnp.asarray(3 * x, jnp.float32))
    other = integrated(lambda s: np.asarray(Lorenz96().slope(jnp.asarray(s))), 3 * x, 0.05)
    np.testing.assert_allclose(step, other, atol=2e-3)


@pytest.mark.parametrize("system", [Lorenz63(), Lorenz96(noise=0.3)])
def test_noise_is_added_to_each_step(system):
    state = jnp.broadcast_to(system.start(jax.random.key(0)), (5000, *system.shape))
    added = system.step(jax.random.key(1), state) - system.advance(state)
    np.testing.assert_allclose(added.std(0), np.full(system.shape, system.noise), rtol=0.06)
    np.testing.assert_allclose(added.mean(0), np.zeros(system.shape), atol=0.02)


# ---- pseudo-spectral systems ---------------------------------------------------------------------


def test_an_exponential_step_is_exact_for_the_linear_part_and_of_order_4():
    """du/dt = a u + u^2 has the solution 1 / u = (1 / u0 + 1 / a) e^(-a t) - 1 / a."""
    rates, errors = np.array([-3.0, -0.5, 1.0]), []
    start = np.array([0.5, 0.4, 0.2])
    linear = ExponentialStep(rates, 0.5)(jnp.asarray(start, jnp.float32), jnp.zeros_like)
    np.testing.assert_allclose(linear, start * np.exp(0.5 * rates), rtol=1e-6)
    expected = 1 / ((1 / start + 1 / rates) * np.exp(-rates) - 1 / rates)
    for count in (2, 4):
        step, u = ExponentialStep(rates, 1 / count), jnp.asarray(start, jnp.float32)
        for _ in range(count):
            u = step(u, jnp.square)
        errors.append(np.abs(u - expected).max())
    assert errors[0] < 1e-3
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), 4, atol=0.6)


def test_small_waves_of_kuramoto_sivashinsky_grow_at_their_rates():
    """e^(k^2 - k^4) in a unit of time: mode 11 is the fastest, 16 neutral, 20 damped."""
    k = np.array([[3], [11], [16], [20]]) / 16
    waves, advance = 1e-4 * np.cos(k * np.pi * np.arange(128) / 4), KuramotoSivashinsky().advance
    state = advance(advance(jnp.asarray(waves, jnp.float32)))
    np.testing.assert_allclose(state, waves * np.exp(2 * (k**2 - k**4)), atol=1e-6)


def test_a_wave_of_kuramoto_sivashinsky_steepens_and_its_step_is_short_enough():
    """Of u = cos x, which neither grows nor decays, -u u_x is sin 2x / 2; the mean is kept."""
    n = np.arange(128)
    u = np.cos(np.pi / 4 * n).astype(np.float32)
    slope = (KuramotoSivashinsky(time_step=1e-3).advance(jnp.asarray(u)) - u) / 1e-3
    np.testing.assert_allclose(slope, np.sin(np.pi / 2 * n) / 2, atol=0.01)
    system, quarter = KuramotoSivashinsky(), KuramotoSivashinsky(time_step=0.25)
    state = fine = system.spin_up(jax.random.key(3))
    new = system.advance(state)
    for _ in range(4):
        fine = quarter.advance(fine)
    assert np.abs(new - state).max() > 0.5
    np.testing.assert_allclose(new, fine, atol=0.02)
    np.testing.assert_allclose(new.mean(), state.mean(), atol=1e-5)


def test_a_taylor_green_vortex_decays_exactly():
    """Its nonlinear term is zero: w falls as e^-(2 k^2 viscosity + drag) t. The drag damps."""
    system = NavierStokes(size=32, viscosity=0.02, drag=0.1, substeps=5)
    w = np.float32(3 * np.cos(2 * GRID[0]) * np.cos(2 * GRID[1]))[..., None]
    new = system.advance(system.advance(jnp.asarray(w)))
    np.testing.assert_allclose(new, w * np.exp(-(8 * 0.02 + 0.1)), atol=1e-5)


def test_vorticity_is_moved_by_its_velocity():
    """For w = cos x + cos 2y, -v . grad w = 1.5 sin x sin 2y, by hand."""
    system = NavierStokes(time_step=1e-2, size=32, viscosity=0.0, drag=0.0, substeps=1)
    w = np.float32(np.cos(GRID[0]) + np.cos(2 * GRID[1]))
    slope = (system.advance(jnp.asarray(w)[..., None])[..., 0] - w) / 1e-2
    np.testing.assert_allclose(slope, 1.5 * np.sin(GRID[0]) * np.sin(2 * GRID[1]), atol=0.02)


def test_products_of_waves_make_no_false_waves():
    """On a grid of 32, wave 20 would be seen as wave 12: nothing beyond 2/3 of 16 is made."""
    w = np.random.default_rng(0).normal(size=(32, 32, 1)).astype(np.float32)
    change = SMALL._nonlinear(jnp.fft.rfft2(w[..., 0]))
    made = np.abs(change) > 1e-3
    p, q = np.nonzero(made)
    assert np.minimum(p, 32 - p).max() == q.max() == 10
    assert made.sum() == 11 * 21 - 1  # all others, but for the mean


def test_energy_and_enstrophy_are_kept_without_viscosity():
    system = NavierStokes(size=32, viscosity=0.0, drag=0.0, substeps=20)
    p, q = np.meshgrid(*[np.fft.fftfreq(32, 1 / 32)] * 2, indexing="ij")

    def energy(w):
        return (np.abs(np.fft.fft2(w[..., 0])) ** 2 / np.maximum(p**2 + q**2, 1)).sum()

    modes = [np.sin(GRID[0]), np.cos(2 * GRID[1]), np.sin(GRID[0] + 3 * GRID[1])]
    w = np.float32(sum(modes))[..., None]
    new = system.advance(jnp.asarray(w))
    assert np.abs(new - w).max() > 0.5
    np.testing.assert_allclose((new**2).sum(), (w**2).sum(), rtol=1e-3)
    np.testing.assert_allclose(energy(new), energy(w), rtol=1e-3)


def test_forcing_is_white_in_time_on_four_modes():
    """From rest, the variance of each amplitude is forcing^2 t, and there is nothing else."""
    system = NavierStokes(time_step=0.02, size=32, forcing=0.7, substeps=2)
    keys = jax.random.split(jax.random.key(0), 2000)
    rest = jnp.zeros(system.shape)
    w = np.asarray(jax.jit(jax.vmap(system.step, (0, None)))(keys, rest))[..., 0]
    x, y = GRID
    modes = [np.sin(6 * x), np.cos(7 * x), np.sin(5 * (x + y)), np.cos(8 * (x + y))]
    amplitudes = np.stack([2 * (w * mode).mean((1, 2)) for mode in modes])
    np.testing.assert_allclose(np.cov(amplitudes), 0.7**2 * 0.02 * np.eye(4), atol=1e-3)
    rest_of_w = w - np.tensordot(amplitudes.T, modes, 1)
    assert np.abs(rest_of_w).max() < 0.02 * np.abs(w).max()


# ---- all of them ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lorenz63", "lorenz96", "kuramoto_sivashinsky"])
def test_offset_and_scale_standardise(name):
    """Up to the 0.14 standard deviations by which the units of FlowDAS miss the mean of z."""
    system = SYSTEMS[name]()

    def one(key):
        return system.trajectory(key, system.spin_up(key), 100)[::5]

    states = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 100))
    x = (states - np.array(system.offset)) / np.array(system.scale)
    x = x.reshape(-1, 3 if name == "lorenz63" else system.shape[0])
    assert np.abs(x.mean(0)).max() < 0.3
    assert abs(x.mean()) < 0.15
    np.testing.assert_allclose(x.std(), 1, atol=0.05)


@pytest.mark.parametrize("system", [Lorenz63(), Lorenz96(), KuramotoSivashinsky(), SMALL])
def test_a_batch_of_states_is_that_of_single_ones(system):
    states = jnp.stack([system.start(key) for key in jax.random.split(jax.random.key(0), 3)])
    assert states.shape == (3, *system.shape)
    together = system.advance(states)
    assert together.dtype == jnp.float32
    np.testing.assert_allclose(together[1], system.advance(states[1]), rtol=1e-4, atol=1e-4)
    path = system.trajectory(jax.random.key(2), states[0], 3)
    np.testing.assert_array_equal(path[0], states[0])
    step = system.step(jax.random.fold_in(jax.random.key(2), 0), states[0])
    np.testing.assert_allclose(path[1], step, rtol=1e-4, atol=1e-4)
