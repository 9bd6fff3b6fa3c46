"""Observation operators against NumPy, and files that cannot be meant."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mclr_jax.assimilation import observe
from mclr_jax.assimilation.observe import (
    Downsample,
    Identity,
    Matrix,
    Observations,
    Operator,
    Random,
    Select,
)

H = ((1.0, 0.0, 2.0), (0.0, -1.0, 0.5))
STATES = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
FIELDS = np.random.default_rng(1).normal(size=(2, 3, 8, 12, 2)).astype(np.float32)


def test_linear_operators_are_those_of_numpy():
    np.testing.assert_array_equal(Operator()(STATES), STATES)
    np.testing.assert_array_equal(Operator(Select((2, 0)))(STATES), STATES[..., [2, 0]])
    np.testing.assert_allclose(Operator(Matrix(H))(STATES), STATES @ np.array(H).T, rtol=1e-5)
    some = Operator(Random(0.25, seed=3))(FIELDS)
    assert some.shape == (2, 3, 48)
    kept = np.isin(FIELDS[0, 0].ravel(), some[0, 0])
    assert kept.sum() == 48
    np.testing.assert_array_equal(some, FIELDS.reshape(2, 3, -1)[..., kept])
    other = Operator(Random(0.25, seed=4))(FIELDS)
    assert not np.array_equal(some, other)


@pytest.mark.parametrize(("share", "count"), [(0.1, 1), (0.4, 4), (0.84, 8), (0.86, 9), (1.0, 10)])
def test_a_share_of_the_coordinates_is_the_nearest_number_of_them(share, count):
    """And at least one, however small the share is."""
    state = np.arange(10.0, dtype=np.float32).reshape(1, 1, 10)
    assert Random(share)(state).shape == (1, 1, count)
    assert Random(share / 100)(state).shape == (1, 1, 1)


def test_downsampling_by_4_is_the_mean_of_the_4_middle_pixels():
    """Bilinear interpolation at the centre of each block, as of half-pixel centres."""
    small = Operator(Downsample(4))(FIELDS).reshape(2, 3, 2, 3, 2)
    blocks = FIELDS.reshape(2, 3, 2, 4, 3, 4, 2)[:, :, :, 1:3, :, 1:3]
    np.testing.assert_allclose(small, blocks.mean((3, 5)), atol=1e-6)


@pytest.mark.parametrize(
    "linear", [Identity(), Select((1,)), Matrix(H), Random(0.5), Downsample(4)]
)
def test_variances_use_the_squared_weights(linear):
    """The diagonal of L diag(v) L^T, with L from the map of unit vectors."""
    shape = FIELDS.shape[2:] if isinstance(linear, Downsample) else (3,)
    units = np.eye(np.prod(shape), dtype=np.float32).reshape(-1, 1, *shape)
    matrix = np.asarray(linear(units))[:, 0].T
    v = np.random.default_rng(2).uniform(0.1, 2, (1, 1, *shape)).astype(np.float32)
    np.testing.assert_allclose(linear(v, 2)[0, 0], matrix**2 @ v.ravel(), rtol=1e-5)


def predict(operator, mean, variance):
    """Mean of A(x), its slope by x of an operator of one coordinate each, and the rest."""
    found = operator.linearise(*(jnp.asarray(x, jnp.float32) for x in (mean, variance)))
    return found.predicted, found.project(jnp.ones(mean.shape)), found.rest


def test_prediction_under_a_normal_distribution():
    """arctan against Monte Carlo, the square against its closed form, the identity exactly."""
    mean, variance = np.array([[[0.4, -1.0, 3.0]]]), np.array([[[0.5, 2.0, 0.1]]])
    square = Operator(Identity(), "square", offset=1.0, scale=2.0)
    z, s = (mean - 1) / 2, variance / 4
    predicted, slope, rest = predict(square, mean, variance)
    np.testing.assert_allclose(predicted, z**2 + s, rtol=1e-4)
    np.testing.assert_allclose(slope, 2 * z / 2, rtol=1e-4)
    np.testing.assert_allclose(rest, 2 * s**2, rtol=1e-3)
    arctan = Operator(Identity(), "arctan", scale=2.0)
    x = mean + np.sqrt(variance) * np.random.default_rng(0).standard_normal((400_000, 1, 1, 3))
    y = np.arctan(x / 2)
    predicted, slope, rest = predict(arctan, mean, variance)
    np.testing.assert_allclose(predicted, y.mean(0), atol=3e-3)
    by_regression = ((y - y.mean(0)) * (x - mean)).mean(0) / variance
    np.testing.assert_allclose(slope, by_regression, atol=3e-3)
    left = ((y - y.mean(0) - by_regression * (x - mean)) ** 2).mean(0)
    np.testing.assert_allclose(rest, left, atol=1e-3)
    plain = Operator(Select((1,)), offset=0.5, scale=4.0)
    predicted, slope, rest = predict(plain, mean, variance)
    assert (predicted.item(), slope.item(), rest.item()) == (-0.375, 0.25, 0)


def test_without_variance_the_slope_is_the_derivative():
    x = jnp.array([[[0.3, -0.8, 1.5]]])
    for name in ("arctan", "tanh", "square", "exp"):
        operator = Operator(Identity(), name, offset=0.1, scale=1.7)
        _, slope, rest = predict(operator, x, jnp.zeros_like(x))
        derivative = jax.grad(lambda x, a=operator: a(x).sum())(x)
        np.testing.assert_allclose(slope, derivative, rtol=2e-3)
        assert float(rest.max()) < 1e-6


def values(trajectories=2, m=1):
    y = np.random.default_rng(5).normal(size=(trajectories, 6, m)).astype(np.float32)
    y[:, 2] = np.nan
    return y


def read(path):
    return observe.parse(observe.load(path), path)


def test_a_file_gives_back_what_was_written(tmp_path):
    for linear in (Identity(), Select((0,)), Matrix(((1.0, 0.0, -2.0),)), Random(0.3, 7)):
        operator = Operator(linear, "arctan", 0.5, 8.0)
        told = Observations(values(), operator, 0.25, np.ones(3), 0.025)
        observe.write(tmp_path / "y.npz", told, truth=np.zeros(2))
        got = read(tmp_path / "y.npz")
        np.testing.assert_array_equal(got.values, told.values)
        np.testing.assert_array_equal(got.initial, told.initial)
        assert (got.operator, got.std, got.time_step) == (operator, np.float32(0.25), 0.025)
    np.savez(tmp_path / "h.npz", values=values(m=2)[0], H=np.array(H), std=[0.1, 0.2])
    got = read(tmp_path / "h.npz")
    assert got.values.shape == (1, 6, 2)
    assert got.operator == Operator(Matrix(H))


SELECT = json.dumps({"name": "select", "indices": [0]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": None}, "has no array 'values'"),
        ({"std": None}, "has no array 'std'"),
        ({"values": np.zeros(3)}, r"shape \(3,\); expected \(T, m\), or \(N, T, m\)"),
        ({"values": np.full((3, 1), np.inf)}, "infinite"),
        ({"values": np.array([["a"]])}, "values has type <U1; expected numbers"),
        ({"values": np.array([[None]])}, "no readable npz"),
        ({"std": 0.0}, "std is 0.0; expected one number above 0"),
        ({"std": np.ones(2)}, r"std is \[1.0, 1.0\]; expected one number above 0, or 1"),
        ({"std": np.nan}, "std is nan"),
        ({"H": np.ones((1, 3))}, "must have one of H and operator_json"),
        ({"operator_json": None}, "must have one of H and operator_json"),
        ({"operator_json": None, "H": np.ones(3)}, r"H has shape \(3,\)"),
        ({"operator_json": "{"}, r"operator_json is no JSON \(Expecting property name"),
        ({"operator_json": "[]"}, r'expected {"name": NAME'),
        ({"operator_json": '{"name": "slect"}'}, "Did you mean 'select'"),
        ({"operator_json": '{"name": "select"}'}, "missing 1 required"),
        ({"operator_json": '{"name": "select", "indices": [0.5]}'}, "indices.0. is 0.5; expected"),
        ({"operator_json": '{"name": "matrix", "rows": [[1, 2], [3]]}'}, "different lengths"),
        ({"operator_json": '{"name": "matrix", "rows": []}'}, "or it has no rows"),
        ({"operator_json": '{"name": "identity", "function": "atan"}'}, "Did you mean 'arctan'"),
        ({"operator_json": '{"name": "identity", "scale": 0}'}, "operator.scale is 0; expected"),
        ({"initial": np.array([np.nan])}, "initial state has values that are not finite"),
        ({"time_step": -1.0}, "time_step is -1.0; expected"),
        ({"time_step": np.ones(2)}, r"time_step has shape \(2,\); expected one number"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(tmp_path, changes, message):
    arrays = {"values": values(), "std": 0.1, "operator_json": SELECT} | changes
    path = tmp_path / "y.npz"
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    with pytest.raises(ValueError, match=message):
        read(path)


def test_damaged_and_missing_files_are_named(tmp_path):
    path = tmp_path / "y.npz"
    for missing, named in ((path, r"y\.npz"), ("", "''"), (tmp_path, tmp_path.name)):
        with pytest.raises(FileNotFoundError, match=f"no file .*{named}"):
            read(missing)
    observe.write(path, Observations(values(), Operator(Select((0,))), 0.1))
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[:100], whole[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no readable npz"):
            read(path)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"operator": Operator()}, "gives 3 values .* have 1 for each frame"),
        ({"operator": Operator(Select((3,)))}, r"coordinates \(3,\); expected some of 0 .. 2"),
        ({"operator": Operator(Matrix(((1.0, 2.0),)))}, r"H has shape \(1, 2\); expected \(m, 3\)"),
        ({"operator": Operator(Downsample(2))}, r"needs fields \(H, W, C\)"),
        ({"initial": np.zeros(2)}, r"shape \(2,\); expected \(3,\) or \(2, 3\)"),
        ({"time_step": 0.1}, "time step of 0.1, the model 0.025"),
    ],
)
def test_observations_of_other_states_are_refused(more, message):
    given = {"operator": Operator(Select((0,)))} | more
    with pytest.raises(ValueError, match=message):
        Observations(values(), std=0.1, **given).for_states((3,), 0.025)


def test_one_initial_state_is_that_of_all_trajectories():
    told = Observations(values(), Operator(Select((0,))), 0.1, initial=np.arange(3))
    np.testing.assert_array_equal(told.for_states((3,)).initial, [[0, 1, 2], [0, 1, 2]])


# ---- operators of one's own, and a function, offset and scale for each value ---------------------


@dataclasses.dataclass(frozen=True)
class Product:
    """The product of the first two coordinates, and a multiple of the last."""

    factor: float = 2.0

    def __call__(self, state):
        return jnp.stack([state[0] * state[1], self.factor * state[-1]])


@dataclasses.dataclass
class Mutable:
    def __call__(self, state):
        return state


@dataclasses.dataclass(frozen=True)
class Taken:
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Odd:
    """Values that are no vector of real numbers, or an error."""

    kind: str

    def __call__(self, state):
        if self.kind == "wide":
            return state @ jnp.ones(7)
        return state.sum() if self.kind == "scalar" else jnp.arange(2)


def test_an_operator_of_ones_own_is_linear_about_the_mean():
    """x0 x1 has the derivative (x1, x0), and under it the variance x1^2 v0 + x0^2 v1."""
    operator = observe.operator_of({"name": f"{__name__}:Product", "factor": 3.0})
    x, v = STATES, np.random.default_rng(3).uniform(0.1, 2, STATES.shape).astype(np.float32)
    want = np.stack([x[..., 0] * x[..., 1], 3 * x[..., 2]], -1)
    np.testing.assert_allclose(operator(x), want, rtol=1e-6)
    found = operator.linearise(jnp.asarray(x), jnp.asarray(v))
    np.testing.assert_allclose(found.predicted, want, rtol=1e-6)
    np.testing.assert_array_equal(found.rest, np.zeros(want.shape))
    d = np.random.default_rng(4).normal(size=x.shape).astype(np.float32)
    along = np.stack([x[..., 1] * d[..., 0] + x[..., 0] * d[..., 1], 3 * d[..., 2]], -1)
    np.testing.assert_allclose(found.project(d), along, rtol=1e-5, atol=1e-6)
    spread = np.stack([x[..., 1] ** 2 * v[..., 0] + x[..., 0] ** 2 * v[..., 1], 9 * v[..., 2]], -1)
    np.testing.assert_allclose(found.spread(v), spread, rtol=1e-4)
    back = jax.linear_transpose(found.project, jnp.asarray(x))(want)[0]  # what guidance needs
    np.testing.assert_allclose((back * d).sum(), (want * along).sum(), rtol=1e-4)
    assert operator.describe() == {"name": f"{__name__}:Product", "factor": 3.0, "scale": 1.0,
                                   "function": "identity", "offset": 0.0}  # fmt: skip
    assert observe.operator_of(operator.describe()) == operator


def test_variances_under_many_coordinates_are_estimated_without_bias():
    """Exactly, where each value is of one coordinate; 32 random signs else."""
    own = observe.Own(lambda state: jnp.stack([state[3, 5, 0], state.sum() / 8]))
    mean = jnp.zeros((1, 1, 16, 16, 1))
    _, spread = own.around(mean)
    v = np.random.default_rng(0).uniform(0.5, 2, mean.shape).astype(np.float32)
    got = np.asarray(spread(v))[0, 0]
    np.testing.assert_allclose(got[0], v[0, 0, 3, 5, 0], rtol=1e-5)
    assert 0.5 < got[1] / (v.sum() / 64) < 2


def test_each_value_has_its_function_offset_and_scale():
    rows = ("arctan", "identity", "log", "arctan"), (0.5, -1.0, -9.0, 0.0), (2.0, 1.0, 3.0, 4.0)
    linear = Matrix(((1.0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 0, 2)))
    several = Operator(linear, *rows)
    x, v = jnp.asarray(STATES), jnp.full(STATES.shape, 0.3)
    found = several.linearise(x, v)
    for row, (function, offset, scale) in enumerate(zip(*rows, strict=True)):
        one = Operator(Matrix((linear.rows[row],)), function, offset, scale)
        want = one.linearise(x, v)
        pairs = [(several(x), one(x)), *zip(found[:2], want[:2], strict=True)]
        pairs += [(found.project(x), want.project(x)), (found.spread(v), want.spread(v))]
        for got, expected in pairs:
            np.testing.assert_allclose(got[..., row], expected[..., 0], rtol=1e-5, atol=1e-7)
    assert observe.operator_of(json.loads(json.dumps(several.describe()))) == several


def test_a_file_has_them_as_arrays_and_a_flag_is_in_place_of_its_operator(tmp_path):
    rows = {"function": ["log", "identity"], "offset": [-9.0, 0.5], "scale": [1.0, 2.0]}
    arrays = {"values": values(m=2), "std": np.array(0.1), "H": np.array(H)}
    want = Operator(Matrix(H), ("log", "identity"), (-9.0, 0.5), (1.0, 2.0))
    told = {key: np.array(x) for key, x in rows.items()}
    assert observe.parse(arrays | told, "x").operator == want
    one = arrays | {"function": np.array("tanh")}
    assert observe.parse(one, "x").operator == Operator(Matrix(H), "tanh")
    own = observe.parse(arrays | told, "x", f"{__name__}:Product").operator
    assert own == Operator(observe.Own(Product()))
    given = '{"name": "select", "indices": [0, 2], "scale": [1, 2]}'
    assert observe.parse(arrays, "x", given).operator == Operator(Select((0, 2)), scale=(1, 2))
    del arrays["H"]
    arrays["operator_json"] = np.array(given)
    with pytest.raises(ValueError, match="'scale' is an array and in operator_json"):
        observe.parse(arrays | told, "x")


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"name": "Product"}, "Unknown operator 'Product'"),
        ({"name": f"{__name__}:Prod"}, "has no 'Prod'. Did you mean 'Product'"),
        ({"name": f"{__name__}:values"}, "expected a dataclass"),
        ({"name": f"{__name__}:Product", "factr": 1}, "no 'factr'. Did you mean 'factor'"),
        ({"name": f"{__name__}:Product", "factor": "a"}, "factor is 'a'; expected a number"),
        ({"name": f"{__name__}:Mutable"}, "unhashable .* of your own is a frozen dataclass"),
        ({"name": f"{__name__}:Taken"}, "has a field 'scale'; expected another name"),
        ({"name": f"{__name__}:Odd", "kind": "scalar"}, r"gives float32 \(\) of a state of shape"),
        (
            {"name": f"{__name__}:Odd", "kind": "integers"},
            r"int32 \(2,\) .*; expected real numbers",
        ),
        (
            {"name": f"{__name__}:Odd", "kind": "wide"},
            r"Odd fails for a state of shape \(3,\) \(dot",
        ),
        ({"name": "identity", "offset": [0, 1]}, "offset has 2 values; expected one, or 3"),
        ({"name": "identity", "function": ["log", "atan"]}, "Did you mean 'arctan'"),
        ({"name": "identity", "scale": [1, 0, 1]}, "operator.scale is 0; expected"),
    ],
)
def test_operators_that_cannot_be_meant_are_refused(description, message):
    with pytest.raises(ValueError, match=message):
        Observations(values(m=3), observe.operator_of(description), 0.1).for_states((3,))


def test_the_operator_of_the_page_is_one():
    """The wind speed of docs/extending.md at two places."""
    page = (pathlib.Path(__file__).parent.parent / "docs" / "extending.md").read_text()
    code = re.search(r"```python\n(# my_project/operators.*?)```", page, re.DOTALL)[1]
    exec(code, names := {"__name__": __name__})
    operator = Operator(observe.Own(names["Speed"]((3, 7), (4, 5))))
    assert operator.size(FIELDS.shape[2:]) == 2
    want = np.hypot(FIELDS[..., 0], FIELDS[..., 1])[:, :, [3, 7], [4, 5]]
    np.testing.assert_allclose(operator(FIELDS), want, atol=1e-3)
