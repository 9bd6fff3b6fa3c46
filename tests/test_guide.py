"""Guidance of a linear-Gaussian process, against conditioning written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Process, conjugate

from mclr_jax.assimilation import guide
from mclr_jax.assimilation.observe import Matrix, Operator, Select
from mclr_jax.samplers import Level

PROCESS, FRAMES = Process(), 5
LEVELS = np.array([0.0, 0.3, 1.0, 4.0, 9.0], np.float32)
OPERATOR = Operator(Matrix(((1.0, 0.0), (0.5, -2.0))))
STD = np.array([0.2, 0.5], np.float32)
FORMS = {"posterior": guide.posterior, "conjugate": conjugate, "norm": guide.norm}


def case(seed=0):
    """Noisy trajectories and observations, one value of which is missing."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, FRAMES, 2)).astype(np.float32) * np.sqrt(1 + LEVELS[:, None] ** 2)
    y = rng.normal(size=(3, FRAMES, 2)).astype(np.float32) * 2
    y[:, 1, 1] = np.nan
    return jnp.asarray(x), y


def level(active=(False, True, True, True, True)):
    sigma = jnp.tile(LEVELS, (3, 1))
    return Level(sigma, sigma / 2, jnp.tile(jnp.array(active), (3, 1)))


def exact(x, y, frames):
    """E[x0 | x, y of these frames] by one conditioning on both, in float64: (3, FRAMES, 2)."""
    covariance, size = PROCESS.covariance(FRAMES), 2 * FRAMES
    rows = [np.eye(size)] + [
        np.kron(np.eye(FRAMES)[f], np.array(OPERATOR.linear.rows)) for f in frames
    ]
    noise = np.append(np.repeat(LEVELS**2, 2), np.tile(STD**2, len(frames))) + 1e-12
    data = np.concatenate([x.reshape(3, -1), y[:, list(frames)].reshape(3, -1)], 1)
    rows, known = np.concatenate(rows), np.isfinite(data[0])
    rows, noise, data = rows[known], noise[known], data[:, known]
    gain = np.linalg.solve(rows @ covariance @ rows.T + np.diag(noise), rows @ covariance).T
    return (data @ gain.T).reshape(3, FRAMES, 2)


def test_enough_iterations_give_the_exact_posterior_mean():
    x, y = case()
    with jax.enable_x64(True):
        seen = guide.Seen(jnp.asarray(y, jnp.float64), jnp.asarray(STD, jnp.float64))
        here = jax.tree.map(
            lambda a: a.astype(jnp.float64) if a.dtype == jnp.float32 else a, level()
        )
        x = x.astype(jnp.float64)
        expected = exact(np.asarray(x), y, range(1, FRAMES))
        wrong = []
        for iterations in (1, 2, 4, 8):
            correct = conjugate(OPERATOR, seen, iterations)
            got, shift = correct(PROCESS.moments(None), x, here, None)
            wrong.append(np.abs(got - expected)[:, 1:].max())
            assert not shift.any()
        np.testing.assert_array_equal(
            got[:, 0], PROCESS.moments(None)(x, here.sigma, None)[0][:, 0]
        )
    assert wrong[-1] < 1e-6  # 7 values are known
    assert np.all(np.diff(wrong) < 0)


@pytest.mark.parametrize("form", ["posterior", "conjugate"])
def test_one_observation_needs_one_step(form):
    """D + v / (v + R) (y - D) for the coordinate itself."""
    x, _ = case()
    y = np.full((3, FRAMES, 1), np.nan, np.float32)
    y[:, 2] = 1.5
    seen = guide.Seen(jnp.asarray(y), jnp.float32(0.3))
    correct = FORMS[form](Operator(Select((1,))), seen)
    got, _ = correct(PROCESS.moments(None), x, level(), None)
    d, v = PROCESS.moments(None)(x, level().sigma, None)
    expected = d[:, 2, 1] + v[:, 2, 1] / (v[:, 2, 1] + 0.09) * (1.5 - d[:, 2, 1])
    np.testing.assert_allclose(got[:, 2, 1], expected, rtol=1e-4)


def forms(y, std=STD, operator=OPERATOR, **units):
    seen = guide.Seen(jnp.asarray(y), jnp.asarray(std), **units)
    return {name: form(operator, seen) for name, form in FORMS.items()}


@pytest.mark.parametrize("form", FORMS)
def test_frames_at_rest_are_not_changed_and_their_observations_not_seen(form):
    x, y = case()
    here = level((False, True, True, False, False))
    plain, _ = PROCESS.moments(None)(x, here.sigma, None)
    d, shift = forms(y)[form](PROCESS.moments(None), x, here, None)
    moved = np.abs(d - plain).max((0, 2)) + np.abs(shift).max((0, 2))
    if form == "norm":
        np.testing.assert_array_equal(moved > 0, [False, True, True, False, False])
    assert moved[0] == 0
    assert moved[1:3].min() > 1e-3
    later = y.copy()
    later[:, [0, 3, 4]] = 99.0
    again, shift_again = forms(later)[form](PROCESS.moments(None), x, here, None)
    np.testing.assert_array_equal(d[:, :3], again[:, :3])
    np.testing.assert_array_equal(shift, shift_again)
    only = y.copy()
    only[:, [0, 3, 4]] = np.nan
    alone, _ = forms(only)[form](PROCESS.moments(None), x, here, None)
    np.testing.assert_array_equal(d[:, :3], alone[:, :3])


def test_the_norm_form_is_the_papers_step_of_its_own_variable():
    """z = x / sqrt(1 + sigma^2); the gradient in z by finite differences of L, in float64."""
    x, y = case()
    zeta, g, frames = 0.7, 0.03, range(1, FRAMES)
    sigma, stop = np.float64(LEVELS), np.float64(LEVELS) / 2
    covariance = PROCESS.covariance(FRAMES)
    gain = covariance @ np.linalg.inv(covariance + np.diag(np.repeat(sigma**2, 2)))
    rows = np.array(OPERATOR.linear.rows)

    def loss(z):
        d = (gain @ (z * np.sqrt(1 + sigma**2)[:, None]).ravel()).reshape(FRAMES, 2)
        total = 0
        for k in frames:
            error = y[0, k] - rows @ d[k]
            weight = 1 / (STD**2 + g * sigma[k] ** 2 * (rows**2).sum(1))
            total += np.nansum(weight * error**2)
        return np.sqrt(total)

    z = np.float64(x[0]) / np.sqrt(1 + sigma**2)[:, None]
    gradient, h = np.zeros_like(z), 1e-5
    for index in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[index] = h
        gradient[index] = (loss(z + step) - loss(z - step)) / (2 * h)
    expected = -zeta * gradient * np.sqrt(1 + stop**2)[:, None]  # back in x, at the new level
    seen = guide.Seen(jnp.asarray(y), jnp.asarray(STD))
    here = level()
    d, shift = guide.norm(OPERATOR, seen, zeta=zeta, g=g)(PROCESS.moments(None), x, here, None)
    np.testing.assert_allclose(shift[0, 1:], expected[1:], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(d, PROCESS.moments(None)(x, here.sigma, None)[0], rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_units_change_nothing_but_the_numbers(form):
    """The state in other units, observed with noise in those units."""
    offset, scale = np.array([3.0, -2.0], np.float32), np.array([8.0, 0.5], np.float32)
    x, y = case()
    rows = np.array(OPERATOR.linear.rows)
    physical = Operator(Matrix(tuple(map(tuple, (rows / scale).tolist()))))
    shifted = y + (rows / scale) @ offset
    one = forms(y)[form](PROCESS.moments(None), x, level(), None)
    units = {"offset": jnp.asarray(offset), "scale": jnp.asarray(scale)}
    other = forms(shifted, operator=physical, **units)[form](
        PROCESS.moments(None), x, level(), None
    )
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_one_level_for_all_frames_is_that_level_in_each():
    x, y = case()
    alike = Level(jnp.full(3, 2.0), jnp.full(3, 1.0), jnp.array(True)[None].repeat(3))
    each = Level(
        jnp.full((3, FRAMES), 2.0), jnp.full((3, FRAMES), 1.0), jnp.ones((3, FRAMES), bool)
    )
    for correct in forms(y).values():
        one, other = (correct(PROCESS.moments(None), x, here, None) for here in (alike, each))
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def one_step(moments, frames, reach=1e9, std=0.5, overlap=1.0):
    """The correction of x = 0 by y = 1 in each frame, at level 1: (F,)."""
    seen = guide.Seen(jnp.ones((1, frames, 1)), jnp.float32(std))
    here = Level(*(jnp.full((1, frames), a) for a in (1.0, 0.5, True)))
    correct = guide.posterior(Operator(), seen, overlap=overlap, reach=reach)
    return np.asarray(correct(moments, jnp.zeros((1, frames, 1)), here, None)[0])[0, :, 0]


def of_matrix(v, inflated=0.0):
    """Moments with D = V x and the variance diag(V); the Jacobian's diagonal may be too large."""
    jacobian = jnp.asarray(v + inflated * np.diag(np.diag(v)), jnp.float32)

    def moments(x, sigma, condition):
        return jnp.einsum("fg,bgc->bfc", jacobian, x), jnp.diag(v)[None, :, None] * jnp.ones_like(x)

    return moments


def test_frames_that_say_the_same_are_not_counted_twice():
    """Of one value seen 64 times the exact answer is F v / (R + F v); the steps add up to more."""
    frames, v = 64, 0.5
    exact = frames * v / (0.25 + frames * v)
    got = one_step(of_matrix(np.full((frames, frames), v)), frames)
    np.testing.assert_allclose(got, exact, rtol=0.1)
    twice = one_step(of_matrix(np.full((frames, frames), v)), frames, overlap=0.0)
    np.testing.assert_allclose(twice, np.sqrt(v * (1 + frames / 0.75)), rtol=1e-4)  # the bound
    independent = one_step(of_matrix(v * np.eye(frames)), frames)
    np.testing.assert_allclose(independent, v / (0.25 + v), rtol=1e-4)


def test_a_diagonal_that_is_too_large_does_not_shorten_the_step():
    """Neighbours move by V A^T (y - A D) / (R + v), whatever the network's own derivative is."""
    v = 0.5 * np.eye(6) + 0.2 * np.eye(6, k=1) @ np.diag([0, 1, 0, 0, 0, 0])
    plain, inflated = (one_step(of_matrix(v, by), 6, overlap=1.0) for by in (0.0, 0.5))
    np.testing.assert_allclose(inflated[3:], 1.5 * plain[3:], rtol=1e-3)
    np.testing.assert_allclose(plain[3:], 0.5 / 0.75, rtol=1e-3)


def test_the_step_is_shortened_near_the_frames_that_overlap():
    v = np.zeros((40, 40))
    v[:8, :8] = 0.5
    v[range(8, 40), range(8, 40)] = 0.5
    got = one_step(of_matrix(v), 40, reach=2.0)
    np.testing.assert_allclose(got[:4], 8 * 0.5 / (0.25 + 8 * 0.5), rtol=0.35)
    np.testing.assert_allclose(got[24:], 0.5 / 0.75, rtol=0.02)


def test_no_coordinate_moves_further_than_its_variance_allows():
    """A derivative of 400 times the size: the step ends at sqrt(v (1 + r^2 / (R + v)))."""
    moments = of_matrix(0.5 * np.eye(1), inflated=400.0)
    np.testing.assert_allclose(one_step(moments, 1), np.sqrt(0.5 * (1 + 1 / 0.75)), rtol=1e-4)
