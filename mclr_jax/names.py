"""Look-up by name, with errors that list the nearest valid names; values checked by range."""

import dataclasses
import difflib
import importlib
import math
import numbers
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")
INT32 = 2**31 - 1  # counts are 32-bit integers on the device
KINDS: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
}


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about `name`: the nearest valid names, then all valid names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}Known: {', '.join(known) or 'none'}."


def of_kind(key: str, value: Any, kind: Any) -> None:
    """Raise ValueError with key and value unless the value has this kind, as a type says it.

    Kinds are bool, int, float (any real number), str and tuples of these; other types are not
    checked. A truth value is no number.
    """
    if kind in KINDS:
        allowed, words = KINDS[kind]
        if isinstance(value, allowed) and (kind is bool or not isinstance(value, bool)):
            return
        raise ValueError(f"{key} is {value!r}; expected {words}.")
    if typing.get_origin(kind) is not tuple:
        return
    parts = typing.get_args(kind)
    parts = parts[:-1] if (anyhow := parts[-1] is ...) else parts
    if not isinstance(value, list | tuple) or not (anyhow or len(value) == len(parts)):
        count = "any number of values" if anyhow else f"{len(parts)} values"
        raise ValueError(f"{key} is {value!r}; expected {count} in parentheses.")
    for index, part in enumerate(value):
        of_kind(f"{key}[{index}]", part, parts[0 if anyhow else index])


def in_range(key: str, value: Any, low: float, high: float | None = None, open: str = "") -> None:
    """Raise ValueError with key, value and range unless low <= value <= high, and value is finite.

    `open` names the ends that are excluded: "(" the lower one, ")" the upper one, "()" both. A low
    end of type int requires an integer value, by default a 32-bit one.
    """
    whole = isinstance(low, int)
    high = (INT32 if whole else math.inf) if high is None else high
    allowed, kind = KINDS[int if whole else float]
    if isinstance(value, allowed) and not isinstance(value, bool):
        above = low < value if "(" in open else low <= value
        below = value < high if ")" in open else value <= high
        if above and below and math.isfinite(value):
            return
    lower = f"above {low:g}" if "(" in open else f"of at least {low:g}"
    upper = f"below {high:g}" if ")" in open else f"at most {high:.10g}"
    limits = lower if high == math.inf else f"{lower} and {upper}"
    raise ValueError(f"{key} is {value!r}; expected {kind} {limits}.")


def pair(key: str, value: Any, low: float, high: float = math.inf) -> None:
    """Raise ValueError with key and value unless it is (a, b) with low <= a < b <= high."""
    of_kind(key, value, tuple[float, ...])
    if len(value) != 2 or not low <= value[0] < value[1] <= high:
        limit = "" if high == math.inf else f" <= {high:g}"
        raise ValueError(f"{key} is {value!r}; expected (low, high), {low:g} <= low < high{limit}.")


def class_factors(key: str, values: Any, num_classes: int) -> None:
    """Raise ValueError with key and values unless they are a factor of at least 0 for each class.

    `values` is a tuple or list of numbers.
    """
    of_kind(key, values, tuple[float, ...])
    if len(values) != num_classes:
        raise ValueError(f"{key} has {len(values)} values; expected {num_classes}, one per class.")
    for label, value in enumerate(values):
        in_range(f"{key}[{label}]", value, 0.0)


def check_keys(section: str, given: Collection[str], known: Collection[str]) -> None:
    """Raise ValueError with the first key of a section that is unknown or missing."""
    for key in given:
        if key not in known:
            raise ValueError(f"{section} has no key {key!r}. {nearest(str(key), known)}")
    for key in known:
        if key not in given:
            raise ValueError(f"{section} lacks {key!r}; expected the keys of configs/base.py.")


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """table[name]; raises ValueError with the nearest names if the table lacks the name."""
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"Unknown {what} {name!r}. {nearest(str(name), table)}")
    return table[name]


def resolve(table: Mapping[str, Any], name: str, what: str) -> Any:
    """table[name], or the imported attribute for a name "package.module:Name".

    Raises ValueError with the nearest names if there is no such entry, module or attribute. Errors
    inside the module, such as a missing dependency of the module, are not caught.
    """
    path, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not path or name in table or not all(map(str.isidentifier, (*path.split("."), attribute))):
        return look_up(table, name, what)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):  # a module that `path` imports is missing
            raise
        raise ValueError(
            f"Unknown {what} {name!r}: no module {error.name!r} can be imported from where this "
            f"command runs; set PYTHONPATH to the folder that has it. {nearest(path, table)}"
        ) from error
    if not hasattr(module, attribute):
        raise ValueError(
            f"Unknown {what} {name!r}: module {path!r} has no {attribute!r}. "
            f"{nearest(attribute, (public for public in vars(module) if public[0] != '_'))}"
        )
    return getattr(module, attribute)


def fields(factory: Any) -> dict[str, dataclasses.Field]:
    """The init fields of a dataclass by name; raises ValueError on anything else."""
    if not dataclasses.is_dataclass(factory):
        raise ValueError(f"Got {factory!r}; expected a dataclass, whose fields are config keys.")
    return {field.name: field for field in dataclasses.fields(factory) if field.init}


def make(table: Mapping[str, Any], config: Mapping[str, Any], what: str, **filled_in: Any) -> Any:
    """Construct the dataclass named config["name"] from the other keys of the section `what`.

    Names are looked up by `resolve`. Of the values in `filled_in`, those for fields of the
    dataclass are used. Raises ValueError with the first wrong key.
    """
    if "name" not in config:
        raise ValueError(f"config.{what} lacks 'name'; expected one of {', '.join(sorted(table))}.")
    factory = resolve(table, name := config["name"], what)
    if not dataclasses.is_dataclass(factory):
        raise ValueError(
            f"config.{what}.name is {name!r}, a {type(factory).__name__}; expected a dataclass, "
            "whose fields are config keys."
        )
    values = {key: value for key, value in config.items() if key != "name"}
    return construct(factory, values, what, name, **filled_in)


def construct(
    factory: Any, config: Mapping[str, Any], what: str, name: str = "", **filled_in: Any
) -> Any:
    """Construct a dataclass from the section `what`, which has `name`, as `make` does."""
    known = fields(factory)
    values = {key: as_tuple(value) for key, value in config.items()}
    for key, value in values.items():
        if key not in known:
            hint = f" Each name has its own options: in a config file, base.options({name!r})."
            raise ValueError(
                f"config.{what}.{key}: {name or what!r} has no such option. "
                f"{nearest(key, known.keys() - filled_in.keys() - {'parent', 'name'})}"
                f"{hint if name else ''}"
            )
        of_kind(f"config.{what}.{key}", value, known[key].type)
    if "dtype" in known and known["dtype"].default is not dataclasses.MISSING:
        # The type's name, as in a config, so that equal objects compare equal.
        values.setdefault("dtype", np.dtype(known["dtype"].default).name)
    values |= {key: value for key, value in filled_in.items() if key in known}
    missing = (dataclasses.MISSING, dataclasses.MISSING)
    for key, field in known.items():
        if key not in values and (field.default, field.default_factory) == missing:
            raise ValueError(f"config.{what} lacks {key!r}, which {name or what!r} needs.")
    return factory(**values)


def as_tuple(value: Any) -> Any:
    """The value with all lists, also nested ones, as tuples, which compare and hash by value."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value


def options(
    table: Mapping[str, Any], name: str, values: Mapping[str, Any], left_out: Collection[str]
) -> dict[str, Any]:
    """The config section for `name`: the defaults of its fields, updated by `values`; see `make`.

    Raises ValueError on an unknown name or option, or if an option without a default has no value.
    """
    known = fields(resolve(table, name, "name"))
    section: dict[str, Any] = {k: field.default for k, field in known.items() if k not in left_out}
    for key in values:
        if key not in section:
            raise ValueError(f"{name!r} has no option {key!r}. {nearest(key, section)}")
    section |= values
    for key, value in section.items():
        if value is dataclasses.MISSING:
            raise ValueError(f"Option {key!r} of {name!r} has no default; give it a value.")
    if "dtype" in section:
        section["dtype"] = np.dtype(section["dtype"]).name
    return {"name": name} | section
