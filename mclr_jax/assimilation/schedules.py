"""The order of updates, and the frames and observations of each one.

A regime is a lag for each frame: how many frames after it may be seen in its estimate. 0 is the
filter, infinity the batch smoother, and each frame may have its own.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from mclr_jax.assimilation import guide
from mclr_jax.assimilation.observe import Operator
from mclr_jax.noise import SIGMA_RANGE
from mclr_jax.samplers import METHODS, CorrectFn
from mclr_jax.schema import Keys, in_range, key, look_up

GUIDANCE = {"posterior": ("c", "overlap", "reach"), "norm": ("zeta", "g")}


@dataclasses.dataclass(frozen=True)
class Scheme(Keys):
    """Settings of the sampling of `regimes`; the defaults suit states of standard deviation 1."""

    window: int = key(0, 0, says="frames; 0: as many as in training, in the batch regime all")
    steps: int = key(16, 1, 100_000, says="of each update")
    first_steps: int = key(32, 1, 100_000, says="of the first one, which starts from noise alone")
    sigma_min: float = key(0.006, *SIGMA_RANGE, says="last noise level before 0")
    sigma_max: float = key(20.0, *SIGMA_RANGE, says="first noise level of new frames")
    restart: float = key(5.0, 0.0, says="first noise level of frames already estimated")
    context: int = key(0, 0, says="first frames of a window that are not revised; in blocks 0 is a "
                       "quarter")  # fmt: skip
    screen: float = key(0.999, 0.0, 1.0, "(", says="members whose misfit is beyond this quantile "
                        "are replaced; 1: none")  # fmt: skip
    inflation: float = key(1.0, 0.0, 100.0, says="of the result's members about their mean")
    method: str = key("ancestral_2m", words=METHODS, says="of sampling")
    guidance: str = key("posterior", words=GUIDANCE, says="function of guide.py")
    c: float = key(1.0, 0.0, says="of posterior")
    overlap: float = key(0.5, 0.0, says="of posterior")
    reach: float = key(4.0, 0.0, ends="(", says="of posterior, in frames")
    zeta: float = key(2.0, 0.0, says="of norm")
    g: float = key(0.01, 0.0, says="of norm")

    where: ClassVar[str] = "scheme"

    def __post_init__(self):
        super().__post_init__()
        in_range("scheme.sigma_max", self.sigma_max, float(self.sigma_min), SIGMA_RANGE[1])
        in_range("scheme.restart", self.restart, self.sigma_min, self.sigma_max, open="(")

    def correct(self, operator: Operator, seen: guide.Seen) -> CorrectFn:
        """The guidance of an update, see `samplers.sample`."""
        options = {key: getattr(self, key) for key in GUIDANCE[self.guidance]}
        return getattr(guide, self.guidance)(operator, seen, **options)


def lags(regime: str, frames: int, lag: int | Sequence[str] = 0) -> np.ndarray:
    """The lag of each frame, (frames,): filter 0, fixed_lag `lag`, batch infinity.

    `lag` is a number or has segments FRAME:LAG; LAG alone begins with frame 0.
    """
    given = lag if isinstance(lag, Sequence) else [str(lag)]
    texts = look_up({"filter": ["0"], "fixed_lag": given, "batch": ["inf"]}, regime, "regime")
    try:
        parts = [text.rpartition(":") for text in texts]
        starts, ahead = [int(part[0] or 0) for part in parts], [float(part[2]) for part in parts]
    except ValueError:
        starts, ahead = [], []
    whole = all(lag >= 0 and (lag == math.inf or lag.is_integer()) for lag in ahead)
    if starts[:1] != [0] or starts != sorted({*starts}) or starts[-1] >= frames or not whole:
        raise ValueError(
            f"The lag is {','.join(texts)!r}; expected a number of frames or inf, or segments "
            f"FRAME:LAG,... from frame 0 on, of frames below {frames} in rising order."
        )
    return np.repeat(ahead, np.diff([*starts, frames]))


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
