"""The pictures of benchmarks/mclr_images.py, from its results and its runs."""

import io
import pathlib

import numpy as np
from matplotlib.figure import Figure
from tasks import ROOT

from mclr_jax import generate, images
from mclr_jax.files import write_atomically


def picture(bench, summary: dict, seed: int, columns: int = 8) -> None:
    """docs/DATA_mclr.png: unguided, best CFG and best MCLR side by side, from the same noise."""
    labels = np.repeat(np.arange(10), columns)
    grids = []
    for part in ("base", "cfg_best", "mclr"):
        model = bench.models((seed,))[summary[part]["name"]]
        run, params = bench.load(model.workdir(seed), model.interpolation)
        samples = generate.generate(
            run.model, params, labels, run.sampler, seed=seed, guidance_scale=1 + model.gamma
        )
        grids.append(images.picture(samples, labels))
    images.save(ROOT / "docs" / f"{bench.name}_mclr.png", np.concatenate(grids, axis=1))


def figure(bench, result: dict) -> None:
    """docs/DATA_mclr_curve.png: fidelity against distance and diversity, mean and spread."""
    table, settings = result["table"], bench.settings
    curves = {
        "CFG, 2 calls a step": ["base"] + [f"cfg {g:g}" for g in settings["cfg"]],
        "MCLR, 1 call": [f"mclr {b:g}" for b in settings["beta"]],
        "MCLR, part of the way, 1 call": [
            *(f"mclr share {place:g}" for place in settings["interpolation"] if place < 1),
            f"mclr {max(settings['beta']):g}",
            *(f"mclr share {place:g}" for place in settings["interpolation"] if place > 1),
        ],
        "MCLR, strength as input, 1 call": [f"mclr strength {b:g}" for b in settings["strength"]],
    }
    styles = [("o-", "#0072B2"), ("s", "#D55E00"), ("D-", "#CC79A7"), ("^--", "#009E73")]
    drawing = Figure(figsize=(10, 4), layout="constrained")
    panels = drawing.subplots(1, 2)
    for panel, key, name in zip(
        panels, ("frechet", "recall"), ("Frechet distance", "recall"), strict=True
    ):
        for (label, rows), (style, colour) in zip(curves.items(), styles, strict=True):
            x, y = ([table[row][k] for row in rows] for k in ("accuracy", key))
            spread = {
                f"{axis}err": [table[row].get(f"{k}_std", 0.0) for row in rows]
                for axis, k in (("x", "accuracy"), ("y", key))
            }
            panel.errorbar(x, y, **spread, fmt=style, color=colour, label=label, elinewidth=0.8)
            for row, at in zip(rows, zip(x, y, strict=True), strict=True):
                value = row.split()[-1] if row != "base" else "unguided"
                panel.annotate(value, at, xytext=(4, 4), textcoords="offset points", fontsize=7)
        panel.axhline(result["floor"][key], color="grey", linewidth=0.8, linestyle=":")
        panel.axvline(result["floor"]["accuracy"], color="grey", linewidth=0.8, linestyle=":")
        panel.set_xlabel("class accuracy (dotted: held-out real images)")
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0 if key == "frechet" else None)
    panels[0].legend(fontsize=8)
    drawing.suptitle(f"{bench.name}: {len(result['seeds'])} seeds; numbers are gamma and beta")
    save(drawing, ROOT / "docs" / f"{bench.name}_mclr_curve.png")


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
    "by the features of a classifier of these classes": ("per_class_frechet", "frechet"),
    "by ImageNet features": ("second.per_class_frechet", "second.frechet"),
    "fidelity and diversity": ("recall", "precision"),
}
AXES = {"recall": "recall: diversity", "precision": "precision: fidelity", "frechet": "FD",
        "per_class_frechet": "FD by class"}  # fmt: skip


def pareto(bench, result: dict, second: str) -> None:
    """docs/equal_noise_DATA.png: means of the methods' seeds, one curve a method over strengths.

    `second` is the key of the second judge's numbers in a row.
    """
    drawing = Figure(figsize=(17, 5), layout="constrained")

    def values(rows: list[dict], key: str) -> list[float]:
        judge, _, name = key.rpartition(".")
        there = [row.get(second) for row in rows] if judge else rows
        return [row[name] for row in there if row]

    for panel, (title, keys) in zip(drawing.subplots(1, 3), PANELS.items(), strict=True):
        names = {}
        for method, (words, colour) in SHOWN.items():
            rows, points = result["methods"].get(method, []), []
            for strength in sorted({row["strength"] for row in rows}):
                own = [row for row in rows if row["strength"] == strength]
                if all(values(own, key) for key in keys):
                    calls = own[0]["network_calls"]
                    points.append((*(np.mean(values(own, key)) for key in keys), calls, strength))
            if not points:
                continue
            across, up, calls, strengths = zip(*points, strict=True)
            panel.plot(across, up, "-", color=colour, linewidth=0.8)
            panel.scatter(across, up, calls, [colour], zorder=3)
            for strength, *at in zip(strengths, across, up, strict=True):
                panel.annotate(
                    f"{strength:g}", at, xytext=(4, -8), textcoords="offset points", fontsize=6,
                    color=colour,
                )  # fmt: skip
            names[words] = (across[-1], up[-1]), colour
        if "second" not in keys[0]:
            panel.axvline(result["floor"][keys[0]], color="grey", linewidth=0.8, linestyle=":")
            panel.axhline(result["floor"][keys[1]], color="grey", linewidth=0.8, linestyle=":")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(AXES[keys[0].removeprefix("second.")])
        panel.set_ylabel(AXES[keys[1].removeprefix("second.")])
        beside(panel, names)
    drawing.suptitle(
        f"{bench.name}: numbers are strengths; the larger a marker, the more network calls; dotted:"
        " held-out real images",
        fontsize=10,
    )
    save(drawing, ROOT / "docs" / f"equal_noise_{bench.name}.png")


def beside(panel, names: dict[str, tuple]) -> None:
    """Names -> (place, colour), written at the right of a panel, apart from each other."""
    low, high = panel.get_ylim()
    height = 0.0
    for words, (at, colour) in sorted(names.items(), key=lambda item: item[1][0][1]):
        height = max(height, (at[1] - low) / (high - low))
        panel.annotate(
            words, at, xytext=(1.03, height), textcoords="axes fraction", va="center",
            fontsize=8, color=colour, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.4},
        )  # fmt: skip
        height += 0.05


def save(drawing: Figure, path: pathlib.Path, dpi: int = 110) -> None:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
