"""Noise levels per frame, against a linear-Gaussian trajectory, whose denoiser is exact at any."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax import samplers
from mclr_jax.noise import normal_like, rho_grid, sample_keys

FRAMES, DIM = 4, 2
SIGMA_MAX = 10.0
METHODS = {"euler": 1, "heun": 2, "dpmpp_2m": 2}  # and their orders


def process():
    """Mean (F d,) and covariance (F d, F d) of x_f+1 = 0.8 R x_f + noise around a drifting mean."""
    turn = 0.8 * np.array([[np.cos(0.6), -np.sin(0.6)], [np.sin(0.6), np.cos(0.6)]])
    noise = np.array([[0.2, 0.05], [0.05, 0.1]])
    blocks = np.zeros((FRAMES, FRAMES, DIM, DIM))
    blocks[0, 0] = np.array([[0.5, -0.1], [-0.1, 0.3]])
    for f, g in itertools.product(range(FRAMES), range(FRAMES)):
        if g > f:  # frame by frame
            blocks[f, g] = blocks[f, g - 1] @ turn.T
            blocks[g, f] = blocks[f, g].T
        elif 0 < f == g:
            blocks[f, f] = turn @ blocks[f - 1, f - 1] @ turn.T + noise
    covariance = blocks.transpose(0, 2, 1, 3).reshape(FRAMES * DIM, FRAMES * DIM)
    return np.linspace(-0.5, 1.0, FRAMES * DIM), covariance


MEAN, COVARIANCE = process()


def exact(x, sigma, condition):
    """E[x0 | x] at levels sigma (B,) or (B, F): mu + C (C + diag(sigma^2))^-1 (x - mu)."""
    del condition
    sigma = jnp.broadcast_to(sigma.reshape(len(x), -1), (len(x), FRAMES)).astype(x.dtype)
    covariance, mean = jnp.asarray(COVARIANCE, x.dtype), jnp.asarray(MEAN, x.dtype)

    def one(x, sigma):
        noisy = covariance + jnp.diag(jnp.repeat(sigma, DIM) ** 2)
        return mean + covariance @ jnp.linalg.solve(noisy, x - mean)

    return jax.vmap(one)(x.reshape(len(x), -1), sigma).reshape(x.shape)


EXACT = jax.jit(exact, static_argnums=2)


def schedule(order, steps):
    """(N + 1, F) levels: each frame takes `steps` steps along one curve and a last one to 0.

    The frames start together, each when the one before has ended, or when it is half-way. With
    twice the steps all starts and ends lie at the same places of the curve.
    """
    delay = {"together": 0, "in turn": steps + 1, "pyramid": steps // 2}[order]
    curve = rho_grid(steps + 1, 1e-8, SIGMA_MAX)
    local = np.arange((FRAMES - 1) * delay + steps + 2)[:, None] - delay * np.arange(FRAMES)
    return curve[np.clip(local, 0, steps + 1)]


# ---- the samples' distribution -------------------------------------------------------------------


def final_error(grid, method):
    """How far mean and covariance of the samples are from the truth, for exact noisy data.

    Computed exactly: sampling is an affine map of the starting noise.
    """
    noisy = COVARIANCE + SIGMA_MAX**2 * np.eye(FRAMES * DIM)
    with jax.enable_x64(True):
        label, size = jnp.zeros(1, jnp.int32), FRAMES * DIM

        def run(x):
            return samplers.sample(exact, x.reshape(1, FRAMES, DIM), label, grid, method).ravel()

        end, jacobian = jax.jit(lambda x: (run(x), jax.jacfwd(run)(x)))(jnp.zeros(size))
        end, jacobian = np.asarray(end), np.asarray(jacobian)
    mean_error = end + jacobian @ MEAN - MEAN
    covariance_error = jacobian @ noisy @ jacobian.T - COVARIANCE
    return np.abs(mean_error).max(), np.abs(covariance_error).max()


@pytest.mark.parametrize(
    ("order", "method"),
    [("together", "heun"), ("in turn", "heun"), *(("pyramid", name) for name in METHODS)],
)
def test_every_schedule_reaches_the_distribution_of_the_data(order, method):
    """The error falls as h for Euler and as h^2 for the others."""
    errors = [final_error(schedule(order, n), method) for n in (64, 128)]
    means, covariances = np.transpose(errors)
    assert means.max() < 1e-9  # the mean is a fixed point of every step
    assert covariances[1] < {"euler": 0.025, "heun": 1e-3, "dpmpp_2m": 1e-3}[method]
    rate = np.log2(covariances[0] / covariances[1])
    assert rate == pytest.approx(METHODS[method], abs=0.15)


# ---- frames that move and frames that do not -----------------------------------------------------

# Frame 0 pauses for a step, frame 1 waits, frame 2 pauses for two and ends early, frame 3 is data.
GRID = np.array([
    [10.0, 10.0, 10.0, 0.0],
    [5.0, 10.0, 8.0, 0.0],
    [2.0, 10.0, 8.0, 0.0],
    [2.0, 3.0, 8.0, 0.0],
    [0.5, 1.0, 0.3, 0.0],
    [0.0, 0.2, 0.1, 0.0],
    [0.0, 0.05, 0.0, 0.0],
    [0.0, 0.0, 0.0, 0.0],
])  # fmt: skip
CHURN = samplers.Churn(amount=2.0, sigma_min=0.0, sigma_max=20.0, noise_scale=1.01)
LABELS = jnp.zeros(3, jnp.int32)
CASES = [("euler", None), ("heun", None), ("dpmpp_2m", None), ("euler", CHURN), ("heun", CHURN),
         ("ancestral", None), ("ancestral_2m", None)]  # fmt: skip


def start():
    keys = sample_keys(3, range(3))
    return keys, 10 * normal_like(keys, jnp.zeros((3, FRAMES, DIM)))


def by_hand(x, grid, method, churn, keys):
    """Each frame's own step, in plain Python: the textbook forms, and nothing for those at rest."""
    x, call, h_before, d_before = np.array(x), 0, np.zeros(FRAMES), None

    def noise(call):
        return np.asarray(normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, call), x))

    def estimate(x, levels):
        return np.asarray(EXACT(jnp.asarray(x), jnp.tile(levels, (len(x), 1)), None))

    for start, stop in itertools.pairwise(grid):
        moving, raised = [f for f in range(FRAMES) if stop[f] < start[f]], start.copy()
        for f in moving if churn is not None else ():
            if churn.sigma_min <= start[f] <= churn.sigma_max:
                raised[f] *= 1 + min(churn.amount / (len(grid) - 1), np.sqrt(2) - 1)
                std = np.sqrt(raised[f] ** 2 - start[f] ** 2) * churn.noise_scale
                x[:, f] += std * noise(call)[:, f]
        denoised = estimate(x, raised)
        new, h = x.copy(), np.zeros(FRAMES)
        for f in moving:
            new[:, f] += (stop[f] - raised[f]) * (x[:, f] - denoised[:, f]) / raised[f]
            h[f] = np.log(raised[f] / stop[f]) if stop[f] else 0
            d, ratio = denoised[:, f], stop[f] / start[f]
            if method.endswith("2m") and h[f] and h_before[f]:
                r = h_before[f] / h[f]
                d = (1 + 1 / (2 * r)) * denoised[:, f] - 1 / (2 * r) * d_before[:, f]
                new[:, f] = ratio * x[:, f] + (1 - ratio) * d
            if method.startswith("ancestral"):  # the posterior of x at stop given x and x0 = d
                std = stop[f] * np.sqrt(start[f] ** 2 - stop[f] ** 2) / start[f]
                new[:, f] = d + ratio**2 * (x[:, f] - d) + std * noise(call + 1)[:, f]
        call += 1
        if method == "heun" and (stop > 0).any():
            again, call = estimate(new, stop), call + 1
            for f in moving:
                if stop[f]:
                    slope = (x[:, f] - denoised[:, f]) / raised[f]
                    slope_there = (new[:, f] - again[:, f]) / stop[f]
                    new[:, f] = x[:, f] + (stop[f] - raised[f]) * (slope + slope_there) / 2
        x, h_before, d_before = new, h, denoised
    return x


@pytest.mark.parametrize(("method", "churn"), CASES)
def test_each_frame_makes_its_own_steps(method, churn):
    keys, x = start()
    expected = by_hand(x, GRID, method, churn, keys)
    got = samplers.sample(exact, x, LABELS, GRID, method, churn=churn, keys=keys)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["heun", "dpmpp_2m", "ancestral_2m"])
def test_a_frame_at_rest_keeps_its_bits(method):
    """Seen by the denoiser, call by call; it answers NaN for frames at level 0."""
    seen = []

    def denoise(x, sigma, condition):
        jax.debug.callback(lambda *call: seen.append(call), x, sigma, ordered=True)
        return jnp.where(sigma[..., None] > 0, exact(x, sigma, condition), jnp.nan)

    keys, x = start()
    end = samplers.sample(denoise, x, LABELS, GRID, method, keys=keys)
    jax.effects_barrier()
    whole = samplers.sample(exact, x, LABELS, GRID, method, keys=keys)
    np.testing.assert_array_equal(end, whole)
    np.testing.assert_array_equal(end[:, 3], x[:, 3])
    levels = np.float32(samplers.call_levels(GRID, method))
    np.testing.assert_array_equal([sigma[0] for _, sigma in seen], levels)
    states = [*(x for x, _ in seen), end]
    steps = np.arange(len(states)) // 2 if method == "heun" else np.arange(len(states))
    rests = np.append(np.diff(GRID, axis=0) == 0, np.ones((1, FRAMES), bool), axis=0)
    for k, (before, after) in enumerate(itertools.pairwise(states)):
        still = rests[steps[k]]
        assert still.any()
        np.testing.assert_array_equal(after[:, still], before[:, still])


@pytest.mark.parametrize("method", METHODS)
def test_a_correction_is_told_the_levels_and_shifts_active_frames_at_the_end_of_a_step(method):
    seen = []

    def correct(denoise, x, level, condition):
        jax.debug.callback(lambda *call: seen.append(call), *level, ordered=True)
        return denoise(x, level.sigma, condition), jnp.full_like(x, 0.5)

    _, x = start()
    end = samplers.sample(exact, x, LABELS, GRID, method, correct=correct)
    jax.effects_barrier()
    np.testing.assert_array_equal(end[:, 3], x[:, 3])
    sigma, stop, active = (np.array(part)[:, 0] for part in zip(*seen, strict=True))
    np.testing.assert_array_equal(sigma, np.float32(samplers.call_levels(GRID, method)))
    steps = np.arange(len(seen)) // 2 if method == "heun" else np.arange(len(seen))
    np.testing.assert_array_equal(stop, np.float32(GRID[1:][steps]))
    moves = (GRID[1:] < GRID[:-1])[steps]
    second = (np.arange(len(seen)) % 2 == 1)[:, None] & (method == "heun")
    np.testing.assert_array_equal(active, moves & ~(second & (stop == 0)))
    together = np.tile([[10.0], [5.0], [2.0], [0.5], [0.0]], FRAMES)
    for grid in {"euler": [GRID, together], "heun": [together], "dpmpp_2m": []}[method]:
        _, x = start()  # each frame's own steps, and 0.5 after each
        end = samplers.sample(exact, x, LABELS, grid, method, correct=correct)
        for a, b in itertools.pairwise(grid):
            x = by_hand(x, np.array([a, b]), method, None, None) + 0.5 * (b < a)[:, None]
        np.testing.assert_allclose(end, x, rtol=1e-4, atol=1e-4)

    def moved(by):
        correct = lambda f, x, c, k: (0 * x, 0 * x + by)  # noqa: E731
        return samplers.sample(exact, x, LABELS, GRID, method, correct=correct)

    # also the step that ends a frame before the others
    np.testing.assert_allclose((moved(1) - moved(0))[:, :3], 1, atol=1e-4)


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ([[2, 2], [1, 3], [0, 0]], "must fall"),
        ([[2, 2], [1, 1], [0, 0.1]], "end in 0"),
        ([[2, 2], [1, 1], [1, 1], [0, 0]], "in every step for some frame"),
        ([[[2, 2]], [[0, 0]]], r"shape \(2, 1, 2\); expected .* or \(num_steps \+ 1, frames\)"),
        ([[2, 2]], r"shape \(1, 2\)"),
    ],
)
def test_bad_schedules_are_refused(grid, message):
    with pytest.raises(ValueError, match=message):
        samplers.sample(exact, jnp.ones((1, 2, 1)), LABELS[:1], np.array(grid, np.float32))


def test_a_stabilised_denoiser_sees_no_level_below_the_floor():
    x, sigma = jnp.ones((2, FRAMES, DIM)), jnp.array([[0.0, 0.01, 0.02, 3.0], [5.0, 0.0, 1.0, 0.3]])
    expected = exact(x, jnp.maximum(sigma, 0.02), LABELS[:2])
    np.testing.assert_array_equal(samplers.stabilised(exact, 0.02)(x, sigma, LABELS[:2]), expected)
    _, x = start()
    steady = samplers.sample(samplers.stabilised(exact, 0.02), x, LABELS, GRID)
    np.testing.assert_allclose(steady, samplers.sample(exact, x, LABELS, GRID), atol=0.05)
    np.testing.assert_array_equal(steady[:, 3], x[:, 3])
