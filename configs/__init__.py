"""Configs of the package: `mclr train NAME`, and a start for config files of your own."""

import pathlib
import runpy
from typing import Any

_FOLDER = pathlib.Path(__file__).parent


class UnknownConfigError(ValueError):
    """No config has this name, and no file this path."""


def names() -> list[str]:
    """The configs that come with the package, such as digits."""
    return sorted({path.stem for path in _FOLDER.glob("[!_]*.py")} - {"base"})


def find(name: str) -> pathlib.Path | None:
    """The file of a config: one of `names`, or the path of a file NAME.py; None: there is none."""
    path = _FOLDER / f"{name}.py" if name in names() else pathlib.Path(name)
    return path if path.suffix == ".py" and path.is_file() else None


def load(name: str) -> Any:
    """The ConfigDict of a config that `find` finds; of NAME:ARGUMENT, get_config gets the argument.

    UnknownConfigError: there is none; other errors are those of the file.
    """
    from ml_collections import ConfigDict

    from mclr_jax.schema import nearest

    name, colon, argument = name.partition(":")
    if path := find(name):
        return ConfigDict(runpy.run_path(str(path))["get_config"](*[argument] * bool(colon)))
    given = pathlib.Path(name)
    if given.stem in names():
        raise UnknownConfigError(
            f"no config file {name!r}. Did you mean {given.stem!r}, of the package?"
        )
    folder = given.parent if given.parent.is_dir() else pathlib.Path()
    known = [*names(), *(str(file) for file in folder.glob("[!_]*.py"))]
    raise UnknownConfigError(f"no config file {name!r}. {nearest(name, known)}")
