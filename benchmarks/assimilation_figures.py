"""Figures of docs/assimilation.md, of runs and of the files of their benchmarks.

  python benchmarks/assimilation_figures.py --workdir=DIR --folder=FOLDER    # assimilation.gif
  python benchmarks/assimilation_figures.py --workdir=DIR --navier_stokes    # navier_stokes.*

assimilation.gif is Lorenz-63 while observations come in, filter and smoother of one model; DIR and
FOLDER are those of lorenz63.py. The trajectory is the first one of the test set `lo`. The filter
has seen the observations up to the frame shown, the smoother all of them. The comment of the GIF
names the command, the revision and the weights. For Navier-Stokes DIR has the files of
navier_stokes.py.
"""

import dataclasses
import io
import json
import pathlib

import numpy as np
from figures import save
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.figure import Figure
from PIL import Image
from tasks import ROOT, Rows
from trajectory_rows import Subject, ahead_of, parser

from mclr_jax.assimilation import observe
from mclr_jax.assimilation.schedules import Scheme
from mclr_jax.files import provenance, write_atomically

FIELDS = "random", "downsample"  # operators of Navier-Stokes
COLORS = {"filter": "#0072B2", "batch": "#E69F00"}
LABELS = {"filter": "filter: observations up to now", "batch": "smoother: all observations"}
POINTS = {"marker": "s", "ls": "", "mfc": "white", "mec": "black", "ms": 5, "mew": 1.5}


def picture(k: int, seen: np.ndarray, truths: np.ndarray, members: dict) -> Image.Image:
    """Frame k of observations of coordinate 1 (T, 1) and members (E, T, 3) by regime.

    Their truth is the first of (N, T, 3), all of which are drawn as the background.
    """
    truth = truths[0]
    figure = Figure((8, 3.6), dpi=80, layout="constrained")
    grid = figure.add_gridspec(2, 5)
    plane = figure.add_subplot(grid[:, :2])
    curves = [figure.add_subplot(grid[row, 2:]) for row in (0, 1)]
    plane.plot(*truths[..., [0, 2]].T, color="gainsboro", lw=0.5, zorder=0)
    plane.plot(*truth[k, [0, 2]], "k*", ms=11, label="truth", zorder=3)
    plane.plot([], [], **POINTS, label="observation of coordinate 1")
    for name, x in members.items():
        plane.plot(*x[:, k, [0, 2]].T, ".", color=COLORS[name], ms=6, label=LABELS[name])
    plane.set(xlim=(-22, 22), ylim=(0, 52), xlabel="coordinate 1", ylabel="coordinate 3")
    shown = plane.get_legend_handles_labels()
    figure.legend(*shown, loc="outside upper center", ncols=4, fontsize=7.5)
    for axis, i, limits in zip(curves, (0, 2), ((-24, 24), (0, 52)), strict=True):
        for name, x in members.items():
            axis.plot(x[:, : k + 1, i].T, color=COLORS[name], lw=0.6, alpha=0.5)
        axis.plot(truth[: k + 1, i], "k", lw=1.2)
        axis.set(xlim=(0, len(truth) - 1), ylim=limits, ylabel=f"coordinate {i + 1}")
    curves[0].plot(np.arange(k + 1), seen[: k + 1, 0], **POINTS, zorder=3)
    curves[0].set(xticklabels=[])
    curves[1].set_xlabel("frame")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE)


def navier_stokes_figures(workdir: pathlib.Path) -> None:
    """The first test trajectory: fields and spectra as a picture, all frames as an animation."""
    rows = [row for row in Rows("navier_stokes").content()["rows"] if row["set"] == "test"]
    found = {name: observe.load(workdir / f"{name}.npz")
             for name in ("random_filter", "random_batch", "downsample_batch")}  # fmt: skip
    frame, limit = len(found["random_batch"]["truth"]) // 2, 6

    def show(axis, values, title="", **options):
        options = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "origin": "lower"} | options
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
        return axis.imshow(values, **options)

    figure = Figure((12, 4.4), layout="constrained")
    axes = figure.subplots(2, 6)
    for line, name in zip(axes, FIELDS, strict=True):
        batch = found[f"{name}_batch"]
        mean = batch["members"].mean(0)
        panels = {"truth": batch["truth"], "observations": batch["seen"], "batch mean": mean,
                  "a member": batch["members"][0]}  # fmt: skip
        for axis, (title, values) in zip(line, panels.items(), strict=False):
            show(axis, values[frame], title if name == "random" else "")
        line[0].set_ylabel(name)
        std = batch["members"].std(0, ddof=1)[frame]
        title = "standard deviation" if name == "random" else ""
        figure.colorbar(show(line[4], std, title, cmap="viridis", vmin=0, vmax=None), ax=line[4])
        for row in rows:
            if (row["operator"], row["regime"], row["method"]) == (name, "batch", "model"):
                for label in ("truth", "mean", "members"):
                    line[5].loglog(row[f"spectrum_{label}"], label=label)
        line[5].set(xlim=(1, 32), ylim=(1e-6, 3))
        line[5].legend(fontsize=7)
    axes[0, 5].set_title("energy by wave number", fontsize=9)
    save(figure, ROOT / "docs" / "navier_stokes.png", 100)

    filtered, batch = found["random_filter"], found["random_batch"]
    panels = {"truth": batch["truth"], "observations": batch["seen"],
              "filter mean": filtered["members"].mean(0),
              "batch mean": batch["members"].mean(0)}  # fmt: skip
    figure = Figure((8, 2.3), layout="constrained")
    shown = [show(axis, np.zeros((64, 64)), title)
             for axis, title in zip(figure.subplots(1, 4), panels, strict=True)]  # fmt: skip

    def draw(k: int) -> list:
        for image, values in zip(shown, panels.values(), strict=True):
            image.set_data(values[k])
        return shown

    film = FuncAnimation(figure, draw, frames=len(batch["truth"]))
    film.save(ROOT / "docs" / "navier_stokes.gif", PillowWriter(fps=4), dpi=80)


def animation(subject: Subject, folder: pathlib.Path, ensemble: int) -> None:
    """The first trajectory of a file of Lorenz-63 as a GIF."""
    arrays = observe.load(path := folder / "lo_test.npz")
    seen = observe.parse(arrays, path)
    seen = dataclasses.replace(seen, values=seen.values[:1])
    frames, members = seen.values.shape[1], {}
    for regime in COLORS:
        found, _ = subject.estimate(seen, Scheme(), ahead_of(regime, frames), ensemble=ensemble)
        members[regime] = found[0]
    shown = [picture(k, seen.values[0], arrays["truth"], members) for k in range(frames)]
    times = [120] * (frames - 1) + [3000]  # ms
    buffer = io.BytesIO()
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=times, loop=0,
                  comment=json.dumps(provenance() | subject.name))  # fmt: skip
    write_atomically(ROOT / "docs" / "assimilation.gif", buffer.getvalue())


def main() -> None:
    found = parser(__doc__, folder=False)
    found.add_argument("--folder", type=pathlib.Path)
    found.add_argument("--ensemble", type=int, default=32)
    found.add_argument("--navier_stokes", action="store_true")
    flags = found.parse_args()
    if flags.navier_stokes:
        return navier_stokes_figures(flags.workdir)
    animation(Subject(flags.workdir), flags.folder, flags.ensemble)


if __name__ == "__main__":
    main()
