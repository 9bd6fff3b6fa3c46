import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest

from mclr_jax.schema import (
    check_keys,
    construct,
    in_range,
    look_up,
    make,
    nearest,
    of_kind,
    pair,
    resolve,
)


def test_found_or_an_error_with_the_nearest():
    table = {"euler": 1, "heun": 2}
    for get in (look_up, resolve):
        assert get(table, "heun", "sampler") == 2
        with pytest.raises(
            ValueError, match=r"Unknown sampler 'huen'. Did you mean 'heun'\? Known: e"
        ):
            get(table, "huen", "sampler")


def test_nothing_near_and_nothing_known():
    assert nearest("xyz", ["euler"]) == "Known: euler."
    assert nearest("xyz", []) == "Known: none."


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package `guest` of a user's that can be imported."""
    package = tmp_path / "guest"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("class Sampler: ...\n_hidden = 1\n")
    (package / "needy.py").write_text("import missing_dependency\n")
    (package / "sibling.py").write_text("import guest.no_sibling\n")
    (package / "stale.py").write_text("from guest import NoSuchPart\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("folder")
def test_a_name_with_a_colon_is_imported():
    found = resolve({"heun": 2}, "guest.parts:Sampler", "sampler")
    assert (found.__module__, found.__name__) == ("guest.parts", "Sampler")
    assert resolve({"guest.parts:Sampler": 3}, "guest.parts:Sampler", "sampler") == 3  # ours first


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gest.parts:Sampler", r"no module 'gest' can be imported .*PYTHONPATH.*Known: heun\."),
        ("guest.prats:Sampler", r"no module 'guest\.prats' can be imported .*PYTHONPATH"),
        ("guest.parts.deep:Sampler", r"no module 'guest\.parts\.deep' can be imported"),
        ("huen:Sampler", r"no module 'huen'.*Did you mean 'heun'"),
        (
            "guest.parts:Smapler",
            r"module 'guest\.parts' has no 'Smapler'\. Did you mean 'Sampler'\? Known: Sampler\.",
        ),
        ("guest.parts:", "Unknown sampler 'guest.parts:'. Known: heun"),
        (":Sampler", "Unknown sampler ':Sampler'. Known: heun"),
        (".parts:Sampler", r"Unknown sampler '.parts:Sampler'. Known: heun"),
        ("guest/parts.py:Sampler", r"Unknown sampler 'guest/parts.py:Sampler'. Known: heun"),
    ],
)
def test_what_cannot_be_imported_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        resolve({"heun": 2}, name, "sampler")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "missing"),
    [("needy", "missing_dependency"), ("sibling", "guest.no_sibling"), ("stale", "NoSuchPart")],
)
def test_what_a_module_lacks_itself_is_not_taken_for_the_module(name, missing):
    with pytest.raises(ImportError, match=missing):
        resolve({}, f"guest.{name}:Sampler", "sampler")


@pytest.mark.parametrize(
    ("value", "low", "high", "ends", "message"),
    [
        (0, 1, math.inf, "", "x is 0; expected an integer of at least 1."),
        (1.5, 1, 3, "", "x is 1.5; expected an integer of at least 1 and at most 3."),
        (0.0, 0.0, 1.0, "(", "x is 0.0; expected a number above 0 and at most 1."),
        (1.0, 0.0, 1.0, ")", "x is 1.0; expected a number of at least 0 and below 1."),
        (math.nan, 0.0, 1.0, "", "x is nan; expected a number of at least 0 and at most 1."),
        (math.inf, 0.0, math.inf, "", "x is inf; expected a number of at least 0."),
        (4.0, 1, 9, "", "x is 4.0; expected an integer of at least 1 and at most 9."),
        (True, 0, 9, "", "x is True; expected an integer of at least 0 and at most 9."),
        ("1", 0.0, 9.0, "", "x is '1'; expected a number of at least 0 and at most 9."),
        (
            2**31,
            0,
            None,
            "",
            "x is 2147483648; expected an integer of at least 0 and at most 2147483647.",
        ),
    ],
)
def test_a_value_outside_its_range_is_named(value, low, high, ends, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        in_range("x", value, low, high, ends)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_value_inside_its_range_passes(value):
    in_range("x", value, 0.0, 1.0)
    in_range("x", 3, 1)
    in_range("x", np.float32(value), 0.0, 1.0)
    in_range("x", np.int64(3), 1)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
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
    ],
)
def test_a_value_of_another_kind_is_named(value, kind, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        of_kind("x", value, kind)


@pytest.mark.parametrize(
    ("value", "kind"),
    [(True, bool), (np.int32(1), int), (1, float), (np.float32(1), float), ("", str), ([], object),
     ((), tuple[int, ...]), ([1, 2], tuple[int, ...]), ((0, 1.5), tuple[float, float]),
     (None, Any), ("any", "int")],
)  # fmt: skip
def test_a_value_of_its_kind_passes(value, kind):
    of_kind("x", value, kind)


@pytest.mark.parametrize("value", [(), (1.0,), (2.0, 1.0), (1.0, 1.0), (-1.0, 1.0), (0, 9),
                                   (0.0, math.nan), 3, (0, 1, 2)])  # fmt: skip
def test_a_pair_is_two_rising_numbers(value):
    with pytest.raises(ValueError, match=rf"^x is {re.escape(repr(value))}; expected "):
        pair("x", value, 0.0, 5.0)
    pair("x", (0, 5.0), 0.0, 5.0)
    pair("x", (1.0, math.inf), 0.0)


def test_keys_are_all_known_and_all_there():
    check_keys("config.a", ["one", "two"], {"two", "one"})
    with pytest.raises(ValueError, match=r"^config\.a has no key 'tow'\. Did you mean 'two'\?"):
        check_keys("config.a", ["one", "tow"], ["one", "two"])
    with pytest.raises(ValueError, match=r"^config\.a lacks 'two'; expected the keys"):
        check_keys("config.a", ["one"], ["one", "two"])


@dataclasses.dataclass(frozen=True)
class Part:
    size: int
    rate: float = 0.5
    ends: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"size": 3}, r"^config\.part lacks 'name'; expected one of part\."),
        ({"name": "part"}, r"^config\.part lacks 'size', which 'part' needs\."),
        ({"name": "part", "size": 2.0}, r"^config\.part\.size is 2\.0; expected an integer"),
        ({"name": "part", "size": 2, "rate": "x"}, r"^config\.part\.rate is 'x'; expected a num"),
        ({"name": "part", "size": 2, "rtae": 1}, r"^config\.part\.rtae: 'part' has no such option"),
        ({"name": ["part"], "size": 2}, r"^Unknown part \['part'\]"),
        ({"name": 3, "size": 2}, r"^Unknown part 3"),
        (
            {"name": "json:dumps"},
            r"^config\.part\.name is 'json:dumps', a function; expected a data",
        ),
    ],
)
def test_a_dataclass_is_made_from_values_of_its_kinds(config, message):
    table = {"part": Part}
    assert make(table, {"name": "part", "size": 2, "ends": [1, 2]}, "part") == Part(2, 0.5, (1, 2))
    assert make(table, {"name": "part"}, "part", size=4, other=5) == Part(4)
    assert construct(Part, {"size": 2}, "part") == Part(2)
    with pytest.raises(ValueError, match=message):
        make(table, config, "part")
