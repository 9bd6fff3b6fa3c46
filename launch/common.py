"""Shared by the command lines: set-up, and one-line errors that name the nearest valid word."""

import contextlib
import functools
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from absl import app, flags
from ml_collections import config_flags

from mclr_jax import commandline, console, cpu, meeting, runs, sampling, schema
from mclr_jax.config import Training
from mclr_jax.extras import MissingExtraError
from mclr_jax.files import digest, provenance, writable
from mclr_jax.generate import Guidance
from mclr_jax.training.devices import banner

flags.disclaim_key_flags()  # those that are defined here belong to the commands

# Flags of several commands, each of which defines its own: name: (kind, default, help, options).
SHARED: dict[str, tuple] = {
    "workdir": (flags.DEFINE_string, None, "Directory of a run, made by mclr train."),
    "init_from": (flags.DEFINE_string, "", "Where the run is now that this one was started from, "
                  "for --interpolation."),
    "data": (flags.DEFINE_string, "", "Where the data of the run are now: as config.data.name, or "
             "the folder config.data.path."),
    "autoencoder": (flags.DEFINE_string, "", "Folder of diffusers with the autoencoder that shows "
                    "latents, where the run names none or has another place for it."),
    "ema": (flags.DEFINE_string, "", "Average of the weights: a track's name, none, or a relative "
            "width such as 0.075."),
    "checkpoint": (flags.DEFINE_integer, None, "Training step; default: the last."),
    "interpolation": (flags.DEFINE_float, 1.0, "Of a fine-tuned run: 0 for the weights that it "
                      "started from, 1 for its own, 0.5 for the weights half-way between."),
    "seed": (flags.DEFINE_integer, 0, "Seed of the starting noise.", {"lower_bound": 0}),
    "batch_size": (flags.DEFINE_integer, 256, "Samples at a time.", {"lower_bound": 1}),
    "class_strengths": (flags.DEFINE_string, None, "File of mclr calibrate, NAME.json: factors "
                        "of the guidance strength by class."),
    "guidance_interval": (flags.DEFINE_list, None, "Guide only at noise levels in LO,HI."),
    "guidance_channels": (flags.DEFINE_integer, None, "Guide only this number of first channels: 3 "
                          "for the published numbers of DiT and SiT, whose code guides 3 of 4. "
                          "There scale 1 + x is about 1 + 3x/4 on all (arXiv 2212.09748, app. A).",
                          {"lower_bound": 1}),
    "autoguidance": (flags.DEFINE_string, None, "Directory of a weaker run, the weak model of the "
                     "guidance."),
    "domain_guidance": (flags.DEFINE_string, None, "Directory of the run that this one was "
                        "fine-tuned from: its answer without a class is the weak model, whatever "
                        "its classes (DoG, arXiv 2504.01521)."),
    "resolution": (flags.DEFINE_integer, 0, "Crop and resize to this size; 0: as they are.",
                   {"lower_bound": 0}),
    "labels": (flags.DEFINE_string, "", "CSV file of file names and classes; default: those of "
               "dataset.json, or the sub-folders."),
    "coordinator": (flags.DEFINE_string, None, "Several hosts: address of process 0, HOST:PORT, or "
                    "auto."),
    "num_processes": (flags.DEFINE_integer, None, "Several hosts: how many processes.",
                      {"lower_bound": 1}),
    "process_id": (flags.DEFINE_integer, None, "Several hosts: number of this process, from 0.",
                   {"lower_bound": 0}),
    "config": (flags.DEFINE_string, None, "Name of a config of the package, such as digits, or "
               "the path of a file NAME.py; each of its keys is a flag, too. It may come first, "
               "without --config=."),
}  # fmt: skip
GUIDANCE = ("class_strengths", "guidance_interval", "guidance_channels", "autoguidance",
            "domain_guidance")  # fmt: skip
HOSTS = ("coordinator", "num_processes", "process_id")

# Errors of the library on bad input or a broken run; other errors are bugs, shown in full.
USER_ERRORS = (ValueError, OSError, RuntimeError, FloatingPointError, MissingExtraError)


def run(main: Callable[..., None], *required: str, usage: str = "", several: bool = False) -> None:
    """Parse the flags and call `main`; exit with 2 on bad flags, with 1 on a USER_ERROR.

    The flags `required` have no default. With a `usage`, the message if there is none, main gets
    the command line's argument that is no flag, or several.
    """
    flags.mark_flags_as_required(required)
    app.run(
        lambda argv: _guarded(functools.partial(main, *argv[1:])),
        flags_parser=functools.partial(_parse, usage, several),
    )


def stop(message: str, status: int = 2) -> NoReturn:
    """Print one message and exit, with all processes of this command."""
    meeting.end(message)
    print(message, file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def mistakes() -> Iterator[None]:
    """A ValueError within it is one of the flags."""
    try:
        yield
    except ValueError as error:
        stop(str(error))


def numbers(flag, kind: type, count: int | None = None) -> list | None:
    """The values of a list flag; stops with a message if they are not `count` numbers."""
    if flag.value is None:
        return None
    try:
        values = [kind(text) for text in flag.value]
    except ValueError:
        values = []
    if not values or (count and len(values) != count):
        wanted = f"{count or 'some'} numbers separated by commas"
        stop(f"--{flag.name} is {','.join(flag.value)!r}; expected {wanted}.")
    return values


def define(*names: str) -> list[flags.FlagHolder]:
    """Flags of SHARED; `run` turns --config into the ConfigDict that the other flags change."""
    found = []
    for name in names:
        kind, default, text, *options = SHARED[name]
        found.append(kind(name, default, text, **(options[0] if options else {})))
    return found


def of_keys(kind: Any, names: Mapping[str, str]) -> dict[str, flags.FlagHolder]:
    """Flags, without a default, that are keys of a dataclass, by key; `names` has their names."""
    found, known = {}, schema.fields(kind)
    for key, name in names.items():
        about = known[key].metadata["key"]
        text = f"{about.says}; default: the run's."
        if about.words:
            found[key] = flags.DEFINE_enum(name, None, sorted(about.words), text)
        else:
            define = flags.DEFINE_integer if known[key].type is int else flags.DEFINE_float
            found[key] = define(name, None, text, about.low, about.high)
    return found


def load(workdir: str | pathlib.Path | None = None) -> runs.Run:
    """The run in --workdir, or in another directory, with its parts where the flags say.

    Its network may get a device for each core: call it before JAX is used.
    """
    found = flags.FLAGS.flag_values_dict()
    moved = {key: found[key] for key in ("init_from", "data", "autoencoder") if key in found}
    run = runs.load(workdir or found["workdir"], **moved)
    cpu.use_cores(run.model.network)
    return run


def connect(workdir: str) -> None:
    """Join the processes that the flags HOSTS name; call it before JAX is used.

    Stops with a message if the flags do not fit together. RuntimeError: `auto` finds no cluster,
    the processes do not meet within five minutes, or see different work directories.
    """
    with mistakes():
        meeting.join(pathlib.Path(workdir), *(flags.FLAGS[name].value for name in HOSTS))


def guidance(run: runs.Run, scale: float = 1.0) -> Guidance:
    """The guidance of a run that the flags GUIDANCE ask for, of which a command may have some."""
    found = {name: flags.FLAGS[name].value for name in GUIDANCE if name in flags.FLAGS}
    found["guidance_interval"] = numbers(flags.FLAGS["guidance_interval"], float, 2)
    if found["autoguidance"] and found["domain_guidance"]:
        stop("Guidance is by one weak model: give --autoguidance or --domain_guidance.")
    return sampling.guidance(run, scale, **found)


def made_by(step: int, params: Any) -> dict[str, Any]:
    """The origin of an output: run, weights, command, revision and device."""
    workdir, average = (flags.FLAGS[name].value for name in ("workdir", "ema"))
    found = {"workdir": workdir, "step": step, "average": average, "weights": digest(params)}
    return {**found, **provenance(), "device": banner()}


def output(name: str, ending: str) -> pathlib.Path:
    """The file of --out, which must have this ending; stops if it cannot be written."""
    with mistakes():
        return writable("--out", name, ending)


def _parse(usage: str, several: bool, argv: list[str]) -> list[str]:
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    if "config" in flags.FLAGS:
        if argv[1:] and argv[1][:1] not in ("", "-"):
            argv = [argv[0], f"--config={argv[1]}", *argv[2:]]
        try:
            config, argv = commandline.read(argv)
        except (ValueError, OSError) as error:
            if os.environ.get("MCLR_TRACEBACK"):
                raise
            stop(str(error))
        if config is not None:
            delattr(flags.FLAGS, "config")
            config_flags.DEFINE_config_dict("config", config, sys_argv=argv)
    try:
        rest = flags.FLAGS(argv)
        for name, value in {**flags.FLAGS.flag_values_dict(), "argument": rest[1:]}.items():
            schema.local(f"--{name}", value)
    except (flags.Error, ValueError) as error:
        text = re.sub(r"invalid literal for int\(\).*", "expected an integer.", str(error))
        if isinstance(error, flags.UnrecognizedFlagError):
            keys = schema.names(Training, "--config.") * ("config" in flags.FLAGS)
            known = [f"--{name}" for name in flags.FLAGS] + keys
            text += schema.elsewhere(error.flagname, known, cutoff=0.6)
        stop(f"{text} (--help lists all flags.)")
    except SystemExit:  # of --help
        if "config" in flags.FLAGS:
            print("\nKeys of the config, each a flag --config.KEY=VALUE [the names that have it]:")
            print("\n".join(f"  {line}" for line in schema.explain(Training)))
        raise
    if len(rest) > 1 and not usage:
        stop(f"Unexpected argument {rest[1]!r}: options are written --name=value.")
    if usage and (len(rest) < 2 or (len(rest) > 2 and not several)):
        stop(usage)
    return rest


def _guarded(main: Callable[[], None]) -> None:
    console.set_up()
    cpu.keep_compiled()
    cpu.keep_freed_memory()
    try:
        main()
    except USER_ERRORS as error:
        if os.environ.get("MCLR_TRACEBACK"):
            raise
        stop(f"{type(error).__name__}: {error} (MCLR_TRACEBACK=1 shows where.)", status=1)
