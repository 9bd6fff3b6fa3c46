"""The figure of benchmarks/guidance_free.py, and how figures are saved."""

import io
import pathlib

import numpy as np
from matplotlib.figure import Figure
from tasks import ROOT

from mclr_jax.files import write_atomically

# The methods of the figure, others are in the table alone: name there, words, colour.
SHOWN = {
    "DSM control": ("no guidance", "black"),
    "CFG": ("CFG", "#E69F00"),
    "CFG in an interval": ("CFG in an interval", "#D55E00"),
    "cca": ("CCA", "#56B4E9"),
    "model_guidance": ("model guidance", "#0072B2"),
    "mclr null, beta 1": ("null", "#009E73"),
    "mclr null and wrong label, beta 0.5": ("null and wrong label", "#CC79A7"),
    "mclr null, beta 1 by class": ("null, by class", "#44AA99"),
}
# What each panel shows: title, and the keys of its axes, of which dots are of the second judge.
PANELS = {
    "first judge: a classifier": ("per_class_frechet", "frechet"),
    "second judge: ImageNet": ("second.per_class_frechet", "second.frechet"),
    "fidelity and diversity": ("recall", "precision"),
}
AXES = {"recall": "recall: diversity", "precision": "precision: fidelity", "frechet": "FD",
        "per_class_frechet": "FD by class"}  # fmt: skip


def pareto(bench, result: dict, second: str) -> None:
    """docs/equal_noise_DATA.png: means over seeds, one curve a method over its strengths.

    `second` is the key of the second judge's numbers in a row. A panel has the strengths that were
    judged for all seeds for which the control was.
    """
    panels = {title: found for title, (x, y) in PANELS.items()
              if (found := curves(result["methods"], x, y, second))}  # fmt: skip
    drawing = Figure(figsize=(5.7 * len(panels), 5), layout="constrained")
    for panel, (title, found) in zip(np.ravel(drawing.subplots(1, len(panels))), panels.items(),
                                     strict=True):  # fmt: skip
        x, y = PANELS[title]
        for words, (points, colour) in found.items():
            across, up, calls, strengths = zip(*points, strict=True)
            panel.plot(across, up, "-", color=colour, linewidth=0.8, label=words)
            panel.scatter(across, up, calls, [colour], zorder=3)
            for strength, *at in zip(strengths, across, up, strict=True):
                panel.annotate(f"{strength:g}", at, xytext=(4, -8), textcoords="offset points",
                               fontsize=6, color=colour)  # fmt: skip
        floor = ", ".join(f"{value(result['floor'], key, second):.3g}" for key in (x, y))
        panel.set_title(f"{title} (held-out: {floor})", fontsize=9)
        panel.set_xlabel(AXES[x.removeprefix("second.")])
        panel.set_ylabel(AXES[y.removeprefix("second.")])
        panel.legend(fontsize=8)
    title = f"{bench.name}: numbers are strengths; the larger a marker, the more network calls"
    drawing.suptitle(title, fontsize=10)
    save(drawing, ROOT / "docs" / f"equal_noise_{bench.name}.png")


def curves(methods: dict, x: str, y: str, second: str) -> dict[str, tuple[list, str]]:
    """Words of a method -> points (x, y, network calls, strength), and its colour."""

    def judged(rows: list[dict]) -> set[int]:
        return {row["seed"] for row in rows if value(row, x, second) is not None}

    seeds, found = judged(methods.get("DSM control", [])), {}
    for method, (words, colour) in SHOWN.items():
        points, rows = [], [row for row in methods.get(method, []) if row["seed"] in seeds]
        for strength in sorted({row["strength"] for row in rows}):
            own = [row for row in rows if row["strength"] == strength]
            if judged(own) == seeds:
                means = (float(np.mean([value(row, key, second) for row in own])) for key in (x, y))
                points.append((*means, own[0]["network_calls"], strength))
        if points:
            found[words] = points, colour
    return found


def value(row: dict, key: str, second: str) -> float | None:
    """A number of a row, or of what the second judge says of it, or None if that is not there."""
    judge, _, name = key.rpartition(".")
    return (row.get(second, {}) if judge else row).get(name)


def save(drawing: Figure, path: pathlib.Path, dpi: int = 110) -> None:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
