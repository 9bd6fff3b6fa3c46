import math
import re

import pytest

from mclr_jax.names import in_range, look_up, nearest, resolve


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
    ],
)
def test_a_value_outside_its_range_is_named(value, low, high, ends, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        in_range("x", value, low, high, ends)


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_a_value_inside_its_range_passes(value):
    in_range("x", value, 0.0, 1.0)
    in_range("x", 3, 1)
