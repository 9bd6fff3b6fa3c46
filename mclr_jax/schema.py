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


def elsewhere(name: str, known: Iterable[str], cutoff: float = 1.0) -> str:
    """The part of an error that names keys, as a.b, that end like `name`, or nearly."""
    last = {key: key.lstrip("-").rpartition(".")[2] for key in known if key != name}
    word = name.rpartition(".")[2]
    close = difflib.get_close_matches(word, {*last.values()}, n=1, cutoff=cutoff)
    found = [key for key in last if last[key] in close or last[key].endswith(f"_{word}")]
    found.sort(key=lambda key: (key.count("."), last[key] != word))
    return f" Did you mean {' or '.join(found[:3])}?" if found else ""


def local(key: str, value: Any) -> None:
    """Raise ValueError with key and value if the value, or one of several, is a URL."""
    for text in value if isinstance(value, list | tuple) else [value]:
        if isinstance(text, str) and "://" in text:
            raise ValueError(
                f"{key} is {text!r}, a URL; expected a path of this machine. Copy the files here, "
                "or mount the bucket (of gs:// by gcsfuse) and give the path there."
            )


def of_kind(key: str, value: Any, kind: Any) -> None:
    """Raise ValueError with key and value unless the value has this kind, as a type says it.

    Kinds are bool, int, float (any real number), str and tuples of these; other types are not
    checked. A truth value is no number.
    """
    if kind in KINDS:
        allowed, words = KINDS[kind]
        if isinstance(value, allowed) and (kind is bool or not isinstance(value, bool)):
            return local(key, value)
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
    raise ValueError(f"{key} is {value!r}; expected {kind} {_limits(low, high, open)}.")


def _limits(low: float, high: float, open: str) -> str:
    lower = f"above {low:g}" if "(" in open else f"of at least {low:g}"
    upper = f"below {high:g}" if ")" in open else f"at most {high:.10g}"
    return lower if high == math.inf else f"{lower} and {upper}"


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


# ---- keys ----------------------------------------------------------------------------------------


class Key(NamedTuple):
    """The values that a field of a dataclass takes, and its meaning."""

    low: Any = None  # the range, see `in_range`; None for none
    high: Any = None
    ends: str = ""
    words: Collection = ()  # all valid values
    ordered: bool = False  # (low, high) with low < high, or () if that is the default
    says: str = ""
    several: bool = False  # of the words

    def check(self, name: str, value: Any) -> None:
        """Raise ValueError with name and value unless the value, or each of several, is valid."""
        if self.ordered:
            if value:
                pair(name, value, self.low, math.inf if self.high is None else self.high)
        elif isinstance(value, tuple) and (self.several or not self.words):
            for index, part in enumerate(value):
                self.check(f"{name}[{index}]", part)
        elif self.words:
            word = getattr(value, "__name__", value)  # of a dtype
            if not isinstance(word, str | numbers.Real) or word not in self.words:
                names = [*map(str, self.words)]
                texts = all(isinstance(word, str) for word in self.words)
                known = nearest(str(word), names) if texts else f"Known: {', '.join(names)}."
                raise ValueError(f"{name} is {value!r}. {known}")
        elif self.low is not None and not hasattr(value, "aval"):  # traced values have no range
            in_range(name, value, self.low, self.high, self.ends)

    def limits(self) -> str:
        """The valid values in words; empty if all values of the field's type are valid."""
        if self.words:
            return f"one of {', '.join(map(str, self.words))}"
        if self.low is None:
            return ""
        high = math.inf if self.high is None else self.high
        return ("rising pair " if self.ordered else "") + _limits(self.low, high, self.ends)


def key(
    default: Any, low: Any = None, high: Any = None, ends: str = "", *, words: Collection = (),
    ordered: bool = False, says: str = "",
) -> Any:  # fmt: skip
    """A field with this default and range (see `in_range`), or words, and its meaning in a line."""
    found = Key(low, high, ends, tuple(words), ordered, says, isinstance(default, tuple))
    return dataclasses.field(default=default, metadata={"key": found})


def check(value: Any) -> None:
    """Raise ValueError unless all keys of a dataclass are valid; errors name WHERE.FIELD."""
    for name, field in fields(type(value)).items():
        if "key" in field.metadata:
            field.metadata["key"].check(f"{value.where}.{name}", getattr(value, name))


class Keys:
    """Base of a frozen dataclass whose fields are the keys of the section `where` of the config."""

    where: ClassVar[str]

    def __init_subclass__(cls, where: str = "") -> None:
        if where:
            cls.where = where

    def __post_init__(self) -> None:
        check(self)


class Section(NamedTuple):
    """A field that is a section of a config with keys of its own."""

    read: Callable[[Any, str], Any]  # (section, its name) -> value of the field
    filled: Callable[[Mapping], dict]  # section -> the same with the defaults of absent keys
    explain: Callable[[str], list[str]]  # name -> lines for `explain`
    says: str
    table: Mapping[str, Any] = {}  # of the names that it may have
    late: Collection[str] = ()  # fields of these that are no keys


def _section(found: Section, factory: Callable[[], Any]) -> Any:
    return dataclasses.field(default_factory=factory, metadata={"section": found})


def section(kind: Any, says: str = "") -> Any:
    """A field that is a section with the keys of a dataclass."""
    found = Section(
        lambda given, where: read(kind, given, where), lambda given: filled(kind, given),
        lambda name: explain(kind, f"{name}."), says,
    )  # fmt: skip
    return _section(found, kind)


def part(
    table: Mapping[str, Any], default: str, late: Collection[str] = (), *, says: str = "",
    optional: bool = False,
) -> Any:  # fmt: skip
    """A field whose section names a dataclass of `table`, the other keys being its fields.

    With `late`, fields that the config need not give, the value is a `Part`, to make it of; without
    a name an `optional` one is None.
    """

    def read_one(given: Any, where: str) -> Any:
        if optional and not given.get("name", ""):
            if more := [name for name in given if name != "name"]:
                raise ValueError(
                    f"{where} without a name has no key {more[0]!r}. {nearest(more[0], ['name'])}"
                )
            return of_kind(f"{where}.name", given.get("name", ""), str)
        found = Part.read(table, given, where, late)
        return found if late else found.make()

    def filled_one(given: Mapping) -> dict[str, Any]:
        if not (name := given.get("name", default)):
            return {"name": ""}
        return {"name": name, **Part.read(table, {**given, "name": name}, "config", late).values}

    def explain_one(name: str) -> list[str]:
        of: dict[str, list[str]] = {}  # line -> the names that have this option
        for word, factory in table.items():
            for line in explain(factory, f"{name}.", late):
                of.setdefault(line, []).append(word)
        for line, words in of.items():
            of[line] = [] if len(words) == len(table) else words
        options = [f"{line} [{', '.join(words)}]".removesuffix(" []") for line, words in of.items()]
        return [f"{name}.name={default!r}: {says}; one of {', '.join(table)}", *options]

    return _section(Section(read_one, filled_one, explain_one, says, table, late), lambda: None)


def texts(default: dict[str, str], says: str = "") -> Any:
    """A field that is a section with texts of any names."""

    def read_all(given: Any, where: str) -> dict[str, str]:
        for name, value in given.items():
            of_kind(f"{where}.{name}", value, str)
        return dict(given)

    def explain_all(name: str) -> list[str]:
        return [f"{name}.{key}={text!r}: {says}" for key, text in default.items()]

    found = Section(read_all, lambda given: default | dict(given), explain_all, says)
    return _section(found, lambda: dict(default))


def hidden() -> Any:
    """A field that is no key."""
    return dataclasses.field(default_factory=dict, compare=False, metadata={"hidden": True})


def rest(says: str = "") -> Any:
    """A field with all keys of the section that are no other field."""
    return dataclasses.field(default_factory=dict, metadata={"rest": True, "says": says})


def fields(factory: Any) -> dict[str, dataclasses.Field]:
    """The fields of a dataclass that are keys, by name; raises ValueError on anything else."""
    if not dataclasses.is_dataclass(factory):
        raise ValueError(f"Got {factory!r}; expected a dataclass, whose fields are config keys.")
    found = {x.name: x for x in dataclasses.fields(factory) if x.init}
    dropped = FLAX if found.keys() >= {*FLAX} else ()
    return {n: x for n, x in found.items() if "hidden" not in x.metadata and n not in dropped}


# ---- from a config and back ----------------------------------------------------------------------


def read(kind: Any, given: Any, where: str) -> Any:
    """The dataclass `kind` from a section of a config; absent keys get their defaults.

    ValueError: the first key that is unknown, or has a value of another kind or out of its range.
    """
    if not hasattr(given, "items"):
        raise ValueError(f"{where} is {given!r}; expected a section with keys.")
    known, values, others = fields(kind), {}, {}
    more = next((name for name, field in known.items() if "rest" in field.metadata), None)
    for name, value in given.items():
        if name in known and name != more:
            values[name] = _value(known[name], value, f"{where}.{name}")
        elif more:
            others[name] = as_tuple(value)
        else:
            hint = elsewhere(f"{where}.{name}", names(kind, f"{where}."))
            raise ValueError(f"{where} has no key {name!r}.{hint} {nearest(str(name), known)}")
    for name, field in known.items():  # the section of a part that is absent has a default name
        if name not in values and (found := field.metadata.get("section")) and found.table:
            values[name] = found.read(found.filled({}), f"{where}.{name}")
    return kind(**values, **({more: others} if more else {}))


def _value(field: dataclasses.Field, value: Any, where: str) -> Any:
    if found := field.metadata.get("section"):
        if not hasattr(value, "items"):
            raise ValueError(f"{where} is {value!r}; expected a section with keys.")
        return found.read(value, where)
    value = as_tuple(value)
    limits = field.metadata.get("key", Key())
    if limits.low is None or isinstance(value, tuple) or field.type not in (int, float):
        of_kind(where, value, field.type)
    limits.check(where, value)
    return value


def filled(kind: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """A section that `read` accepts, with the default of each absent key, as a config holds it."""
    found = {}
    for name, field in fields(kind).items():
        if part := field.metadata.get("section"):
            found[name] = part.filled(given.get(name, {}))
        elif "rest" not in field.metadata:
            found[name] = as_tuple(given.get(name, field.default))
    return found | {name: as_tuple(value) for name, value in given.items() if name not in found}


def names(kind: Any, prefix: str = "") -> list[str]:
    """The name of each key, of all names that a part may have."""
    return [line.partition("=")[0] for line in explain(kind, prefix)]


def explain(kind: Any, prefix: str = "", left_out: Collection[str] = ()) -> list[str]:
    """A line for each key: its name, default, range and meaning."""
    lines = []
    for name, field in fields(kind).items():
        if name in left_out:
            continue
        if part := field.metadata.get("section"):
            lines += part.explain(f"{prefix}{name}")
        elif found := field.metadata.get("key"):
            value: Any = field.default if name != "dtype" else np.dtype(field.default).name  # type: ignore
            notes = "; ".join(filter(None, (found.says, found.limits().removeprefix("of "))))
            lines.append(f"{prefix}{name}={value!r}: {notes}")
        elif "rest" in field.metadata:
            lines.append(f"{prefix}...: {field.metadata['says']}")
    return lines


def switched(kind: Any, config: Mapping[str, Any], name: str, word: str) -> dict[str, Any]:
    """The section `name` of a config for another of its names: `word`.

    It has the options of the new name; those that both names have, and that differ from the
    default of the old one, keep their values.
    """
    found, given = fields(kind)[name].metadata["section"], config[name]
    known = fields(Part.read(found.table, {"name": word}, f"config.{name}", found.late).factory)
    old = found.filled({"name": given["name"]}) if given.get("name") else {}
    kept = {key: x for key, x in given.items() if key in known and x != old.get(key)}
    return found.filled({**kept, "name": word})


# ---- names ---------------------------------------------------------------------------------------


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


@dataclasses.dataclass(frozen=True)
class Part:
    """A dataclass that a section of a config names, and the values of its fields."""

    factory: Any
    values: Mapping[str, Any]
    where: str  # the section
    name: str

    @classmethod
    def read(
        cls, table: Mapping[str, Any], given: Any, where: str, late: Collection[str] = ()
    ) -> "Part":
        """From a section, whose key `name` is looked up by `resolve`.

        Options that another name of the table has are dropped if all have its defaults: they are
        left from before the name was changed. ValueError: the name is unknown or names no
        dataclass, or an option is unknown, or has a value of another kind or out of its range.
        """
        if not (name := given.get("name", "")):
            raise ValueError(f"{where} lacks 'name'; expected one of {', '.join(sorted(table))}.")
        factory = resolve(table, name, f"{where}.name")
        if not dataclasses.is_dataclass(factory):
            raise ValueError(
                f"{where}.name is {name!r}, a {type(factory).__name__}; expected a dataclass, "
                "whose fields are config keys."
            )
        known, options = fields(factory), {k: x for k, x in given.items() if k != "name"}
        values = _defaults(factory, late)
        for key in (key for key in options if key in known):
            values[key] = _value(known[key], options[key], f"{where}.{key}")
        more = {key: as_tuple(value) for key, value in options.items() if key not in known}
        if more and not any(more.items() <= _defaults(other).items() for other in table.values()):
            key = next(iter(more))
            raise ValueError(
                f"{where}.{key}: {name!r} has no such option. "
                f"{nearest(key, known.keys() - set(late))} Each name has its own options: in a "
                f"config file, base.options({name!r})."
            )
        return cls(factory, values, where, name)

    def make(self, **filled_in: Any) -> Any:
        """The object; of `filled_in`, the values of fields that the config does not give."""
        known = fields(self.factory)
        values = {key: x for key, x in filled_in.items() if key in known} | dict(self.values)
        missing = (dataclasses.MISSING, dataclasses.MISSING)
        for key, field in known.items():
            if key not in values and (field.default, field.default_factory) == missing:
                raise ValueError(f"{self.where} lacks {key!r}, which {self.name!r} needs.")
        return self.factory(**values)


def _defaults(factory: Any, left_out: Collection[str] = ()) -> dict[str, Any]:
    """The defaults of keys as a config holds them: of a type of numbers, the name."""
    given: dict = {k: x.default for k, x in fields(factory).items() if k not in left_out}
    given = {k: x for k, x in given.items() if x is not dataclasses.MISSING}
    return given | ({"dtype": np.dtype(given["dtype"]).name} if "dtype" in given else {})


def options(
    table: Mapping[str, Any], name: str, values: Mapping[str, Any], late: Collection[str] = ()
) -> dict[str, Any]:
    """The config section for `name`: the defaults of its fields but `late`, updated by `values`.

    Raises ValueError on an unknown name or option, or if an option without a default has no value.
    """
    factory = resolve(table, name, "name")
    known = fields(factory).keys() - {*late}
    for key in values:
        if key not in known:
            raise ValueError(f"{name!r} has no option {key!r}. {nearest(key, known)}")
    found = {**_defaults(factory, late), **values}
    for key in known - found.keys():
        raise ValueError(f"Option {key!r} of {name!r} has no default; give it a value.")
    return {"name": name, **found}


def as_tuple(value: Any) -> Any:
    """The value with all lists, also nested ones, as tuples, which compare and hash by value."""
    return tuple(map(as_tuple, value)) if isinstance(value, list | tuple) else value
