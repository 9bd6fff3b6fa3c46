"""README and docs: tables and numbers equal the result files, links lead somewhere, no idioms."""

import pathlib
import re
import tomllib

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


# Idioms that a reader with English as a second language may not know, and their plain words.
IDIOMS = {"stands for": "means", "goes on": "continues", "to be had": "available",
          "what there is": "the ...", "as it is": "unchanged", "has gone": "moved by",
          "at hand": "available", "takes turns": "alternates", "makes of": "computes from",
          "read elsewhere": "read by ..."}  # fmt: skip


def test_the_english_is_plain():
    places = ("mclr_jax", "launch", "configs", "docs", "notebooks", "benchmarks")
    files = [path for place in places for path in (ROOT / place).rglob("*.*")]
    files = [path for path in files if path.suffix in (".py", ".md", ".ipynb")]
    assert len(files) > 90
    for path in [ROOT / "README.md", *files]:
        words = " ".join(path.read_text().lower().split())
        found = [idiom for idiom in IDIOMS if re.search(rf"\b{idiom}\b", words)]
        assert not found, f"{path.relative_to(ROOT)} says {found}"


def test_every_error_of_mutants_can_be_inserted():
    """An error whose text is no longer there once would never be tried."""
    for mutant in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]:
        assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1, mutant["what"]
        assert mutant["new"] != mutant["old"], mutant["what"]
