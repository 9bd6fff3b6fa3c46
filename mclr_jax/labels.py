"""Labels by their names; warnings of answers at labels that no training has shown."""

import difflib
import pathlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from absl import logging

from mclr_jax.config import Training
from mclr_jax.generate import NONE, Guidance
from mclr_jax.runs import Run, load
from mclr_jax.schema import nearest


def chosen(texts: Sequence[str] | None, run: Run) -> list[int]:
    """The labels that texts name: a class (also the first of its names, before a comma), a number,
    or null for no class. None: those of all classes. ValueError: no class has such a name."""
    null = run.model.null_label
    if texts is None:
        return list(range(null))
    words = {name: label for label, name in enumerate(run.class_names)}
    words = {name.partition(",")[0]: label for name, label in words.items()} | words
    found = []
    for text in texts:
        label = {**words, "null": null}.get(text, int(text) if text.isdecimal() else None)
        if label == null and text != "null":
            raise ValueError(
                f"--labels has {null}, which is no class; for samples of none write null."
            )
        if label is None:
            few = difflib.get_close_matches(text, words) if len(words) > 100 else words
            raise ValueError(
                f"--labels has {text!r}, which is no class of {run.workdir}. "
                f"{nearest(text, ['null', *few])} Classes have numbers, too, from 0."
            )
        found.append(label)
    return found


NEEDED_BY = {"null": "the null label, which guidance, unconditional samples, ICR and some "
             "objectives ask for", "class": "the classes"}  # fmt: skip


def untrained(config: Mapping[str, Any], asked: Collection[str]) -> str:
    """The reason why a denoiser has no trained answer at "null" or "class", if it is asked; or "".

    Nothing is known of a run without a config, which was trained elsewhere.
    """
    if not (objective := config.get("objective")):
        return ""
    label, why = "null", f"the objective {objective['name']!r}, which has no label_dropout"
    if (dropout := objective.get("label_dropout")) is not None:
        label = {0: "null", 1: "class"}.get(dropout, "")
        why = f"objective.label_dropout={dropout}"
    if label not in asked:
        return ""
    start = f", from {config['init_from']}," if config.get("init_from") else ""
    return f"was trained{start} with {why}, and so was not shown {NEEDED_BY[label]}"


def warn_untrained(run: Run, labels: Iterable[int] = (), guided: Guidance = NONE) -> None:
    """Warn if samples of these labels, or their guidance, ask a run for untrained answers."""
    null = run.model.null_label
    asked = {"null" if label == null else "class" for label in labels}
    scales = guided.scales(null)[:-1] if guided.weak is None else ()
    if any(guided.is_second_call(run.model, scale) for scale in scales):
        asked.add("null")
    if run.model.is_denoiser and (why := untrained(run.config, asked)):
        logging.warning(
            "%s %s. Train it with a label_dropout between 0 and 1, such as 0.1, or guide by "
            "--autoguidance.", run.workdir, why,
        )  # fmt: skip


def warn_of_companions(training: Training) -> None:
    """Warn if an objective reads answers, of other runs or its own, that are untrained.

    Dropped labels ask the reference, too, for the null label. The model itself has the answers of
    the run that it starts from.
    """
    objective, runs = training.objective, dict(training.runs)
    null = set(objective.reads_null)
    if getattr(objective, "label_dropout", 0):
        null |= {"reference"} & training.asked_for_classes
    start = {"start": training.init_from} if training.init_from else {}
    if null & {"self", "average"}:
        null, runs = null | {"start"}, runs | start
        if not start and (why := untrained(training.config, ["null"])):
            logging.warning("The model in training %s.", why.replace("was", "is", 1))
    for path in dict.fromkeys(runs.values()):
        names = {name for name in runs if runs[name] == path}
        classes = names & {*training.asked_for_classes, "start"}
        asked = [*["class"] * bool(classes), *["null"] * bool(names & null)]
        if not (pathlib.Path(path) / "run.json").exists():
            continue  # its copy is in the work directory
        run = load(path)
        asks = {"start" if name in ("self", "average") else name for name in objective.reads_null}
        if names & asks and not run.model.data.has_null:
            raise ValueError(
                f"The objective asks {path} for answers at the null label, which no training has "
                "shown to it: let a weak or unconditional model explain, by "
                "config.objective.wrong='weak' and config.companions.weak."
            )
        if not run.model.is_classifier and (why := untrained(run.config, asked)):
            logging.warning("%s, which this objective reads, %s.", path, why)
