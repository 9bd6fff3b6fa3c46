"""The directory of a run: its model, its weights and its companions.

`run.json` holds the config, the model and its companions with all values resolved; `checkpoints/`
the training state; `snapshots/` averages of earlier steps for post-hoc EMA; `frozen/` the weights
of the companions, so that the run needs no other directory.
"""

import contextlib
import dataclasses
import itertools
import json
import operator
import os
import pathlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import logging
from flax import traverse_util

from mclr_jax import __version__, ema, experiment
from mclr_jax.data import sources
from mclr_jax.data.formats import FORMATS
from mclr_jax.data.protocol import Source, evenly
from mclr_jax.files import digest, flat, provenance, write_atomically, write_json
from mclr_jax.model import DataInfo, Model, shapes_of
from mclr_jax.names import construct
from mclr_jax.samplers import Sampler
from mclr_jax.task import MADE_HERE
from mclr_jax.training.checkpoint import Checkpoints, check_same
from mclr_jax.training.devices import banner, placed

# Values of run.json that a run with checkpoints cannot change: they decide what its weights mean.
FIXED = ("model.", "companions.", "data.")
BEAT = 20.0  # seconds between two signs of life that a trainer gives in its lock
SILENCE = 120.0  # seconds without one, after which a trainer on another host has ended
# Parts of run.json that may differ without a warning.
APART = ("history", "start", "paths", "frozen")


def describe(
    config: Any, model: Model, companions: Mapping[str, Model], source: Source
) -> dict[str, Any]:
    """The description of a run, without its history, as JSON."""
    others = {name: experiment.describe(other) for name, other in companions.items()}
    examples = {"number": len(source), "digest": digest(source[evenly(source, 64)])}
    parts = {"config": config.to_dict(), "model": experiment.describe(model), "data": examples}
    numbers = operator.methodcaller("item")  # NumPy's as Python's
    return json.loads(json.dumps({**parts, "companions": others}, default=numbers))


def _paths(config: Mapping[str, Any]) -> dict[str, str]:
    """The files and directories that a config names, by key."""
    values = {"init_from": config["init_from"], "data.path": config["data"]["path"]}
    values |= {f"companions.{name}": path for name, path in config["companions"].items()}
    for key in ("name", "test", "generated"):
        kind, _, path = config["data"][key].partition(":")
        values[f"data.{key}"] = path if kind in ("npz", "zip") else ""
    return {key: path for key, path in values.items() if path}


def changes(workdir: pathlib.Path, description: Mapping[str, Any]) -> dict[str, list]:
    """key: [old, new] of the values that differ from those in run.json; warns of each.

    Raises ValueError if the directory has checkpoints, which these values do not describe.
    """
    before, now = flat(read(workdir)), flat(dict(description))
    if not before:
        return {}
    keys = [k for k in before.keys() | now.keys() if not k.startswith(APART)]
    keys = [k for k in keys if k in before or not k.startswith("data.")]  # of an older version
    found = {k: [before.get(k), now.get(k)] for k in sorted(keys) if before.get(k) != now.get(k)}
    texts = {key: "is now {1}; it was {0}".format(*map(json.dumps, v)) for key, v in found.items()}
    fixed = [f"{key} {text}" for key, text in texts.items() if key.startswith(FIXED)]
    if fixed and has_checkpoints(workdir):
        raise ValueError(
            f"{workdir} has checkpoints of another model or other data: {'; '.join(fixed)}. Use "
            "another --workdir, the old values, or --restart to begin again in this one."
        )
    for key, text in texts.items():
        logging.warning("%s %s, when this run was started.", key, text)
    return found


def record(
    workdir: pathlib.Path, description: Mapping[str, Any], changed: Mapping[str, list],
    step: int, start: Any = None,
) -> None:  # fmt: skip
    """Write run.json: the description, its history, and `start`, the origin of the weights.

    Paths are also stored in absolute form and relative to `workdir`, so that `load` finds the files
    from another current directory, and in a run that was moved together with them.
    """
    old = read(workdir)
    made_by = {**provenance(), "version": __version__, "device": banner()}
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, **made_by}
    history = [*old.get("history", []), {**entry, "changes": dict(changed)}]
    origin = {"start": found} if (found := start or old.get("start")) else {}
    absolute = {key: os.path.abspath(name) for key, name in _paths(description["config"]).items()}
    here = os.path.realpath(workdir)
    paths = {
        k: [name, os.path.relpath(os.path.realpath(name), here)] for k, name in absolute.items()
    }
    parts = {**description, **origin, "paths": paths, "history": history}
    write_json(workdir / "run.json", parts)


def has_checkpoints(workdir: pathlib.Path) -> bool:
    """Whether a directory has checkpoints of a training, readable or not."""
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
    for key in ("config", "model", "companions"):
        if not isinstance(description.get(key), dict):
            raise ValueError(f"{path} is damaged ({key!r} has no keys); restore it from a copy.")
    return description


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """Hold the lock of a directory, so that only one process trains in it.

    Raises RuntimeError if another process holds the lock, unless that process of this host has
    ended, or its host has given no sign of life for SILENCE seconds.
    """
    path, host = workdir / "lock", socket.gethostname()
    born = _born(os.getpid())
    mine = {"host": host, "pid": os.getpid(), "since": time.ctime(), "born": born, "beat": BEAT}
    while not _create(path, json.dumps(mine)):
        with contextlib.suppress(FileNotFoundError):  # the lock was released in between
            try:
                holder = json.loads(path.read_text())
                here = holder["host"] == host
                ended = _born(holder["pid"]) != holder["born"] if here else False
            except (ValueError, KeyError, TypeError):
                holder, here, ended = dict.fromkeys(mine, "unknown"), True, False
            if not (ended or (not here and "beat" in holder and _is_silent(path))):
                raise RuntimeError(
                    f"Process {holder['pid']} on {holder['host']} has trained in {workdir} since "
                    f"{holder['since']}; wait for its end, or use another --workdir. If that host "
                    f"no longer runs it, delete {path}."
                )
            path.unlink()
    done = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, done), daemon=True)
    beating.start()
    try:
        yield
    finally:
        done.set()
        beating.join()
        path.unlink(missing_ok=True)


def _beat(path: pathlib.Path, done: threading.Event) -> None:
    """Change the time of a file every BEAT seconds, until `done` is set."""
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)


def _is_silent(path: pathlib.Path) -> bool:
    """Whether the time of a file stays the same for SILENCE seconds; clocks may differ."""
    logging.warning("Waiting at most %.0f s for a sign of life in %s.", SILENCE, path)
    before, end = path.stat().st_mtime_ns, time.monotonic() + SILENCE
    while time.monotonic() < end:
        time.sleep(min(SILENCE, 1.0))
        if path.stat().st_mtime_ns != before:
            return False
    return True


def _create(path: pathlib.Path, text: str) -> bool:
    """Make a file with this text at once; False if the file exists."""
    own = path.with_name(f"{path.name}.{os.getpid()}")
    write_atomically(own, text)
    try:
        os.link(own, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with path.open("x") as file:
                file.write(text)
        except FileExistsError:
            return False
    finally:
        own.unlink()
    return True


def _born(pid: int) -> str | None:
    """What tells a running process from later ones with its number; None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # of another user
        pass
    stat = pathlib.Path(f"/proc/{pid}/stat")
    return stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""


def set_aside(workdir: pathlib.Path) -> None:
    """Move a run, except pictures and evaluations, to the folder `replaced` of its directory."""
    target = workdir / "replaced" / time.strftime("%Y%m%d-%H%M%S")
    names = ("run.json", "metrics.jsonl", "checkpoints", "snapshots", "frozen", "tensorboard")
    for path in (workdir / name for name in names):
        if path.exists():
            target.mkdir(parents=True, exist_ok=True)
            path.rename(target / path.name)


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model, its directory, its config, and the companions of its training by name."""

    workdir: pathlib.Path
    config: ml_collections.FrozenConfigDict
    model: Model
    companions: Mapping[str, Model]

    def source(self, split: str) -> Source:
        """The data of training, or the held-out data for split "test"."""
        try:
            return sources.from_config(self.config.data, split, self.config.seed)
        except FileNotFoundError as error:
            origin = f"{self.workdir} was trained on {self.config.data.name}"
            raise FileNotFoundError(f"{error}. {origin}; give its new place by --data.") from error

    @property
    def sampler(self) -> Sampler:
        """config.sampler as a Sampler."""
        return construct(Sampler, self.config.sampler, "sampler")

    def weights(
        self, average: str = "", step: int | None = None, interpolation: float = 1.0
    ) -> tuple[Any, int]:
        """(parameters on the first device, step), by default of the last step.

        `average` is the name of an EMA track; "none": the raw parameters; a number: the relative
        width of a power-function EMA, reconstructed from the run's snapshots; "": the first track,
        or the raw parameters of a run without tracks. `interpolation` is the place on the line from
        the weights that a fine-tuned run started from (0) to its own (1), or beyond. CFG is linear
        in gamma; likewise, for a model linear in its weights, the line has the optimum of MCLR at
        each strength up to that of training.

        FileNotFoundError: the run has no checkpoint. ValueError: no such average, or an
        interpolation other than 1 of a run without a start.
        """
        if interpolation != 1:
            tuned, step = self.weights(average, step)
            start = self._start()
            return jax.tree.map(lambda a, b: a + interpolation * (b - a), start, tuned), step
        like, names = _like(self.model), list(ema.tracks(self.config.ema))
        average = average or (names[0] if names else "none")
        if average not in (*names, "none"):
            return self._reconstruct(like, average, names, step)
        branch = {"params": like} if average == "none" else {"ema": {average: like}}
        with Checkpoints(self.workdir / "checkpoints", keep=None) as checkpoints:
            restored = checkpoints.restore(branch, step)
        if restored is None:
            raise FileNotFoundError(f"{self.workdir} has no checkpoint yet.")
        state, step = restored
        return (state["params"] if average == "none" else state["ema"][average]), step

    def _start(self) -> Any:
        """The weights that training started from: the run's copy, or those of config.init_from."""
        if not self.config.init_from:
            raise ValueError(
                f"{self.workdir} was not started from another run (config.init_from is empty): its "
                "only interpolation is 1."
            )
        if "reference" in self.companions and (self.workdir / "frozen").exists():
            with Checkpoints(self.workdir / "frozen", keep=None) as store:
                restored = store.restore({"reference": _like(self.companions["reference"])})
            if restored is not None:
                return fitted(restored[0]["reference"], self.model, f"{self.workdir}/frozen")
        try:
            return start_weights(self.config.init_from, self.model)[0]
        except FileNotFoundError as error:
            origin = f"{self.workdir} was started from {self.config.init_from}"
            raise FileNotFoundError(
                f"{error} {origin}; give its new place by --init_from."
            ) from error

    def _reconstruct(self, like: Any, average: str, names: list[str], step: int | None):
        """Post-hoc EMA: a weighted sum of the snapshots up to `step`, read one at a time."""
        try:
            width = float(average)
            stds = [float(name.removeprefix("power_")) for name in names if "power_" in name]
            with Checkpoints(self.workdir / "snapshots", keep=None) as snapshots:
                steps = [s for s in snapshots.steps() if step is None or s <= step]
                if not steps or not stds:
                    raise ValueError("the run stored no power-function snapshots")
                in_steps, in_stds = zip(*itertools.product(steps, stds), strict=True)
                weights = ema.posthoc_coefficients(in_steps, in_stds, steps[-1], width)
                total = jax.tree.map(lambda x: 0.0, like)
                for s, std, weight in zip(in_steps, in_stds, weights, strict=True):
                    restored = snapshots.restore({f"power_{std}": like}, s)
                    assert restored is not None  # `restore` raises if the step is missing
                    part = restored[0][f"power_{std}"]
                    total = jax.tree.map(lambda t, x, w=weight: t + w * x, total, part)
            return total, steps[-1]
        except ValueError as error:
            raise ValueError(
                f"No EMA {average!r} in {self.workdir}: {error}. The run has {[*names, 'none']}; a "
                "number needs config.ema.power_stds and config.ema.snapshot_every."
            ) from error


def load(workdir: str | pathlib.Path, init_from: str = "", data: str = "") -> Run:
    """The run in a directory; FileNotFoundError: no run.json; ValueError: an old run.json.

    Files and runs that its config names are looked for at their absolute path, and then relative to
    `workdir`. `init_from` and `data` (a source, see `sources.load`, or the folder
    config.data.path) are new places that replace those of the config.
    """
    workdir = pathlib.Path(workdir)
    if not (description := read(workdir)):
        raise FileNotFoundError(
            f"{workdir} is not the directory of a run: no run.json. Pass the --workdir of training."
        )
    try:
        config = ml_collections.ConfigDict(description["config"])
        config.update_from_flattened_dict(_found(description, workdir))
        others = {name: experiment.model_of(d) for name, d in description["companions"].items()}
        model = experiment.model_of(description["model"])
        hash((model, *others.values()))  # fails for values of other types
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{workdir}/run.json is damaged ({reason}); restore it.") from error
    except ValueError as error:
        raise ValueError(f"{workdir}/run.json: {error}") from error
    if init_from:
        config.init_from = init_from
    if data and (":" in data or data in FORMATS):
        config.data.update({"name": data, "path": ""})
    elif data:
        config.data.path = data
    return Run(workdir, ml_collections.FrozenConfigDict(config), model, others)


def _found(description: Mapping[str, Any], workdir: pathlib.Path) -> dict[str, str]:
    """The config's files and directories, by key, where they are now."""
    found, written = {}, flat(description["config"])
    for key, name in _paths(description["config"]).items():
        absolute, relative = description.get("paths", {}).get(key, [name, name])
        places = [pathlib.Path(absolute), workdir / relative]
        place = str(next((place for place in places if place.exists()), absolute))
        found[key] = written[key].removesuffix(name) + place
    return found


def load_model(workdir: str | pathlib.Path, interpolation: float = 1.0) -> tuple[Model, Any]:
    """(model, parameters) of a run: its last step and its first average, if it has one."""
    run = load(workdir)
    return run.model, run.weights(interpolation=interpolation)[0]


def _like(model: Model) -> Any:
    """The shapes of the parameters, on the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return placed(shapes_of(model), jax.tree.map(lambda x: first, shapes_of(model)))


def fitted(weights: Any, model: Model, source: str) -> Any:
    """Weights of another model for this one, which may differ in optional inputs.

    Optional inputs of this model alone get weights of zero; those of the other model alone, which
    were zero in sampling, are removed. MismatchError: another difference.
    """
    optional = set(getattr(model.network, "optional_inputs", ()))
    wanted, given = (traverse_util.flatten_dict(tree) for tree in (shapes_of(model), weights))
    changed = {path for path in wanted.keys() ^ given.keys() if optional & set(path)}
    result = {path: x for path, x in given.items() if path not in changed}
    for path in changed & wanted.keys():
        result[path] = jnp.zeros(wanted[path].shape, wanted[path].dtype)
    tree = traverse_util.unflatten_dict(result)
    check_same(shapes_of(model), tree, source)
    check_same(tree, shapes_of(model), "the network of this run")
    return tree


def start_weights(path: str, model: Model) -> tuple[Any, int]:
    """The default weights of the run in `path`, `fitted` to a model, and their step."""
    run = load(path)
    weights, step = run.weights()
    log = logging.warning if step < run.config.num_steps else logging.info
    log("Weights from step %d of %d of %s.", step, run.config.num_steps, path)
    return fitted(weights, model, path), step


def companion_paths(config: Any) -> dict[str, str]:
    """The directories of the runs that the objective reads, by name; ValueError: one is not set."""
    paths = {**config.companions, "reference": config.init_from}
    special = {"reference": "a frozen reference", "classifier": "a classifier"}
    needed = sorted(experiment.needs(config) - MADE_HERE)
    for name in needed:
        if not paths.get(name):
            what = special.get(name, f"the companion run {name!r}")
            key = "config.init_from" if name == "reference" else f"config.companions.{name}"
            raise ValueError(f"This objective needs {what}: set {key} to the directory of its run.")
    return {name: paths[name] for name in needed}


def companions(config: Any, data: DataInfo, workdir: pathlib.Path) -> dict[str, Model]:
    """The models that the objective reads, by name; from run.json if `workdir` has checkpoints.

    ValueError: a model is missing, of the wrong kind, or for other data.
    """
    paths, found = companion_paths(config), {}
    held: Mapping[str, Model] = {}
    if has_checkpoints(workdir):
        held = load(workdir).companions
    for name in sorted(n for n, path in config.companions.items() if path and n not in paths):
        logging.warning("config.companions.%s is not used: this objective reads %s.",
                        name, ", ".join(paths) or "no companion")  # fmt: skip
    for name, path in paths.items():
        found[name] = held[name] if name in held else load(path).model
        check_companion(name, path, found[name], data, config)
    return found


def check_companion(name: str, path: str, model: Model, data: DataInfo, config: Any) -> None:
    """ValueError unless the model of the run in `path` is of the kind and data that `name` needs.

    `data` are those of config.data: a companion has their shape and number of classes. The one
    named "classifier" is a classifier, all others are denoisers.
    """
    kind = "a classifier" if model.is_classifier else "a denoiser"
    wanted = "a classifier" if name == "classifier" else "a denoiser"
    got, expected = ((info.shape, info.num_classes) for info in (model.data, data))
    if (kind, got) != (wanted, expected):
        raise ValueError(
            f"Companion {name!r} in {path!r}: expected {wanted}, data shape and number of "
            f"classes {expected}, those of config.data.name={config.data.name!r}; it is {kind} "
            f"of {got}."
        )
