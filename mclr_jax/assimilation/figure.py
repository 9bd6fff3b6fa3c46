"""A figure of one estimated trajectory: curves of coordinates, or fields at some frames."""

import io

import numpy as np


def trajectory(members: np.ndarray, truth: np.ndarray | None = None, begins: int = 0) -> bytes:
    """Members (E, T, *state), and the truth (T', *state) from frame `begins` on, as a PNG file.

    Of a state of coordinates (d,) it shows the first 6: mean, two standard deviations and truth. Of
    fields (H, W, C) it shows the first channel at 6 frames.
    """
    from matplotlib.figure import Figure  # slow to import

    mean, std = members.mean(0), members.std(0)
    fields = members.ndim > 3
    if fields:
        rows = {"mean": mean[..., 0], "standard deviation": std[..., 0]}
        places = np.unique(np.linspace(begins, len(mean) - 1, 6).astype(int))
        figure = Figure((2 * len(places), 6), layout="constrained")
        if truth is not None:
            rows = {
                "truth": np.concatenate([np.nan * mean[:begins, ..., 0], truth[..., 0]]),
                **rows,
            }
        axes = figure.subplots(len(rows), len(places), squeeze=False)
        for line, (name, values) in zip(axes, rows.items(), strict=True):
            line[0].set_ylabel(name)
            for axis, k in zip(line, places, strict=True):
                axis.set(xticks=[], yticks=[], title=f"frame {k}" if line is axes[0] else "")
                if k < len(values):
                    axis.imshow(values[k], cmap="viridis" if "dev" in name else "RdBu_r")
    else:
        count = min(6, mean.shape[1])
        figure = Figure((8, 1.6 * count), layout="constrained")
        for i, axis in enumerate(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]):
            k = np.arange(len(mean))
            band = (mean[:, i] - 2 * std[:, i], mean[:, i] + 2 * std[:, i])
            axis.fill_between(k, *band, alpha=0.3, label="2 standard deviations")
            axis.plot(k, mean[:, i], label="mean")
            axis.set_ylabel(f"coordinate {i}")
            if truth is not None:
                axis.plot(begins + np.arange(len(truth)), truth[:, i], "k--", lw=1, label="truth")
        axis.set_xlabel("frame")
        figure.axes[0].legend(loc="upper right", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
