"""Typed keys: dataclass fields with a range and a meaning, read from a config; look-up by name."""

import dataclasses
import difflib
import importlib
import math
import numbers
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
INT32 = 2**31 - 1  # counts are 32-bit integers on the device
FLAX = ("parent", "name")  # fields of every network that are no keys
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


class Key(NamedTuple):
    """What a field of a dataclass says of the values that it takes."""

    low: Any = None  # the range, see `in_range`; None for none
    high: Any = None
    ends: str = ""
    words: Mapping[str, Any] | None = None  # the valid texts
    says: str = ""  # the meaning, in a line

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError with name and value unless the value, or each of several, is valid."""
        if isinstance(value, tuple):
            for index, part in enumerate(value):
                self.check(f"{name}[{index}]", part)
        elif self.words is not None:
            look_up(self.words, value, name)
        elif self.low is not None and not hasattr(value, "aval"):  # traced values have no range
            in_range(name, value, self.low, self.high, self.ends)


def key(
    default: Any, low: Any = None, high: Any = None, ends: str = "", says: str = "",
    words: Mapping[str, Any] | None = None,
) -> Any:  # fmt: skip
    """A field with this default, range (see `in_range`) or words, and meaning."""
    return dataclasses.field(default=default, metadata={"key": Key(low, high, ends, words, says)})


def check(value: Any) -> None:
    """Raise ValueError unless all keys of a dataclass are valid; errors name SECTION.FIELD."""
    for name, field in fields(type(value)).items():
        if "key" in field.metadata:
            field.metadata["key"].check(f"{value.where}.{name}", getattr(value, name))


class Keys:
    """Base of a frozen dataclass whose fields are the keys of a section of the config."""

    where: ClassVar[str]

    def __post_init__(self) -> None:
        check(self)


def section(kind: Any, says: str = "") -> Any:
    """A field that is a section of its own: a dataclass of keys."""
    read_one, blank_one = lambda given, where: read(kind, given, where), lambda: blank(kind)
    return _readable(kind, read_one, blank_one, says)


def part(
    table: Mapping[str, Any], default: str, what: str, late: Collection[str] = (), says: str = ""
) -> Any:
    """A field whose section names a dataclass of `table`, the other keys being its fields.

    With `late`, fields that the config does not give, the value is a `Part` to make it of.
    """

    def read_one(given: Any, where: str) -> Any:
        if not default and not late and hasattr(given, "items") and not given.get("name", ""):
            if more := [key for key in given if key != "name"]:
                raise ValueError(f"{where} without a name has no key {more[0]!r}.")
            of_kind(f"{where}.name", given.get("name", ""), str)
            return None
        found = Part.read(table, given, what, late)
        return found if late else found.make()

    def blank_one() -> dict[str, Any]:
        return options(table, default, {}, (*late, *FLAX)) if default else {"name": ""}

    return _readable(None, read_one, blank_one, says)


def _readable(factory: Any, read_one: Callable, blank_one: Callable, says: str) -> Any:
    metadata = {"read": read_one, "blank": blank_one, "says": says}
    return dataclasses.field(default_factory=factory or (lambda: None), metadata=metadata)


def texts(default: dict[str, str], says: str = "") -> Any:
    """A field that is a section with texts of any names."""

    def read_all(given: Any, where: str) -> dict[str, str]:
        for name, value in given.items():
            of_kind(f"{where}.{name}", value, str)
        return dict(given)

    metadata = {"read": read_all, "blank": lambda: dict(default), "says": says}
    return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)


def hidden() -> Any:
    """A field that is no key."""
    return dataclasses.field(default_factory=dict, compare=False, metadata={"hidden": True})


def rest(says: str = "") -> Any:
    """A field with all keys of the section that are no other field."""
    return dataclasses.field(default_factory=dict, metadata={"rest": True, "says": says})


def read(kind: Any, given: Any, where: str) -> Any:
    """The dataclass `kind` from a section of a config; absent keys get their defaults.

    ValueError: the first key that is unknown, or has a value of another kind or out of its range.
    """
    if not isinstance(given, Mapping) and not hasattr(given, "items"):
        raise ValueError(f"{where} is {given!r}; expected a section with keys.")
    known, values, others = fields(kind), {}, {}
    more = next((name for name, field in known.items() if "rest" in field.metadata), None)
    for name, value in given.items():
        if name in known and name != more:
            values[name] = _value(known[name], value, f"{where}.{name}")
        elif more:
            others[name] = as_tuple(value)
        else:
            raise ValueError(f"{where} has no key {name!r}. {nearest(str(name), known)}")
    return kind(**values, **({more: others} if more else {}))


def _value(field: dataclasses.Field, value: Any, where: str) -> Any:
    if "read" in field.metadata:
        return field.metadata["read"](value, where)
    value = as_tuple(value)
    known = field.metadata.get("key", Key())
    if known.low is None or isinstance(value, tuple):
        of_kind(where, value, field.type)
    known.check(where, value)
    return value


def blank(kind: Any) -> dict[str, Any]:
    """The section with the default of each key, as a config holds it."""
    found = {}
    for name, field in fields(kind).items():
        if "blank" in field.metadata:
            found[name] = field.metadata["blank"]()
        elif "rest" not in field.metadata:
            plain = field.default is not dataclasses.MISSING
            found[name] = field.default if plain else field.default_factory()  # type: ignore
    return found


def explain(kind: Any, prefix: str = "") -> list[str]:
    """A line for each key: its name, its default and its meaning."""
    lines = []
    for name, field in fields(kind).items():
        if dataclasses.is_dataclass(field.type) and "read" in field.metadata:
            lines += explain(field.type, f"{prefix}{name}.")
        elif "key" in field.metadata:
            lines.append(f"{prefix}{name}={field.default!r}: {field.metadata['key'].says}")
        else:
            lines.append(f"{prefix}{name}: {field.metadata.get('says', '')}")
    return lines


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
    found = (field for field in dataclasses.fields(factory) if field.init)
    return {field.name: field for field in found if "hidden" not in field.metadata}


@dataclasses.dataclass(frozen=True)
class Part:
    """A dataclass that a config names, and the values that it gives for the fields."""

    factory: Any
    values: Mapping[str, Any]
    what: str  # the section
    name: str = ""

    @classmethod
    def read(
        cls, table: Mapping[str, Any], given: Mapping[str, Any], what: str,
        late: Collection[str] = (),
    ) -> "Part":  # fmt: skip
        """From the section `what`, whose key `name` is looked up by `resolve`.

        ValueError: the name is unknown, or is no dataclass; see `construct` for the other keys.
        """
        if not hasattr(given, "items"):
            raise ValueError(f"config.{what} is {given!r}; expected a section with keys.")
        if not (name := given.get("name", "")):
            raise ValueError(
                f"config.{what} lacks 'name'; expected one of {', '.join(sorted(table))}."
            )
        factory = resolve(table, name, what)
        if not dataclasses.is_dataclass(factory):
            raise ValueError(
                f"config.{what}.name is {name!r}, a {type(factory).__name__}; expected a "
                "dataclass, whose fields are config keys."
            )
        values = {key: as_tuple(value) for key, value in given.items() if key != "name"}
        found = cls(factory, values, what, name)
        found._check_kinds(late)
        return found

    def _check_kinds(self, late: Collection[str] = ()) -> None:
        known = fields(self.factory)
        for key, value in self.values.items():
            if key not in known:
                hint = f" Each name has its own options: in a config file, options({self.name!r})."
                raise ValueError(
                    f"config.{self.what}.{key}: {self.name or self.what!r} has no such option. "
                    f"{nearest(key, known.keys() - {*FLAX, *late})}{hint if self.name else ''}"
                )
            of_kind(f"config.{self.what}.{key}", value, known[key].type)
            known[key].metadata.get("key", Key()).check(f"config.{self.what}.{key}", value)

    def make(self, **filled_in: Any) -> Any:
        """The object; of `filled_in`, the values of fields that the config does not give."""
        known, values = fields(self.factory), dict(self.values)
        if "dtype" in known and known["dtype"].default is not dataclasses.MISSING:
            # The type's name, as in a config, so that equal objects compare equal.
            values.setdefault("dtype", np.dtype(known["dtype"].default).name)
        values = {key: x for key, x in filled_in.items() if key in known} | values
        missing = (dataclasses.MISSING, dataclasses.MISSING)
        for key, field in known.items():
            if key not in values and (field.default, field.default_factory) == missing:
                what = self.name or self.what
                raise ValueError(f"config.{self.what} lacks {key!r}, which {what!r} needs.")
        return self.factory(**values)


def construct(factory: Any, given: Mapping[str, Any], what: str) -> Any:
    """The dataclass `factory` from a section without a name."""
    found = Part(factory, {key: as_tuple(value) for key, value in given.items()}, what)
    found._check_kinds()
    return found.make()


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
