"""Config values of wrong kind or size, through `main.train` up to the first compiled step."""

import contextlib
import functools
import math
import pathlib
import random
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import sklearn.datasets
from outcomes import FOREIGN, REFUSED, SILENT, WORKS, Case, attempt
from tasks import config_of

from mclr_jax import main, runs
from mclr_jax.files import flat
from mclr_jax.training.devices import Devices

SMALL = {
    "num_steps": 3, "batch_size": 8, "log_every": 3, "checkpoint_every": 3, "eval_examples": 8,
    "sample_every": 0, "steps_per_dispatch": 1, "sampler.num_steps": 2,
}  # fmt: skip
NETWORKS: dict[str, dict[str, Any]] = {
    "mlp": {"width": 8, "depth": 1},
    "dit": {"width": 8, "depth": 1, "heads": 2, "patch_size": 4},
    "unet": {"channels": 8, "num_blocks": 1, "channel_mult": (1, 1), "dtype": "float32"},
    "trajectory": {"width": 8, "depth": 1, "heads": 2},
    "mlp_classifier": {"width": 8, "depth": 1},
    "conv_classifier": {"channels": (8, 8), "dtype": "float32"},
}
# Configs, and changes that select a part of the project each.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("mixture", {}),
    ("mixture", {"noise.name": "loguniform"}),
    ("mixture", {"preconditioning.name": "velocity"}),
    ("mixture", {"preconditioning.name": "epsilon"}),
    ("mixture", {"preconditioning.name": "v"}),
    ("mixture", {"objective.name": "gft", "strength": (0.0, 2.0)}),
    ("mixture", {"objective.name": "contrastive_flow"}),
    ("mixture", {"objective.name": "model_guidance"}),
    ("mixture", {"ema.power_stds": (0.05, 0.1), "ema.snapshot_every": 3}),
    ("mixture", {"optimizer.schedule": "inverse_sqrt", "icr.every_steps": 3}),
    *(("mixture_mclr", {"objective.name": name}) for name in ("cca", "dpo")),
    ("mixture_mclr", {}),
    ("mixture_mclr", {"posterior.name": "denoiser"}),
    ("mixture_mclr", {"posterior.name": "classifier"}),
    ("mixture_mclr", {"objective.bound": "clip", "strength": (0.0, 2.0)}),
    ("mixture_mclr", {"objective.negatives": "prior", "objective.bound": "clip"}),
    ("digits", {}),
    ("digits", {"data.augment": 0.1}),
    ("digits_classifier", {}),
    ("cifar10", {"data.name": "digits", "data.augment": 0.1, "sigma_data": 0.0}),
    ("cifar10_classifier", {"data.name": "digits"}),
]
HUGE = (2**31, 2**63, 10**30, 1e30)
NUMBERS = (0, 1, 2, 3, -1, -(2**40), *HUGE, 0.0, 0.5, 1.0, 1.5, -0.5, 1e-30, math.nan, math.inf,
           -math.inf, 1000.0, np.float32(0.5), np.int64(3))  # fmt: skip
OTHERS = (None, True, False, "", "x", "1", "nan", "../..", "a" * 300, "digits", "json:dumps",
          "no.module:Name", [], [1], (0.0,), (1, 2), (2.0, 0.5), (-1.0, 1.0), (0.0, math.nan),
          (1, 2, 3), ("a", "b"), ((1, 2), 3), {}, {"name": "x"}, b"x", 1j)  # fmt: skip
# What a value may be, said without the code that checks it: numbers below 0, and above 1.
DELETED = "(no such key)"
SIGNED = ("noise.mean", "preconditioning.start", "preconditioning.end")
AT_MOST_1 = ("label_dropout", "dropout", "augment", "ramp_up", "contrast", "scale", "b1", "b2",
             "negative_share", "power_stds")  # fmt: skip


class TracedError(BaseException):
    """The training step has been traced: everything before it has accepted the config."""


def _compile(self: Devices, update: Any, original: Any = Devices.compile) -> Any:
    def traced(*arguments: Any) -> None:
        jax.eval_shape(original(self, update), *arguments)
        raise TracedError

    return traced


def _initialise(self: Devices, draw: Any, complete: Any) -> Any:
    shapes = jax.eval_shape(lambda: complete(draw()))
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@contextlib.contextmanager
def traced_only() -> Iterator[None]:
    """`main.train` stops at its first step, which is traced instead of compiled."""
    kept = Devices.compile, Devices.initialise, runs.provenance, sklearn.datasets.load_digits
    Devices.compile, Devices.initialise = _compile, _initialise
    runs.provenance = functools.cache(kept[2])  # the same for all cases
    sklearn.datasets.load_digits = functools.cache(kept[3])
    try:
        yield
    finally:
        Devices.compile, Devices.initialise, runs.provenance, sklearn.datasets.load_digits = kept


def small(file: str, changes: dict[str, Any], folder: pathlib.Path) -> Any:
    """configs/FILE.py with a network of no size; its companions are in `folder`."""
    config = config_of(file, changes)
    network = {f"network.{k}": v for k, v in NETWORKS[config.network.name].items()}
    config.update_from_flattened_dict(SMALL | network | changes)
    base, judge = (str(folder / name) for name in ("mixture", "classifier"))
    if config.init_from:
        used = judge if config.posterior.name == "classifier" else ""
        config.init_from, config.companions.classifier = base, used
    return config


def companions(folder: pathlib.Path) -> None:
    """Train the runs that some configs start from, of 3 steps."""
    main.train(small("mixture", {}, folder), folder / "mixture")
    judge = {"data.name": "mixture", "sigma_data": 1.0}
    main.train(small("digits_classifier", judge, folder), folder / "classifier")


def train(config: Any) -> None:
    """Train up to the first step, in a directory that is removed."""
    workdir = tempfile.mkdtemp()
    try:
        main.train(config, workdir)
    except TracedError:
        pass
    finally:
        shutil.rmtree(workdir)


def fits(key: str, value: Any, default: Any) -> bool:
    """Whether a key whose default is of this kind can mean something by the value."""
    if isinstance(default, tuple):
        numbers = isinstance(value, list | tuple) and all(fits(key, v, 0.0) for v in value)
        return numbers or (key.endswith("strength") and not value)
    if isinstance(default, bool | str):
        return type(value) is type(default)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    if not math.isfinite(value) or (isinstance(default, int) and isinstance(value, float)):
        return False
    leaf = key.rpartition(".")[2]
    return (value >= 0 or key in SIGNED) and (value <= 1 or leaf not in AT_MOST_1)


def mutate(config: Any, key: str, value: Any) -> None:
    """Set a key to any value: a section that a config file replaces has any types."""
    section, _, leaf = key.rpartition(".")
    part = config
    for name in filter(None, section.split(".")):
        part = part[name]
    if value is DELETED:
        del part[leaf]
        return
    with part.ignore_type():
        part[leaf] = value


def cases(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """`count` configs with one or two keys changed."""
    rng = random.Random(seed)
    companions(folder)
    with traced_only():
        for number in range(count):
            if number % 500 == 0:
                jax.clear_caches()
            file, changes = rng.choice(VARIANTS)
            config = small(file, changes, folder)
            defaults = flat(config.to_dict())
            mutations = {}
            sections = {key.partition(".")[0] for key in defaults if "." in key}
            known = sorted(defaults) + sorted(sections)
            for key in sorted(rng.sample(known, rng.choice((1, 1, 1, 2))), key=known.index):
                if rng.random() < 0.03:
                    mutations[key] = DELETED
                    continue
                if key in defaults and rng.random() < 0.05:
                    key = key[:-1]
                default = defaults.get(key)
                numeric = isinstance(default, int | float) and not isinstance(default, bool)
                value = rng.choice(NUMBERS if rng.random() < (0.7 if numeric else 0.3) else OTHERS)
                if numeric and rng.random() < 0.4:  # not far from the default
                    value = default * rng.choice((0.5, 2, 3, 10)) + rng.choice((0, 0, 1))
                    value = type(default)(value)
                mutations[key] = value
            variant = " ".join([file, *(f"{k}={v}" for k, v in changes.items())])
            what = ", ".join(f"{key}={value!r:.60}" for key, value in mutations.items())
            yield judge(f"{variant}: {what}", config, mutations, defaults)


def judge(what: str, config: Any, mutations: dict, defaults: dict) -> Case:
    """The outcome of training a config with these mutations."""

    def call() -> None:
        for key, value in mutations.items():
            mutate(config, key, value)
        train(config)

    outcome, detail, _ = attempt(call)
    if outcome == WORKS:
        found = flat(config.to_dict())
        for key, value in mutations.items():
            value = found.get(key, value)  # ConfigDict makes 0.0 of False
            if value is DELETED or any(name.startswith(f"{key}.") for name in defaults):
                continue  # a default, or a section
            if key not in defaults:
                return Case(what, SILENT, f"{key} is no key, and is ignored")
            if not fits(key, value, defaults[key]):
                return Case(what, SILENT, f"{key} of kind {defaults[key]!r} accepts {value!r:.60}")
    words = {word for key, value in mutations.items()
             for word in (key.rpartition(".")[2], repr(value), str(value))}  # fmt: skip
    # A parameter of another shape is named with both shapes.
    exempt = DELETED in words or "MismatchError: Parameter" in detail
    if outcome == REFUSED and not exempt and not any(word in detail for word in words):
        return Case(what, FOREIGN, f"names neither key nor value: {detail}")
    return Case(what, outcome, detail[:300])
