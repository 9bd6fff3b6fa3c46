import dataclasses
import math
import re
from typing import Any, ClassVar

import numpy as np
import pytest

from mclr_jax import schema
from mclr_jax.config import Training
from mclr_jax.configs import base
from mclr_jax.schema import Keys, Part, filled, in_range, key, of_kind, pair, read, resolve, section


def test_found_or_an_error_with_the_nearest():
    table = {"euler": 1, "heun": 2}
    for get in (schema.look_up, resolve):
        assert get(table, "heun", "sampler") == 2
        with pytest.raises(ValueError, match=r"sampler 'huen'. Did you mean 'heun'\? Known: e"):
            get(table, "huen", "sampler")
    assert schema.nearest("xyz", ["euler"]) == "Known: euler."
    assert schema.nearest("xyz", []) == "Known: none."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package `guest` of a user's that can be imported."""
    package = tmp_path / "guest"
    package.mkdir()
    for name, code in {
        "__init__": "", "parts": "class Sampler: ...\n_hidden = 1", "stale": "from guest import No",
        "needy": "import missing_dependency", "sibling": "import guest.no_sibling",
    }.items():  # fmt: skip
        (package / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("folder")
def test_a_name_with_a_colon_is_imported():
    found = resolve({"heun": 2}, "guest.parts:Sampler", "sampler")
    assert (found.__module__, found.__name__) == ("guest.parts", "Sampler")
    assert resolve({"guest.parts:Sampler": 3}, "guest.parts:Sampler", "sampler") == 3  # ours first


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "message"), [
    ("gest.parts:Sampler", r"no module 'gest' can be imported .*PYTHONPATH.*Known: heun\."),
    ("guest.prats:Sampler", r"no module 'guest\.prats' can be imported .*PYTHONPATH"),
    ("guest.parts.deep:Sampler", r"no module 'guest\.parts\.deep' can be imported"),
    ("huen:Sampler", r"no module 'huen'.*Did you mean 'heun'"),
    ("guest.parts:Smapler", r"'guest\.parts' has no 'Smapler'\. Did .* 'Sampler'\? Known: S.*r\."),
    ("guest.parts:", "Unknown sampler 'guest.parts:'. Known: heun"),
    (":Sampler", "Unknown sampler ':Sampler'. Known: heun"),
    (".parts:Sampler", r"Unknown sampler '.parts:Sampler'. Known: heun"),
    ("guest/parts.py:Sampler", r"Unknown sampler 'guest/parts.py:Sampler'. Known: heun"),
])  # fmt: skip
def test_what_cannot_be_imported_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        resolve({"heun": 2}, name, "sampler")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "missing"), [
    ("needy", "missing_dependency"), ("sibling", "guest.no_sibling"), ("stale", "'No'"),
])  # fmt: skip
def test_what_a_module_lacks_itself_is_not_taken_for_the_module(name, missing):
    with pytest.raises(ImportError, match=missing):
        resolve({}, f"guest.{name}:Sampler", "sampler")


@pytest.mark.parametrize(("value", "low", "high", "ends", "expected"), [
    (0, 1, math.inf, "", "an integer of at least 1"),
    (1.5, 1, 3, "", "an integer of at least 1 and at most 3"),
    (0.0, 0.0, 1.0, "(", "a number above 0 and at most 1"),
    (1.0, 0.0, 1.0, ")", "a number of at least 0 and below 1"),
    (math.nan, 0.0, 1.0, "", "a number of at least 0 and at most 1"),
    (math.inf, 0.0, math.inf, "", "a number of at least 0"),
    (4.0, 1, 9, "", "an integer of at least 1 and at most 9"),
    (True, 0, 9, "", "an integer of at least 0 and at most 9"),
    ("1", 0.0, 9.0, "", "a number of at least 0 and at most 9"),
    (2**31, 0, None, "", "an integer of at least 0 and at most 2147483647"),
])  # fmt: skip
def test_a_value_outside_its_range_is_named(value, low, high, ends, expected):
    with pytest.raises(ValueError, match=f"^x is {value!r}; expected {expected}\\.$"):
        in_range("x", value, low, high, ends)


def test_a_value_inside_its_range_or_of_its_kind_passes():
    for value in (0.0, 0.5, 1.0, np.float32(0.5)):
        in_range("x", value, 0.0, 1.0)
    for value in (3, np.int64(3)):
        in_range("x", value, 1)
    for value, kind in ((np.float32(1), float), (None, Any), ("any", "int")):
        of_kind("x", value, kind)


@pytest.mark.parametrize(("value", "kind", "message"), [
    ("no", bool, "x is 'no'; expected True or False."),
    (1, bool, "x is 1; expected True or False."),
    (False, int, "x is False; expected an integer."),
    (1.0, int, "x is 1.0; expected an integer."),
    ("1", float, "x is '1'; expected a number."),
    (True, float, "x is True; expected a number."),
    (None, str, "x is None; expected a text."),
    (3, tuple[int, ...], "x is 3; expected any number of values in parentheses."),
    ("ab", tuple[str, ...], "x is 'ab'; expected any number of values in parentheses."),
    ((1, 2, 3), tuple[float, float], "x is (1, 2, 3); expected 2 values in parentheses."),
    ((1, "b"), tuple[int, ...], "x[1] is 'b'; expected an integer."),
])  # fmt: skip
def test_a_value_of_another_kind_is_named(value, kind, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        of_kind("x", value, kind)


@pytest.mark.parametrize("value", [(), (1.0,), (2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (0, 9),
                                   (0.0, math.nan), 3, (0, 1, 2)])  # fmt: skip
def test_a_pair_is_two_rising_numbers(value):
    with pytest.raises(ValueError, match=rf"^x is {re.escape(repr(value))}; expected "):
        pair("x", value, 0.0, 5.0)
    pair("x", (0, 5.0), 0.0, 5.0)
    pair("x", (1.0, math.inf), 0.0)


@dataclasses.dataclass(frozen=True)
class Inner(Keys):
    method: str = key("heun", words=("euler", "heun"), says="of sampling")
    ends: tuple[float, ...] = key((), 0.0, ordered=True, says="low and high")

    where: ClassVar[str] = "config.inner"


@dataclasses.dataclass(frozen=True)
class Thing:
    size: int = key(3, 1, 9, says="of the thing")
    late: int = 0


@dataclasses.dataclass(frozen=True)
class Other:
    size: int = key(5, 1, 9, says="of the other")
    rate: float = 0.5


@dataclasses.dataclass(frozen=True)
class Needy:
    size: int
    rate: float = 0.5


TABLE = {"thing": Thing, "other": Other, "needy": Needy}


@dataclasses.dataclass(frozen=True)
class Whole(Keys):
    count: int = key(1, 0, says="of all")
    shares: tuple[float, ...] = key((0.5,), 0.0, 1.0, "()", says="of each")
    flag: bool = key(False, says="whether")
    inner: Inner = section(Inner)
    made: Any = schema.part(TABLE, "thing", says="made at once")
    later: Part = schema.part({"thing": Thing}, "thing", ("late",), says="made when late is known")
    maybe: Any = schema.part(TABLE, "", optional=True, says="none without a name")
    paths: dict = schema.texts({"one": ""}, says="a path")

    where: ClassVar[str] = "config"


def test_a_config_is_read_with_defaults_for_absent_keys():
    given = {"count": np.int64(4), "shares": [0.25], "inner": {"ends": [1, 2]},
             "made": {"name": "other", "rate": 1}, "paths": {"two": "x"}}  # fmt: skip
    whole = read(Whole, given, "config")
    assert (whole.count, whole.shares, whole.flag) == (4, (0.25,), False)
    assert whole.inner == Inner("heun", (1, 2))
    assert whole.made == Other(5, 1)
    assert whole.later.make(late=7) == Thing(3, 7)
    assert whole.maybe is None
    assert whole.paths == {"two": "x"}
    every = filled(Whole, given)
    assert every == {
        "count": 4, "shares": (0.25,), "flag": False, "inner": {"method": "heun", "ends": (1, 2)},
        "made": {"name": "other", "size": 5, "rate": 1}, "later": {"name": "thing", "size": 3},
        "maybe": {"name": ""}, "paths": {"one": "", "two": "x"},
    }  # fmt: skip
    assert filled(Whole, every) == every
    again = read(Whole, every, "config")
    assert (again.made, again.inner) == (whole.made, whole.inner)


def test_every_key_is_explained_with_default_range_and_meaning():
    assert schema.explain(Whole)[:5] == [
        "count=1: of all; at least 0",
        "shares=(0.5,): of each; above 0 and below 1",
        "flag=False: whether",
        "inner.method='heun': of sampling; one of euler, heun",
        "inner.ends=(): low and high; rising pair of at least 0",
    ]
    assert "made.size=3: of the thing; at least 1 and at most 9 [thing]" in schema.explain(Whole)


@pytest.mark.parametrize(("given", "message"), [
    ({"cuont": 1}, "config has no key 'cuont'. Did you mean 'count'? Known: "),
    ({"count": -1}, "config.count is -1; expected an integer of at least 0"),
    ({"flag": 1}, "config.flag is 1; expected True or False."),
    ({"shares": (0.5, 1.0)}, "config.shares[1] is 1.0; expected a number above 0 and below 1."),
    ({"shares": 0.5}, "config.shares is 0.5; expected any number of values in parentheses."),
    ({"inner": 3}, "config.inner is 3; expected a section with keys."),
    ({"inner": {"method": "huen"}}, "config.inner.method is 'huen'. Did you mean 'heun'? "),
    ({"inner": {"method": 3}}, "config.inner.method is 3; expected a text."),
    ({"inner": {"ends": (2, 1)}}, "config.inner.ends is (2, 1); expected (low, high), 0 <= "),
    ({"made": 3}, "config.made is 3; expected a section with keys."),
    ({"made": {"name": "thign"}}, "Unknown config.made.name 'thign'. Did you mean 'thing'"),
    ({"made": {"name": ""}}, "config.made lacks 'name'; expected one of needy, other, thing."),
    ({"made": {"name": 3}}, "Unknown config.made.name 3"),
    ({"made": {"name": ["thing"]}}, "Unknown config.made.name ['thing']"),
    ({"made": {"name": "thing", "szie": 1}}, "config.made.szie: 'thing' has no such option. D"),
    ({"made": {"name": "thing", "size": 10}}, "config.made.size is 10; expected an integer "),
    ({"made": {"name": "needy", "size": 2.0}}, "config.made.size is 2.0; expected an integer."),
    ({"made": {"name": "needy"}}, "config.made lacks 'size', which 'needy' needs."),
    ({"made": {"name": "json:dumps"}}, "config.made.name is 'json:dumps', a function; expected"),
    ({"later": {"szie": 3, "name": "thing"}}, "config.later.szie: 'thing' has no such option."),
    ({"maybe": {"name": "", "size": 3}}, "config.maybe without a name has no key 'size'."),
    ({"maybe": {"name": None}}, "config.maybe.name is None; expected a text."),
    ({"paths": {"one": 3}}, "config.paths.one is 3; expected a text."),
    (3, "config is 3; expected a section with keys."),
])  # fmt: skip
def test_the_first_wrong_key_is_named(given, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        read(Whole, given, "config")


def test_defaults_of_another_name_are_no_mistake():
    for left in ({"rate": 0.5}, {"rate": 0.5, "late": 0}):  # from "other" or "needy"
        assert read(Whole, {"made": {"name": "thing", **left}}, "config").made == Thing()
    for wrong in ({"rate": 0.25}, {"speed": 0.5}):
        message = r"has no such option\. .*a config file, base\.options\('thing'\)"
        with pytest.raises(ValueError, match=message):
            read(Whole, {"made": {"name": "thing", **wrong}}, "config")


def test_a_value_made_directly_is_checked_too():
    with pytest.raises(ValueError, match=r"^config\.inner\.method is 'x'"):
        Inner("x")


@pytest.mark.parametrize("key", ["init_from", "companions.weak", "data.path", "data.name"])
def test_a_url_is_no_value_of_a_key(key):
    config = base.base()
    config.network = base.options("mlp")
    config.update_from_flattened_dict({key: "gs://bucket/a"})
    with pytest.raises(ValueError, match=f"config.{key} is 'gs://bucket/a', a URL; expected a pa"):
        Training.parse(config)


def test_a_key_in_the_wrong_section_is_told_its_own():
    with pytest.raises(ValueError, match=r"no key 'std'. Did you mean config.noise.std\? "):
        Training.parse({"std": 1.0})
