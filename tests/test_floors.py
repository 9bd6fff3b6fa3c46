"""The order of the floors: imports point down only, and files stay small."""

import ast
import functools
import pathlib
import subprocess
import sys

from mclr_jax.config import OBJECTIVES

ROOT = pathlib.Path(__file__).parent.parent
# From the ground up. A file imports from floors below it; files of one folder import each other,
# but not in a circle. A name with a slash at its end is a folder, but for its files named alone.
FLOORS = [
    ["schema", "types", "files", "extras", "reductions", "cpu", "backend", "hlo", "chips"],
    ["denoiser", "adapter"],
    ["noise"],
    ["guidance", "flow", "mixture"],
    ["samplers"],
    ["networks/", "data/", "objectives/"],
    ["model", "posterior"],
    ["training/optimizer", "training/ema"],
    ["task"],
    ["training/"],
    ["parts", "images", "meeting", "console"],
    ["config", "generate"],
    ["record"],
    ["runs"],
    ["inherit", "labels"],
    ["experiment", "plan", "calibrate", "commandline"],
    ["pretrained/", "assimilation/"],
    ["latents"],
    ["sampling"],
    ["evaluation/"],
    ["representation/"],
    ["hooks"],
    ["main"],
    ["demo"],
    ["launch/"],
    ["cli"],
]
# What the ground floors, up to the task, may import beside the standard library.
FOUNDATION = ("jax", "flax.linen", "optax", "numpy")


@functools.cache
def files():
    """Module name -> file, of mclr_jax and launch."""
    return {
        ".".join(["mclr_jax", *path.relative_to(top).with_suffix("").parts]): path
        for top, folder in ((ROOT / "mclr_jax", "."), (ROOT, "launch"))
        for path in (top / folder).rglob("*.py")
        if path.name != "__init__.py"
    }


@functools.cache
def trees():
    """Module name -> syntax tree."""
    return {module: ast.parse(path.read_text()) for module, path in files().items()}


def imports(nodes):
    """The modules of this project that the import statements among `nodes` name."""
    found = set()
    for node in nodes:
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        found |= trees().keys() & set(names)
    return found


def unit(module):
    """What a module is called in FLOORS."""
    path = module.removeprefix("mclr_jax.").replace(".", "/")
    folder, slash, _ = path.partition("/")
    return path if any(path in names for names in FLOORS) else folder + slash


def test_imports_point_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    assert {unit(module) for module in trees()} == floor.keys()
    for module, tree in trees().items():
        for other in imports(ast.walk(tree)):
            below = floor[unit(other)] < floor[unit(module)]
            beside = unit(other) == unit(module) and unit(module).endswith("/")
            assert below or beside, f"{module} imports {other}, which is no floor below it"


def test_files_of_a_folder_do_not_import_each_other_in_a_circle():
    """At the top of the file; a function may import what is built on its own file."""
    graph = {module: imports(tree.body) for module, tree in trees().items()}
    while graph:
        leaves = {module for module, others in graph.items() if not others & graph.keys()}
        assert leaves, f"these import each other: {sorted(graph)}"
        graph = {module: others for module, others in graph.items() if module not in leaves}


def test_nothing_is_imported_that_is_not_used():
    """In a new process: what comes with the foundation is there before the ground floors.

    Each of the heavy ones takes a second or more, and few trainings use it.
    """
    heavy = {"sklearn", "scipy.stats", "tensorboardX", "matplotlib", "tensorflow_datasets", "torch"}
    program = f"""
import sys
import {", ".join(FOUNDATION)}
before = {{name.split(".")[0] for name in sys.modules}}
import mclr_jax.task, mclr_jax.model
print(*{{name.split(".")[0] for name in sys.modules}} - before - sys.stdlib_module_names)
import mclr_jax.launch.train
print(*{heavy} & sys.modules.keys())
"""
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["mclr_jax", ""]


def test_only_the_table_of_objectives_knows_their_names():
    for module, tree in trees().items():
        if unit(module) in ("objectives/", "config", "launch/"):
            continue
        constants = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        assert not constants & OBJECTIVES.keys(), module
        found = {other for other in imports(ast.walk(tree)) if unit(other) == "objectives/"}
        inputs = module in ("mclr_jax.task", "mclr_jax.posterior")
        assert found <= ({"mclr_jax.objectives.base"} if inputs else set())


def test_nothing_looks_at_the_parameters_of_functions():
    for module, tree in trees().items():
        words = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(tree)}
        assert not words & {"signature", "getfullargspec", "co_varnames"}, module


def test_files_and_functions_are_short():
    longest = {"mclr_jax.config": 250, "mclr_jax.training.loop": 250}
    for module, tree in trees().items():
        lines = len(files()[module].read_text().splitlines())
        assert lines <= longest.get(module, 500), f"{module} has {lines} lines"
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{module}.{node.name} has {length} lines"
