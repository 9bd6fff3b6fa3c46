"""Which frames are denoised when, and under which observations: values in NumPy, no model.

A regime is a lag for each frame: how many frames after it may be seen in its estimate. 0 is the
filter, infinity the batch smoother, and each frame may have its own.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from mclr_jax.noise import SIGMA_RANGE
from mclr_jax.samplers import METHODS
from mclr_jax.schema import in_range, look_up

GUIDANCE = {"posterior": ("c", "overlap", "reach"), "conjugate": ("iterations",),
            "norm": ("zeta", "g")}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How `regimes` samples; the defaults suit states of standard deviation 1."""

    window: int = 0  # frames; 0: those of the model's training, in the batch regime all frames
    steps: int = 16  # of each update
    first_steps: int = 32  # of the first one, which starts from noise alone
    sigma_min: float = 0.006
    sigma_max: float = 20.0
    restart: float = 5.0  # noise on the frames already estimated
    context: int = 0  # first frames of a window that are not revised; in blocks 0 is a quarter
    revise: bool = True  # False: no frame is revised, members are resampled by likelihood
    screen: float = 0.999  # members whose misfit is beyond this quantile are replaced; 1: none
    inflation: float = 1.0  # of the result's members about their mean
    method: str = "ancestral_2m"
    guidance: str = "posterior"  # or conjugate, norm: the functions of guide.py
    c: float = 1.0  # of posterior
    overlap: float = 0.5
    reach: float = 4.0
    iterations: int = 5  # of conjugate
    zeta: float = 2.0  # of norm
    g: float = 0.01

    def __post_init__(self):
        look_up(METHODS, self.method, "sampler")
        look_up(GUIDANCE, self.guidance, "guidance")
        limits: dict = dict.fromkeys(("steps", "first_steps", "iterations"), (1, 100_000))
        limits |= dict.fromkeys(("window", "context"), (0,))
        limits |= dict.fromkeys(("c", "overlap", "zeta", "g"), (0.0,)) | {"sigma_min": SIGMA_RANGE}
        limits["inflation"] = 0.0, 100.0
        limits |= {"reach": (0.0, None, "("), "screen": (0.0, 1.0, "(")}
        for key, limit in limits.items():
            in_range(f"scheme.{key}", getattr(self, key), *limit)
        in_range("scheme.sigma_max", self.sigma_max, float(self.sigma_min), SIGMA_RANGE[1])
        in_range("scheme.restart", self.restart, self.sigma_min, self.sigma_max, open="(")


def lags(regime: str, frames: int, lag: int = 0) -> np.ndarray:
    """The lag of each frame, (frames,): filter 0, fixed_lag `lag`, batch infinity."""
    in_range("lag", lag, 0)
    table = {"filter": 0.0, "fixed_lag": lag, "batch": math.inf}
    return np.full(frames, look_up(table, regime, "regime"))


class Update(NamedTuple):
    """Frames end - window .. end - 1, the last observation of which is that of frame `seen`."""

    end: int
    seen: int


def updates(
    observed: np.ndarray, until: np.ndarray, window: int, forecast: int = 0, started: bool = False
) -> list[Update]:
    """The updates of windows of `window` frames that show each frame all that it may see.

    `observed` (T,) are the frames with an observation, `until` (before + T,) the last frame that
    each may see, of which the first `before` are of an earlier run; `forecast` frames come after
    the last one. At most half a window is new in an update, if the window before it is known; that
    before the first update is known if the run has `started` earlier.
    """
    latest = np.maximum.accumulate(np.where(observed, np.arange(len(observed)), -1))
    wanted, before = latest[until], len(until) - len(observed)
    half, found = max(1, window // 2), []
    end, room = (0, half) if started else (0, window)
    for seen in map(int, np.unique(wanted)):
        first, last = (int(k) - before for k in np.flatnonzero(wanted == seen)[[0, -1]])
        target = max(seen, last) + 1 + (forecast if seen == wanted[-1] else 0)
        # the first frame that waits for this observation is still in the window, if it can be
        crowded = target - first > window >= seen + 1 - first
        for goal in (seen + 1, target) if crowded else (target,):
            while end < goal:
                end, room = min(goal, end + room), half
                found.append(Update(end, int(latest[min(end - 1, seen)]) if seen >= 0 else -1))
    return found


def levels(
    scheme: Scheme, new: np.ndarray, clean: np.ndarray, steps: int, high: float
) -> np.ndarray:
    """Noise levels (steps + 1, W) of an update, geometric to sigma_min, then 0; `clean`: 0."""
    tops = np.log(np.where(new, high, scheme.restart))
    grid = np.exp(np.linspace(tops, math.log(scheme.sigma_min), steps))
    return np.append(grid, np.zeros((1, len(new))), 0) * ~clean


def matrix(frames: int, steps: int, u: float) -> np.ndarray:
    """The schedule of ForcingDAS, K[m, k] = clip(S + int(u k) - m, 0, S): steps left in row m.

    u = S is filtering, one frame after the other; u = 0 is batch smoothing; between them, frame k
    starts when frame k - S / u ends: a pyramid. The shape is (S + int(u (F - 1)) + 1, F).
    """
    in_range("u", u, 0.0, float(steps))
    start = steps + (u * np.arange(frames)).astype(int)
    return np.clip(start - np.arange(start[-1] + 1)[:, None], 0, steps)
