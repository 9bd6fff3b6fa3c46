"""Config values of wrong kind or size: parsed, or used up to the first compiled step."""

import functools
import math
import pathlib
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from outcomes import FOREIGN, REFUSED, SILENT, WORKS, Case, attempt
from tasks import config_of

from mclr_jax import hooks, plan
from mclr_jax.config import Training
from mclr_jax.experiment import Experiment
from mclr_jax.files import flat
from mclr_jax.training.step import make_update

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
AT_MOST_1 = {"label_dropout", "dropout", "augment", "ramp_up", "contrast", "objective.scale", "b1",
             "b2", "negative_share", "power_stds"}  # fmt: skip


def small(file: str, changes: dict[str, Any]) -> Any:
    """configs/FILE.py with a network of no size."""
    config = config_of(file, changes)
    network = {f"network.{k}": v for k, v in NETWORKS[config.network.name].items()}
    config.update_from_flattened_dict(SMALL | network | changes)
    if config.init_from:
        config.init_from = "a"
        config.companions.classifier = "b" if config.posterior.name == "classifier" else ""
    return config


class Bare(Experiment):
    """An experiment whose companions have no runs: small models without weights."""

    new_labels = ""  # the classes are those of the run in init_from

    @functools.cached_property
    def companions(self) -> Any:
        judge = small("digits_classifier", {"data.name": "mixture", "sigma_data": 1.0})
        others = {name: small("mixture", {}) for name in self.training.runs}
        others |= {"classifier": judge} if "classifier" in others else {}
        models = {name: Training.parse(c).model(self.data) for name, c in others.items()}
        return {name: types.SimpleNamespace(model=model) for name, model in models.items()}

    frozen = functools.cached_property(lambda self: {})


def trace(config: Any) -> None:
    """Everything of a training before its first compiled step, which is traced."""
    experiment = Bare(Training.parse(config), pathlib.Path("nowhere"))
    training, task = experiment.training, experiment.task
    hooks.readings(experiment, 0)
    experiment.devices.check_batch_size(training.batch_size, training.grad_accumulation)
    shapes = plan.shapes(task, training.batch_size, training.dispatch)
    jax.eval_shape(make_update(task), *shapes)


def fits(key: str, value: Any, default: Any) -> bool:
    """Whether a key whose default is of this kind can mean something by the value."""
    if isinstance(default, tuple):
        like = default[0] if default and isinstance(default[0], str) else 0.0
        several = isinstance(value, list | tuple) and all(fits(key, v, like) for v in value)
        return several or (key.endswith("strength") and not value)
    if isinstance(default, bool | str):
        return type(value) is type(default)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    if not math.isfinite(value) or (isinstance(default, int) and isinstance(value, float)):
        return False
    leaf = key.rpartition(".")[2]
    return (value >= 0 or key in SIGNED) and (value <= 1 or not {leaf, key} & AT_MOST_1)


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


def cases(seed: int, count: int, folder: Any = None, use: Callable = trace) -> Iterator[Case]:
    """`count` configs with one or two keys changed; `use` raises the error of a wrong one."""
    rng, made = random.Random(seed), functools.cache(lambda i: small(*VARIANTS[i]))
    for number in range(count):
        if number % 500 == 499 and use is trace:
            jax.clear_caches()
        variant = rng.randrange(len(VARIANTS))
        config = made(variant).copy_and_resolve_references()
        defaults = flat(config.to_dict())
        sections = {key.partition(".")[0] for key in defaults if "." in key}
        known = sorted(defaults) + sorted(sections)
        keys = sorted(rng.sample(known, rng.choice((1, 1, 1, 2))), key=known.index)
        mutations = dict(mutation(rng, key, defaults) for key in keys)
        what = ", ".join(f"{key}={value!r:.60}" for key, value in mutations.items())
        file, changes = VARIANTS[variant]
        name = " ".join([file, *(f"{k}={v}" for k, v in changes.items())])
        yield judge(f"{name}: {what}", config, mutations, defaults, use)


def mutation(rng: random.Random, key: str, defaults: dict[str, Any]) -> tuple[str, Any]:
    """A key, sometimes misspelt, and an odd value or one that is near the default."""
    if rng.random() < 0.03:
        return key, DELETED
    if key in defaults and rng.random() < 0.05:
        key = key[:-1]
    default = defaults.get(key)
    numeric = isinstance(default, int | float) and not isinstance(default, bool)
    if numeric and rng.random() < 0.4:
        return key, type(default)(default * rng.choice((0.5, 2, 3, 10)) + rng.choice((0, 0, 1)))
    return key, rng.choice(NUMBERS if rng.random() < (0.7 if numeric else 0.3) else OTHERS)


def judge(what: str, config: Any, mutations: dict, defaults: dict, use: Callable = trace) -> Case:
    """The outcome of using a config with these mutations.

    What `Training.parse` accepts and should not must be refused by `trace`.
    """

    def call() -> None:
        for key, value in mutations.items():
            mutate(config, key, value)
        use(config)

    outcome, detail, _ = attempt(call)
    wrong = accepted(config, mutations, defaults) if outcome == WORKS else ""
    if wrong and use == Training.parse:
        outcome, detail, _ = attempt(lambda: trace(config))
    if wrong and outcome == WORKS:
        return Case(what, SILENT, wrong)
    words = {word for key, value in mutations.items()
             for word in (key.rpartition(".")[2], repr(value), str(value))}  # fmt: skip
    # A parameter of another shape is named with both shapes.
    exempt = DELETED in words or "MismatchError: Parameter" in detail
    if outcome == REFUSED and not exempt and not any(word in detail for word in words):
        return Case(what, FOREIGN, f"names neither key nor value: {detail}")
    return Case(what, outcome, detail[:300])


def accepted(config: Any, mutations: dict, defaults: dict) -> str:
    """What is wrong with a config that was accepted, or nothing."""
    found = flat(config.to_dict())
    for key, value in mutations.items():
        value = found.get(key, value)  # ConfigDict makes 0.0 of False
        section = mutations.get(key.partition(".")[0])
        gone = value is DELETED or section is DELETED or section == {}
        if gone or any(name.startswith(f"{key}.") for name in defaults):
            continue  # a default, or a section
        if key.startswith("companions.") and isinstance(value, str):
            continue  # of any name; a training warns of one that it does not use
        if key not in defaults:
            return f"{key} is no key, and is ignored"
        if not fits(key, value, defaults[key]):
            return f"{key} of kind {defaults[key]!r} accepts {value!r:.60}"
    return ""
