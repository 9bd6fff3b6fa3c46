"""Looking things up by name, with errors that name the nearest valid one."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """What to put behind an error about `name`: the nearest valid names, and all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    guess = f"Did you mean {' or '.join(map(repr, close))}? " if close else ""
    return f"{guess}Known: {', '.join(known) or 'none'}."


def look_up(table: Mapping[str, T], name: str, what: str) -> T:
    """table[name].

    Raises:
      ValueError: naming the nearest entries, if there is none.
    """
    if name not in table:
        raise ValueError(f"Unknown {what} {name!r}. {nearest(name, table)}")
    return table[name]
