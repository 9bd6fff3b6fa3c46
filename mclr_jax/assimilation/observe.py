"""Observations of a trajectory, y = f((L x - offset) / scale) + noise, and the file that has them.

L is linear in the state of one frame, in physical units; f acts on each element. Missing values are
NaN. An operator knows its mean and its slope under a normal distribution (statistical
linearisation), which is what guidance needs of it.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.files import named, save_arrays
from mclr_jax.schema import as_tuple, fields, in_range, look_up, nearest, of_kind

FUNCTIONS: dict[str, Callable] = {"identity": lambda z: z} | {
    name: getattr(jnp, name) for name in ("arctan", "tanh", "square", "abs", "exp", "log")
}
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


# ---- linear maps: (x (B, F, *state), power) -> (B, F, m), their weights raised to `power` --------


@dataclasses.dataclass(frozen=True)
class Identity:
    """All coordinates."""

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        return x.reshape(*x.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Select:
    """Some coordinates, as indices of the flattened state."""

    indices: tuple[int, ...]

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        last = math.prod(x.shape[2:]) - 1
        if not self.indices or not 0 <= min(self.indices) <= max(self.indices) <= last:
            raise ValueError(
                f"The operator selects coordinates {self.indices}; expected some of 0 .. {last}."
            )
        return x.reshape(*x.shape[:2], -1)[..., np.array(self.indices)]


@dataclasses.dataclass(frozen=True)
class Random:
    """A fixed random share of the coordinates, in their order."""

    share: float
    seed: int = 0

    def __post_init__(self):
        in_range("operator.share", self.share, 0.0, 1.0, open="(")

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        order = np.random.default_rng(self.seed).permutation(math.prod(x.shape[2:]))
        chosen = np.sort(order[: max(1, round(self.share * len(order)))])
        return x.reshape(*x.shape[:2], -1)[..., chosen]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """H x, with the rows (m, d) of H for a state of d coordinates."""

    rows: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        if len(set(map(len, self.rows))) != 1:
            raise ValueError("The rows of the matrix H have different lengths, or it has no rows.")

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        x, weights = x.reshape(*x.shape[:2], -1), np.array(self.rows) ** power
        if weights.shape[1] != x.shape[2]:
            raise ValueError(f"The matrix H has shape {weights.shape}; expected (m, {x.shape[2]}).")
        return x @ jnp.asarray(weights.T, x.dtype)


@dataclasses.dataclass(frozen=True)
class Downsample:
    """Fields (H, W, C) by bilinear interpolation at every `factor`-th place, without smoothing."""

    factor: int

    def __post_init__(self):
        in_range("operator.factor", self.factor, 1)

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        n = self.factor
        if x.ndim != 5 or x.shape[2] % n or x.shape[3] % n:
            raise ValueError(
                f"Downsampling by {n} needs fields (H, W, C) with H and W multiples of {n}; a "
                f"state has shape {x.shape[2:]}."
            )
        rows, columns = (
            jax.image.resize(jnp.eye(size), (size // n, size), "linear", antialias=False) ** power
            for size in x.shape[2:4]
        )
        return jnp.einsum("ih,jw,bfhwc->bfijc", rows, columns, x).reshape(*x.shape[:2], -1)


LINEAR = {"identity": Identity, "select": Select, "random": Random, "matrix": Matrix,
          "downsample": Downsample}  # fmt: skip


# ---- operators -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Operator:
    """A(x) = f((L x - offset) / scale) of states x (B, F, *state) in physical units: (B, F, m)."""

    linear: Any = Identity()
    function: str = "identity"
    offset: float = 0.0
    scale: float = 1.0

    def __post_init__(self):
        look_up(FUNCTIONS, self.function, "function of an operator")
        in_range("operator.offset", self.offset, -math.inf)
        in_range("operator.scale", self.scale, 0.0, open="(")

    def __call__(self, x: jax.Array) -> jax.Array:
        return FUNCTIONS[self.function]((self.linear(x) - self.offset) / self.scale)

    def predict(self, mean: jax.Array, variance: jax.Array) -> tuple[jax.Array, ...]:
        """Mean of A(x), slope and residual variance (B, F, m), for x ~ N(mean, diag(variance)).

        A(x) is about its mean + slope (L x - L mean), and the rest has the residual variance:
        statistical linearisation, by Gauss-Hermite quadrature. Exact for the identity. For the
        logarithm x has the part of the distribution in its domain, since a value was observed.
        """
        z, f = (self.linear(mean) - self.offset) / self.scale, FUNCTIONS[self.function]
        if self.function == "identity":
            return z, jnp.full_like(z, 1 / self.scale), jnp.zeros_like(z)
        std = jnp.sqrt(jnp.maximum(self.linear(variance, 2), 1e-6 * self.scale**2)) / self.scale
        if self.function == "log":
            center, std, spread = _positive(z, std)
            slope = center * spread / std**2
            predicted = jnp.log(center) - spread / 2 + slope * (z - center)
            return predicted, slope / self.scale, jnp.maximum(spread - (slope * std) ** 2, 0)
        values = jnp.stack([f(z + std * node) for node in _NODES])
        weights = jnp.asarray(_WEIGHTS, z.dtype)
        predicted = jnp.tensordot(weights, values, 1)
        slope = jnp.tensordot(weights * jnp.asarray(_NODES, z.dtype), values, 1) / std
        total = jnp.tensordot(weights, (values - predicted) ** 2, 1)
        return predicted, slope / self.scale, jnp.maximum(total - (slope * std) ** 2, 0)

    def describe(self) -> dict[str, Any]:
        """As JSON: `name` of the linear map, its parameters, and function, offset and scale."""
        values = dataclasses.asdict(self)  # the linear map as its parameters
        name = next(name for name, kind in LINEAR.items() if isinstance(self.linear, kind))
        return {"name": name, **values.pop("linear"), **values}


def _positive(mean: jax.Array, std: jax.Array) -> tuple[jax.Array, ...]:
    """Mean and std of the positive part of a normal distribution, and the variance of its log.

    The variance is that of the log-normal distribution with this mean and std.
    """
    a = jnp.clip(mean / std, -10, 100)
    hazard = jnp.exp(-(a**2) / 2 - jax.scipy.special.log_ndtr(a)) / np.sqrt(2 * np.pi)
    center, std = std * (a + hazard), std * jnp.sqrt(1 - hazard * (a + hazard))
    return jnp.maximum(mean, center), std, jnp.log1p((std / jnp.maximum(mean, center)) ** 2)


def operator_of(description: Mapping[str, Any]) -> Operator:
    """The operator of a description, see `Operator.describe`; ValueError: a wrong name or value."""
    if not isinstance(description, Mapping) or "name" not in description:
        raise ValueError(f'The operator is {description!r}; expected {{"name": NAME, ...}}.')
    kind = look_up(LINEAR, name := description["name"], "operator")
    known = fields(Operator) | fields(kind)
    del known["linear"]
    values = {key: as_tuple(value) for key, value in description.items() if key != "name"}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"Operator {name!r} has no {key!r}. {nearest(key, known)}")
        of_kind(f"operator.{key}", value, known[key].type)
    own = {key: values.pop(key) for key in fields(kind).keys() & values.keys()}
    try:
        return Operator(kind(**own), **values)
    except TypeError as error:
        raise ValueError(f"Operator {dict(description)}: {error}.") from error


# ---- observations --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Observations:
    """The observed values of N trajectories; ValueError: parts that do not fit together."""

    values: np.ndarray  # (N, T, m) or (T, m) for N = 1; NaN where missing
    operator: Operator
    std: Any  # of the noise of the values: a number or (m,)
    initial: np.ndarray | None = None  # known state of the first frame, (N, *state) or (*state)
    time_step: float = 0.0  # between frames; 0: not known

    def __post_init__(self):
        values, std = (np.asarray(part, np.float32) for part in (self.values, self.std))
        initial = None if self.initial is None else np.asarray(self.initial, np.float32)
        if values.ndim not in (2, 3) or 0 in values.shape:
            raise ValueError(f"values has shape {values.shape}; expected (T, m), or (N, T, m).")
        if np.isinf(values).any():
            raise ValueError("Some values are infinite; expected numbers, or NaN if missing.")
        m = values.shape[-1]
        if std.shape not in ((), (m,)) or not (np.isfinite(std) & (std > 0)).all():
            raise ValueError(f"std is {std.tolist()}; expected one number above 0, or {m} of them.")
        if initial is not None and not np.isfinite(initial).all():
            raise ValueError("The initial state has values that are not finite.")
        in_range("time_step", self.time_step, 0.0)
        values = values.reshape(-1, *values.shape[-2:])
        for name, part in {"values": values, "std": std, "initial": initial}.items():
            object.__setattr__(self, name, part)

    def for_states(self, shape: tuple[int, ...], time_step: float = 0.0) -> "Observations":
        """The same with `initial` (N, *shape); ValueError unless they fit states of this shape."""
        count, _, m = self.values.shape
        state = jax.ShapeDtypeStruct((1, 1, *shape), np.float32)
        if (size := jax.eval_shape(self.operator, state).shape[2]) != m:
            raise ValueError(
                f"The operator gives {size} values of a state of shape {shape}; the observations "
                f"have {m} for each frame."
            )
        steps = self.time_step, time_step
        if all(steps) and not math.isclose(*steps, rel_tol=1e-3):
            raise ValueError(
                f"The observations have a time step of {self.time_step:g}, the model "
                f"{time_step:g}; write a row of NaN for each frame without an observation."
            )
        if self.initial is None:
            return self
        if self.initial.shape not in (shape, (count, *shape)):
            got = self.initial.shape
            raise ValueError(f"initial has shape {got}; expected {shape} or {(count, *shape)}.")
        return dataclasses.replace(self, initial=np.broadcast_to(self.initial, (count, *shape)))


PARTS = ("values", "std", "initial", "time_step")  # arrays of a file, beside the operator


def write(path: str | os.PathLike, observations: Observations, **more: Any) -> None:
    """Write an npz file that `read` reads, with more arrays such as `truth`."""
    told = {key: getattr(observations, key) for key in PARTS}
    told["operator_json"] = json.dumps(observations.operator.describe())
    save_arrays(path, **{key: x for key, x in told.items() if x is not None}, **more)


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an npz file; FileNotFoundError, or ValueError if it is none."""
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"There is no file {path}.")
    with named(f"{path} is no readable npz file of arrays"), np.load(path) as file:
        return {key: np.asarray(file[key]) for key in file.files}


def read(path: str | os.PathLike) -> Observations:
    """The observations of an npz file, see `parse`."""
    return parse(load(path), path)


def parse(arrays: Mapping[str, np.ndarray], path: str | os.PathLike) -> Observations:
    """The observations in the arrays of a file; ValueError: what is wrong, what is expected.

    Arrays: `values`, `std`, `operator_json` (a JSON text) or the matrix `H` (m, d), and if known
    `initial` and `time_step`.
    """
    with named(f"{path} has no valid observations"):
        for key in ("values", "std"):
            if key not in arrays:
                raise ValueError(f"The file has no array {key!r}. {nearest(key, arrays)}")
        if ("H" in arrays) == ("operator_json" in arrays):
            raise ValueError(f"A file must have one of H and operator_json; got {sorted(arrays)}.")
        for key in (*PARTS, "H"):
            if key in arrays and arrays[key].dtype.kind not in "fiu":
                raise ValueError(f"{key} has type {arrays[key].dtype}; expected numbers.")
        if got := np.shape(arrays.get("time_step", 0)):
            raise ValueError(f"time_step has shape {got}; expected one number.")
        if (h := arrays.get("H")) is not None:
            if h.ndim != 2 or not np.isfinite(h).all():
                raise ValueError(f"H has shape {h.shape}; expected finite numbers (m, d).")
            operator = Operator(Matrix(as_tuple(h.tolist())))
        else:
            with named("operator_json is no JSON"):
                description = json.loads(str(arrays["operator_json"]))
            operator = operator_of(description)
        time_step = float(arrays.get("time_step", 0))
        std, initial = arrays["std"], arrays.get("initial")
        return Observations(arrays["values"], operator, std, initial, time_step)


def truth_of(
    arrays: Mapping[str, np.ndarray], count: int, shape: tuple[int, ...], path: str | os.PathLike
) -> np.ndarray | None:
    """The truth (count, T, *shape) in the arrays of a file, or (T, *shape) of one trajectory."""
    if (truth := arrays.get("truth")) is None:
        return None
    found = truth if truth.ndim == 2 + len(shape) else truth[None]
    fits = found.ndim == 2 + len(shape) and (len(found), *found.shape[2:]) == (count, *shape)
    if not fits or not found.size or found.dtype.kind not in "fiu" or not np.isfinite(found).all():
        raise ValueError(
            f"{path}: truth has shape {truth.shape} and type {truth.dtype}; expected finite "
            f"numbers ({count}, T, {', '.join(map(str, shape))})."
        )
    return found
