"""README and docs: tables and numbers equal the result files, links lead somewhere, no idioms."""

import pathlib
import re

import pytest
import tables

ROOT = pathlib.Path(__file__).parent.parent
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
# 98.2%<!-- demo: an expression of d, the content of benchmarks/results/demo.json -->
MEASURED = re.compile(r"(?<![\d.])(\d[\d,]*(?:\.\d+)?)[%M]?<!-- (\w+): (.+?) -->")
# Settings and versions are no measurements.
SETTING = r"(?:beta|gamma|sigma|strength|interpolation|place|PyTorch|>=|Apache-)\s*\d+\.\d+"
DECIMAL = re.compile(r"\d+\.\d+|\d+%")
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in tables.PAGES}


@pytest.fixture(params=PAGES)
def page(request):
    return request.param


def test_tables_are_those_of_the_results(page):
    assert tables.filled(PAGES[page]) == PAGES[page], "python benchmarks/tables.py"


def test_numbers_are_those_of_the_results(page):
    for number, name, expression in MEASURED.findall(PAGES[page]):
        value = eval(expression, {"d": tables.load(name)})
        digits = len(number.partition(".")[2])
        assert f"{value:,.{digits}f}" == number, f"{number} in {page}: {expression} is {value}"


def test_every_measured_number_names_its_result(page):
    """Outside of code, tables made from results, and links."""
    text = tables.TABLE.sub("", PAGES[page])
    for pattern in (MEASURED, CODE, re.compile(r"\[[^]]*\]\([^)]*\)")):
        text = pattern.sub(" ", text)
    text = re.sub(SETTING, " ", text)
    assert not DECIMAL.findall(text)


def test_links_lead_to_files(page):
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", CODE.sub("", PAGES[page])):
        assert link.startswith("https://") or (folder / link).exists(), link


def test_a_changed_number_is_found():
    text = PAGES["docs/mclr.md"]
    (number, *_), *_ = MEASURED.findall(text)
    assert number == "2.1"
    head, _, tail = text.partition("2.1<!--")
    broken = f"{head}2.2<!--{tail}"
    (number, name, expression), *_ = MEASURED.findall(broken)
    assert f"{eval(expression, {'d': tables.load(name)}):.1f}" != number


def test_the_front_door_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 160
