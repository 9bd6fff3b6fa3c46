"""Noise levels per frame, against a linear-Gaussian trajectory, whose denoiser is exact at any."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from configs import base
from mclr_jax import main, runs, samplers
from mclr_jax.data.protocol import Arrays
from mclr_jax.denoiser import natural_weight
from mclr_jax.guidance import autoguidance
from mclr_jax.noise import LogNormal, normal_like, rho_grid, sample_keys

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


def exact(x, sigma, condition, covariance=COVARIANCE):
    """E[x0 | x] at levels sigma (B,) or (B, F): mu + C (C + diag(sigma^2))^-1 (x - mu)."""
    del condition
    sigma = jnp.broadcast_to(sigma.reshape(len(x), -1), (len(x), FRAMES)).astype(x.dtype)
    covariance, mean = jnp.asarray(covariance, x.dtype), jnp.asarray(MEAN, x.dtype)

    def one(x, sigma):
        noisy = covariance + jnp.diag(jnp.repeat(sigma, DIM) ** 2)
        return mean + covariance @ jnp.linalg.solve(noisy, x - mean)

    return jax.vmap(one)(x.reshape(len(x), -1), sigma).reshape(x.shape)


def schedule(order, steps, sigma_min=1e-8, rho=7.0):
    """(N + 1, F) levels: each frame takes `steps` steps along one curve and a last one to 0.

    The frames start together, each when the one before has ended, or when it is half-way. With
    twice the steps all starts and ends lie at the same places of the curve.
    """
    delay = {"together": 0, "in turn": steps + 1, "pyramid": steps // 2}[order]
    curve = rho_grid(steps + 1, sigma_min, SIGMA_MAX, rho)
    local = np.arange((FRAMES - 1) * delay + steps + 2)[:, None] - delay * np.arange(FRAMES)
    return curve[np.clip(local, 0, steps + 1)]


# ---- the samples' distribution -------------------------------------------------------------------


def final_error(grid, method, mean, covariance):
    """How far mean and covariance of the samples are from the truth, for x_init ~ N(mean, cov).

    Computed exactly: sampling is an affine map of x_init.
    """
    with jax.enable_x64(True):
        label, size = jnp.zeros(1, jnp.int32), FRAMES * DIM

        def run(x):
            return samplers.sample(exact, x.reshape(1, FRAMES, DIM), label, grid, method).ravel()

        end, jacobian = jax.jit(lambda x: (run(x), jax.jacfwd(run)(x)))(jnp.zeros(size))
        end, jacobian = np.asarray(end), np.asarray(jacobian)
    mean_error = end + jacobian @ mean - MEAN
    covariance_error = jacobian @ covariance @ jacobian.T - COVARIANCE
    return np.abs(mean_error).max(), np.abs(covariance_error).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["together", "in turn", "pyramid"])
def test_every_schedule_reaches_the_distribution_of_the_data(order, method):
    """The error falls as h for Euler and as h^2 for the others."""
    noisy = COVARIANCE + SIGMA_MAX**2 * np.eye(FRAMES * DIM)
    errors = [final_error(schedule(order, n), method, MEAN, noisy) for n in (32, 64, 128)]
    means, covariances = np.transpose(errors)
    assert means.max() < 1e-9  # the mean is a fixed point of every step
    assert covariances[-1] < {"euler": 0.025, "heun": 1e-3, "dpmpp_2m": 1e-3}[method]
    rates = np.log2(covariances[:-1] / covariances[1:])
    np.testing.assert_allclose(rates, METHODS[method], atol=0.15)


def test_pure_noise_is_as_good_a_start_where_it_is_large():
    """x_init ~ N(0, sigma_max^2) knows no mean: what is left of it falls as 1 / sigma_max."""
    grid = schedule("pyramid", 128)
    for scale, limit in [(1, 0.12), (10, 0.012)]:
        prior = (scale * SIGMA_MAX) ** 2 * np.eye(FRAMES * DIM)
        errors = final_error(scale * grid, "heun", np.zeros(FRAMES * DIM), prior)
        assert max(errors) < limit, (scale, errors)


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
    call, h_before, d_before = 0, np.zeros(FRAMES), None
    for start, stop in itertools.pairwise(grid):
        moving, raised = [f for f in range(FRAMES) if stop[f] < start[f]], start.copy()
        if churn is not None:
            noise = normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, call), x)
            for f in moving:
                if churn.sigma_min <= start[f] <= churn.sigma_max:
                    rise = min(churn.amount / (len(grid) - 1), np.sqrt(2) - 1)
                    raised[f] = start[f] * (1 + rise)
                    std = np.sqrt(raised[f] ** 2 - start[f] ** 2) * churn.noise_scale
                    x = x.at[:, f].add(std * noise[:, f])
        denoised = exact(x, jnp.tile(raised, (len(x), 1)), None)
        new, h = x, np.zeros(FRAMES)
        for f in moving:
            slope = (x[:, f] - denoised[:, f]) / raised[f]
            new = new.at[:, f].add((stop[f] - raised[f]) * slope)
            h[f] = np.log(raised[f] / stop[f]) if stop[f] else 0
            d, ratio = denoised[:, f], stop[f] / start[f]
            if method.endswith("2m") and h[f] and h_before[f]:
                r = h_before[f] / h[f]
                d = (1 + 1 / (2 * r)) * denoised[:, f] - 1 / (2 * r) * d_before[:, f]
                new = new.at[:, f].set(ratio * x[:, f] + (1 - ratio) * d)
            if method.startswith("ancestral"):  # the posterior of x at stop given x and x0 = d
                noise = normal_like(jax.vmap(jax.random.fold_in, (0, None))(keys, call + 1), x)
                std = stop[f] * np.sqrt(start[f] ** 2 - stop[f] ** 2) / start[f]
                drawn = d + ratio**2 * (x[:, f] - d) + std * noise[:, f]
                new = new.at[:, f].set(drawn)
        call += 1
        if method == "heun" and (stop > 0).any():
            again, call = exact(new, jnp.tile(stop, (len(x), 1)), None), call + 1
            predicted = new
            for f in moving:
                if stop[f]:
                    slope = (x[:, f] - denoised[:, f]) / raised[f]
                    slope_there = (predicted[:, f] - again[:, f]) / stop[f]
                    step = (stop[f] - raised[f]) * (slope + slope_there) / 2
                    new = new.at[:, f].set(x[:, f] + step)
        x, h_before, d_before = new, h, denoised
    return x


@pytest.mark.parametrize(("method", "churn"), CASES)
def test_each_frame_makes_its_own_steps(method, churn):
    keys, x = start()
    expected = by_hand(x, GRID, method, churn, keys)
    got = samplers.sample(exact, x, LABELS, GRID, method, churn=churn, keys=keys)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "churn"), CASES)
def test_a_frame_at_rest_keeps_its_bits(method, churn):
    """Seen by the denoiser, call by call; it answers NaN for frames at level 0."""
    seen = []

    def denoise(x, sigma, condition):
        jax.debug.callback(lambda *call: seen.append(call), x, sigma, ordered=True)
        return jnp.where(sigma[..., None] > 0, exact(x, sigma, condition), jnp.nan)

    keys, x = start()
    end = samplers.sample(denoise, x, LABELS, GRID, method, churn=churn, keys=keys)
    jax.effects_barrier()
    np.testing.assert_array_equal(
        end, samplers.sample(exact, x, LABELS, GRID, method, churn=churn, keys=keys)
    )
    np.testing.assert_array_equal(end[:, 3], x[:, 3])
    if churn is None:
        levels = np.float32(samplers.call_levels(GRID, method))
        np.testing.assert_array_equal([sigma[0] for _, sigma in seen], levels)
    states = [*(x for x, _ in seen), end]
    steps = np.arange(len(states)) // 2 if method == "heun" else np.arange(len(states))
    rests = np.append(np.diff(GRID, axis=0) == 0, np.ones((1, FRAMES), bool), axis=0)
    for k, (before, after) in enumerate(itertools.pairwise(states)):
        still = rests[steps[k]]
        if churn is not None:  # what is seen in the next step has its noise already
            still = still & rests[steps[k + 1]]
        assert still.any()
        np.testing.assert_array_equal(after[:, still], before[:, still])


@pytest.mark.parametrize(("method", "churn"), CASES)
def test_equal_levels_in_all_frames_are_one_level(method, churn):
    keys, x = start()
    grid = rho_grid(6, 0.01, 10.0)
    one, each = (
        samplers.sample(exact, x, LABELS, levels, method, churn=churn, keys=keys)
        for levels in (grid, np.tile(grid[:, None], FRAMES))
    )
    np.testing.assert_allclose(one, each, rtol=1e-5, atol=2e-6)  # up to rounding of fused code


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
    # also the step that ends a frame before the others
    plain = samplers.sample(
        exact, x, LABELS, GRID, method, correct=lambda f, x, c, k: (0 * x, 0 * x)
    )
    moved = samplers.sample(
        exact, x, LABELS, GRID, method, correct=lambda f, x, c, k: (0 * x, 0 * x + 1)
    )
    np.testing.assert_allclose((moved - plain)[:, :3], 1, atol=1e-4)


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
    lowest = []

    def denoise(x, sigma, condition):
        jax.debug.callback(lambda level: lowest.append(level.min()), sigma)
        return exact(x, sigma, condition)

    _, x = start()
    steady = samplers.sample(samplers.stabilised(denoise, 0.02), x, LABELS, GRID)
    jax.effects_barrier()
    assert min(lowest) == np.float32(0.02)
    np.testing.assert_allclose(steady, samplers.sample(exact, x, LABELS, GRID), atol=0.05)
    np.testing.assert_array_equal(steady[:, 3], x[:, 3])


def test_guidance_in_an_interval_looks_at_each_frame():
    weak = lambda x, sigma, condition: 0 * x  # noqa: E731
    x, sigma = jnp.ones((2, FRAMES, DIM)), jnp.array([[0.1, 0.5, 2.0, 3.0], [1.0, 0.0, 9.0, 0.6]])
    guided = autoguidance(exact, weak, jnp.array([3.0, 2.0]), (0.5, 2.0))(x, sigma, LABELS[:2])
    scale = jnp.array([[1.0, 1.0, 3.0, 1.0], [2.0, 1.0, 1.0, 2.0]])
    expected = scale[..., None] * exact(x, sigma, LABELS[:2])
    np.testing.assert_allclose(guided, expected, rtol=1e-5)


# ---- training with levels of their own -----------------------------------------------------------


def trajectories(split):
    """A data source as a user's own: 20,000 draws of the process, in one class."""
    rng = np.random.default_rng({"train": 0, "test": 1}[split])
    x = rng.multivariate_normal(MEAN, COVARIANCE, 20_000).astype(np.float32)
    return Arrays(x.reshape(-1, FRAMES, DIM), np.zeros(20_000, np.int32), 1)


def frame_by_frame(x, sigma, condition):
    """The best that can be said of each frame alone."""
    del condition
    blocks = np.zeros_like(COVARIANCE)
    for f in range(FRAMES):
        part = slice(f * DIM, (f + 1) * DIM)
        blocks[part, part] = COVARIANCE[part, part]
    return exact(x, sigma, None, blocks)


@pytest.mark.slow
def test_a_network_learns_the_denoiser_at_independent_levels_of_the_frames(tmp_path):
    """By the loop, with nothing but the network's `per_frame` set.

    The weight of the loss makes distances comparable over levels: 1 is the variance of what the
    network itself has to give.
    """
    config = tiny.config("mixture", num_steps=400, batch_size=128, steps_per_dispatch=50)
    config.update_from_flattened_dict({
        "parallel": "data", "log_every": 400, "checkpoint_every": 400, "eval_examples": 0,
        "ema.halflife_steps": 30.0, "optimizer.learning_rate": 5e-3,
        "sigma_data": 0.0, "data.name": f"{__name__}:trajectories",
    })  # fmt: skip
    config.network = base.options("mlp", width=64, depth=2, per_frame=True)
    main.train(config, tmp_path)
    run = runs.load(tmp_path)
    assert run.model.frames == (FRAMES,)

    keys = sample_keys(1, range(2000))
    x0, _ = trajectories("test")[np.arange(2000)]
    sigma = jax.vmap(lambda key: LogNormal(-0.4, 1.2).sample(key, (FRAMES,)))(keys)
    x = x0 + sigma[..., None] * normal_like(keys, x0)
    truth, weight = exact(x, sigma, None), natural_weight(run.model.preconditioning, sigma)

    def distance(denoise, levels=sigma):
        return float((weight * ((denoise(x, levels, None) - truth) ** 2).mean(-1)).mean())

    learned = distance(run.model.denoise(run.weights()[0]))
    untrained = distance(run.model.denoise(run.model.init(jax.random.key(0))))
    alone = distance(frame_by_frame)
    one_level = distance(exact, jnp.exp(jnp.log(sigma).mean(-1, keepdims=True) * jnp.ones(FRAMES)))
    assert untrained > 0.4
    assert learned < min(0.035, untrained / 10, alone / 5, one_level / 100)
