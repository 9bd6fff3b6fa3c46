"""The command `mclr`: `mclr train digits` does what `python -m launch.train digits` does.

The module of the command is the only one that is imported.
"""

import ast
import importlib
import os
import pathlib
import runpy
import sys
import textwrap

USAGE = """Class-conditional diffusion models in JAX, and MCLR.

  mclr train digits --workdir=runs/digits
  mclr sample --workdir=runs/digits --out=digits.npz

Commands; mclr COMMAND --help explains each:
"""


def commands() -> dict[str, str]:
    """The first line of the docstring of each command."""
    found, package = {}, importlib.import_module("mclr_jax.launch")
    for path in sorted(pathlib.Path(package.__path__[0]).glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if '\nif __name__ == "__main__":' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
    return found


def usage() -> str:
    """A list of the commands and of the configs."""
    from mclr_jax import configs

    listed = [f"  {name:11s} {line}" for name, line in commands().items()]
    names = textwrap.indent(textwrap.fill(", ".join(configs.names()), 96), "  ")
    return "\n".join([USAGE, *listed, "\nConfigs, or the path of a file of your own:\n", names])


def main() -> None:
    """Run the command that sys.argv names, in this process, as `python -m` would."""
    from mclr_jax import __version__

    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        print(usage())
    elif name == "--version":
        print(f"mclr_jax {__version__}")
    elif name not in (known := commands()):
        from mclr_jax.schema import nearest

        print(f"No command {name!r}. {nearest(name, known)}", file=sys.stderr)
        sys.exit(2)
    else:
        sys.path.append(os.getcwd())  # for package.module:Name, after all that is installed
        sys.argv = [f"mclr {name}", *arguments]
        runpy.run_module(f"mclr_jax.launch.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
