import pytest

from mclr_jax.names import look_up, nearest


def test_found_or_an_error_with_the_nearest():
    table = {"euler": 1, "heun": 2}
    assert look_up(table, "heun", "sampler") == 2
    with pytest.raises(ValueError, match=r"Unknown sampler 'huen'. Did you mean 'heun'\? Known: e"):
        look_up(table, "huen", "sampler")


def test_nothing_near_and_nothing_known():
    assert nearest("xyz", ["euler"]) == "Known: euler."
    assert nearest("xyz", []) == "Known: none."
