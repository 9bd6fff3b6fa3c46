"""A web page that compares runs: one file, without server or network."""

import base64
import dataclasses
import html
import io
import json
import pathlib
import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mclr_jax import extras, generate, images, latents
from mclr_jax.evaluation.evaluate import remark
from mclr_jax.files import flat, read_lines
from mclr_jax.labels import warn_untrained
from mclr_jax.runs import load

PAGE = string.Template(pathlib.Path(__file__).with_suffix(".html").read_text())
FIRST = ("loss", "eval_loss", "accuracy", "eval_accuracy", "error", "eval_error")
SETTINGS = ("step", "average", "interpolation", "guidance_scale", "class_strengths",
            "guidance_interval", "guidance_channels", "autoguidance", "samples",
            "features")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Column:
    """The data of a run that the page shows."""

    name: str
    config: dict[str, Any]  # flat, with dots for levels
    curves: dict[str, tuple[list[float], list[float]]]  # metric -> (steps, values) as logged
    rows: list[dict[str, Any]]  # of mclr evaluate
    grids: dict[float, bytes]  # guidance scale -> PNG of samples
    note: str = ""  # why there are none


def read(
    workdir: str | pathlib.Path,
    guidance_scales: Sequence[float] = (),
    per_class: int = 6,
    guided: generate.Guidance = generate.NONE,
    **options: Any,
) -> Column:
    """The data of the run in `workdir`; FileNotFoundError if it is not the directory of a run.

    A denoiser is sampled at each scale, from the same noise; options of `generate.generate`.
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
    grids, note = {}, ""
    if guidance_scales and not run.model.is_classifier:
        params, decode = run.weights()[0], latents.decoder(run.data, run.model)
        warn_untrained(run, [0], guided.at(max(guidance_scales, key=lambda s: abs(s - 1))))
        labels = np.tile(np.arange(run.model.null_label), per_class)
        for scale in map(float, guidance_scales):
            samples = generate.generate(
                run.model, params, labels, run.sampler, guided=guided.at(scale), **options
            )
            if (shown := latents.shown(samples, decode)) is not None:
                grids[scale] = images.png(images.picture(shown, labels, per_class, run.class_names))
            else:
                note = latents.UNSEEN.format(samples.shape[-1])
    return Column(workdir.name, flat(dict(run.config)), curves, rows, grids, note)


def page(runs: Sequence[Column]) -> str:
    """The page as HTML; a number is added to the name of a run if another run has that name."""
    names = [one.name for one in runs]
    names = [f"{name} ({i + 1})" if name in names[:i] else name for i, name in enumerate(names)]
    runs = [dataclasses.replace(one, name=name) for one, name in zip(runs, names, strict=True)]
    sections = {"Samples": _samples, "Metrics": _metrics, "Curves": _curves, "Configs": _configs}
    links = "".join(f'<a href="#{title}">{title}</a> ' for title in sections)
    body = "".join(
        f'<section aria-labelledby="{title}"><h2 id="{title}">{title}</h2>{content(runs)}</section>'
        for title, content in sections.items()
    )
    return PAGE.substitute(title=html.escape(" · ".join(names)), links=links, body=body)


def _samples(runs: Sequence[Column]) -> str:
    scales = sorted({scale for one in runs for scale in one.grids})
    notes = "".join(f"<p>{html.escape(f'{x.name}: {x.note}')}</p>" for x in runs if x.note)
    if not scales:
        return notes or "<p>No samples were asked for (--guidance_scales).</p>"
    figures = ""
    for one in runs:
        pictures = ""
        for scale, content in sorted(one.grids.items()):
            text = f"Samples of {one.name} at guidance scale {scale:g}, a class in each row"
            hidden = "" if scale == scales[0] else "hidden"
            pictures += _picture(text, "png", content, f'data-scale="{scale:g}" {hidden}')
        figures += f"<figure>{pictures}<figcaption>{html.escape(one.name)}</figcaption></figure>"
    ticks = " ".join(f"{scale:g}" for scale in scales)
    return (
        f'{notes}<p><label for="scale">Guidance scale</label> '
        f'<input id="scale" type="range" value="0" min="0" max="{len(scales) - 1}" '
        f'data-scales="{ticks}"> '
        f'<output for="scale" id="scale-value"></output></p><div class="side">{figures}</div>'
    )


def _picture(text: str, kind: str, content: bytes, attributes: str = "") -> str:
    data = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return f'<img alt="{html.escape(text)}" {attributes} src="{data}">'


def _metrics(runs: Sequence[Column]) -> str:
    rows = [(one.name, row) for one in runs for row in one.rows]
    if not rows:
        return "<p>No run was evaluated yet (mclr evaluate).</p>"
    numeric = [k for _, row in rows for k, value in row.items() if isinstance(value, int | float)]
    remarks = f"<p>{html.escape(remark(row for _, row in rows))}</p>"
    keys = [key for key in dict.fromkeys([*SETTINGS, *numeric]) if key != "seed"]
    return _table(["run", *keys], ([name, *map(row.get, keys)] for name, row in rows)) + remarks


def _configs(runs: Sequence[Column]) -> str:
    head = ["key", *(one.name for one in runs)]
    keys = sorted({key for one in runs for key in one.config})
    rows = [[key, *(one.config.get(key, "not set") for one in runs)] for key in keys]
    differing = [row for row in rows if any(value != row[1] for value in row[1:])]
    changed = f"<p>Keys that differ:</p>{_table(head, differing)}"
    first = changed if differing else "<p>All keys are the same.</p>"
    return f"{first}<details><summary>All keys</summary>{_table(head, rows)}</details>"


def _curves(runs: Sequence[Column]) -> str:
    keys = {key for one in runs for key in one.curves}
    ordered = [key for key in FIRST if key in keys] + sorted(keys - {*FIRST})
    charts = (_chart(key, [one for one in runs if key in one.curves]) for key in ordered)
    return f'<div class="side">{"".join(charts)}</div>' if keys else "<p>Nothing was logged.</p>"


def _chart(key: str, runs: Sequence[Column]) -> str:
    """A metric over training steps; the axis is logarithmic if max / min of the values > 100."""
    make = extras.needed("matplotlib.figure", "figures").Figure
    style = extras.needed("matplotlib.style", "figures")
    labels, picture = [], io.BytesIO()
    with style.context("tableau-colorblind10"):
        drawing = make(figsize=(4.8, 2.8 + 0.2 * len(runs)), layout="constrained")
        axes = drawing.subplots()
        for number, one in enumerate(runs):
            steps, values = np.array(one.curves[key], np.float64)
            steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
            line = ("-", "--", ":", "-.")[number % 4]
            marker = "o" if len(steps) <= 30 else ""  # a single point has no line
            axes.plot(steps, values, line + marker, markersize=3)
            last = f"{values[-1]:.4g} at step {steps[-1]:.0f}" if len(steps) else "no finite value"
            labels.append(f"run {one.name}: {last}")
        low, high = axes.dataLim.intervaly
        axes.set(xlabel="step", yscale="log" if 0 < 100 * low < high else "linear")
        axes.grid(alpha=0.3)
        shown = [label.replace("$", r"\$") for label in labels]  # a plain $ begins a formula
        drawing.legend(axes.lines, shown, loc="outside lower left", fontsize=8)
        drawing.savefig(picture, format="svg")
    text = "; ".join([f"{key} over training steps", *labels])
    image = _picture(text, "svg+xml", picture.getvalue())
    return f"<figure><figcaption>{html.escape(key)}</figcaption>{image}</figure>"


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def cell(value: Any) -> str:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        return "" if value is None else html.escape(text)

    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    lines = ""
    for first, *rest in rows:
        cells = "".join(f"<td>{cell(value)}</td>" for value in rest)
        lines += f'<tr><th scope="row">{cell(first)}</th>{cells}</tr>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{lines}</tbody></table></div>"
    )
