"""Configs of the package: `mclr train NAME`, and a start for config files of your own."""

import pathlib

_FOLDER = pathlib.Path(__file__).parent


def names() -> list[str]:
    """The configs that come with the package, such as digits."""
    return sorted({path.stem for path in _FOLDER.glob("[!_]*.py")} - {"base"})


def find(name: str) -> pathlib.Path | None:
    """The file of a config: one of `names`, or the path of a file NAME.py; None: there is none."""
    path = _FOLDER / f"{name}.py" if name in names() else pathlib.Path(name)
    return path if path.suffix == ".py" and path.is_file() else None
