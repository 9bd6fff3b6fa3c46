import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax import noise
from mclr_jax.denoiser import V


@pytest.mark.parametrize(("n", "low", "high", "rho"), [(18, 0.002, 80, 7), (5, 0.01, 10, 3)])
def test_rho_grid_is_edm_equation_5(n, low, high, rho):
    """The formula written out step by step."""
    places = [i / (n - 1) for i in range(n)]
    expected = [
        (high ** (1 / rho) + i * (low ** (1 / rho) - high ** (1 / rho))) ** rho for i in places
    ]
    np.testing.assert_allclose(noise.rho_grid(n, low, high, rho), [*expected, 0.0], rtol=1e-12)
    np.testing.assert_allclose(noise.rho_grid(1, low, high, rho), [high, 0.0], rtol=1e-12)


@pytest.mark.parametrize("bad", [(0, 0.002, 80, 7), (5, 0, 80, 7), (5, 90, 80, 7), (5, 0.1, 1, 0)])
def test_bad_grids_are_refused(bad):
    with pytest.raises(ValueError, match=r"num_steps is 0|expected 0 < sigma_min"):
        noise.rho_grid(*bad)


def test_training_distributions_have_their_moments():
    """And the levels of three frames are independent."""
    keys = jax.random.split(jax.random.key(0), 100_000)

    def log_sigma(levels):
        sigma = jax.vmap(lambda key: levels.sample(key, (3,)))(keys)
        found = np.log(np.asarray(sigma, np.float64))
        np.testing.assert_allclose(np.corrcoef(found.T), np.eye(3), atol=0.015)
        return found

    normal = log_sigma(noise.LogNormal(-0.4, 1.3))
    np.testing.assert_allclose(normal.mean(0), np.full(3, -0.4), atol=0.015)
    np.testing.assert_allclose(normal.std(0), np.full(3, 1.3), atol=0.015)
    uniform = log_sigma(noise.LogUniform(0.01, 10.0))
    low, high = np.log(0.01), np.log(10.0)
    np.testing.assert_allclose(uniform.mean(0), np.full(3, (low + high) / 2), atol=0.03)
    np.testing.assert_allclose(uniform.std(0), np.full(3, (high - low) / 12**0.5), atol=0.03)
    assert uniform.min() >= low - 1e-5
    assert uniform.max() <= high + 1e-5


# ---- levels by frame -----------------------------------------------------------------------------

FRAMES = 12
LOW, HIGH = np.log(0.004), np.log(20.0)


def quantiles(count=4000, **shares):
    """Quantiles (count, FRAMES) of levels by `Forcing`, with these shares and no others."""
    none = {"shared": 0.0, "independent": 0.0, "prefix": 0.0, "segments": 0.0}
    levels = noise.Forcing(**none | shares)
    keys = jax.random.split(jax.random.key(0), count)
    sigma = jax.jit(jax.vmap(lambda key: levels.sample(key, (FRAMES,))))(keys)
    return (np.log(np.asarray(sigma, np.float64)) - LOW) / (HIGH - LOW)


def test_patterns_of_forcing_have_their_shapes():
    """Joint, independent, a lower past, and three parts; quantiles of single levels are uniform."""
    shared = quantiles(shared=1.0)
    assert np.ptp(shared, axis=1).max() < 1e-6
    np.testing.assert_allclose(np.histogram(shared[:, 0], 4, (0, 1))[0] / 4000, 0.25, atol=0.03)
    independent = quantiles(independent=1.0)
    np.testing.assert_allclose(np.corrcoef(independent.T), np.eye(FRAMES), atol=0.06)
    np.testing.assert_allclose(independent.mean(0), np.full(FRAMES, 0.5), atol=0.02)

    segments = quantiles(segments=1.0)
    ends = (np.abs(np.diff(segments)) > 1e-6).sum(1)
    assert set(ends) <= {0, 1, 2}
    assert (ends == 2).mean() > 0.8  # cuts fall together in one of 11 cases
    np.testing.assert_allclose(segments.mean(0), np.full(FRAMES, 0.5), atol=0.02)

    prefix = quantiles(prefix=1.0)
    assert np.diff(prefix).min() > -1e-5  # levels never fall with the frame
    assert abs((prefix[:, 0] < 1e-6).mean() - 0.5) < 0.03
    flat = np.abs(prefix[:, -1] - prefix[:, -2]) < 1e-6
    last = np.abs(np.diff(prefix)[:, -1]) > 1e-6
    assert 0.4 < (last & ~flat).mean() < 0.65  # rising, or a past of all but one frame
    rising = prefix[(np.abs(np.diff(prefix)) > 1e-6).sum(1) > 3]
    second = np.diff(rising, 2)[:, -1]
    assert np.median(np.abs(second)) < 1e-5  # linearly


def test_short_records_have_known_frames_and_frames_that_do_not_exist():
    """Sigma_min in 1, ... frames, as many of 1 as of 2 and 3; one level; then sigma_max."""
    found = quantiles(prefix=1.0, short=1.0)
    known, after = (found < 1e-6).sum(1), (found > 1 - 1e-6).sum(1)
    assert np.diff(found).min() > -1e-5
    assert {*known} == {*range(1, FRAMES)}
    shares = np.log2([2 / 1, 4 / 2, 8 / 4]) / np.log2(FRAMES)
    np.testing.assert_allclose(
        [(known == 1).mean(), np.isin(known, (2, 3)).mean(), np.isin(known, (4, 5, 6, 7)).mean()],
        shares, atol=0.03,
    )  # fmt: skip
    lengths = FRAMES - after[known == 1]  # of the records
    assert {*lengths} == {*range(2, FRAMES + 1)}
    np.testing.assert_allclose((lengths == FRAMES).mean(), 1 / (FRAMES - 1), atol=0.03)
    level = found[(known == 1) & (after < FRAMES - 2)][:, 1:3]
    assert np.ptp(level, axis=1).max() < 1e-5
    np.testing.assert_allclose(
        np.histogram(level[:, 0], 4, (0, 1))[0] / len(level), 0.25, atol=0.05
    )
    some = quantiles(prefix=1.0, short=0.5)
    assert abs((some[:, -1] > 1 - 1e-6).mean() - 0.5 * (after > 0).mean()) < 0.04


def test_patterns_of_forcing_have_their_shares():
    found = quantiles(shared=0.4, independent=0.3, segments=0.3)
    changes = (np.abs(np.diff(found)) > 1e-6).sum(1)
    assert abs((changes == 0).mean() - 0.4) < 0.035
    assert abs((changes > 2).mean() - 0.3) < 0.025


def test_levels_of_forcing_may_be_lognormal_within_their_range():
    """Against rejection from the normal distribution."""
    levels = noise.Forcing(sigma_min=0.02, sigma_max=3.0, mean=-1.0, std=1.5)
    keys = jax.random.split(jax.random.key(0), 20_000)
    log_sigma = np.log(jax.vmap(lambda key: levels.sample(key))(keys))
    draws = -1.0 + 1.5 * np.random.default_rng(0).normal(size=60_000)
    kept = draws[(draws > np.log(0.02)) & (draws < np.log(3.0))]
    probes = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(log_sigma, probes), np.quantile(kept, probes), atol=0.05)
    assert log_sigma.min() > np.log(0.02) - 1e-3


def causal(rho, count, frames, **options):
    levels = noise.CausalForcing(rho, **options)
    keys = jax.random.split(jax.random.key(1), count)
    return np.asarray(jax.jit(jax.vmap(lambda key: levels.steps(key, frames)))(keys)), keys


def test_causal_levels_are_the_columns_of_the_pyramid():
    """Every row after its context is clip(S + j - m, 0, S), mapped linearly onto -1 .. 999."""
    steps, _ = causal(1.0, 3000, 4, stages=10, context=1)
    pyramids = {
        tuple(-1 + 100 * min(max(10 + j - m, 0), 10) for j in range(3)) for m in range(10 + 3)
    }
    assert {tuple(row) for row in steps[:, 1:].tolist()} == pyramids
    assert min(min(p) for p in pyramids) == -1
    assert max(max(p) for p in pyramids) == 999
    # each m as often as the others: m = 0, 1 and 2 begin at the top, m = 10, ... at the bottom
    for level, m in [(999, 1), (-1, 3), (499, 1)]:
        assert abs((steps[:, 1] == level).mean() - m / 13) < 0.025
    own = np.sort(steps[:, 0])
    np.testing.assert_allclose(own[[750, 1500, 2250]], [250, 500, 750], atol=35)


def test_causal_contexts_and_shares():
    steps, _ = causal(1.0, 4000, 5, stages=2000)
    # with this many stages consecutive frames of a pyramid differ by one half step
    follows = np.abs(np.diff(steps)) <= 1
    start = [(follows[:, k:].all(1) & ~follows[:, :k].any(1)).mean() for k in range(1, 4)]
    np.testing.assert_allclose(start, np.full(3, 0.25), atol=0.03)  # n ~ U{1, ..., 4}
    assert steps.min() >= -1
    assert steps.max() == 999
    some, _ = causal(0.25, 4000, 40, context=4)
    pyramid = (np.abs(np.diff(some[:, 4:])) <= 10).all(1)
    assert abs(pyramid.mean() - 0.25) < 0.025
    rest = some[~pyramid]
    assert rest.min() == 0
    np.testing.assert_allclose(rest.mean(), 499.5, atol=5)


def test_causal_levels_are_those_of_the_table():
    levels = noise.CausalForcing(1.0, context=1)
    steps, keys = causal(1.0, 50, 6, context=1)
    sigma = jax.vmap(lambda key: levels.sample(key, (6,)))(keys)
    falling = 1 / (1 + np.exp(np.linspace(-3, 3, 1001)))  # sigmoid(3 .. -3)
    alpha_bar = (falling - falling[-1]) / (falling[0] - falling[-1])
    table = np.sqrt(1 / alpha_bar[1:-1] - 1)  # the last of the table is bounded
    inner = (steps >= 0) & (steps < 999)
    np.testing.assert_allclose(sigma[inner], table[steps[inner]], rtol=1e-4)
    assert inner.sum() > 50
    np.testing.assert_allclose(sigma[steps == -1], V().sigma_range[0], rtol=1e-5)
    np.testing.assert_allclose(sigma[steps == 999], V().sigma_range[1], rtol=1e-5)


def test_noise_of_a_sample_is_addressed_by_seed_and_number():
    x = jnp.zeros((4, 3, 2))
    all_four = noise.normal_like(noise.sample_keys(1, [0, 1, 2, 3]), x)
    two = noise.normal_like(noise.sample_keys(1, [2, 0]), x[:2])
    np.testing.assert_array_equal(all_four[np.array([2, 0])], two)
    other_seed = noise.normal_like(noise.sample_keys(2, [0, 1, 2, 3]), x)
    assert np.abs(all_four - other_seed).min() > 0
    half = noise.normal_like(noise.sample_keys(1, [0]), x[:1].astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16


def test_the_noise_of_samples_is_that_of_earlier_versions():
    """A seed and a number name a sample for ever."""
    n = noise.normal_like(noise.sample_keys(5, [0, 3]), jnp.zeros((2, 2)))
    expected = [[0.41528264, 1.1503867], [-1.2152554, 0.08600466]]
    np.testing.assert_allclose(n, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: noise.LogNormal(mean=21.0), "mean is 21.0; .*at least -20 and at most 20"),
        (lambda: noise.LogUniform(sigma_min=0.0), "sigma_min is 0.0; .*at least 1e-09"),
        (lambda: noise.LogUniform(sigma_min=2.0, sigma_max=1.0), "sigma_max is 1.0; .*at least 2"),
        (lambda: noise.Forcing(shared=0.5), r"\+ prefix \+ segments is 1\.15; expected 1"),
        (lambda: noise.Forcing(shared=1.1, prefix=-0.5), r"noise\.shared is 1\.1"),
        (lambda: noise.Forcing(sigma_max=0.001), r"noise\.sigma_max is 0\.001"),
    ],
)
def test_levels_that_cannot_be_are_refused(make, message):
    """Their squares are to be held by a float32."""
    with pytest.raises(ValueError, match=message):
        make()
