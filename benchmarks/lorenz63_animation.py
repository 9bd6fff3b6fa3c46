"""docs/assimilation.gif: Lorenz-63 while observations come in, filter and smoother of one model.

  python benchmarks/lorenz63_animation.py --workdir=DIR --folder=FOLDER

DIR and FOLDER are those of lorenz63.py. The trajectory is the first one of the test set `lo`. The
filter has seen the observations up to the frame shown, the smoother has seen all of them. The
comment of the GIF names the command, the revision and the weights.
"""

import argparse
import dataclasses
import io
import json
import pathlib

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from tasks import ROOT

from mclr_jax import runs
from mclr_jax.assimilation import observe, regimes
from mclr_jax.assimilation.schedules import Scheme, lags
from mclr_jax.files import digest, provenance, write_atomically

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
    figure.legend(
        *plane.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=7.5
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--ensemble", type=int, default=32)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs" / "assimilation.gif")
    flags = parser.parse_args()
    run, path = runs.load(flags.workdir), flags.folder / "lo_test.npz"
    (params, step), arrays = run.weights(), observe.load(path)
    seen = observe.parse(arrays, path)
    seen = dataclasses.replace(seen, values=seen.values[:1])
    frames, members = seen.values.shape[1], {}
    for regime in COLORS:
        found = regimes.assimilate(
            run.model, params, seen, Scheme(), lags(regime, frames), ensemble=flags.ensemble
        )
        members[regime] = found.members[0]
    shown = [picture(k, seen.values[0], arrays["truth"], members) for k in range(frames)]
    made = provenance() | {"step": step, "weights": digest(params)}
    times = [120] * (frames - 1) + [3000]  # ms
    buffer = io.BytesIO()
    shown[0].save(buffer, "GIF", save_all=True, append_images=shown[1:], duration=times, loop=0,
                  comment=json.dumps(made))  # fmt: skip
    write_atomically(flags.out, buffer.getvalue())
    print(f"Wrote {flags.out}: {frames} frames, {len(buffer.getvalue()) / 1e6:.2f} MB.")


if __name__ == "__main__":
    main()
