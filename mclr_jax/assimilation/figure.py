"""A figure of one estimated trajectory: curves of coordinates, or fields at some frames."""

import io
import math

import jax.numpy as jnp
import numpy as np

from mclr_jax import extras
from mclr_jax.assimilation.observe import Downsample, Operator


def places(operator: Operator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(coordinate, factor) of each value (m,): L x = factor * x[coordinate] of the flattened state.

    The coordinate is -1 where a value is of several coordinates, or of none.
    """
    size = math.prod(shape)
    x = np.stack([np.ones(size), np.arange(size), np.random.default_rng(0).normal(size=size)])
    linear = operator.linear(jnp.asarray(x.reshape(1, 3, *shape), jnp.float32))
    factor, product, check = np.asarray(linear)[0]
    index = np.rint(product / np.where(factor, factor, 1)).astype(int).clip(0, size - 1)
    alone = (factor != 0) & np.isclose(check, factor * x[2, index], 1e-3, 1e-6)
    return np.where(alone, index, -1), factor


def trajectory(
    members: np.ndarray,
    values: np.ndarray,
    operator: Operator,
    truth: np.ndarray | None = None,
    begins: int = 0,
) -> bytes:
    """A PNG file of members (E, T, *state), observations (T', m) and truth (T'', *state).

    The last two are of the frames from `begins` on. Of a state of coordinates (d,) it shows the
    first 6: mean, two standard deviations, truth, and the values that observe one coordinate
    linearly. Up to 3 other observed values have panels of their own, with A(x) in place of x. Of
    fields (H, W, C) it shows the first channel at 6 frames.
    """
    make = extras.needed("matplotlib.figure", "figures").Figure  # slow to import

    def whole(x):  # NaN in the other frames
        padded = np.full((members.shape[1], *x.shape[1:]), np.nan, np.float32)
        padded[begins : begins + len(x)] = x[: len(padded) - begins]
        return padded

    truth = np.full_like(members[0], np.nan) if truth is None else whole(truth)
    draw = _fields if members.ndim > 3 else _coordinates
    buffer = io.BytesIO()
    draw(make, members, whole(values), operator, truth).savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _coordinates(make, members, values, operator, truth):
    coordinate, factor = places(operator, members.shape[2:])
    coordinate = np.where(np.array(operator.function) == "identity", coordinate, -1)
    offset, scale = np.array(operator.offset), np.array(operator.scale)
    panels = []  # name, members (E, T), truth (T,), observations (T, any number)
    for i in range(min(6, members.shape[2])):
        own = coordinate == i
        states = (offset + scale * values)[:, own] / factor[own]
        panels.append((f"coordinate {i}", members[..., i], truth[:, i], states))
    every = np.asarray(operator(jnp.asarray(np.append(members, truth[None], 0))))
    for j in np.flatnonzero(coordinate < 0)[:3]:
        panels.append((f"A(x), value {j}", every[:-1, :, j], every[-1, :, j], values[:, [j]]))
    figure = make((8, 1.6 * len(panels) + 0.3), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    entries: dict = {}
    for axis, (name, x, true, seen) in zip(axes, panels, strict=True):
        k, mean, std = np.arange(x.shape[1]), x.mean(0), x.std(0)
        axis.set_ylabel(name)
        band = axis.fill_between(k, mean - 2 * std, mean + 2 * std, alpha=0.3)
        entries |= {"mean": axis.plot(k, mean)[0], "2 standard deviations": band}
        if np.isfinite(true).any():
            entries["truth"] = axis.plot(k, true, "k--", lw=1)[0]
        if np.isfinite(seen).any():
            entries["observations"] = axis.plot(k, seen, "C1.", ms=5)[0]
    axes[-1].set_xlabel("frame")
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=4, fontsize=8)
    return figure


def _fields(make, members, values, operator, truth):
    frames, *shape = members.shape[1:]
    (coordinate, factor), seen = places(operator, shape), np.full_like(truth, np.nan)
    values = np.array(operator.offset) + np.array(operator.scale) * values
    is_linear = (np.array(operator.function) == "identity").all()
    if is_linear and (coordinate >= 0).all():
        seen.reshape(frames, -1)[:, coordinate] = values / factor
    elif is_linear and isinstance(operator.linear, Downsample):
        n = operator.linear.factor
        seen = values.reshape(frames, shape[0] // n, shape[1] // n, shape[2])
    rows = {"truth": truth, "observations": seen, "mean": members.mean(0), "std": members.std(0)}
    rows = {name: x[..., 0] for name, x in rows.items() if np.isfinite(x).any()}
    shown = np.unique(np.linspace(0, frames - 1, 6).astype(int))
    figure = make((1.5 * len(shown) + 1, 1.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(shown), squeeze=False)
    most = np.nanmax(np.abs(np.append(rows["mean"], rows.get("truth", rows["mean"]), 0)))
    for line, (name, x) in zip(axes, rows.items(), strict=True):
        low, high, colours = (0, x.max(), "viridis") if name == "std" else (-most, most, "RdBu_r")
        for axis, k in zip(line, shown, strict=True):
            axis.set(xticks=[], yticks=[], facecolor="silver")  # where nothing is observed
            picture = axis.imshow(x[k], colours, vmin=low, vmax=high)
        line[0].set_ylabel(name)
        figure.colorbar(picture, ax=line)
    for axis, k in zip(axes[0], shown, strict=True):
        axis.set_title(f"frame {k}")
    return figure
