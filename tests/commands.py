"""Command lines in processes of their own, forked from a process with all imports done."""

import multiprocessing
import os
import pathlib
import re
import runpy
import shlex
import sys
import tempfile

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")
PRELOADED = ["mclr_jax.main", "mclr_jax.assimilation.regimes", "mclr_jax.evaluation.evaluate",
             "mclr_jax.evaluation.report", "mclr_jax.launch.common"]  # fmt: skip
SERVER.set_forkserver_preload(PRELOADED)


def _child(target, argv, path, log, devices, folder):
    """In the new process: run a module like `python -m` does, or a function of `argv`."""
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    os.environ["XLA_FLAGS"] = flags
    os.chdir(folder)
    sys.path[:0] = [*map(str, path), str(ROOT), str(ROOT / "tests")]
    sys.argv, sys.orig_argv = [str(target), *argv], [sys.executable, "-m", str(target), *argv]
    try:
        if callable(target):
            target(*argv)
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    # JAX does so at the end of a program, but not of a forked one: without it a process that ends
    # first closes the connections of another, which still reads from them.
    jax.distributed.shutdown()


def start(target, argv, log, path=(), devices=1, folder=ROOT):
    """The process, on CPU devices; `path` is for imports, output goes to the file `log`."""
    process = SERVER.Process(target=_child, args=(target, argv, path, str(log), devices, folder))
    process.start()
    return process


def blocks(page, language):
    """The code of a page's blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def lines(page, module=r"\w+"):
    """The calls of mclr MODULE in a page's blocks, each as the list of its words."""
    text = "\n".join(blocks(page, "(?:ba)?sh")).replace("\\\n", " ")
    found = re.findall(rf"^mclr {module} .*", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found]


def call(module, *arguments, expect=0, path=(), folder=ROOT, devices=1):
    """Output of launch.MODULE; its exit status must be `expect`."""
    with tempfile.NamedTemporaryFile() as log:
        process = start(f"launch.{module}", list(arguments), log.name, path, devices, folder)
        process.join(300)
        output = pathlib.Path(log.name).read_text()
    assert process.exitcode == expect, output
    return output
