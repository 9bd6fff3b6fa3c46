"""Charts of a web page: SVG in its text, whose colours are those of the page, light or dark."""

import html
import io
import re
from collections.abc import Iterable

import numpy as np

from mclr_jax import extras

COLOURS, LINES = 6, ("solid", "dashed", "dotted")  # report.html has the colours


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
