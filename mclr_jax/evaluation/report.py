"""A web page that compares runs: one file, without server, network or scripts."""

import base64
import dataclasses
import html
import io
import json
import pathlib
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mclr_jax import extras, generate, images, latents, sampling
from mclr_jax.data.protocol import caption
from mclr_jax.evaluation.evaluate import remark, title
from mclr_jax.files import flat, read_lines
from mclr_jax.runs import load

COLOURS, LINES = 6, ("solid", "dashed", "dotted")  # of runs; report.html has the colours
PAGE = string.Template(pathlib.Path(__file__).with_suffix(".html").read_text())
# Which values of a metric are better, as in docs/evaluation.md. Columns and charts have this order;
# charts of other metrics are folded away.
BETTER = {
    "frechet": "↓", "accuracy": "↑", "sample_accuracy": "↑", "per_class_frechet": "↓",
    "inter_class_frechet": "↑", "inception_score": "↑", "kernel": "↓", "precision": "↑",
    "recall": "↑", "density": "↑", "coverage": "↑", "memorized": "↓", "copy_ratio": "↑",
    "network_calls": "↓", "samples_per_second": "↑", "loss": "↓", "error": "↓", "margin": "↑",
    "positive_ratio": "↑", "negative_ratio": "↓", "weight_ess": "↑", "weight_max": "↓",
    "unbounded": "↓", "memorization_gap": "↓", "memorization_one_call": "↓",
    "memorization_copies": "↓", "memorization_copies_by_features": "↓", "icr": "↓",
    "icr_memorized": "↓", "images_per_second": "↑",
}  # fmt: skip
APART = ("loss", "accuracy", "negative_error", "negative_ratio")  # each objective has its own
SETTINGS = ("step", "samples", "features", "class_strengths", "guidance_interval",
            "guidance_channels", "autoguidance")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Column:
    """The data of a run that the page shows."""

    name: str
    config: dict[str, Any]  # flat, with dots for levels
    curves: dict[str, tuple[list[float], list[float]]]  # metric -> (steps, values) as logged
    rows: list[dict[str, Any]]  # of mclr evaluate
    grids: dict[float, np.ndarray]  # guidance scale -> picture (H, W, 3), or trajectories (n, T)
    note: str = ""  # why there are none
    classes: tuple[str, ...] = ()  # names of the rows of pictures
    number: int = 0  # of its colour, kind of line and switch


def read(
    workdir: str | pathlib.Path,
    guidance_scales: Sequence[float] = (),
    per_class: int = 6,
    guided: generate.Guidance = generate.NONE,
    **options: Any,
) -> Column:
    """The data of the run in `workdir`; FileNotFoundError if it is not the directory of a run.

    A denoiser is sampled at each scale, from the same noise; options of `generate.generate`. Of
    trajectories (T, d) the page shows the first coordinate, of those of fields the first frames.
    """
    workdir, run = pathlib.Path(workdir), load(workdir)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for record in read_lines(workdir / "metrics.jsonl"):
        for key, value in record.items():
            if key != "step" and isinstance(value, int | float):
                steps, numbers = curves.setdefault(key, ([], []))
                steps.append(record["step"])
                numbers.append(value)
    stored = sorted((workdir / "evaluation").glob("*.json"))
    rows = [json.loads(path.read_text()) for path in stored]
    rows.sort(key=lambda row: (row["average"], row["guidance_scale"]))
    grids, note, shape, count = {}, "", run.model.data.shape, run.model.null_label
    labels = np.tile(np.arange(count), per_class)
    for scale in () if not run.model.is_denoiser else map(float, guidance_scales):
        samples, shown = sampling.draw(run, labels, guided.at(scale), **options)
        if len(shape) == 2:
            grids[scale] = samples[:, :, 0]
        elif shown is None:
            note = latents.UNSEEN.format(shape[-1])
        else:
            grids[scale] = images.picture(shown, labels, per_class, captions=False)
    names = [caption(i, run.class_names) if count > 1 else "" for i in range(count)]
    classes = tuple(names) if len(shape) > 2 else ()
    return Column(workdir.name, flat(dict(run.config)), curves, rows, grids, note, classes)


def page(runs: Sequence[Column]) -> str:
    """The page as HTML; a number is added to the name of a run if another run has that name."""
    names = [one.name for one in runs]
    names = [f"{name} ({i + 1})" if name in names[:i] else name for i, name in enumerate(names)]
    runs = [dataclasses.replace(x, name=names[i], number=i) for i, x in enumerate(runs)]
    boxes = {f"run-{i}": f"[data-run='{i}']" for i in range(len(runs))}
    boxes |= {f"scale-{i}": f"[data-scale='{x:g}']" for i, x in enumerate(_scales(runs))}
    return PAGE.substitute(
        title=html.escape(" · ".join(names)),
        runs="".join(_box("checkbox", f"run-{x.number}", _mark(x)) for x in runs),
        hidden=",\n".join(f"body:has(#{x}:not(:checked)) {y}" for x, y in boxes.items()),
        metrics=_metrics(runs), samples=_samples(runs), curves=_curves(runs),
        configs=_configs(runs),
    )  # fmt: skip


def _box(kind: str, name: str, content: str, checked: bool = True) -> str:
    kind = f'type="{kind}" name="{kind}" {"checked" if checked else ""}'
    return f'<label><input id="{name}" {kind}> {content}</label> '


def _mark(one: Column, more: str = "") -> str:
    """The name of a run after a line of its colour and kind."""
    style = "--colour: {}; --line: {}".format(*look(one.number))
    text = f"{html.escape(one.name)} <small>{html.escape(more)}</small>"
    return f'<span class="mark" style="{style}">{text}</span>'


def _plain(key: str) -> str:
    return key.removeprefix("eval_")


def _metrics(runs: Sequence[Column]) -> str:
    rows = [(one, row) for one in runs for row in one.rows]
    if not rows:
        return "<p>No run was evaluated yet (mclr evaluate).</p>"
    every = [{**row["floor"], "features": row["features"]} for _, row in rows if row.get("floor")]
    floors = [floor for i, floor in enumerate(every) if floor not in every[:i]]
    values = {key: [row.get(key) for _, row in rows] for key in SETTINGS}
    same = {key: x[0] for key, x in values.items() if all(value == x[0] for value in x)}
    keys = [key for key in BETTER if any(key in row for _, row in rows)]
    keys += [key for key in SETTINGS if key not in same]
    lines: list[Any] = [(None, "real, held out", map(row.get, keys)) for row in floors]
    lines += [(one, _mark(one, title(row)), map(row.get, keys)) for one, row in rows]
    fixed = ", ".join(f"{key} {value}" for key, value in same.items() if value is not None)
    text = f"All rows: {fixed}. " if fixed else ""
    text += remark((row for _, row in rows), floors[0] if len(floors) == 1 else {})
    head = ["run", *(f"{key} {BETTER.get(key, '')}" for key in keys)]
    return f"{_table(head, lines)}<p>{html.escape(text)}</p>"


def _scales(runs: Sequence[Column]) -> list[float]:
    return sorted({scale for one in runs for scale in one.grids})


def _samples(runs: Sequence[Column]) -> str:
    notes = "".join(f"<p>{html.escape(f'{x.name}: {x.note}')}</p>" for x in runs if x.note)
    if not (scales := _scales(runs)):
        return notes or "<p>No samples were asked for (--guidance_scales).</p>"
    boxes = (_box("radio", f"scale-{i}", f"{x:g}", i == 0) for i, x in enumerate(scales))
    return (
        f"{notes}<fieldset><legend>Guidance scale</legend>{''.join(boxes)}</fieldset>"
        f'<div class="side">{"".join(_pictures(one) for one in runs if one.grids)}</div>'
    )


def _pictures(one: Column) -> str:
    """The samples of a run; small images are enlarged to about 56 pixels, by a whole number."""
    found, zoom = "", 1
    for scale, array in sorted(one.grids.items()):
        text = f"Samples of {one.name} at guidance scale {scale:g}"
        if array.ndim == 2:
            frames = np.arange(array.shape[1])
            picture = chart(text, [(one.number, frames, values) for values in array], "frame")
        else:
            height, width, _ = array.shape
            if one.classes:
                side = (height - images.MARGIN) // len(one.classes) - images.MARGIN
                zoom = max(1, round(56 / side))
            data = f"data:image/png;base64,{base64.b64encode(images.png(array)).decode()}"
            picture = f'<img alt="{html.escape(text)}" width="{zoom * width}" src="{data}">'
        found += f'<div data-scale="{scale:g}">{picture}</div>'
    names = "".join(f"<li>{html.escape(name)}</li>" for name in one.classes)
    rows = f'<ul style="--half: {zoom * images.MARGIN // 2}px">{names}</ul>' if names else ""
    return (
        f'<figure data-run="{one.number}"><figcaption>{_mark(one)}</figcaption>'
        f'<div class="grid">{rows}<div>{found}</div></div></figure>'
    )


def _curves(runs: Sequence[Column]) -> str:
    groups: dict[tuple[str, str], list[Column]] = {}
    for one in runs:
        for key in one.curves:
            objective = one.config.get("objective.name", "") if _plain(key) in APART else ""
            groups.setdefault((key, objective), []).append(one)
    parts = ["", ""]
    ranks, last = {key: rank for rank, key in enumerate(BETTER)}, len(BETTER)
    for key, objective in sorted(groups, key=lambda group: ranks.get(_plain(group[0]), last)):
        parts[_plain(key) not in BETTER] += _curve(key, objective, groups[key, objective])
    shown, folded = (f'<div class="charts">{part}</div>' if part else "" for part in parts)
    more = f"<details><summary>Curves for diagnosis</summary>{folded}</details>" if folded else ""
    return shown + more or "<p>Nothing was logged.</p>"


def _curve(key: str, objective: str, runs: Sequence[Column]) -> str:
    """A metric over training steps: the last values, and a chart if a run has several."""
    lines, marks = [], ""
    name = " ".join(filter(None, [key, objective and f"of {objective}", BETTER.get(_plain(key))]))
    words, warnings = [name], []
    for one in runs:
        steps, values = np.array(one.curves[key], np.float64)
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
        last = f"{values[-1]:.4g} at step {steps[-1]:.0f}" if len(steps) else "no finite value"
        if key.startswith("memorization_") and (at := warned(one)) is not None:
            warnings.append((one.number, at))
            last += f", warning at step {at:.0f}"
        lines.append((one.number, steps, values))
        words.append(f"run {one.name}: {last}")
        marks += f'<li data-run="{one.number}">{_mark(one, last)}</li>'
    several = any(len(steps) > 1 for _, steps, _ in lines)
    drawn = chart("; ".join(words), lines, "step", warnings) if several else ""
    return f"<figure><figcaption>{html.escape(name)}</figcaption>{drawn}<ul>{marks}</ul></figure>"


def warned(one: Column) -> float | None:
    """The step of a run's warning of memorization, if there was one."""
    steps, stages = one.curves.get("memorization_warning", ([], []))
    return next((step for step, stage in zip(steps, stages, strict=True) if stage), None)


def _configs(runs: Sequence[Column]) -> str:
    head = ["key", *map(_mark, runs)]
    keys = sorted({key for one in runs for key in one.config})
    rows = [
        (None, html.escape(key), [one.config.get(key, "not set") for one in runs]) for key in keys
    ]
    differing = [row for row in rows if any(value != row[2][0] for value in row[2])]
    changed = f"<p>Keys that differ:</p>{_table(head, differing)}"
    first = changed if differing else "<p>All keys are the same.</p>" * (len(runs) > 1)
    return f"{first}<details><summary>All keys</summary>{_table(head, rows)}</details>"


def _table(head: Iterable[str], rows: Iterable[tuple[Column | None, str, Iterable[Any]]]) -> str:
    """A table in a box that scrolls. Of a row: its run, if it is of one, its title and values."""

    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return "" if value is None else html.escape(text)

    titles = "".join(f'<th scope="col">{title}</th>' for title in head)
    lines = ""
    for one, name, values in rows:
        of = f' data-run="{one.number}"' if one else ""
        cells = "".join(f"<td>{cell(value)}</td>" for value in values)
        lines += f'<tr{of}><th scope="row">{name}</th>{cells}</tr>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def look(number: int) -> tuple[str, str]:
    """(colour, kind of line) of a run, as CSS: 18 runs have different ones."""
    kind = LINES[(number + number // COLOURS) % len(LINES)]
    return f"var(--run-{number % COLOURS})", kind


def chart(
    text: str, lines: Iterable[tuple[int, np.ndarray, np.ndarray]], below: str,
    marks: Iterable[tuple[int, float]] = (),
) -> str:  # fmt: skip
    """An SVG of lines (number of the run, x, y), with a text in place of it for screen readers.

    Lines have the attribute data-run, and so have marks (number of the run, x), thin vertical ones.
    The vertical axis is logarithmic if max / min > 100.
    """
    make = extras.needed("matplotlib.figure", "figures").Figure
    style, file = extras.needed("matplotlib.style", "figures"), io.StringIO()
    options = {"svg.fonttype": "none", "svg.hashsalt": text, "font.size": 9.0,
               "font.sans-serif": ["DejaVu Sans"]}  # fmt: skip
    with style.context(["default", options]):
        axes = (drawing := make(figsize=(4.8, 2.6), layout="constrained")).subplots()
        for number, x, y in lines:
            marker = "o" if len(x) <= 30 else ""  # a single point has no line
            (line,) = axes.plot(x, y, marker=marker, markersize=3, color=f"#a{number:05d}")
            line.set(linestyle=look(number)[1], gid=f"run-{number}")
        low, high = axes.dataLim.intervaly
        for number, place in marks:
            axes.axvline(place, color=f"#a{number:05d}", linewidth=0.8, gid=f"run-{number}")
        axes.set(xlabel=below, yscale="log" if 0 < 100 * low < high else "linear")
        axes.grid(color="black", alpha=0.12)
        axes.spines[["top", "right"]].set_visible(False)
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawing.savefig(file, format="svg", transparent=True, metadata=empty)
    svg = file.getvalue().partition("<svg")[2].replace("#000000", "currentColor")
    svg = re.sub(r"#a(\d{5})", lambda found: look(int(found[1]))[0], svg)
    svg = re.sub(r'<g id="run-(\d+)"', r'<g data-run="\1"', svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # names that all charts would have in common
    return f'<svg role="img" aria-label="{html.escape(text)}"{svg}'
