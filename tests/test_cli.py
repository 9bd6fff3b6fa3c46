"""The command mclr, and the wheel: it runs beside folders that have the names of the checkout's."""

import ast
import os
import pathlib
import re
import resource
import runpy
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import tiny
from commands import call

from mclr_jax import cli, configs, extras, files
from mclr_jax.training.log import Writer

ROOT = pathlib.Path(__file__).parent.parent
ADDRESS = "https://github.com/someone/mclr_jax"


def run(*command, cwd=ROOT, expect=0, **environment):
    """The output of a process; CPU seconds are added to those of `resource`."""
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout
    return done.stdout


def seconds():
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_lists_all_commands_and_configs_at_once():
    before = seconds()
    program = "import sys; from mclr_jax import cli; cli.main(); print(*sys.modules)"
    text = run(sys.executable, "-c", program, "--help")
    assert seconds() - before < 1.0
    text, imported = text.rstrip().rsplit("\n", 1)
    assert not {"jax", "numpy", "absl"} & {*imported.split()}
    listed = dict(re.findall(r"^  (\w+) +(\S.*)$", text, re.MULTILINE))
    sources = {path.stem: path.read_text() for path in (ROOT / "launch").glob("*.py")}
    commands = {name for name, text in sources.items() if "common.run(main" in text}
    assert {"train", "sample", "evaluate", "report"} < commands
    for name in commands:
        assert listed[name] == ast.get_docstring(ast.parse(sources[name])).splitlines()[0]
    assert "common" not in listed
    assert {*configs.names()} <= {*re.findall(r"\w+", text)}
    assert {"digits", "cifar10_mclr"} < {*configs.names()} < {p.stem for p in configs_files()}


def configs_files():
    return (ROOT / "configs").glob("*.py")


def test_an_unknown_command_is_guessed(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mclr", "smaple"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "No command 'smaple'. Did you mean 'sample'?" in capsys.readouterr().err


def test_the_command_of_a_result_is_the_one_that_was_given(monkeypatch, tmp_path):
    (tmp_path / "mclr").touch()
    for given, told in {
        ("python3", str(tmp_path / "mclr"), "icr", "--out=a b"): "mclr icr '--out=a b'",
        ("python3", "-m", "launch.icr"): "python -m launch.icr",
        ("python3", "benchmarks/icr.py"): "python benchmarks/icr.py",
        ("python3",): "python",
    }.items():
        monkeypatch.setattr(sys, "orig_argv", [*given])
        assert files.provenance()["command"] == told


def test_configs_are_found_by_name_and_by_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    for name in ("digits", "notes"):
        (tmp_path / name).touch()
    assert configs.find("digits") == ROOT / "configs" / "digits.py"
    assert configs.find("mine.py") == pathlib.Path("mine.py")
    assert configs.find(str(tmp_path / "mine.py")) == tmp_path / "mine.py"
    for wrong in (
        "mine",
        "notes",
        "base",
        "__init__",
        "digits.py",
        "configs/digits.py",
        str(tmp_path),
        "",
    ):
        assert configs.find(wrong) is None, wrong


def test_a_config_of_ones_own_builds_on_those_of_the_package(tmp_path):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.py").write_text(
        "from mclr_jax.configs import base, digits\n"
        "def get_config(top):\n"
        "    config = digits.get_config()\n"
        "    config.noise = base.options('loguniform', sigma_min=0.02)\n"
        "    config.noise.sigma_max = float(top)\n"
        "    return config\n"
    )
    wrong = ["--workdir=run", "--config.noise.std=1"]
    log = call("train", "configs/mine.py:9", *wrong, expect=2, folder=tmp_path)
    assert "config.noise has no key 'std'. Known: name, sigma_max, sigma_min" in log
    log = call("train", "configs/mine.py:high", *wrong, expect=2, folder=tmp_path)
    assert "configs/mine.py:high cannot be loaded: ValueError: could not convert" in log


def test_modules_of_ones_own_come_after_all_others(monkeypatch, tmp_path):
    """A folder of the project named like a library does not hide the library."""
    seen = {}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["/bin/mclr", "sample", "--seed=1"])
    monkeypatch.setattr(runpy, "run_module", lambda name, **_: seen.update({name: sys.argv}))
    cli.main()
    assert seen == {"mclr_jax.launch.sample": ["mclr sample", "--seed=1"]}
    assert sys.path[-1] == str(tmp_path)
    assert str(tmp_path) not in sys.path[:-1]


# ---- extras --------------------------------------------------------------------------------------


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    assert extras.needed("matplotlib.figure", "figures").Figure
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(extras.MissingExtraError, match=r"pip install 'mclr_jax\[figures\]'"):
        extras.needed("matplotlib.figure", "figures")


def test_an_installed_library_that_fails_shows_its_own_error(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("import nothing_of_that_name")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="nothing_of_that_name") as error:
        extras.needed("broken_library", "figures")
    assert error.type is ModuleNotFoundError


def test_a_training_without_the_library_of_curves_says_so_and_keeps_its_log(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with Writer(tmp_path, 0, 2) as writer:
        writer.scalars(1, {"loss": 2.0})
        writer.image(1, "samples", np.zeros((2, 2, 3), np.uint8))
        writer.scalars(2, {"loss": 1.0})
    assert [record["loss"] for record in tiny.records(tmp_path)] == [2.0, 1.0]
    assert capsys.readouterr().err.count("pip install 'mclr_jax[tensorboard]'") == 1
    assert not (tmp_path / "tensorboard").exists()


# ---- the package ---------------------------------------------------------------------------------


def packaged(monkeypatch, address):
    """The arguments of setup.py's call of `setup`, with this REPOSITORY."""
    found = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **given: found.update(given))
    own = runpy.run_path("setup.py")
    own["described"].__globals__["REPOSITORY"] = address
    return found | {"long_description": own["described"]()}


def links(text):
    text = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    return re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", text)


def test_the_page_of_the_package_has_links_that_lead_somewhere(monkeypatch):
    assert {(picture, target.split(":")[0]) for picture, target in links("[a](docs/b.md)")} == {
        ("", "docs/b.md")
    }
    for address in ("", ADDRESS):
        page = packaged(monkeypatch, address)["long_description"]
        found = links(page)
        assert found
        assert all(target.startswith(("https://", "#")) for _, target in found)
        assert f"[digits]({address}/blob/main/configs/digits.py)" in page or not address
        assert f"({address}/raw/main/docs/demo.png)" in page or not address
        assert "| digits |" in page or address


def test_extras_are_those_that_errors_name(monkeypatch):
    known = packaged(monkeypatch, "")["extras_require"].keys()
    assert known >= {"figures", "features", "torch", "tpu", "cuda", "wandb", "tensorboard"}
    for path in [*(ROOT / "mclr_jax").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]:
        text = path.read_text()
        named = re.findall(r"mclr_jax\[(\w+)\]", text)
        named += re.findall(r'needed\("[\w.]+", "(\w+)"', text)
        assert {*named} <= known, path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network from a copy: a build leaves files in its tree."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("mclr_jax", "configs", "launch", "tests/tiny.py"):
        source, copy = ROOT / name, folder / "tree" / name
        copy.parent.mkdir(exist_ok=True, parents=True)
        (shutil.copytree if source.is_dir() else shutil.copy2)(source, copy)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / "tree")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", ".",
        cwd=folder / "tree")  # fmt: skip
    (path,) = folder.glob("mclr_jax-*-py3-none-any.whl")
    run(*pip, "install", "--no-deps", "--no-compile", f"--target={folder / 'site'}", path)
    return path, folder / "site"


def test_the_wheel_has_all_files_under_one_name(wheel):
    names = {*zipfile.ZipFile(wheel[0]).namelist()}
    for top in ("mclr_jax", "configs", "launch"):
        own = {str(path.relative_to(ROOT)) for path in (ROOT / top).rglob("*.py")}
        assert {n if top == "mclr_jax" else f"mclr_jax/{n}" for n in own} <= names
    assert {"mclr_jax/py.typed", "mclr_jax/evaluation/report.html"} <= names
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"mclr_jax"}
    info = next(name for name in names if name.endswith("/METADATA")).removesuffix("METADATA")
    assert f"{info}licenses/LICENSE" in names
    metadata = zipfile.ZipFile(wheel[0]).read(f"{info}METADATA").decode()
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert "OWNER" not in metadata


def test_the_wheel_trains_beside_foreign_folders(wheel, tmp_path):
    for name in ("configs", "launch"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('not of mclr_jax')")
    log = run(
        sys.executable, wheel[1] / "bin" / "mclr", "train", "digits", "--config.num_steps=2",
        "--workdir=run", "--config.network.name=tiny:Linear", "--config.sample_every=0",
        "--config.eval_examples=0", cwd=tmp_path, MCLR_JAX_REVISION="",
        PYTHONPATH=os.pathsep.join([str(wheel[1]), str(ROOT / "tests")]),
    )  # fmt: skip
    assert "from step 0" in log
    told = (tmp_path / "run" / "run.json").read_text()
    assert '"mclr train digits --config.num_steps=2' in told
    assert '"version ' in told
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
