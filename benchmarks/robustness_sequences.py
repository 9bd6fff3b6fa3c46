"""Two or three uses of one directory, one after the other, and what the directory then claims.

The directory is compared with a model of it: the spans of steps that should have been trained, from
which a loop of a few lines computes the weights again.
"""

import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import outcomes
from outcomes import BAD, SILENT, WORKS, Case, attempt
from robustness_values import small

from mclr_jax import generate, main, runs
from mclr_jax.config import Training
from mclr_jax.data import pipeline
from mclr_jax.files import flat, read_lines
from mclr_jax.training.loop import Hook, Interrupted
from mclr_jax.training.step import init_state, make_update

BASE = {"objective.name": "dsm", "network.name": "mlp", "network.dropout": 0.1, "num_steps": 6,
        "checkpoint_every": 3, "keep_checkpoints": 9, "log_every": 1, "ema.halflife_steps": 2.0,
        "optimizer.warmup_steps": 0, "eval_examples": 0}  # fmt: skip
DECIDING = ({"objective.label_dropout": 0.5}, {"optimizer.learning_rate": 0.02}, {"seed": 1},
            {"optimizer.schedule": "constant"}, {"batch_size": 16}, {"ema.halflife_steps": 8.0},
            {"optimizer.clip_norm": 0.1}, {"noise.name": "loguniform"})  # fmt: skip
FREE = ({"log_every": 2}, {"eval_examples": 8}, {"sampler.num_steps": 3}, {"parallel": "data"},
        {"steps_per_dispatch": 2}, {"checkpoint_every": 2}, {"keep_checkpoints": 8})  # fmt: skip
FIXED = ({"network.width": 16}, {"sigma_data": 0.7}, {"data.limit": 999})
TOLERANCE = 1e-5  # of weights: layouts and compilations differ in the last bits
Changes = tuple[tuple[str, Any], ...]


@functools.cache
def parsed(changes: Changes) -> Training:
    return Training.parse(small("mixture", BASE | dict(changes)))


@functools.cache
def trained(spans: tuple[tuple[int, Changes], ...], steps: int) -> Any:
    """The state after the steps, of which each span begins at its first number."""
    *before, (start, changes) = spans
    training = parsed(changes)
    source = training.data.source("train", training.seed)
    task = training.task(training.data_info(source), {})
    state = trained(tuple(before), start) if before else init_state(task)
    batches = pipeline.stream(source, training.batch_size, training.seed, start)
    update = jax.jit(make_update(task))
    for _ in range(start, steps):
        state, _ = update(state, {}, pipeline.stack(batches, 1, 1), np.int32(1))
    return jax.device_get(state)


@dataclasses.dataclass
class Directory:
    """What should be in a directory: the weights of the spans up to each of the checkpoints."""

    path: pathlib.Path
    spans: tuple[tuple[int, Changes], ...] = ()
    saved: tuple[int, ...] = ()

    @property
    def done(self) -> int:
        return max(self.saved, default=0)

    @property
    def changes(self) -> dict[str, Any]:
        return dict(self.spans[-1][1]) if self.spans else {}

    def wrong(self) -> str:
        """The first claim of the directory that is not so, or nothing."""
        if not self.saved:
            return "files of a run that has not begun" if self.path.exists() else ""
        told = json.loads((self.path / "run.json").read_text())
        values = [flat(dict(parsed(changes).config)) for _, changes in self.spans]
        if flat(told["config"]) != values[-1]:
            return "run.json has another config"
        claimed = told.get("spans", [{"from": 0}])
        last = {f"config.{key}": value for key, value in values[-1].items()}
        for step in range(self.done):
            given = next(span for span in claimed[::-1] if span["from"] <= step)
            number = max(n for n, (start, _) in enumerate(self.spans) if start <= step)
            own = {f"config.{key}": value for key, value in values[number].items()}
            for key in own.keys() | last.keys():
                if own.get(key) != given.get(key, last.get(key)) and not free(key):
                    return f"run.json has {key} {given.get(key)} at step {step}, not {own.get(key)}"
        steps = [record["step"] for record in read_lines(self.path / "metrics.jsonl")]
        if steps != sorted(steps) or max(steps) > self.done:
            return f"metrics.jsonl has steps {steps} of {self.done}"
        found, step = runs.load(self.path).weights()
        if step not in self.saved:
            return f"weights of step {step}; expected one of {self.saved}"
        spans = tuple(span for span in self.spans if span[0] < step)
        return outcomes.difference(found, trained(spans, step).ema["halflife"], TOLERANCE)


def free(key: str) -> bool:
    return key.removeprefix("config.") in {name for change in FREE for name in change}


def contents(path: pathlib.Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


def train(place: Directory, changes: dict, hooks: tuple[Hook, ...] = (), **options: bool) -> str:
    """A training with the changes of BASE, and whether the directory is then as it should be."""
    asked, before = tuple(sorted(changes.items())), contents(place.path)
    target, end = parsed(asked).num_steps, [0]

    def seen(moment: Any) -> None:
        end[0] = moment.step

    def call() -> None:
        config = small("mixture", BASE | changes)
        try:
            main.train(config, place.path, [*hooks, Hook(1, seen)], **options)
        except Interrupted as stopped:
            end[0] = stopped.step

    if options.get("restart"):
        place.spans = place.saved = ()
    deciding = {key for key, value in flat(dict(parsed(asked).config)).items()
                if place.saved and flat(dict(parsed(place.spans[-1][1]).config)).get(key) != value
                and not free(key) and key != "num_steps"}  # fmt: skip
    fixed = deciding & {key for change in FIXED for key in change}
    fixed |= deciding & {"seed"} if "data.limit" in changes else set()  # it draws the subset
    refused = fixed or (deciding and not options.get("change") and place.done < target)
    outcome, detail, _ = attempt(call)
    if outcome in BAD:
        return f"{outcome}: {detail}"
    if refused or place.done >= target:
        if bool(refused) != (outcome == "refused"):
            return f"{outcome} ({detail}); expected {'an error' if refused else 'no error'}"
        return "" if contents(place.path) == before else "files changed though nothing was trained"
    if outcome == "refused":
        return f"refused: {detail}"
    start = place.done
    if not place.spans or dict(place.spans[-1][1]) != changes:
        place.spans = (*(span for span in place.spans if span[0] < start), (start, asked))
    every = parsed(asked).checkpoint_every
    new = {step for step in range(start + 1, end[0]) if step % every == 0} | {end[0]}
    place.saved = tuple(sorted({*place.saved, *new}))
    return ""


# ---- uses of a directory: (rng, place) -> what was done, and what is wrong or nothing ------------


def further(rng: random.Random, place: Directory) -> tuple[str, str]:
    changes = place.changes | {"num_steps": place.done + rng.choice((2, 4, 6))}
    return f"train to {changes['num_steps']}", train(place, changes)


def changed(rng: random.Random, place: Directory) -> tuple[str, str]:
    change = rng.choice((*DECIDING, *DECIDING, *FREE, *FIXED))
    asked, steps = rng.random() < 0.6, max(place.done + rng.choice((-3, 0, 3, 5)), 1)
    changes = place.changes | change | {"num_steps": steps}
    what = f"train to {steps} with {change}{' --change' * asked}"
    return what, train(place, changes, change=asked)


def stopped(rng: random.Random, place: Directory) -> tuple[str, str]:
    step = place.done + rng.choice((1, 2, 4))
    stop = Hook(0, lambda moment: os.kill(os.getpid(), signal.SIGTERM), at=(step,))
    changes = place.changes | {"num_steps": place.done + 6}
    return f"stopped after {step}", train(place, changes, (stop,))


def restarted(rng: random.Random, place: Directory) -> tuple[str, str]:
    changes = place.changes | rng.choice((*DECIDING, *FIXED, {}))
    changes |= {"num_steps": rng.choice((3, 6))}
    return f"--restart with {changes}", train(place, changes, restart=True)


def moved(rng: random.Random, place: Directory) -> tuple[str, str]:
    old, place.path = place.path, place.path.with_name(f"moved{rng.random()}")
    if old.exists():
        old.rename(place.path)
    return "moved", ""


def lost(rng: random.Random, place: Directory) -> tuple[str, str]:
    """Its newest checkpoint is damaged: an older one, if any, is continued."""
    if len(place.saved) < 2:
        return "nothing", ""
    *place.saved, newest = place.saved
    place.saved = tuple(place.saved)
    shutil.rmtree(place.path / "checkpoints" / str(newest) / "state")
    return f"checkpoint {newest} damaged and train", further(rng, place)[1]


def tuned(rng: random.Random, place: Directory) -> tuple[str, str]:
    """Fine-tuned elsewhere, twice, with the base trained on between: it holds the first weights."""
    if not place.saved:
        return "nothing", ""
    other = place.path.with_name(f"tuned{rng.random()}")
    options = {"init_from": str(place.path), "objective.name": "mclr_null", "num_steps": 2}
    outcome, detail, _ = attempt(lambda: main.train(small_of(options), other))
    told, step = json.loads((other / "run.json").read_text())["start"], place.done
    if outcome in BAD or told != {"run": str(place.path), "step": step}:
        return "fine-tuned", f"{outcome} {detail}: started from {told}"
    wrong = further(rng, place)[1]
    outcome, detail, _ = attempt(lambda: main.train(small_of(options | {"num_steps": 4}), other))
    start, _ = runs.load(other).weights(interpolation=0.0)
    expected = trained(tuple(s for s in place.spans if s[0] < step), step).ema["halflife"]
    differs = outcomes.difference(start, expected, TOLERANCE)
    wrong = wrong or differs if outcome not in BAD else f"{outcome} {detail}"
    return "fine-tuned, base trained on, fine-tuned on", wrong


def small_of(options: dict[str, Any]) -> Any:
    config = small("mixture", BASE | options)
    config.init_from = options["init_from"]
    return config


def sampled(rng: random.Random, place: Directory) -> tuple[str, str]:
    """Samples while it trains: of the weights of a checkpoint that is then on disk."""
    wrong: list[str] = []

    def read(moment: Any) -> None:
        if not any((place.path / "checkpoints").glob("[0-9]*")):
            return
        run = runs.load(place.path)
        params, step = run.weights()
        spans = tuple(span for span in place.spans if span[0] < step) or ((0, asked),)
        if step > max(place.done, 0) and place.spans:
            spans = (*place.spans, (place.done, asked)) if place.spans[-1][1] != asked else spans
        expected = trained(spans, step).ema["halflife"]
        wrong.append(outcomes.difference(params, expected, TOLERANCE))
        images = generate.generate(run.model, params, np.arange(2), run.sampler)
        again = generate.generate(run.model, params, np.arange(2), run.sampler)
        wrong.append("" if np.array_equal(images, again) else "samples differ")

    changes = place.changes | {"num_steps": place.done + 6}
    asked = tuple(sorted(changes.items()))
    found = train(place, changes, (Hook(2, read),))
    return "sampled while it trains", found or next(filter(None, wrong), "")


USES: tuple[Callable, ...] = (further, changed, changed, changed, stopped, restarted, moved, lost,
                              tuned, sampled)  # fmt: skip


def cases(seed: int, count: int, folder: pathlib.Path) -> Iterator[Case]:
    """`count` sequences of two or three uses after a first training."""
    rng = random.Random(seed)
    for number in range(count):
        place = Directory(folder / str(number) / "run")
        uses = [further, *rng.choices(USES, k=rng.choice((2, 3)))]
        done, wrong = [], ""
        for use in uses:
            what, wrong = use(rng, place)
            done.append(what)
            wrong = wrong or place.wrong()
            if wrong:
                break
        yield Case("; ".join(done), SILENT if wrong else WORKS, wrong)
        shutil.rmtree(folder / str(number), ignore_errors=True)
        if number % 10 == 9:  # compiled programs fill the memory
            trained.cache_clear()
            jax.clear_caches()
