"""Filter, fixed lag and batch with an exact denoiser, against Kalman's answers."""

import dataclasses
import types

import jax
import numpy as np
import oracle
import pytest
import scipy.stats

from mclr_jax.assimilation import guide, regimes
from mclr_jax.assimilation.observe import Operator
from mclr_jax.assimilation.regimes import assimilate
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.types import label_of

PROCESS = oracle.Process()
FRAMES = 12
COUNT = 4  # of trajectories
TRUTH, SEEN = PROCESS.draw(COUNT, FRAMES, 0.3, missing=(3, 7))
EXACT = oracle.Exact()


def until(lag, frames=FRAMES):
    return np.minimum(np.arange(frames) + lag, frames - 1).astype(int)


def errors(result, lag, observations=SEEN, process=PROCESS):
    """Of the mean in posterior standard deviations, and ratio of the spread."""
    frames = observations.values.shape[1]
    mean, std = process.posterior(observations, until(lag, frames))
    return oracle.errors(result.members[:, :, :frames], mean, np.maximum(std, 1e-3))


def run(scheme=EXACT, lag=0, observations=SEEN, process=PROCESS, ensemble=256, **options):
    lag = np.broadcast_to(lag, observations.values.shape[1])
    options = {"batch_size": 8192, "ensemble": ensemble} | options
    return assimilate(process, None, observations, scheme, lag, **options)


def test_batch_is_kalmans_smoother_and_the_spread_converges():
    """Spread of the second-order method 1.02 to 1.04 at 16 steps, first order below .8."""
    wrong, ratio = errors(run(lag=np.inf), np.inf)
    assert wrong < 0.03
    assert abs(ratio - 1) < 0.015
    for method, low, high in [("ancestral_2m", 1.01, 1.05), ("ancestral", 0.7, 0.8)]:
        scheme = dataclasses.replace(EXACT, first_steps=16, method=method)
        wrong, ratio = errors(run(scheme, np.inf), np.inf)
        assert wrong < 0.03
        assert low < ratio < high


def test_the_window_filter_is_kalmans_filter_and_gives_any_lag():
    wrong, ratio = errors(run(), 0)
    assert wrong < 0.04
    assert abs(ratio - 1) < 0.05
    wrong, ratio = errors(run(lag=3), 3)
    assert wrong < 0.08  # the window of 8 frames has 4 before the frame
    assert abs(ratio - 1) < 0.05


def test_the_guidance_for_networks_is_nearly_exact():
    """One step along the gradient: the mean within .15 of a standard deviation, the spread 3%."""
    wrong, ratio = errors(run(Scheme(), np.inf), np.inf)
    assert wrong < 0.15
    assert abs(ratio - 1) < 0.03
    wrong, ratio = errors(run(Scheme()), 0)
    assert wrong < 0.15
    assert abs(ratio - 1) < 0.06


def test_guidance_of_the_paper_is_biased():
    """Its mean and spread at the zeta that is best here, and at the paper's."""

    def of(zeta):
        scheme = Scheme(first_steps=64, guidance="norm", zeta=zeta, method="euler")
        return errors(run(scheme, np.inf), np.inf)

    (best, spread), (papers, _) = of(0.1), of(2.0)
    assert 0.1 < best < papers
    assert spread < 0.9


@pytest.mark.slow
def test_a_known_start_and_a_forecast():
    """In physical units. Beyond the last observation the spread grows to that of the process."""
    process = oracle.Process(offset=(3.0, -1.0), scale=(8.0, 0.5))
    truth, seen = process.draw(2 * COUNT, 5, 2.0, initial=True)
    for lag in (0, np.inf):
        result = run(lag=lag, observations=seen, process=process, forecast=6)
        assert result.members.shape == (2 * COUNT, 256, 11, 2)
        np.testing.assert_allclose(
            result.members[:, :, 0], truth[:, None, 0].repeat(256, 1), rtol=1e-5
        )
        mean, std = process.posterior(seen, np.append(until(lag, 5), [4] * 6), frames=11)
        wrong, ratio = oracle.errors(result.members[:, :, 1:], mean[:, 1:], std[1:])
        assert wrong < 0.05
        assert abs(ratio - 1) < 0.05
    assert std[-1, 0] > 7.5


def test_long_trajectories_in_blocks():
    """Batch with a window of 8 frames, of which half are new in each block."""
    _, seen = PROCESS.draw(2 * COUNT, 16, 0.3)
    wrong, ratio = errors(run(dataclasses.replace(EXACT, window=8), np.inf, seen), np.inf, seen)
    assert wrong < 0.08
    assert abs(ratio - 1) < 0.05


def small(count=3, frames=FRAMES, **options):
    return PROCESS.draw(count, frames, 0.3, **options)[1]


def test_a_continued_run_is_the_run_without_a_pause():
    """The same members; where the lag allows, the frames before the pause are revised."""
    seen, lag = small(), 3
    first, second = (dataclasses.replace(seen, values=seen.values[:, part])
                     for part in (slice(0, 7), slice(7, None)))  # fmt: skip
    whole = run(Scheme(), lag, seen, ensemble=3)
    start = run(Scheme(), lag, first, ensemble=3)
    rest = run(Scheme(), lag, second, ensemble=3, state=start.state)
    assert (start.first, rest.first) == (0, 7 - lag)
    np.testing.assert_allclose(rest.members, whole.members[:, :, 7 - lag :], atol=1e-4)
    np.testing.assert_allclose(
        start.members[:, :, : 7 - lag], whole.members[:, :, : 7 - lag], atol=1e-4
    )
    assert rest.state.frames == FRAMES
    np.testing.assert_allclose(rest.state.members, whole.state.members, atol=1e-4)


def test_a_member_depends_on_seed_trajectory_and_number_alone():
    def of(observations, ensemble, **options):
        return run(Scheme(), 0, observations, ensemble=ensemble, **options).members

    seen = small(frames=5)
    two = dataclasses.replace(seen, values=seen.values[:2])
    members = of(seen, 4)
    np.testing.assert_allclose(of(seen, 4, batch_size=3), members, atol=1e-4)
    np.testing.assert_allclose(of(two, 4, batch_size=3), members[:2], atol=1e-4)
    assert np.abs(of(seen, 4, seed=1) - members).max() > 0.1
    assert np.abs(members[:, 0] - members[:, 1]).max() > 0.1


def test_no_more_members_at_a_time_than_asked_for():
    calls = []
    progress = lambda *told: calls.append(told)  # noqa: E731
    run(Scheme(), 0, small(frames=2), ensemble=4, batch_size=3, progress=progress)
    members, updates = zip(*calls, strict=True)
    assert (max(members), sum(members), {*updates}) == (3, 2 * 12, {2})


def test_other_values_and_another_noise_need_no_compilation():
    seen = small()
    members = run(Scheme(), 0, seen, ensemble=2).members
    program = regimes._compiled(PROCESS, seen.operator, Scheme())
    before = program._cache_size()
    assert before > 0
    other = dataclasses.replace(seen, values=seen.values + 1, std=0.9)
    assert np.abs(run(Scheme(), 0, other, ensemble=2).members - members).max() > 0.1
    assert program._cache_size() == before


def test_later_observations_do_not_change_the_filter():
    seen = small()
    other = dataclasses.replace(seen, values=seen.values.copy())
    other.values[:, 8:] += 5
    one, two = (run(Scheme(), 0, y, ensemble=2).members for y in (seen, other))
    np.testing.assert_array_equal(one[:, :, :8], two[:, :, :8])
    assert np.abs(one[:, :, 8:, 0] - two[:, :, 8:, 0]).min() > 0


def seen_by(change, **fields):
    """A process whose moments are `change` of their own ones and the levels."""

    class Changed(oracle.Process):
        def moments(self, params):
            exact = oracle.Process.moments(self, params)
            return lambda x, sigma, condition: change(exact(x, sigma, condition), sigma)

    return Changed(**fields)


def test_a_network_of_tokens_gets_whole_tokens():
    def whole(answer, sigma):
        assert sigma.shape[1] % 4 == 0
        return answer

    process, seen = seen_by(whole, window=6), small(frames=6)
    type(process).network = types.SimpleNamespace(frames_per_token=4)
    for lag in (0, np.inf):
        assert run(Scheme(), lag, seen, process, ensemble=2).members.shape == (3, 2, 6, 2)


def test_a_member_is_plausible_within_the_chi_square_law_of_its_misfit():
    """17 known values with misfit 1 each: P(chi2 <= 17) = .5516 of scipy, and missing ones."""
    values = np.full((1, 9, 2), 3.0)
    values[0, 4, 1] = np.nan
    seen = guide.Seen(values, np.float32(0.5), 1.0, 2.0)
    x = np.full((1, 9, 2), 0.75)  # 1 + 2 x = 3 - .5
    share = scipy.stats.chi2.cdf(17, 17)
    for wanted, given in [(True, share + 1e-3), (False, share - 1e-3)]:
        assert regimes.plausible(Operator(), seen, x, given).tolist() == [wanted]
    nothing = seen._replace(values=np.full((1, 9, 2), np.nan))
    assert regimes.plausible(Operator(), nothing, x, 1e-6).tolist() == [True]


def test_members_are_replaced_by_kept_ones_of_their_trajectory():
    x, group = np.arange(8.0)[:, None], np.array([0, 0, 0, 0, 1, 1, 2, 2])
    kept = np.array([True, False, True, False, False, False, False, True])
    found = []
    for seed in range(40):
        keys = jax.random.split(jax.random.key(seed), 8)
        found.append(regimes.screened(x, kept, group, keys)[:, 0])
    found = np.array(found)
    np.testing.assert_array_equal(found[:, [0, 2, 4, 5, 6, 7]], [[0, 2, 4, 5, 7, 7]] * 40)
    assert set(found[:, 1]) == set(found[:, 3]) == {0, 2}
    assert (found[:, 1] != found[:, 3]).any()


def test_a_filter_replaces_members_that_the_observations_contradict():
    """With guidance that does nothing every member is one of the prior."""
    _, seen = PROCESS.draw(COUNT, FRAMES, 0.3, every=6)
    blind = Scheme(guidance="norm", zeta=0.0)
    with_all, rest = (
        run(dataclasses.replace(blind, screen=screen), np.inf, seen).members
        for screen in (1.0, 0.999)
    )
    missed = (np.abs(m[..., 0] - seen.values[:, None, :, 0]) for m in (with_all, rest))
    wrong = [np.nanmean(values, (1, 2)) for values in missed]
    unique = [len(np.unique(m[0, :, -1, 0])) for m in (with_all, rest)]
    assert unique[1] < unique[0] == 256
    assert np.all(wrong[1] < wrong[0])


def test_a_short_record_is_among_frames_that_wait():
    """The denoiser gets as many frames as in training; those beyond the record stay noise."""
    levels = []

    def watch(answer, sigma):
        jax.debug.callback(lambda s: levels.append(s[0]), sigma)
        return answer

    process = seen_by(watch, window=9)
    for lag, forecast, frames in [(np.inf, 0, 9), (np.inf, 2, 9), (np.inf, 6, 11), (0, 0, 9)]:
        levels.clear()
        result = run(Scheme(), lag, small(frames=5), process, ensemble=2, forecast=forecast)
        assert result.members.shape == (3, 2, 5 + forecast, 2)
        jax.effects_barrier()
        seen = np.array(levels)
        assert seen.shape[1] == frames
        waits = (seen > 19).all(0)
        assert waits.sum() == (frames - 5 - forecast if lag else 0)
        assert not waits[: 5 + forecast].any()


def test_inflation_moves_members_from_their_mean():
    process, x = oracle.Process(offset=(3.0, -1.0), scale=(8.0, 0.5)), TRUTH[:, :6]
    plain, wider = (regimes._physical(process, x, 2, Scheme(inflation=i)) for i in (1.0, 1.5))
    mean = plain.mean(1, keepdims=True)
    np.testing.assert_allclose(plain[1, 1], [3.0, -1.0] + x[3] * [8.0, 0.5], rtol=1e-5)
    np.testing.assert_allclose(wider, mean + 1.5 * (plain - mean), rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lag": 8}, "lag of 8 frames needs a window of more frames; it has 8"),
        ({"state": regimes.State(np.zeros((3, 5, 8, 2)), np.zeros((3, 8, 1)), 8)},
         r"\(3, 5, 2, 1\); expected \(3, 2, 2, 1\)"),
        ({"state": regimes.State(np.zeros((3, 2, 5, 2)), np.zeros((3, 5, 1)), 5)},
         "window of 5 frames; expected 8 or more"),
        ({"seed": 2**32}, "seed is 4294967296; expected an integer of at least 0 and at most"),
        ({"seed": -1}, "seed is -1"),
        ({"ensemble": 0}, "ensemble is 0"),
        ({"forecast": -1}, "forecast is -1"),
        ({"ensemble": 10**9, "forecast": 10**6},
         r"3 trajectories of 1000000000 members and 1000020 frames need 4.8e\+07 GB; this machine"),
        ({"process": type("Plain", (oracle.Process,), {"has_variance": False})()},
         "needs a network that was trained with config.network.variance=True"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(**({"scheme": Scheme(), "observations": small(), "ensemble": 2} | options))


def test_members_that_are_not_finite_are_an_error():
    x = np.where(np.arange(4)[:, None, None] == 1, np.nan, TRUTH)
    with pytest.raises(FloatingPointError, match="1 of 4 members are not finite"):
        regimes._physical(PROCESS, x, 2, Scheme())


@pytest.mark.parametrize("offset", [3.0, -1.0])  # mean of a coordinate of variance 1
def test_an_observed_logarithm_gives_its_posterior_though_estimates_leave_its_domain(offset):
    """Mean and standard deviation by integration of prior and likelihood over the coordinate."""
    values, z = np.full((3, 2, 1), np.nan), np.linspace(1e-3, 12, 20_000)
    values[:, 0, 0] = np.log([0.3, 1.0, 2.5])
    seen = oracle.Observations(values, Operator(oracle.Select((0,)), "log"), 0.3)
    process = oracle.Process(offset=(offset, 0.0), scale=(1.0, 1.0))
    found = run(Scheme(), np.inf, seen, process, ensemble=64)
    misfit = ((np.log(z) - values[:, 0]) / 0.3) ** 2
    weights = np.exp(-((z - offset) ** 2 + misfit) / 2)
    weights /= weights.sum(1, keepdims=True)
    mean = weights @ z
    std = np.sqrt(weights @ z**2 - mean**2)
    members = found.members[:, :, 0, 0]
    np.testing.assert_allclose((members.mean(1) - mean) / std, 0, atol=0.4)
    np.testing.assert_allclose(members.std(1) / std, 1, atol=0.15)


def test_members_outside_the_domain_of_the_operator_are_replaced():
    seen = oracle.guide.Seen(np.zeros((2, 1, 1), np.float32), np.float32(1.0))
    x = np.array([1.5, -1.5], np.float32).reshape(2, 1, 1)
    assert regimes.plausible(Operator(function="log"), seen, x, 0.99).tolist() == [True, False]


def test_data_of_one_class_are_asked_for_by_the_label_that_training_has_shown():
    class Told(oracle.Process):
        def moments(self, params):
            def shifted(x, sigma, condition):
                mean, variance = exact(x, sigma, condition)
                return mean + 9.0 * label_of(condition)[:, None, None], variance

            exact = oracle.Process.moments(self, params)
            return shifted

    plain, told = (run(Scheme(), 0, small(), process, ensemble=2) for process in (PROCESS, Told()))
    np.testing.assert_array_equal(told.members, plain.members)


def test_updates_are_counted_as_parts_of_members():
    shown = []
    progress = regimes.counted(shown.append)
    for members in (3, 3, 1, 1):
        progress(members, 2)
    assert shown == [1, 2, 0, 1]
