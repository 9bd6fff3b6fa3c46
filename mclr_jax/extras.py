"""Libraries that only some uses need: extras of setup.py, imported where they are used."""

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """A library of an extra is not installed; the message names the extra."""


def needed(module: str, extra: str) -> Any:
    """An imported module of the extra; MissingExtraError if its library is not installed."""
    library = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != library:  # an installation that is broken
            raise
        raise MissingExtraError(
            f"{library} is not installed; expected the extra {extra}: "
            f"pip install 'mclr_jax[{extra}]'."
        ) from error
