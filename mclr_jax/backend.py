"""The backend that programs are traced for: some operations have a form for CPUs or for GPUs."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_for_others = contextvars.ContextVar("for_others", default=False)


def traced_for() -> str:
    """Name of JAX's default backend ("cpu", "gpu", "tpu"), or "other" in `programs_for_others`."""
    return "other" if _for_others.get() else jax.default_backend()


@contextlib.contextmanager
def programs_for_others() -> Iterator[None]:
    """Programs traced inside are those of an accelerator, on a machine without one.

    JAX remembers what it has traced: a function that was traced before keeps its form.
    """
    token = _for_others.set(True)
    try:
        yield
    finally:
        _for_others.reset(token)
