"""Command lines, within this process or in forks of one with all imports done.

A fork costs a CPU second, or three for a training: it traces and loads again what others have.
"""

import contextlib
import copy
import faulthandler
import importlib
import logging
import multiprocessing
import os
import pathlib
import re
import runpy
import shlex
import sys
import tempfile
import threading
import traceback
from unittest import mock

import jax
from absl import app, flags
from absl import logging as absl_logging

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


def fork(module, *arguments, expect=0):
    """Output of launch.MODULE in a process of its own, in which JAX has not begun."""
    with tempfile.NamedTemporaryFile() as log:
        process = start(f"launch.{module}", list(arguments), log.name)
        process.join(300)
        output = pathlib.Path(log.name).read_text()
    assert process.exitcode == expect, output
    return output


def call(module, *arguments, expect=0, path=(), folder=ROOT, devices=1):
    """Output of launch.MODULE in this process; its exit status must be `expect`."""
    status, argv = 0, [f"launch.{module}", *arguments]
    with tempfile.TemporaryFile("w+", buffering=1) as log:
        with _apart(argv, [*map(str, path), str(ROOT), *sys.path], folder, devices, log):
            try:
                runpy.run_module(argv[0], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code or 0
            except Exception:
                traceback.print_exc()
                status = 1
        log.seek(0)
        output = log.read()
    assert status == expect, output
    return output


def _forget():
    """Drop the programs that functions keep, which are for the devices that they saw."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("mclr_jax"):
            for value in [*vars(module).values()]:
                getattr(value, "cache_clear", int)()


@contextlib.contextmanager
def _apart(argv, path, folder, devices, log):
    """What a command changes in its process is its own; it sees some of the devices."""
    app.define_help_flags()
    known, mine = vars(flags.FLAGS), jax.devices()[:devices]
    kept = {
        key: {k: copy.copy(x) if isinstance(x, list) else x for k, x in value.items()}
        if isinstance(value, dict) else value for key, value in known.items()
    }  # fmt: skip
    modules = {n: sys.modules.pop(n) for n in [*sys.modules] if n.startswith("mclr_jax.launch")}
    before, place, root = {*sys.modules}, pathlib.Path.cwd(), logging.getLogger()
    for name, defined in flags.FLAGS.flags_by_module_dict().items():  # of an imported command
        for flag in [*defined] if name.startswith(("mclr_jax.launch", "launch")) else ():
            if flag.name in flags.FLAGS:
                delattr(flags.FLAGS, flag.name)
    handler, verbosity = absl_logging.get_absl_handler(), absl_logging.get_verbosity()
    own_level = absl_logging.get_absl_logger().level
    handlers, level = [*root.handlers], root.level
    filters, shape = [*handler.filters], handler.python_handler.formatter
    handler.python_handler.setStream(log)
    importlib.invalidate_caches()
    _forget()
    os.chdir(folder)
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (jax, "devices", lambda *_, **__: mine), (jax, "local_devices", lambda *_, **__: mine),
            (jax, "device_count", lambda *_: devices), (faulthandler, "enable", lambda *_: None),
            (sys, "argv", argv), (sys, "path", path), (sys, "excepthook", sys.excepthook),
            (sys, "orig_argv", [sys.executable, "-m", *argv]), (sys, "stdout", log),
            (sys, "stderr", log), (threading, "excepthook", threading.excepthook),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(os.environ))
        try:
            yield
        finally:
            _forget()
            os.chdir(place)
            handler.python_handler.setStream(sys.__stderr__)
            handler.setFormatter(shape)
            handler.filters[:], root.handlers[:] = filters, handlers
            absl_logging.set_verbosity(verbosity)
            absl_logging.get_absl_logger().setLevel(own_level)  # verbosity alone hides its NOTSET
            root.setLevel(level)
            known.clear()
            known.update(kept)
            for name in {*sys.modules} - before:
                file = getattr(sys.modules[name], "__file__", None) or ""
                own = folder != ROOT and file.startswith(str(folder) + os.sep)  # .venv is in ROOT
                if name.startswith("mclr_jax.launch") or own:
                    del sys.modules[name]
            sys.modules.update(modules)
