"""README and docs: tables and numbers equal the result files, links lead somewhere, plain English.

A number of a result is followed by a comment that names its file and key, in one line:

  2.1<!-- fashion_mnist_mclr: summary.speedup_over_cfg -->
  62%<!-- fashion_mnist_mclr: guidance_by_noise_level.by_sigma[5].bayes_in_mclr * 250 -->
  29.4<!-- guidance_free_fashion_mnist: mean of methods[CFG][strength=0.6, noise.0=0.8].frechet -->

FILE is benchmarks/results/FILE.json, a config (configs/digits), or a module with constants. A path
has keys, those with other characters than letters in brackets. In brackets after a list: a place,
or conditions that a row meets, of which KEY=* asks for the key alone and KEY=*TEXT for the end of
the value; [*] is all of a list or of a section. A path leads to one value, or to several after
`mean of`, `min of`, `max of` and `count of`. Paths and numbers are joined by + - * / with spaces,
from left to right.
"""

import ast
import importlib
import json
import operator
import pathlib
import re
import statistics
import tomllib

import pytest
import tables
import yaml
from test_floors import FLOORS

from mclr_jax import __version__, configs
from mclr_jax.config import OBJECTIVES
from mclr_jax.launch import common
from mclr_jax.objectives.emulate import Emulate
from mclr_jax.samplers import Sampler
from mclr_jax.schema import fields

ROOT = pathlib.Path(__file__).parent.parent
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
LINK = re.compile(r"!?\[([^]]*)\]\([^)]*\)")
MEASURED = re.compile(r"(?<![\d.,])(\d[\d,]*(?:\.\d+)?)[%M]?<!-- ([\w/]+): (.+?) -->")
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
REDUCED = {"mean": statistics.fmean, "min": min, "max": max, "count": len}
# Settings and versions are no measurements.
SETTING = r"(?:beta|gamma|sigma|strength|interpolation|PyTorch|>=|Apache-)\s*\d+\.\d+"
SETTING += "|16,384 particles|8 trajectories|8 members"  # of benchmarks of assimilation
SETTING += r"|[^.;]* logs? that (?:is|are) not kept"  # the text says that there is no file
# What a reader takes for a result: a decimal, a percentage, a count of something, a duration.
UNITS = r"percent|seconds?|s|ms|minutes?|hours?|days?|samples?|images?|steps?|epochs?|parameters?"
UNITS += r"|particles|trajectories|members|times|points?|[KMG]i?B|bytes|examples|cases|errors"
RESULT = re.compile(
    rf"\d+\.\d+|(?<![\dx])\d[\d,]*\s?(?:(?:{UNITS})\b|%)"
    rf"|\d[\d,]* (?:to|and|or) \d[\d,]* (?:{UNITS})\b"
    r"|\b(?:an?|one|two|three|four|five|six|ten|twenty|half an?) (?:minutes?|hours?|days?)\b"
    r"|\b(?:two|three|four|five|six|ten|twenty) seconds\b",
    re.IGNORECASE,
)
COMMAND = r"(?:^|`)mclr (?!null\b|weak\b)(\w+)"  # those two are names of methods
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in tables.PAGES}


@pytest.fixture(params=PAGES)
def page(request):
    return request.param


def measured(name, expression):
    """The value of an expression of the docstring above."""
    if "/" in name:
        data = vars(importlib.import_module(name.replace("/", ".")))
        data = data["get_config"]().to_dict() if "get_config" in data else data
    else:
        data = tables.load(name)
    first, *others = re.split(r" ([-+*/]) ", expression)
    value = term(data, first)
    for sign, other in zip(others[::2], others[1::2], strict=True):
        value = OPERATORS[sign](value, term(data, other))
    return value


def term(data, text):
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    word, path = re.fullmatch(r"(?:(\w+) of )?((?:\.?\w+|\[[^]]+\])+)", text).groups()
    found = [data]
    for key, bracket in re.findall(r"(\w+)|\[([^]]+)\]", path):
        found = [value for node in found for value in chosen(node, key or bracket)]
    if word:
        return REDUCED[word](found)
    (value,) = found
    return value


def chosen(node, key):
    """The values of a list or section that a key or a bracket names."""
    if key == "*":
        return [*node.values()] if isinstance(node, dict) else node
    if isinstance(node, dict):
        return [node[key]]
    if re.fullmatch(r"-?\d+", key):
        return [node[int(key)]]
    conditions = re.split(r", (?=[\w.]+=)", key)
    return [row for row in node if all(holds(row, condition) for condition in conditions)]


def holds(row, condition):
    path, _, wanted = condition.partition("=")
    for key in path.split("."):
        row = row[int(key)] if isinstance(row, list) else (row or {}).get(key)
    if re.fullmatch(r"-?[\d.]+", wanted):
        return row == float(wanted)
    if wanted.startswith("*"):
        return row is not None and str(row).endswith(wanted[1:])
    return str(row) == wanted


def test_tables_are_those_of_the_results(page):
    assert tables.filled(PAGES[page]) == PAGES[page], "python benchmarks/tables.py"


def test_numbers_are_those_of_the_results(page):
    for number, name, expression in MEASURED.findall(PAGES[page]):
        value, digits = measured(name, expression), len(number.partition(".")[2])
        assert f"{value:,.{digits}f}" == number, f"{number} in {page}: {expression} is {value}"


def test_every_measured_number_names_its_result(page):
    """Outside of code, tables made from results, and links."""
    text = re.sub("^#.*", "", tables.TABLE.sub("", PAGES[page]), flags=re.MULTILINE)
    for pattern in (MEASURED, CODE, LINK):
        text = pattern.sub(" ", text)
    assert not re.findall(r"<!-- (?!table: |end of table).*", text), "a comment names no number"
    assert not RESULT.findall(re.sub(SETTING, " ", " ".join(text.split())))


def revisions(node):
    """The revisions that a result file names."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        if key == "revision":
            yield value
        elif isinstance(value, dict | list):
            yield from revisions(value)


def test_results_name_the_revision_that_made_them():
    """With the exceptions that docs/verification.md lists."""
    dirty, absent = {}, []
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        found = [*revisions(tables.load(path.stem))]
        if not found:
            absent.append(path.stem)
        if count := sum(not re.fullmatch("[0-9a-f]{40}", revision) for revision in found):
            dirty[path.stem] = count
    assert absent == ["costs"]
    assert dirty == {"lorenz63": 14, "forcing_fields": 6, "environments": 1}


@pytest.mark.parametrize(
    "text", ["2.1", "5%", "4,800 samples", "25 minutes", "one hour", "4 to 5 s"]
)
def test_a_number_without_a_result_is_found(text):
    assert RESULT.search(f"It takes {text}.")


def test_paths_lead_to_one_value_unless_they_are_reduced():
    first, second = {"name": "a, b", "x": {"B/2": 2}}, {"name": "b", "x": {"B/2": 4}, "y": [8]}
    rows = {"rows": [first, second]}
    assert term(rows, "rows[name=a, b, x=*].x[B/2]") == term(rows, "rows[0].x[*]") == 2
    assert term(rows, "rows[y=*].y[0]") == term(rows, "rows[y.0=8].y[-1]") == 8
    assert term(rows, "mean of rows[*].x[B/2]") == 3
    assert term(rows, "count of rows[x=*]") == 2
    for wrong in ("rows[x=*].name", "rows[name=c].x"):
        with pytest.raises(ValueError, match="unpack"):
            term(rows, wrong)
    assert measured("configs/digits_mclr", "num_steps / 100 + 1") == 5


def slug(heading):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_to_files_and_headings(page):
    folder = (ROOT / page).parent
    for link, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", CODE.sub("", PAGES[page])):
        if link.startswith("https://"):
            continue
        target = folder / link if link else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{link}#{anchor}"


def test_named_files_exist(page):
    """Those of the folders of this repository, also in commands; tests without their folder."""
    text = PAGES[page]
    paths = re.findall(
        r"(?<![\w/$])((?:tests|configs|benchmarks|launch|mclr_jax)/[\w/]+\.\w+)", text
    )
    paths += [f"tests/{name}" for name in re.findall(r"\btest_\w+\.py", text)]
    paths += [f"launch/{name}.py" for name in re.findall(COMMAND, text, re.MULTILINE)]
    missing = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


def test_options_of_objectives_exist(page):
    objectives = [*OBJECTIVES.values(), Emulate]
    known = {"name"}.union(*map(fields, objectives))
    assert {*re.findall(r"(?<!/)\bobjective\.(\w+)", PAGES[page])} - {"c"} <= known


def test_flags_of_commands_exist(page):
    text = PAGES[page].replace("\\\n", " ")
    for module, rest in re.findall(rf"{COMMAND}([^`\n#]*)", text, re.MULTILINE):
        files = [ROOT / f"launch/{name}.py" for name in (module, "common")]
        code = "".join(file.read_text() for file in files)
        known = {"config", "help", *re.findall(r"DEFINE_\w+\(\s*\"(\w+)\"", code)}
        known |= {*fields(Sampler), "sampler", "steps"} if "of_keys(Sampler" in code else set()
        for shared in re.findall(r"common\.define\(([^)]*)\)", code):
            names = {*re.findall(r"\w+", shared)}
            for group in names & {"GUIDANCE", "HOSTS"}:
                names |= {*getattr(common, group)}
            known |= names & common.SHARED.keys()
        assert {*re.findall(r"(?<!\S)--(\w+)", rest)} <= known, f"mclr {module}{rest}"
        if module in ("train", "plan") and (config := re.match(r" ([a-z]\w*) ", rest)):
            assert config[1] in configs.names(), f"mclr {module}{rest}"


def test_python_on_the_pages_runs(capsys):
    """The README's example; tests/test_extension.py has those of extending.md."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGES["README.md"], re.DOTALL)
    exec(example, {})
    assert float(capsys.readouterr().out) > 0.95  # guided samples are of their class


def test_every_page_is_linked():
    linked = {
        (ROOT / page).parent.joinpath(link).resolve()
        for page, text in PAGES.items()
        for link in re.findall(r"\]\(([^)#:]+\.md)", text)
    }
    assert {path for path in tables.PAGES if path.name != "README.md"} <= linked
    assert len(PAGES["README.md"].splitlines()) <= 160  # the front door is short


def test_the_floors_of_architecture_are_those_of_the_imports():
    page = PAGES["docs/architecture.md"]
    listed = re.search(r"## Floors.*?```text\n(.*?)```", page, re.DOTALL)
    names = (re.findall(r"[\w/]+(?:\.py|/)(?!\S)", line) for line in listed[1].splitlines())
    found = [{name.removesuffix(".py") for name in floor} for floor in names]
    assert found[::-1] == [set(floor) for floor in FLOORS]


def sentences(text):
    """The sentences of a page, without tables, code, headings and comments."""
    text = re.sub(r"(?s:```.*?```)|<!--.*?-->|^#.*|^ *\|.*", "", text, flags=re.MULTILINE)
    text = LINK.sub(r"\1", re.sub(r"\$\$[^$]*\$\$|\$[^$]*\$", "X", CODE.sub("X", text)))
    for block in re.split(
        r"\n\s*\n", re.sub(r"^ *(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    ):
        yield from re.split(r"(?<!et al\.)(?<=[.!?])\**\s+", " ".join(block.split()))


def notebook(name):
    """The text of a notebook."""
    cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
    return "\n\n".join("".join(x["source"]) for x in cells if x["cell_type"] == "markdown")


@pytest.mark.parametrize("name", [*PAGES, *(x.name for x in (ROOT / "notebooks").glob("*.ipynb"))])
def test_sentences_are_short(name):
    text = PAGES[name] if name in PAGES else notebook(name)
    long = [sentence for sentence in sentences(text) if len(sentence.split()) > 35]
    assert not long, "\n".join(f"{len(each.split())} words: {each}" for each in long)


def test_a_long_sentence_is_found():
    words = "word " * 34
    assert max(len(each.split()) for each in sentences(f"- {words}`a b c`. More.")) == 35
    page = (
        "# No\n\nOne et al. 1. Two\nlines: a\n\n| a table |\n\n- Three.\n- Four\n  [five](six).\n"
    )
    found = [s for s in sentences(page) if s]
    assert found == ["One et al. 1.", "Two lines: a", "Three.", "Four five."]


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


QUESTIONS = {"What", "Whether", "How", "Which", "Where", "When", "Why", "Who", "If"}


def test_docstrings_begin_with_a_noun_or_a_verb():
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    for path in [*(ROOT / "mclr_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            assert not text or text.split()[0] not in QUESTIONS, f"{path.name}: {text[:90]}"


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license"} < cited.keys()
    assert cited["version"] == __version__
    for paper in cited["references"]:
        assert {"type", "title", "authors"} < paper.keys()
        number = paper["url"].removeprefix("https://arxiv.org/abs/")
        assert any(number in page for page in PAGES.values())


def test_every_error_of_mutants_can_be_inserted():
    """An error whose text is no longer there once would never be tried."""
    for mutant in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]:
        assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1, mutant["what"]
        assert mutant["new"] != mutant["old"], mutant["what"]
