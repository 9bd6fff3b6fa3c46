"""Every notebook runs in a new process; its own assertions are what it shows."""

import json
import os
import pathlib
import re

import commands
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def execute(path):
    """In a new process: the code cells in an IPython shell; the first error ends it."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    os.chdir(pathlib.Path(path).parent)
    os.environ.update({"MPLBACKEND": "agg", "NOTEBOOK_STEPS": "100"})  # of training
    config = Config()
    config.HistoryManager.enabled = False
    shell = InteractiveShell.instance(config=config)
    for cell in json.loads(pathlib.Path(path).read_text())["cells"]:
        if cell["cell_type"] == "code":
            shell.run_cell("".join(cell["source"])).raise_error()


def of_each(slow=()):
    marked = [pytest.param(p, marks=[pytest.mark.slow] * (p.stem in slow)) for p in NOTEBOOKS]
    return pytest.mark.parametrize("path", marked, ids=lambda path: path.stem)


@of_each(slow={path.stem for path in NOTEBOOKS} - {"quickstart"})
def test_it_runs_and_its_assertions_hold(path, tmp_path):
    assert "assert " in path.read_text()
    process = commands.start(execute, [str(path)], tmp_path / "log")
    process.join(600)
    assert process.exitcode == 0, (tmp_path / "log").read_text()[-3000:]


@of_each()
def test_it_is_stored_without_outputs(path):
    nbformat.validate(notebook := nbformat.read(path, as_version=4))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs, f"Clear the outputs of {path.name} before committing."
            assert cell.execution_count is None
        assert not re.search(r"@[A-Z]+\d+@", cell.source), "A text that is still to be written."


@of_each()
def test_it_opens_on_colab_with_an_accelerator_and_installs_the_package(path):
    """One address of the repository, that of setup.py; without an address there are no badges."""
    notebook = nbformat.read(path, as_version=4)
    assert notebook.metadata.accelerator == "TPU"
    assert notebook.metadata.colab.gpuType == "V5E1"
    (address,) = re.findall(r'^REPOSITORY = "(.*)"$', (ROOT / "setup.py").read_text(), re.MULTILINE)
    colab = address.replace("https://github.com/", "https://colab.research.google.com/github/")
    badge = f"({colab}/blob/main/notebooks/{path.name})"
    for page in (notebook.cells[0].source, (ROOT / "README.md").read_text()):
        assert (badge in page) == ("colab.research.google.com" in page) == bool(address)
    install = [cell.source for cell in notebook.cells if "# @title Install" in cell.source]
    first = nbformat.read(NOTEBOOKS[0], as_version=4).cells[1].source
    assert install == [first] == [notebook.cells[1].source]
    assert f'REPOSITORY = "{address}"' in first
