"""Every key of a config is declared once: a field of a dataclass, with default and meaning."""

import ast
import inspect
import textwrap

import pytest

from mclr_jax import config, schema
from mclr_jax.configs import base

TRAINING = schema.fields(config.Training)
SECTIONS = {name: field.type for name, field in TRAINING.items()
            if inspect.isclass(field.type) and issubclass(field.type, schema.Keys)}  # fmt: skip
PARTS = {name: field.metadata["section"] for name, field in TRAINING.items()
         if "section" in field.metadata and field.metadata["section"].table}  # fmt: skip
# (where, dataclass, fields that are no keys) of all sections, and of all names of parts.
KINDS = [
    ("config", config.Training, ()),
    *((f"config.{name}", kind, ()) for name, kind in SECTIONS.items()),
    *((f"config.{name}", kind, found.late) for name, found in PARTS.items()
      for kind in found.table.values()),
]  # fmt: skip


def declared(kind):
    """Names of the fields in the body of a class, without those of its bases."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return [line.target.id for line in body.body if isinstance(line, ast.AnnAssign)]


@pytest.mark.parametrize(("where", "kind", "late"), KINDS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_key_is_declared_once_with_its_section_and_meaning(where, kind, late):
    """Only a part may change the default of a key that it inherits, in its own body."""
    bodies = [declared(x) for x in kind.__mro__ if x.__module__.startswith("mclr_jax")]
    assert getattr(kind, "where", where) == where
    for name, field in schema.fields(kind).items():
        if "rest" in field.metadata or name in late:
            continue
        held = bodies[:1] if name in bodies[0] and where.split(".")[-1] in PARTS else bodies
        assert sum(body.count(name) for body in held) == 1, name
        found = field.metadata.get("key") or field.metadata["section"]
        assert found.says or name in SECTIONS, name


def test_the_base_config_declares_nothing():
    assert base.base().to_dict() == config.blank()
    nodes = ast.walk(ast.parse(inspect.getsource(base)))
    assert not [x for x in nodes if isinstance(x, ast.Assign | ast.AnnAssign | ast.Dict)]
