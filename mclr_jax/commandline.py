"""The config that the words of a command line ask for: a named one, that of a file or of a run.

Its keys become flags, which `launch.common` parses.
"""

import contextlib
import pathlib
import re
import sys
from collections.abc import Mapping

from ml_collections import ConfigDict

from mclr_jax import configs, inherit, record, schema
from mclr_jax.config import Training
from mclr_jax.schema import nearest


def read(argv: list[str]) -> tuple[ConfigDict | None, list[str]]:
    """The config, None if no word asks for one, and the words without --config.

    A section whose name is a flag gets the options of the new name, so that they are flags, too.
    ValueError, OSError: there is no such config, or it lacks a key that is a flag.
    """
    given = {}
    for word, following in zip(argv[1:], [*argv[2:], ""], strict=True):
        name, equals, value = word.lstrip("-").partition("=")
        if word[0] == "-":
            given[name] = value if equals else following
    keys = [name.removeprefix("config.") for name in given if name.startswith("config.")]
    if (config := _config_of(given)) is None:
        if keys:
            raise ValueError(f"--config.{keys[0]} needs --config=NAME, the config that it changes.")
        return None, argv
    for name, field in schema.fields(Training).items():
        part, section = given.get(f"config.{name}.name"), config.get(name)
        if part and isinstance(section, ConfigDict) and field.metadata["section"].table:
            if part == section.get("name"):
                continue
            config[name] = new = ConfigDict(schema.switched(Training, config, name, part))
            if dropped := sorted({*section} - {*new}):
                print(f"config.{name} is now {part}, without {', '.join(dropped)}", file=sys.stderr)
    _check_keys(config, keys)
    if "config" in given:
        at = next(i for i, word in enumerate(argv) if re.fullmatch(r"--?config(=.*)?", word))
        argv = argv[:at] + argv[at + 1 + ("=" not in argv[at]) :]
    return config, argv


def _config_of(given: Mapping[str, str]) -> ConfigDict | None:
    """The config of the flag --config, or of the run in --workdir, with what it takes from a run.

    What decides about that is set already: the run, the data and the number of steps.
    """
    workdir, helps = given.get("workdir", ""), given.keys() & {"help", "h", "helpshort", "helpfull"}
    if "config" in given:
        config = _load(given["config"])
        for key, kind in {"init_from": str, "data.name": str, "data.latents": str,
                          "num_steps": int}.items():  # fmt: skip
            if value := given.get(f"config.{key}"):
                with contextlib.suppress(KeyError, ValueError):  # which the flag's own check names
                    config.update_from_flattened_dict({key: kind(value)})
        return config if helps else ConfigDict(inherit.completed(config.to_dict(), workdir))
    if not workdir or helps:
        return None
    if not (found := record.continued(pathlib.Path(workdir))):
        raise ValueError(
            f"{workdir} has no training to continue; name a config, as in mclr train digits."
        )
    return ConfigDict(schema.filled(Training, found))


def _load(path: str) -> ConfigDict:
    """The config NAME or FILE, or the same with :ARGUMENT; ValueError if it cannot be loaded."""
    try:
        return configs.load(path)
    except configs.UnknownConfigError as error:
        raise ValueError(f"--config: {error}") from error
    except Exception as error:
        what = f"{type(error).__name__}: {error} (MCLR_TRACEBACK=1 shows where.)"
        raise ValueError(f"--config={path} cannot be loaded: {what}") from error


def _check_keys(config: ConfigDict, keys: list[str]) -> None:
    """Raise ValueError on the first of the keys, as a.b, that a config does not have."""
    for key in keys:
        section, so_far = config, "config"
        for name in key.split("."):
            known = section.keys() if isinstance(section, ConfigDict) else ()
            if name not in known:
                what = f"--config.{key}: {so_far} has no key {name!r}."
                what += schema.elsewhere(f"--config.{key}", schema.names(Training, "--config."))
                raise ValueError(f"{what} {nearest(name, known)} --help explains all keys.")
            section, so_far = section[name], f"{so_far}.{name}"
        if isinstance(section, ConfigDict):
            raise ValueError(
                f"--config.{key} is a section; set its keys. --help explains all keys."
            )
