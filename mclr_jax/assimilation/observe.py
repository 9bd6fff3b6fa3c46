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
from mclr_jax.names import as_tuple, in_range, look_up, nearest, of_kind

FUNCTIONS: dict[str, Callable] = {
    "identity": lambda z: z,
    "arctan": jnp.arctan,
    "tanh": jnp.tanh,
    "square": jnp.square,
    "abs": jnp.abs,
    "exp": jnp.exp,
    "log": jnp.log,
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
        size = math.prod(x.shape[2:])
        if not self.indices or not 0 <= min(self.indices) <= max(self.indices) < size:
            raise ValueError(
                f"The operator selects coordinates {self.indices}; expected some of 0 .. "
                f"{size - 1}, since a state has shape {x.shape[2:]}."
            )
        return x.reshape(*x.shape[:2], size)[..., np.array(self.indices)]


@dataclasses.dataclass(frozen=True)
class Random:
    """A fixed random share of the coordinates, in their order."""

    share: float
    seed: int = 0

    def __post_init__(self):
        in_range("operator.share", self.share, 0.0, 1.0, open="(")

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        size = math.prod(x.shape[2:])
        order = np.random.default_rng(self.seed).permutation(size)
        return x.reshape(*x.shape[:2], size)[
            ..., np.sort(order[: max(1, round(self.share * size))])
        ]


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
            raise ValueError(
                f"The matrix H has shape {weights.shape}; expected (m, {x.shape[2]}) for states of "
                f"{x.shape[2]} coordinates."
            )
        return x @ jnp.asarray(weights.T, x.dtype)


@dataclasses.dataclass(frozen=True)
class Downsample:
    """Fields (H, W, C) by bilinear interpolation at every `factor`-th place, without smoothing."""

    factor: int

    def __post_init__(self):
        in_range("operator.factor", self.factor, 1)

    def __call__(self, x: jax.Array, power: int = 1) -> jax.Array:
        if x.ndim != 5 or x.shape[2] % self.factor or x.shape[3] % self.factor:
            raise ValueError(
                f"Downsampling by {self.factor} needs fields (H, W, C) with H and W multiples of "
                f"{self.factor}; a state has shape {x.shape[2:]}."
            )
        rows, columns = (self._weights(size) ** power for size in x.shape[2:4])
        small = jnp.einsum("ih,jw,bfhwc->bfijc", rows, columns, x)
        return small.reshape(*x.shape[:2], -1)

    def _weights(self, size: int) -> jax.Array:
        shape = (size // self.factor, size)
        return jax.image.resize(jnp.eye(size), shape, "linear", antialias=False)


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
        statistical linearisation, by Gauss-Hermite quadrature. Exact for the identity.
        """
        z, f = (self.linear(mean) - self.offset) / self.scale, FUNCTIONS[self.function]
        if self.function == "identity":
            return z, jnp.full_like(z, 1 / self.scale), jnp.zeros_like(z)
        std = jnp.sqrt(jnp.maximum(self.linear(variance, 2), 1e-6 * self.scale**2)) / self.scale
        values = jnp.stack([f(z + std * node) for node in _NODES])
        weights = jnp.asarray(_WEIGHTS, z.dtype)
        predicted = jnp.tensordot(weights, values, 1)
        slope = jnp.tensordot(weights * jnp.asarray(_NODES, z.dtype), values, 1) / std
        total = jnp.tensordot(weights, (values - predicted) ** 2, 1)
        return predicted, slope / self.scale, jnp.maximum(total - (slope * std) ** 2, 0)

    def describe(self) -> dict[str, Any]:
        """As JSON: `name` of the linear map, its parameters, and function, offset and scale."""
        name = next(name for name, kind in LINEAR.items() if isinstance(self.linear, kind))
        values = {"function": self.function, "offset": self.offset, "scale": self.scale}
        return {"name": name, **dataclasses.asdict(self.linear), **values}


def operator_of(description: Mapping[str, Any]) -> Operator:
    """The operator of a description, see `Operator.describe`; ValueError: a wrong name or value."""
    if not isinstance(description, Mapping) or not isinstance(description.get("name"), str):
        raise ValueError(
            f'The operator is {description!r}; expected {{"name": NAME, ...}}, with NAME one of '
            f"{', '.join(LINEAR)}."
        )
    kind = look_up(LINEAR, description["name"], "operator")
    own = {field.name: field.type for field in dataclasses.fields(kind)}
    shared = {"function", "offset", "scale"}
    values = {key: as_tuple(value) for key, value in description.items() if key != "name"}
    for key in values.keys() - shared:
        if key not in own:
            known = nearest(key, own.keys() | shared)
            raise ValueError(f"Operator {description['name']!r} has no {key!r}. {known}")
        of_kind(f"operator.{key}", values[key], own[key])
    try:
        linear = kind(**{key: values[key] for key in own.keys() & values.keys()})
        return Operator(linear, **{key: values[key] for key in shared & values.keys()})
    except TypeError as error:
        raise ValueError(f"Operator {dict(description)}: {error}.") from error


# ---- observations --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Observations:
    """What was seen of N trajectories; ValueError: parts that do not fit together."""

    values: np.ndarray  # (N, T, m) or (T, m) for N = 1; NaN where missing
    operator: Operator
    std: Any  # of the noise of the values: a number or (m,)
    initial: np.ndarray | None = None  # known state of the first frame, (N, *state) or (*state)
    time_step: float = 0.0  # between frames; 0: not known

    def __post_init__(self):
        values = np.asarray(self.values, np.float32)
        if values.ndim not in (2, 3) or 0 in values.shape:
            raise ValueError(
                f"Observed values have shape {values.shape}; expected (T, m), or (N, T, m) for N "
                "trajectories."
            )
        values = values if values.ndim == 3 else values[None]
        if np.isinf(values).any():
            raise ValueError("Observed values are infinite; expected numbers, or NaN if missing.")
        std = np.asarray(self.std, np.float32)
        if std.shape not in ((), values.shape[2:]) or not (np.isfinite(std) & (std > 0)).all():
            raise ValueError(
                f"std is {std.tolist()}; expected one number above 0, or {values.shape[2]}, one "
                "for each value of a frame."
            )
        in_range("time_step", self.time_step, 0.0)
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "std", std)
        if self.initial is not None:
            initial = np.asarray(self.initial, np.float32)
            if not np.isfinite(initial).all():
                raise ValueError("The initial state has values that are not finite.")
            object.__setattr__(self, "initial", initial)

    def for_states(self, shape: tuple[int, ...], time_step: float = 0.0) -> "Observations":
        """The same with `initial` (N, *shape); ValueError unless they fit states of this shape."""
        count, _, m = self.values.shape
        got = jax.eval_shape(self.operator, jax.ShapeDtypeStruct((1, 1, *shape), np.float32)).shape
        if got[2] != m:
            raise ValueError(
                f"The operator gives {got[2]} values of a state of shape {shape}; the observations "
                f"have {m} for each frame."
            )
        if (
            self.time_step
            and time_step
            and not math.isclose(self.time_step, time_step, rel_tol=1e-3)
        ):
            raise ValueError(
                f"The observations have a time step of {self.time_step:g}, the model "
                f"{time_step:g}; write a row of NaN for each frame without an observation."
            )
        if self.initial is None:
            return self
        if self.initial.shape not in (shape, (count, *shape)):
            raise ValueError(
                f"The initial state has shape {self.initial.shape}; expected {shape} or "
                f"{(count, *shape)}."
            )
        initial = np.broadcast_to(self.initial, (count, *shape))
        return dataclasses.replace(self, initial=initial)


def write(path: str | os.PathLike, observations: Observations, **more: Any) -> None:
    """Write an npz file that `read` reads, with more arrays such as `truth`."""
    arrays = {"values": observations.values, "std": observations.std,
              "time_step": observations.time_step,
              "operator_json": json.dumps(observations.operator.describe())}  # fmt: skip
    if observations.initial is not None:
        arrays["initial"] = observations.initial
    save_arrays(path, **arrays, **more)


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
    for key in ("values", "std"):
        if key not in arrays:
            raise ValueError(f"{path} has no array {key!r}. {nearest(key, arrays)}")
    if ("H" in arrays) == ("operator_json" in arrays):
        raise ValueError(f"{path} must have one of H and operator_json; it has {sorted(arrays)}.")
    for key in ("values", "std", "initial", "time_step", "H"):
        if key in arrays and arrays[key].dtype.kind not in "fiu":
            raise ValueError(f"{path}: {key} has type {arrays[key].dtype}; expected numbers.")
    if got := np.shape(arrays.get("time_step", 0.0)):
        raise ValueError(f"{path}: time_step has shape {got}; expected one number.")
    try:
        if "H" in arrays:
            if arrays["H"].ndim != 2 or not np.isfinite(arrays["H"]).all():
                raise ValueError(
                    f"H has shape {arrays['H'].shape}; expected finite numbers (m, d)."
                )
            operator = Operator(Matrix(as_tuple(arrays["H"].tolist())))
        else:
            with named("operator_json is no JSON"):
                description = json.loads(str(arrays["operator_json"]))
            operator = operator_of(description)
        known = {key: arrays[key] for key in ("initial",) if key in arrays}
        time_step = float(arrays.get("time_step", 0.0))
        return Observations(arrays["values"], operator, arrays["std"], time_step=time_step, **known)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
