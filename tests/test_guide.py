"""Guidance of a linear-Gaussian process, against conditioning written out."""

import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Process

from mclr_jax.assimilation import guide
from mclr_jax.assimilation.observe import Matrix, Operator
from mclr_jax.samplers import Level

PROCESS, FRAMES = Process(), 5
LEVELS = np.array([0.0, 0.3, 1.0, 4.0, 9.0], np.float32)
OPERATOR = Operator(Matrix(((1.0, 0.0), (0.5, -2.0))))
STD = np.array([0.2, 0.5], np.float32)
FORMS = {"posterior": guide.posterior, "norm": guide.norm}


def case():
    """Noisy trajectories and observations, one value of which is missing."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, FRAMES, 2)).astype(np.float32) * np.sqrt(1 + LEVELS[:, None] ** 2)
    y = rng.normal(size=(3, FRAMES, 2)).astype(np.float32) * 2
    y[:, 1, 1] = np.nan
    return jnp.asarray(x), y


def level(active=(False, True, True, True, True)):
    sigma = jnp.tile(LEVELS, (3, 1))
    return Level(sigma, sigma / 2, jnp.tile(jnp.array(active), (3, 1)))


def corrected(form, x, y, level, operator=OPERATOR, **units):
    """What a form of guidance makes of D and adds to it."""
    seen = guide.Seen(jnp.asarray(y), jnp.asarray(STD), **units)
    return FORMS[form](operator, seen)(PROCESS.moments(None), x, level, None)


@pytest.mark.parametrize("form", FORMS)
def test_frames_at_rest_are_not_changed_and_their_observations_not_seen(form):
    x, y = case()
    here = level((False, True, True, False, False))
    plain, _ = PROCESS.moments(None)(x, here.sigma, None)
    d, shift = corrected(form, x, y, here)
    moved = np.abs(d - plain).max((0, 2)) + np.abs(shift).max((0, 2))
    if form == "norm":
        np.testing.assert_array_equal(moved > 0, [False, True, True, False, False])
    assert moved[0] == 0
    assert moved[1:3].min() > 1e-3
    later = y.copy()
    later[:, [0, 3, 4]] = 99.0
    again, shift_again = corrected(form, x, later, here)
    np.testing.assert_array_equal(d[:, :3], again[:, :3])
    np.testing.assert_array_equal(shift, shift_again)
    only = y.copy()
    only[:, [0, 3, 4]] = np.nan
    alone, _ = corrected(form, x, only, here)
    np.testing.assert_array_equal(d[:, :3], alone[:, :3])


@pytest.mark.parametrize("curved", [False, True])
def test_the_norm_form_is_the_papers_step_of_its_own_variable(curved):
    """z = x / sqrt(1 + sigma^2); the gradient in z by finite differences of L, in float64.

    The weights are constants; of arctan((H x - 0.3) / 2) they have the slope at the estimate.
    """
    x, y = case()
    operator = Operator(OPERATOR.linear, "arctan", 0.3, 2.0) if curved else OPERATOR
    zeta, g, frames = 0.7, 0.03, range(1, FRAMES)
    sigma, stop = np.float64(LEVELS), np.float64(LEVELS) / 2
    covariance = PROCESS.covariance(FRAMES)
    gain = covariance @ np.linalg.inv(covariance + np.diag(np.repeat(sigma**2, 2)))
    rows = np.array(OPERATOR.linear.rows)

    def estimate(z):
        return (gain @ (z * np.sqrt(1 + sigma**2)[:, None]).ravel()).reshape(FRAMES, 2)

    def told(state):  # and its slope
        inner = (rows @ state - 0.3) / 2
        return (np.arctan(inner), 0.5 / (1 + inner**2)) if curved else (rows @ state, 1.0)

    z = np.float64(x[0]) / np.sqrt(1 + sigma**2)[:, None]
    slopes = [told(state)[1] for state in estimate(z)]

    def loss(z):
        d, total = estimate(z), 0
        for k in frames:
            error = y[0, k] - told(d[k])[0]
            weight = 1 / (STD**2 + g * slopes[k] ** 2 * sigma[k] ** 2 * (rows**2).sum(1))
            total += np.nansum(weight * error**2)
        return np.sqrt(total)

    gradient, h = np.zeros_like(z), 1e-5
    for index in np.ndindex(*z.shape):
        step = np.zeros_like(z)
        step[index] = h
        gradient[index] = (loss(z + step) - loss(z - step)) / (2 * h)
    expected = -zeta * gradient * np.sqrt(1 + stop**2)[:, None]  # back in x, at the new level
    seen = guide.Seen(jnp.asarray(y), jnp.asarray(STD))
    here = level()
    d, shift = guide.norm(operator, seen, zeta=zeta, g=g)(PROCESS.moments(None), x, here, None)
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
    one = corrected(form, x, y, level())
    units = {"offset": jnp.asarray(offset), "scale": jnp.asarray(scale)}
    other = corrected(form, x, shifted, level(), physical, **units)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def by_formula(jacobian, y, sigma, rows, noise, v, c=1.0, overlap=1.0, reach=4.0, d=0.0):
    """`guide.posterior` as its docstring has it, in NumPy: D (F,), or (F, n) with values (F, m).

    `jacobian` is of D (F n) by x, `rows` (F m, F n) of the operator; y - A D is `y`, 0 if unknown.
    """
    y, sigma, v = (np.asarray(a, np.float64) for a in (y, sigma, v))
    frames, shape = len(y), y.shape
    known = (y != 0) * 1.0
    spread = (rows**2 @ v.ravel()).reshape(shape)
    p = y / (noise + c * spread)
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (frames, y[0].size)).reshape(shape)

    def gain(p):  # V A^T p with V = sigma^2 J^T
        return (sigma**2 * (jacobian.T @ (rows.T @ p.ravel())).reshape(v.shape).T).T

    def project(state):
        return known * (rows @ state.ravel()).reshape(shape)

    pairs = p * project(gain(p)) - signs * p * project(gain(signs * p))
    near = np.exp(-np.abs(np.subtract.outer(np.arange(frames), np.arange(frames))) / reach)
    size, among = (near @ part.reshape(frames, -1).sum(1) for part in (p * y, pairs))
    length = size / np.maximum(size + overlap * np.maximum(among, 0), 1e-30)
    bound = (np.sqrt(1 + size) * np.sqrt(v).T).T
    return d + np.clip((length * gain(p).T).T, -bound, bound)


@pytest.mark.parametrize("options", [{}, {"c": 0.4, "overlap": 2.0, "reach": 1.5}])
def test_the_posterior_form_is_its_formula(options):
    """For a Jacobian that is not symmetric, in units, with a frame at rest and a missing value."""
    rng = np.random.default_rng(3)
    _, y = case()
    size, offset, scale = 2 * FRAMES, np.array([3.0, -2.0]), np.array([2.0, 0.5])
    jacobian = np.eye(size) / 2 + 0.15 * rng.normal(size=(size, size))
    v = rng.uniform(0.05, 0.6, (FRAMES, 2))

    def moments(x, sigma, condition):
        d = jnp.einsum("ij,bj->bi", jnp.float32(jacobian), x.reshape(3, -1)).reshape(x.shape)
        return d, jnp.broadcast_to(jnp.float32(v), x.shape)

    x = 0.3 * rng.normal(size=(3, FRAMES, 2)).astype(np.float32)
    units = {"offset": jnp.float32(offset), "scale": jnp.float32(scale)}
    seen = guide.Seen(jnp.asarray(y), jnp.asarray(STD), **units)
    got, shift = guide.posterior(OPERATOR, seen, **options)(moments, x, level(), None)
    assert not shift.any()
    rows, limits = np.array(OPERATOR.linear.rows), {"overlap": 0.5} | options
    told = {"rows": np.kron(np.eye(FRAMES), rows * scale), "noise": STD**2, "v": v, **limits}
    moves = []
    for row in range(3):
        d = (jacobian @ x[row].ravel()).reshape(FRAMES, 2)
        wrong = np.nan_to_num(y[row] - (offset + scale * d) @ rows.T)
        wrong[0] = 0  # at rest
        expected = by_formula(jacobian, wrong, LEVELS, d=d, **told)
        np.testing.assert_allclose(got[row], expected, rtol=1e-3, atol=1e-4)
        free = by_formula(jacobian, wrong, LEVELS, d=d, **told | {"overlap": 0.0})
        moves.append(np.abs(free - expected).max(1)[1:] > 1e-3)
    assert np.any(moves)  # the overlap matters somewhere
    assert not np.all(moves)  # and the bound elsewhere


def of_matrix(v):
    """Moments with D = V x and the variance diag(V)."""
    jacobian = jnp.asarray(v, jnp.float32)

    def moments(x, sigma, condition):
        return jnp.einsum("fg,bgc->bfc", jacobian, x), jnp.diag(v)[None, :, None] * jnp.ones_like(x)

    return moments


def test_an_operator_that_is_not_linear_is_linearised_under_the_estimate():
    """Of ((x - 1) / 2)^2 mean, slope and what is left have closed forms; frames are independent."""
    rng, size = np.random.default_rng(4), 8
    v, x = rng.uniform(0.1, 0.6, size), 0.4 * rng.normal(size=size)
    d, y, units = v * x, 0.5 + 0.2 * rng.normal(size=size), {"offset": 0.3, "scale": 1.5}
    seen = guide.Seen(jnp.float32(y)[None, :, None], jnp.float32(0.4), **units)
    here = Level(*(jnp.full((1, size), a) for a in (1.0, 0.5, True)))
    correct = guide.posterior(Operator(function="square", offset=1.0, scale=2.0), seen)
    got, _ = correct(of_matrix(np.diag(v)), jnp.float32(x)[None, :, None], here, None)
    z, s = (0.3 + 1.5 * d - 1) / 2, 1.5**2 * v / 4  # mean and variance of the operator's argument
    slope = 2 * z * 1.5 / 2  # by x of the model's units
    total = 0.4**2 + 2 * s**2 + slope**2 * v
    expected = d + v * slope * (y - z**2 - s) / total
    bound = np.sqrt(v * (1 + (y - z**2 - s) ** 2 / total))
    np.testing.assert_allclose(got[0, :, 0], expected, rtol=2e-3, atol=1e-3)
    assert np.all(np.abs(expected - d) < bound)
    assert np.abs(expected - d).max() > 0.05
