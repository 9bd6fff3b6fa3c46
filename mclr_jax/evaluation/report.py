"""One self-contained web page that compares runs: no server, no network, no library."""

import base64
import dataclasses
import html
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from mclr_jax import generate, images, run

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#000000", "#E69F00")
DASHES = ("", "6 3", "2 2", "8 2 2 2", "1 3")
FIRST = ("loss", "eval_loss", "accuracy", "eval_accuracy", "error", "eval_error")
WIDTH, HEIGHT = 460, 260
FEW = 30  # points of a line that are marked
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 12, 34  # margins of a chart


@dataclasses.dataclass(frozen=True)
class Run:
    """What the page says of a run.

    Attributes:
      name: unique on the page.
      config: its config, flat, with dots for levels.
      curves: metric -> (steps, values) as they were logged.
      rows: of launch.evaluate.
      grids: guidance scale -> PNG of samples.
    """

    name: str
    config: dict[str, Any]
    curves: dict[str, tuple[list[float], list[float]]]
    rows: list[dict[str, Any]]
    grids: dict[float, bytes]


def read(
    workdir: str | pathlib.Path,
    guidance_scales: Sequence[float] = (),
    per_class: int = 6,
    seed: int = 0,
    progress: Callable[[int], Any] = lambda count: None,
) -> Run:
    """A run's directory; samples are drawn for each guidance scale from the same noise.

    Raises:
      FileNotFoundError: if `workdir` is not the directory of a run.
    """
    workdir = pathlib.Path(workdir)
    experiment = run.load_experiment(workdir)
    curves: dict[str, tuple[list[float], list[float]]] = {}
    log = workdir / "metrics.jsonl"
    for line in log.read_text().splitlines() if log.exists() else []:
        values = json.loads(line)
        step = values.pop("step")
        for key, value in values.items():
            steps, numbers = curves.setdefault(key, ([], []))
            steps.append(step)
            numbers.append(value)
    stored = sorted((workdir / "evaluation").glob("*.json"))
    rows = sorted(
        (json.loads(path.read_text()) for path in stored),
        key=lambda row: (row["average"], row["guidance_scale"]),
    )
    grids = {}
    if guidance_scales:
        params, _ = run.load_weights(workdir)
        labels = np.tile(np.arange(experiment.null_label), per_class)
        for scale in guidance_scales:
            samples = generate.generate(
                experiment, params, labels, seed=seed, guidance_scale=scale, progress=progress
            )
            picture = images.picture(images.clip(samples), labels, per_class)
            grids[float(scale)] = images.png(picture)
    config = run.flat(experiment.config.to_dict())
    return Run(workdir.name, config, curves, rows, grids)


def page(runs: Sequence[Run]) -> str:
    """The page as HTML; names that several runs share get a number."""
    names: list[str] = []
    for number, one in enumerate(runs, 1):
        names.append(f"{one.name} ({number})" if one.name in names else one.name)
    runs = [dataclasses.replace(one, name=name) for one, name in zip(runs, names, strict=True)]
    sections = {
        "Samples": _samples(runs),
        "Metrics": _metrics(runs),
        "Curves": _curves(runs),
        "Configs": _configs(runs),
    }
    links = "".join(f'<a href="#{t.lower()}">{t}</a> ' for t in sections)
    body = "".join(
        f'<section id="{title.lower()}" aria-labelledby="h-{title}"><h2 id="h-{title}">{title}</h2>'
        f"{content}</section>"
        for title, content in sections.items()
    )
    title = html.escape(" · ".join(names))
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><header><h1>{title}</h1>"
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def _samples(runs: Sequence[Run]) -> str:
    scales = sorted({scale for one in runs for scale in one.grids})
    if not scales:
        return "<p>No samples were asked for (--guidance_scales).</p>"
    figures = []
    for one in runs:
        pictures = "".join(
            f'<img data-scale="{scale:g}" {"" if scale == scales[0] else "hidden"} '
            f'alt="Samples of {html.escape(one.name)} at guidance scale {scale:g}, a class a row" '
            f'src="data:image/png;base64,{base64.b64encode(one.grids[scale]).decode()}">'
            for scale in scales
            if scale in one.grids
        )
        figures.append(
            f"<figure>{pictures}<figcaption>{html.escape(one.name)}</figcaption></figure>"
        )
    ticks = json.dumps([f"{scale:g}" for scale in scales])
    return (
        '<p><label for="scale">Guidance scale</label> '
        f'<input id="scale" type="range" min="0" max="{len(scales) - 1}" step="1" value="0" '
        f"data-scales='{ticks}' aria-valuetext=\"{scales[0]:g}\"> "
        f'<output for="scale" id="scale-value">{scales[0]:g}</output></p>'
        f'<div class="side">{"".join(figures)}</div>'
    )


def _metrics(runs: Sequence[Run]) -> str:
    rows = [(one.name, row) for one in runs for row in one.rows]
    if not rows:
        return "<p>No run was evaluated yet (launch.evaluate).</p>"
    settings = ("step", "average", "strength", "guidance_scale", "guidance_interval",
                "autoguidance", "samples", "features")  # fmt: skip
    skipped = {"seed", *settings}
    numeric = [
        key
        for key in dict.fromkeys(key for _, row in rows for key in row)
        if key not in skipped and any(isinstance(row.get(key), int | float) for _, row in rows)
    ]
    return _table(
        ["run", *settings, *numeric],
        ([name, *(row.get(key) for key in (*settings, *numeric))] for name, row in rows),
    )


def _configs(runs: Sequence[Run]) -> str:
    missing = "not set"
    keys = sorted({key for one in runs for key in one.config})
    values = {key: [one.config.get(key, missing) for one in runs] for key in keys}
    names = [one.name for one in runs]
    differing = [key for key in keys if any(v != values[key][0] for v in values[key])]
    intro = "<p>Keys that differ:</p>" if differing else "<p>All keys are the same.</p>"
    changed = _table(["key", *names], ([k, *values[k]] for k in differing)) if differing else ""
    everything = _table(["key", *names], ([k, *values[k]] for k in keys))
    return f"{intro}{changed}<details><summary>All keys</summary>{everything}</details>"


def _curves(runs: Sequence[Run]) -> str:
    keys = {key for one in runs for key in one.curves}
    ordered = [key for key in FIRST if key in keys] + sorted(keys - {*FIRST})
    charts = [
        chart(key, {one.name: one.curves[key] for one in runs if key in one.curves})
        for key in ordered
    ]
    return f'<div class="side">{"".join(charts)}</div>' if charts else "<p>Nothing was logged.</p>"


def chart(title: str, series: dict[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Lines over training steps as a figure of SVG; a logarithmic axis where values span 100."""
    points = {
        name: [(x, y) for x, y in zip(*line, strict=True) if math.isfinite(y)]
        for name, line in series.items()
    }
    values = [y for line in points.values() for _, y in line] or [0.0]
    last = max((x for line in points.values() for x, _ in line), default=1) or 1
    logarithmic = min(values) > 0 and max(values) > 100 * min(values)

    def scaled(y: float) -> float:
        return math.log10(y) if logarithmic else y

    low, high = scaled(min(values)), scaled(max(values))
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / last
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - scaled(y)) / (high - low)

    parts = []
    for i in range(5):
        y = low + (high - low) * i / 4
        down = TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)
        text = f"{10**y if logarithmic else y:.4g}"
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down:.1f}" y2="{down:.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{text}</text>'
        )
        across = LEFT + (WIDTH - LEFT - RIGHT) * i / 4
        parts.append(
            f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f"{last * i / 4:.4g}</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 2}" text-anchor="middle">step</text>'
    )
    legend = []
    for number, (name, line) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        look = f'stroke="{colour}" stroke-dasharray="{DASHES[number % len(DASHES)]}"'
        look += ' stroke-width="1.8" fill="none"'
        places = [place(x, y) for x, y in line]
        joined = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts.append(f'<polyline points="{joined}" {look}/>')
        if len(places) <= FEW:  # dots, so that a single point is seen too
            parts += [f'<circle cx="{a:.1f}" cy="{d:.1f}" r="2.5" fill="{colour}"/>'
                      for a, d in places]  # fmt: skip
        swatch = f'<svg width="28" height="8" aria-hidden="true"><path d="M0 4H28" {look}/></svg>'
        ends = f", {line[-1][1]:.4g} at step {line[-1][0]:g}" if line else ""
        legend.append(f"<li>{swatch} {html.escape(name)}{ends}</li>")
    name = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{name}</figcaption><svg role="img" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" aria-label="{name} over training steps; '
        f'the last values are listed below">{"".join(parts)}</svg>'
        f"<ul>{''.join(legend)}</ul></figure>"
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return ""
        return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))

    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    lines = []
    for first, *rest in rows:
        cells = "".join(f"<td>{cell(value)}</td>" for value in rest)
        lines.append(f'<tr><th scope="row">{cell(first)}</th>{cells}</tr>')
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>'
        f"<thead><tr>{titles}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1500px; padding: 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
nav a { margin-right: 1rem; } a { color: #00527f; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; }
figure { margin: 0; } figcaption { font-weight: 600; } figure img { max-width: 100%; }
.chart { width: 460px; max-width: 100%; } .chart svg { width: 100%; height: auto; }
.chart ul svg { width: 28px; height: 8px; } .chart ul { list-style: none; padding: 0 0 0 64px; }
.chart text { font-size: 11px; fill: #444; } .grid { stroke: #ddd; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: right; padding: .2rem .6rem; border-bottom: 1px solid #ddd; }
tbody th { text-align: left; font-weight: 500; } input[type=range] { width: 20rem; }
:focus-visible { outline: 3px solid #0072b2; outline-offset: 2px; }
"""
SCRIPT = """
const slider = document.getElementById('scale');
if (slider) {
  const scales = JSON.parse(slider.dataset.scales);
  const show = () => {
    const scale = scales[slider.value];
    document.getElementById('scale-value').textContent = scale;
    slider.setAttribute('aria-valuetext', scale);
    for (const image of document.querySelectorAll('img[data-scale]'))
      image.hidden = image.dataset.scale !== scale;
  };
  slider.addEventListener('input', show);
  show();
}
"""
