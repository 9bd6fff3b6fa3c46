"""The pictures of benchmarks/mclr_images.py, from its results and its runs."""

import io
import pathlib

import numpy as np
from matplotlib import colormaps
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


def pareto(bench, result: dict) -> None:
    """docs/equal_noise_DATA.png: every method's means, marker area by network calls."""
    drawing = Figure(figsize=(11, 5), layout="constrained")
    panels = drawing.subplots(1, 2)
    names = {"recall": "recall (diversity)", "precision": "precision (fidelity)",
             "accuracy": "class accuracy", "frechet": "Frechet distance"}  # fmt: skip
    markers = "oPXD*sv^<>phd"
    for panel, (x, y) in zip(
        panels, [("recall", "precision"), ("accuracy", "frechet")], strict=True
    ):
        for number, (method, rows) in enumerate(result["methods"].items()):
            strengths = list(dict.fromkeys(row["strength"] for row in rows))
            points = [
                [np.mean([row[key] for row in rows if row["strength"] == strength])
                 for key in (x, y, "network_calls")]
                for strength in strengths
            ]  # fmt: skip
            across, up, calls = np.transpose(points)
            colour = colormaps["tab20"](2 * number % 20 + number // 10)
            panel.plot(across, up, "-", color=colour, linewidth=0.7)
            panel.scatter(across, up, calls, [colour], marker=markers[number % 13], label=method)
            for strength, at in zip(strengths, zip(across, up, strict=True), strict=True):
                panel.annotate(
                    f"{strength:g}", at, xytext=(4, 3), textcoords="offset points", fontsize=6
                )
        panel.axhline(result["floor"][y], color="grey", linewidth=0.8, linestyle=":")
        panel.axvline(result["floor"][x], color="grey", linewidth=0.8, linestyle=":")
        panel.set_xlabel(names[x])
        panel.set_ylabel(names[y])
    panels[1].set_yscale("log")
    panels[0].legend(fontsize=7)
    drawing.suptitle(
        f"{bench.name}: dotted, held-out real images; numbers are strengths; the larger a marker, "
        "the more network calls"
    )
    save(drawing, ROOT / "docs" / f"equal_noise_{bench.name}.png")


def save(drawing: Figure, path: pathlib.Path, dpi: int = 110) -> None:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=dpi)
    write_atomically(path, buffer.getvalue())
