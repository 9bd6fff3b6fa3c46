"""Looking things up by name, with errors that name the nearest valid one."""

import dataclasses
import difflib
import importlib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to put behind an error about `name`: the nearest valid names, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}Known: {', '.join(known) or 'none'}."


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """table[name].

    Raises:
      ValueError: naming the nearest entries, if there is none.
    """
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}. {nearest(name, table)}")
    return table[name]


def resolve(table: Mapping[str, Any], name: str, what: str) -> Any:
    """table[name], or what "package.module:Name" stands for, which is imported.

    Raises:
      ValueError: naming the nearest, if there is no such entry, module or attribute. An error
        inside the module, such as a missing dependency of its own, is passed on as it is.
    """
    path, _, attribute = name.partition(":")
    if name in table or not all(map(str.isidentifier, (*path.split("."), attribute))):
        return look_up(table, name, what)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):  # it is something that the module imports
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
    """The fields of a dataclass by name.

    Raises:
      ValueError: if it is none.
    """
    if not dataclasses.is_dataclass(factory):
        raise ValueError(f"Got {factory!r}; expected a dataclass, whose fields are config keys.")
    return {field.name: field for field in dataclasses.fields(factory) if field.init}


def make(table: Mapping[str, Any], config: Mapping[str, Any], what: str, **filled_in: Any) -> Any:
    """The dataclass that config["name"] is, of the config's other keys.

    Args:
      table: of names; others are imported, see `resolve`.
      config: the section config.`what`.
      what: its name, for errors.
      **filled_in: more values, for those fields that the dataclass has.

    Raises:
      ValueError: naming the key at fault.
    """
    factory = resolve(table, config["name"], what)
    known = fields(factory)
    values = {}
    for key, value in config.items():
        if key == "name":
            continue
        if key not in known:
            raise ValueError(
                f"config.{what}.{key}: {config['name']!r} has no such option. "
                f"{nearest(key, known.keys() - filled_in.keys() - {'parent', 'name'})} Each "
                f"name has its own options: in a config file, base.options({config['name']!r})."
            )
        values[key] = _as_tuple(value)
    if "dtype" in known and known["dtype"].default is not dataclasses.MISSING:
        # By its name, as in a config: what is made compares by value.
        values.setdefault("dtype", np.dtype(known["dtype"].default).name)
    return factory(**values, **{k: v for k, v in filled_in.items() if k in known})


def _as_tuple(value: Any) -> Any:
    """Lists, as JSON has them, within lists too, become tuples, which compare and hash."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def options(
    table: Mapping[str, Any], name: str, values: Mapping[str, Any], left_out: Collection[str]
) -> dict[str, Any]:
    """The section of a config for `name`: its fields' defaults, but for `values`; see `make`.

    Raises:
      ValueError: if there is no such name or option, or one without a default is not given.
    """
    known = {k: f for k, f in fields(resolve(table, name, "name")).items() if k not in left_out}
    for key in values:
        if key not in known:
            raise ValueError(f"{name!r} has no option {key!r}. {nearest(key, known)}")
    result: dict[str, Any] = {"name": name}
    for key, field in known.items():
        if key not in values and field.default is dataclasses.MISSING:
            raise ValueError(f"Option {key!r} of {name!r} has no default; give it a value.")
        value = values.get(key, field.default)
        result[key] = np.dtype(value).name if key == "dtype" else value
    return result
