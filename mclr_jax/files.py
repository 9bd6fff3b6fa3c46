"""Atomic writes of text, JSON and npz; JSON lines; digests; the provenance of a result."""

import contextlib
import hashlib
import io
import json
import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from mclr_jax import __version__


def write_atomically(path: str | os.PathLike, data: bytes | str) -> None:
    """Write under a temporary name, then rename; a missing folder is created.

    An error, such as a full disk, leaves the old file, and no temporary one.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with _naming(path):
            temporary.write_bytes(data.encode() if isinstance(data, str) else data)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: str | os.PathLike, text: str) -> None:
    """Add text to the end of a file; OSError names the file."""
    with _naming(path), open(path, "a") as file:
        file.write(text)


@contextlib.contextmanager
def made(folder: pathlib.Path, *inner: str) -> Iterator[None]:
    """Makes a folder; those that are still empty at the end go, its folders `inner` included."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in [*(folder / name for name in inner), *missing]:
            with contextlib.suppress(OSError):  # it has content
                path.rmdir()


def writable(key: str, name: str, ending: str) -> pathlib.Path:
    """The path of a file to write later; ValueError: another ending, or it cannot be written."""
    path = pathlib.Path(name)
    if path.suffix != ending:
        raise ValueError(f"{key} is {name!r}; expected a name that ends in {ending}.")
    probe = path.with_name(f"{path.name}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError("it is a directory")
        with made(path.parent):
            write_atomically(probe, b"")
            probe.unlink()
    except OSError as error:
        what = f"where no file can be written ({error.strerror or error})"
        raise ValueError(f"{key} is {name!r}, {what}.") from error
    return path


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Adds the file to an OSError: that of a full disk names none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Turns an error of a library into a ValueError of `what` and the error's first line.

    Damaged files cause many types of errors. Missing and forbidden files have clear errors.
    """
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        raise
    except Exception as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{what} ({first})") from error


def as_json(value: Any) -> Any:
    """The value as JSON holds it: lists for tuples, Python's numbers for NumPy's.

    ValueError: a part of another kind.
    """

    def plain(part: Any) -> Any:
        if not hasattr(part, "item"):
            raise ValueError(f"got {part!r}; expected text, numbers, or lists of them")
        return part.item()

    return json.loads(json.dumps(value, default=plain))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def save_arrays(path: str | os.PathLike, **arrays: Any) -> None:
    """Write an npz file atomically."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomically(path, buffer.getvalue())


def read_lines(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """The records of a JSON-lines file that have an integer `step`; none if the file is missing.

    Other lines are left out: a killed process can leave an incomplete last line.
    """
    path = pathlib.Path(path)
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def digest(tree: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a tree: paths, shapes, types and values."""
    total = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(jax.device_get(tree)):
        array = np.ascontiguousarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)}{array.shape}{array.dtype}".encode())
        total.update(array.tobytes())
    return total.hexdigest()[:16]


def flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Nested dicts as one dict, with keys joined by dots."""
    return traverse_util.flatten_dict(tree, sep=".")


def provenance() -> dict[str, str]:
    """The command line of this process and the git revision of the package, to store with a result.

    The revision ends in "-dirty" if files have changed since. Outside a git checkout it is the
    version of the package. The environment variable MCLR_JAX_REVISION, for a copy of a checkout on
    another machine, comes before both.
    """
    root = pathlib.Path(__file__).resolve().parent.parent
    revision = os.environ.get("MCLR_JAX_REVISION", "")
    if not revision and (root / ".git").exists():
        git = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        with contextlib.suppress(OSError):  # git is not installed
            revision = subprocess.run(git, cwd=root, capture_output=True, text=True).stdout.strip()
    words = ["python", *sys.orig_argv[1:]]
    script = pathlib.Path(*words[1:2])
    if script.suffix == "" and script.is_file():  # an installed command
        words[:2] = [script.name]
    return {"command": shlex.join(words), "revision": revision or f"version {__version__}"}
