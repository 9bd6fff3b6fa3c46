"""Look-up by name, with errors that list the nearest valid names; values checked by range."""

import dataclasses
import difflib
import importlib
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about `name`: the nearest valid names, then all valid names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}Known: {', '.join(known) or 'none'}."


def in_range(key: str, value: Any, low: float, high: float = math.inf, open: str = "") -> None:
    """Raise ValueError with key, value and range unless low <= value <= high, and value is finite.

    `open` names the ends that are excluded: "(" the lower one, ")" the upper one, "()" both. A low
    end of type int requires an integer value.
    """
    above = low < value if "(" in open else low <= value
    below = value < high if ")" in open else value <= high
    whole = isinstance(low, int)
    if above and below and math.isfinite(value) and (not whole or value == int(value)):
        return
    kind = "an integer" if whole else "a number"
    lower = f"above {low:g}" if "(" in open else f"of at least {low:g}"
    upper = f"below {high:g}" if ")" in open else f"at most {high:g}"
    limits = lower if high == math.inf else f"{lower} and {upper}"
    raise ValueError(f"{key} is {value!r}; expected {kind} {limits}.")


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """table[name]; raises ValueError with the nearest names if the table lacks the name."""
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}. {nearest(name, table)}")
    return table[name]


def resolve(table: Mapping[str, Any], name: str, what: str) -> Any:
    """table[name], or the imported attribute for a name "package.module:Name".

    Raises ValueError with the nearest names if there is no such entry, module or attribute. Errors
    inside the module, such as a missing dependency of the module, are not caught.
    """
    path, _, attribute = name.partition(":")
    if name in table or not all(map(str.isidentifier, (*path.split("."), attribute))):
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
    factory = resolve(table, config["name"], what)
    known = fields(factory)
    values = {key: _as_tuple(value) for key, value in config.items() if key != "name"}
    for key in values:
        if key not in known:
            raise ValueError(
                f"config.{what}.{key}: {config['name']!r} has no such option. "
                f"{nearest(key, known.keys() - filled_in.keys() - {'parent', 'name'})} Each "
                f"name has its own options: in a config file, base.options({config['name']!r})."
            )
    if "dtype" in known and known["dtype"].default is not dataclasses.MISSING:
        # The type's name, as in a config, so that equal objects compare equal.
        values.setdefault("dtype", np.dtype(known["dtype"].default).name)
    return factory(**values, **{k: v for k, v in filled_in.items() if k in known})


def _as_tuple(value: Any) -> Any:
    """The value with all lists, also nested ones, as tuples, which compare and hash by value."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


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
