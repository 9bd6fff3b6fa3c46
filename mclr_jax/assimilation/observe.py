"""Observations of a trajectory, y = f((L x - offset) / scale) + noise, and the file that has them.

L is linear in the state of one frame, in physical units, or any function of it; f acts on each
element, with an offset and a scale of its own. Missing values are NaN. An operator knows its mean
and its slope under a normal distribution (statistical linearisation), which is what guidance needs
of it.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mclr_jax.files import named, save_arrays
from mclr_jax.schema import as_tuple, fields, in_range, look_up, nearest, of_kind, resolve

FUNCTIONS: dict[str, Callable] = {"identity": lambda z: z} | {
    name: getattr(jnp, name) for name in ("arctan", "tanh", "square", "abs", "exp", "log")
}
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(9)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
EXACT = 32  # coordinates of a state up to which the slope of one's own function is known exactly


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
class Own:
    """A function of one's own in place of a linear map: the state of a frame (*state) -> (m,).

    It is a frozen dataclass that JAX can differentiate, and acts on each frame alone.
    """

    function: Any

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(jax.vmap(self.function))(x)

    def around(self, mean: jax.Array) -> tuple[Callable, Callable]:
        """The derivative at states (B, F, *state), and variances of the state -> of the values.

        Up to `EXACT` coordinates the variances are those of the derivative; beyond, an estimate by
        `EXACT` random signs (Hutchinson).
        """

        def slope(x):
            return jax.jvp(self, (mean,), (x,))[1]

        size = math.prod(mean.shape[2:])
        directions = np.eye(size) if size <= EXACT else (
            np.random.default_rng(0).choice([-1, 1], (EXACT, size)) / EXACT**0.5
        )  # fmt: skip
        directions = directions.reshape(-1, *mean.shape[2:]).astype(np.float32)

        def spread(variance):
            std = jnp.sqrt(variance)
            parts = jax.lax.map(lambda direction: slope(std * direction) ** 2, directions)
            return parts.sum(0)

        return slope, spread


class Linearised(NamedTuple):
    """A(x) under x ~ N(mean, diag(variance)): about predicted + project(x - mean)."""

    predicted: jax.Array  # (B, F, m), the mean of A(x)
    rest: jax.Array  # variance of what is not linear
    project: Callable[[jax.Array], jax.Array]  # (B, F, *state) -> (B, F, m), linear
    spread: Callable[[jax.Array], jax.Array]  # variance of x -> variance of project(x)


@dataclasses.dataclass(frozen=True)
class Operator:
    """A(x) = f((L x - offset) / scale) of states x (B, F, *state) in physical units: (B, F, m).

    f, offset and scale are those of all values, or a tuple of one for each.
    """

    linear: Any = Identity()
    function: str | tuple[str, ...] = "identity"
    offset: float | tuple[float, ...] = 0.0
    scale: float | tuple[float, ...] = 1.0

    def __post_init__(self):
        for name in self._row(self.function):
            look_up(FUNCTIONS, name, "function of an operator")
        for value in self._row(self.offset):
            in_range("operator.offset", value, -math.inf)
        for value in self._row(self.scale):
            in_range("operator.scale", value, 0.0, open="(")

    @staticmethod
    def _row(value: Any) -> tuple:
        return value if isinstance(value, tuple) else (value,)

    def _by_row(self, f: Callable, *parts: jax.Array) -> Any:
        """f(name, *parts) with the name of the function of each value, parts being (..., m)."""
        if isinstance(self.function, str):
            return f(self.function, *parts)
        places = {name: np.flatnonzero(np.array(self.function) == name) for name in self.function}
        found = [f(name, *(part[..., at] for part in parts)) for name, at in places.items()]
        order = np.argsort(np.concatenate([*places.values()]))
        return jax.tree.map(lambda *rows: jnp.concatenate(rows, -1)[..., order], *found)

    def size(self, shape: tuple[int, ...]) -> int:
        """The number of values m of a state of this shape; ValueError: they do not fit."""
        state = jax.ShapeDtypeStruct((1, 1, *shape), np.float32)
        if isinstance(self.linear, Own):
            what = f"The operator {self.describe()['name']}"
            with named(f"{what} fails for a state of shape {shape}"):
                got = jax.eval_shape(self.linear, state)
            if len(got.shape) != 3 or not np.issubdtype(got.dtype, np.floating):
                raise ValueError(
                    f"{what} gives {got.dtype} {got.shape[2:]} of a state of shape {shape}; "
                    "expected real numbers (m,)."
                )
        count = jax.eval_shape(self.linear, state).shape[2]
        for key in ROW:
            value = getattr(self, key)
            if isinstance(value, tuple) and len(value) != count:
                raise ValueError(
                    f"operator.{key} has {len(value)} values; expected one, or {count}, as the "
                    f"operator gives of a state of shape {shape}."
                )
        return count

    def _standard(self, x: jax.Array) -> jax.Array:
        offset, scale = (np.asarray(value, np.float32) for value in (self.offset, self.scale))
        return (self.linear(x) - offset) / scale

    def __call__(self, x: jax.Array) -> jax.Array:
        return self._by_row(lambda name, z: FUNCTIONS[name](z), self._standard(x))

    def linearise(self, mean: jax.Array, variance: jax.Array) -> Linearised:
        """The operator under x ~ N(mean, diag(variance)), by statistical linearisation.

        f by Gauss-Hermite quadrature; exact for the identity of a linear map. For the logarithm x
        has the part of the distribution in its domain, since a value was observed. A function of
        one's own in place of L is linear about the mean.
        """
        if isinstance(self.linear, Own):
            along, spread = self.linear.around(mean)
        else:
            along, spread = self.linear, lambda variance: self.linear(variance, 2)
        scale = np.asarray(self.scale, np.float32)
        std = jnp.sqrt(jnp.maximum(spread(variance) / scale**2, 1e-6))
        predicted, slope, rest = self._by_row(_through, self._standard(mean), std)
        slope = slope / scale
        return Linearised(
            predicted, rest, lambda x: slope * along(x), lambda v: slope**2 * spread(v)
        )

    def describe(self) -> dict[str, Any]:
        """As JSON: `name` of the map, its parameters, and function, offset and scale."""
        own = self.linear.function if isinstance(self.linear, Own) else self.linear
        found = (name for name, kind in LINEAR.items() if kind is type(own))
        name = next(found, f"{type(own).__module__}:{type(own).__qualname__}")
        values = {key: getattr(self, key) for key in ROW}
        return {"name": name, **dataclasses.asdict(own), **values}


def _through(name: str, z: jax.Array, std: jax.Array) -> tuple[jax.Array, ...]:
    """Mean, slope by z and residual variance of a function of N(z, std^2)."""
    if name == "identity":
        return z, jnp.ones_like(z), jnp.zeros_like(z)
    if name == "log":
        center, std, spread = _positive(z, std)
        slope = center * spread / std**2
        predicted = jnp.log(center) - spread / 2 + slope * (z - center)
        return predicted, slope, jnp.maximum(spread - (slope * std) ** 2, 0)
    values = jnp.stack([FUNCTIONS[name](z + std * node) for node in _NODES])
    weights = jnp.asarray(_WEIGHTS, z.dtype)
    predicted = jnp.tensordot(weights, values, 1)
    slope = jnp.tensordot(weights * jnp.asarray(_NODES, z.dtype), values, 1) / std
    total = jnp.tensordot(weights, (values - predicted) ** 2, 1)
    return predicted, slope, jnp.maximum(total - (slope * std) ** 2, 0)


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
    kind = resolve(LINEAR, name := description["name"], "operator")
    around, inner = fields(Operator), fields(kind)
    del around["linear"]
    if taken := around.keys() & inner.keys():
        raise ValueError(f"Operator {name!r} has a field {min(taken)!r}; expected another name.")
    known = around | inner
    values = {key: as_tuple(value) for key, value in description.items() if key != "name"}
    for key, value in values.items():
        if key not in known:
            raise ValueError(f"Operator {name!r} has no {key!r}. {nearest(key, known)}")
        of_kind(f"operator.{key}", value, known[key].type)
    own = {key: values.pop(key) for key in inner.keys() & values.keys()}
    try:
        made = kind(**own)
        hash(made)
    except TypeError as error:
        text = "" if name in LINEAR else " An operator of your own is a frozen dataclass."
        raise ValueError(f"Operator {dict(description)}: {error}.{text}") from error
    return Operator(made if kind in LINEAR.values() else Own(made), **values)


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
        if (size := self.operator.size(shape)) != m:
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


ROW = ("function", "offset", "scale")  # of an operator, one for all values or for each
PARTS = ("values", "std", "initial", "time_step")  # arrays of a file, beside the operator


def write(path: str | os.PathLike, observations: Observations, **more: Any) -> None:
    """Write an npz file for `load` and `parse`, with more arrays such as `truth`."""
    told = {key: getattr(observations, key) for key in PARTS}
    told["operator_json"] = json.dumps(observations.operator.describe())
    save_arrays(path, **{key: x for key, x in told.items() if x is not None}, **more)


def load(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of an npz file; FileNotFoundError, or ValueError if it is none."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path or repr('')}.")
    with named(f"{path} is no readable npz file of arrays"), np.load(path) as file:
        return {key: np.asarray(file[key]) for key in file.files}


def parse(
    arrays: Mapping[str, np.ndarray], path: str | os.PathLike, operator: str = ""
) -> Observations:
    """The observations in the arrays of a file; ValueError: what is wrong, what is expected.

    Arrays: `values`, `std`, `operator_json` (a JSON text, or a name alone) or the matrix `H` (m,
    d), and if known `initial` and `time_step`; `function`, `offset` and `scale`, one for all values
    or for each (m,). `operator` is in place of those of the file.
    """
    if operator:
        others = {key: x for key, x in arrays.items() if key not in ("H", *ROW)}
        arrays = others | {"operator_json": np.array(operator)}
    with named(f"{path} has no valid observations"):
        for key in ("values", "std"):
            if key not in arrays:
                raise ValueError(f"The file has no array {key!r}. {nearest(key, arrays)}")
        if ("H" in arrays) == ("operator_json" in arrays):
            raise ValueError(
                "A file must have one of H and operator_json, unless --operator is given; got "
                f"{sorted(arrays)}."
            )
        for key in (*PARTS, "H"):
            if key in arrays and arrays[key].dtype.kind not in "fiu":
                raise ValueError(f"{key} has type {arrays[key].dtype}; expected numbers.")
        if got := np.shape(arrays.get("time_step", 0)):
            raise ValueError(f"time_step has shape {got}; expected one number.")
        if (h := arrays.get("H")) is not None:
            if h.ndim != 2 or not np.isfinite(h).all():
                raise ValueError(f"H has shape {h.shape}; expected finite numbers (m, d).")
            description: Any = {"name": "matrix", "rows": h.tolist()}
        elif re.fullmatch(r"[\w.:]+", text := str(arrays["operator_json"])):
            description = {"name": text}
        else:
            with named("operator_json is no JSON"):
                description = json.loads(text)
        own = {key: arrays[key].tolist() for key in ROW if key in arrays}
        if isinstance(description, dict):
            if twice := own.keys() & description.keys():
                raise ValueError(f"{min(twice)!r} is an array and in operator_json; expected one.")
            description |= own
        made = operator_of(description)
        time_step = float(arrays.get("time_step", 0))
        std, initial = arrays["std"], arrays.get("initial")
        return Observations(arrays["values"], made, std, initial, time_step)


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
