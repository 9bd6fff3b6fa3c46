"""`run.json`: what a run is and what was done with it, and how it differs from what is asked."""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from mclr_jax import __version__, parts
from mclr_jax.config import Training
from mclr_jax.data.protocol import Source, evenly, names_of
from mclr_jax.data.sources import place_of
from mclr_jax.files import as_json, digest, flat, provenance, write_json
from mclr_jax.model import Model
from mclr_jax.training.devices import banner

# Values that a run with checkpoints cannot change: they decide what its weights mean.
FIXED = ("model.", "companions.", "data.", "config.init_from", "config.adapter.")
# Keys that it can change at any time: no step learns anything else. The files and runs that some of
# them name are told by their digests.
FREE = tuple(
    f"config.{key}"
    for key in ("num_steps", "init_from", "new_labels", "parallel", "require_accelerator",
                "steps_per_dispatch", "grad_accumulation", "log_every", "checkpoint_every",
                "keep_checkpoints", "eval_examples", "sample_every", "companions.", "data.name",
                "data.path", "data.test", "data.autoencoder", "data.labels", "data.cache",
                "sampler.", "icr.", "memorization.", "evaluate.", "log.",
                "profile.")
)  # fmt: skip
# Keys of earlier versions, by section, with the only values that mean what no such key means now.
RETIRED: dict[str, dict[str, Any]] = {
    "objective": {"logistic_scale": 10.0, "reference_penalty": 0.0, "null_share": 1.0,
                  "null_interval": []},
}  # fmt: skip
# Parts that may differ without a warning.
APART = ("history", "start", "origin", "spans", "paths", "frozen", "averages", "sampler")


def describe(
    training: Training, model: Model, companions: Mapping[str, Model], source: Source
) -> dict[str, Any]:
    """The description of a run, without its history, as JSON."""
    named = {"class_names": list(names)} if (names := names_of(source)) else {}
    return {
        "config": dict(training.config),
        **of_model(model, list(training.ema.tracks), training.config["sampler"]),
        "data": {"number": len(source), "digest": digest(source[evenly(source, 64)]), **named},
        "companions": {name: parts.describe(other) for name, other in companions.items()},
    }


def of_model(model: Model, averages: list[str], sampler: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that sampling needs: every run has it, trained here or not."""
    found = {"model": parts.describe(model), "averages": averages, "sampler": dict(sampler)}
    return as_json(found)


def places(config: Mapping[str, Any], origin: Mapping[str, Any] = {}) -> dict[str, str]:
    """The files and directories that a config, or an origin of published weights, names, by key."""
    found = {f"origin.{key}": origin[key] for key in ("file", "autoencoder") if key in origin}
    if not config:
        return found
    values = {"init_from": config["init_from"], "data.path": config["data"]["path"]}
    newer = ("autoencoder", "labels")
    values |= {f"data.{key}": config["data"].get(key, "") for key in newer}
    values |= {f"companions.{name}": path for name, path in config["companions"].items()}
    for section in ("evaluate", "memorization"):
        _, _, path = config.get(section, {}).get("features", "").partition(":")
        values[f"{section}.features"] = path  # of a classifier or a file of weights
    for key in ("name", "test", "generated"):
        values[f"data.{key}"] = place_of(config["data"][key])
    return found | {key: path for key, path in values.items() if path}


def changes(workdir: pathlib.Path, description: Mapping[str, Any]) -> dict[str, list]:
    """key: [old, new] of the values that differ from those in run.json.

    Raises ValueError if the directory has checkpoints, which these values do not describe.
    """
    if not (old := read(workdir)):
        return {}
    with contextlib.suppress(ValueError):  # a key that is newer than the run has its default there
        old["config"] = dict(Training.parse(old["config"]).config)
        old["model"] = as_json(parts.describe(parts.model_of(old["model"])))
        for name, other in old["companions"].items():
            old["companions"][name] = as_json(parts.describe(parts.model_of(other)))
    before, now = flat(old), flat(dict(description))
    known = before.get("frozen", now.get("frozen"))  # none: of a training without companions
    if has_checkpoints(workdir) and now.get("frozen", known) != known:
        raise ValueError(
            f"The frozen weights of {', '.join(description['companions'])} have digest "
            f"{now['frozen']}; this run was started with {known}. Restore {workdir}/frozen and the "
            "runs of config.init_from and config.companions from a copy, or begin again by "
            "--restart."
        )
    keys = [k for k in before.keys() | now.keys() if not k.startswith(APART)]
    keys = [k for k in keys if k in before or not k.startswith("data.")]  # of an older version
    found = {k: [before.get(k), now.get(k)] for k in sorted(keys) if before.get(k) != now.get(k)}
    held = ("config.init_from",) * ("reference" in description["companions"])  # by its weights
    fixed = {k: v for k, v in found.items() if k.startswith(FIXED) and k not in held}
    if fixed and has_checkpoints(workdir):
        raise ValueError(
            f"{workdir} has checkpoints of another model or other data: {told(fixed)}. Use "
            "another --workdir, the old values, or --restart to begin again in this one."
        )
    return found


def told(changed: Mapping[str, list]) -> str:
    """Changes in words."""
    pairs = ((key, map(json.dumps, values[::-1])) for key, values in changed.items())
    return "; ".join("{} is now {}; it was {}".format(key, *values) for key, values in pairs)


def require_none(changed: Mapping[str, list], workdir: pathlib.Path) -> None:
    """ValueError if some of the changes decide what the next steps of a run learn."""
    if found := deciding(changed):
        raise ValueError(
            f"{workdir} was trained with other values: {told(found)}. Add --change (in Python, "
            "change=True) to train on with the new values, restore the old ones, or use another "
            "--workdir."
        )


def deciding(changed: Mapping[str, list]) -> dict[str, list]:
    """Those of the changes that decide what the next steps learn."""
    return {key: values for key, values in changed.items() if not key.startswith(FREE)}


def write(
    workdir: pathlib.Path, description: Mapping[str, Any], changed: Mapping[str, list] = {},
    step: int = 0, start: Any = None,
) -> None:  # fmt: skip
    """Write run.json: the description, its history, and `start`, the origin of the weights.

    If values have changed, `spans` has a part for each span of steps: `from`, the number of steps
    done before, and the values there of all keys that have ever changed.

    A run that starts from published weights, or from a run that did, has their `origin`.

    Paths are also stored in absolute form and relative to `workdir`, so that `runs.load` finds the
    files from another current directory, and in a run that was moved together with them.
    """
    old = read(workdir)
    for key, values in changed.items():
        logging.warning("%s, when this run was started.", told({key: values}))
    made_by = {**provenance(), "version": __version__, "device": banner()}
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, **made_by}
    history = [*old.get("history", []), {**entry, "changes": dict(changed)}]
    more = {"start": found} if (found := start or old.get("start")) else {}
    if len(spans := _spans(old.get("spans", []), description, changed, step)) > 1:
        more["spans"] = spans
    published = description.get("origin") or old.get("origin", {})
    if start and not published:
        base = pathlib.Path(start["run"])
        published = origin(read(base), base)
    more |= {"origin": published} if published else {}
    named = places(description.get("config", {}), published)
    absolute = {key: os.path.abspath(name) for key, name in named.items()}
    here = os.path.realpath(workdir)
    paths = {
        k: [name, os.path.relpath(os.path.realpath(name), here)] for k, name in absolute.items()
    }
    write_json(workdir / "run.json", {**description, **more, "paths": paths, "history": history})


def _spans(
    old: list[dict[str, Any]],
    description: Mapping[str, Any],
    changed: Mapping[str, list],
    step: int,
) -> list[dict[str, Any]]:
    """The spans of `write`; later steps than `step` are done again."""
    keys = deciding(changed).keys() | {"config.num_steps"} & changed.keys()
    before, now = {key: changed[key][0] for key in sorted(keys)}, flat(dict(description))
    spans = [before | span for span in old if span["from"] < step] or [{"from": 0, **before}]
    last = {key: now.get(key) for key in spans[-1] if key != "from"}
    return spans if last.items() <= spans[-1].items() else [*spans, {"from": step, **last}]


def at_new_places(description: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """The config, empty without one, with its files and directories where they are now."""
    config, written = dict(description.get("config", {})), flat(description.get("config", {}))
    for key, name in places(config).items():
        place = _now(description, workdir, key, name)
        section, _, last = key.rpartition(".")
        value = {last: written[key].removesuffix(name) + place}
        config |= {section: {**config[section], **value}} if section else value
    return config


def continued(workdir: pathlib.Path) -> dict[str, Any]:
    """The config of the training in a directory, to continue it; empty: there is none.

    Its data, and before the first checkpoint other runs, are looked for at their new places.
    """
    config = dict((description := read(workdir)).get("config", {}))
    if not config:
        return {}
    missing = {k: name for k, name in places(config).items() if not os.path.exists(name)}
    now, held = at_new_places(description, workdir), has_checkpoints(workdir)
    if any(key.startswith("data.") for key in missing):
        config["data"] = now["data"]
    if missing and not held:
        config |= {key: now[key] for key in ("init_from", "companions")}
    return config


def class_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes of the data, or else those published with the weights."""
    if found := description.get("data", {}).get("class_names"):
        return tuple(found)
    named = description.get("origin", {}).get("id2label", {})
    in_order = [
        named.get(str(label)) for label in range(description["model"]["data"]["num_classes"])
    ]
    return () if None in in_order else tuple(map(str, in_order))


def origin(description: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """The origin of published weights, {} for others, with its files where they are now."""
    found = dict(description.get("origin", {}))
    for key, name in places({}, found).items():
        found[key.removeprefix("origin.")] = _now(description, workdir, key, name)
    return found


def _now(description: Mapping[str, Any], workdir: pathlib.Path, key: str, name: str) -> str:
    """The present place of a file or directory of `places`: its absolute or its relative path."""
    absolute, relative = description.get("paths", {}).get(key, [name, name])
    options = [pathlib.Path(absolute), workdir / relative]
    return str(next((place for place in options if place.exists()), absolute))


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """True if a directory has checkpoints of a training, readable or not."""
    return any((workdir / "checkpoints").glob("[0-9]*"))


def read(workdir: pathlib.Path) -> dict[str, Any]:
    """The content of run.json; empty without the file; ValueError: it is damaged or old."""
    path = workdir / "run.json"
    if not path.exists():
        return {}
    try:
        description = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); restore it from a copy.") from error
    if not isinstance(description, dict) or "model" not in description:
        raise ValueError(f"{path} was written by an older version; train that run again.")
    trained = ("config", "companions") if description.keys() & {"config", "companions"} else ()
    for key in ("model", *trained):
        if not isinstance(description.get(key), dict):
            raise ValueError(f"{path} is damaged ({key!r} has no keys); restore it from a copy.")
    for section, keys in RETIRED.items():
        given = description.get("config", {}).get(section)
        for key in [key for key in keys if isinstance(given, dict) and given.get(key) == keys[key]]:
            del given[key]
    return description


def set_aside(workdir: pathlib.Path) -> None:
    """Move a run, except pictures and evaluations, to the folder `replaced` of its directory."""
    target = workdir / "replaced" / time.strftime("%Y%m%d-%H%M%S")
    names = ("run.json", "metrics.jsonl", "checkpoints", "snapshots", "frozen", "tensorboard",
             "wandb", "assimilation.json")  # fmt: skip
    for path in (workdir / name for name in names):
        if path.exists():
            target.mkdir(parents=True, exist_ok=True)
            path.rename(target / path.name)
