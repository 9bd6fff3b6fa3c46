"""What tests give to objectives: parts of known answers, and a small task for every option.

CASES has each objective and option as changes of `tiny.config`; `task`, `frozen`, `params` and
`batch` make what a step takes of them. MCLR's own options are a table in which every value of one
option meets every value of every other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from mclr_jax.config import Training
from mclr_jax.mixture import toy
from mclr_jax.model import DataInfo, Model
from mclr_jax.objectives.base import Batch, Models, Problem
from mclr_jax.task import Task
from mclr_jax.types import Answers, Condition, label_of, with_label

# ---- objectives alone ----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Level:
    """A distribution of noise levels that has one level only; it may be traced."""

    sigma: Any

    def sample(self, key, shape=()):
        del key
        return jnp.full(shape, self.sigma, jnp.float32)


def problem(levels, **changes) -> Problem:
    """Three classes and unit weight, but for `changes`."""
    defaults = {"levels": levels, "weight": jnp.ones_like, "null_label": 3}
    return Problem(**defaults | changes)


def models(denoise, posterior=None, **frozen) -> Models:
    """A denoiser in training, and frozen ones by their names."""
    held = {name: Answers(other, no_answer) for name, other in frozen.items()}
    return Models(denoise, no_answer, held, posterior)


def no_answer(x, sigma, condition):
    """In place of the logits of a denoiser, or the other way round."""
    raise AssertionError("the network was asked for what it does not give")


def draws(count: int) -> tuple[Batch, jax.Array]:
    """Examples of `toy`, each with another one, and their keys."""
    k_data, k_other, k_loss = jax.random.split(jax.random.key(3), 3)
    x0, label = toy().sample(k_data, count)
    other, _ = toy().sample(k_other, count)
    return Batch(x0, Condition(label), other), jax.random.split(k_loss, count)


def waves(x, sigma, condition):
    return jnp.tanh(2 * x + label_of(condition)[:, None])


def guidance_direction(*inputs):
    x, sigma, condition = inputs
    exact = toy()
    return exact.denoise(*inputs) - exact.denoise(x, sigma, with_label(condition, 3))


def slopes_in_standard_errors(objective, points, more=(), strength=(), **frozen):
    """The largest slope of the mean loss on `toy`, over its error, at each denoiser of `points`.

    Along the two directions above and `more`; of a parabola, for which this is exact.
    """
    directions, prior = (guidance_direction, waves, *more), (1 / 3, 1 / 3, 1 / 3)

    @jax.jit  # one loss for all places, which compiles in a tenth of the time
    def slopes():
        given = problem(Level(0.8), class_prior=prior, strength=strength), *draws(30_000)

        def slope(place):
            def loss(size):
                def moved(*inputs):
                    start = jnp.stack([point(*inputs) for point in points])[place[0]]
                    along = jnp.stack([along(*inputs) for along in directions])[place[1]]
                    return start + size * along

                return objective(models(moved, **frozen), *given)[0]

            return (loss(1.0) - loss(-1.0)) / 2

        places = jnp.indices((len(points), len(directions))).reshape(2, -1).T
        return jax.lax.map(slope, places).reshape(len(points), len(directions), -1)

    found = np.asarray(slopes(), np.float64)  # (points, directions, draws)
    return np.abs(found.mean(-1) / (found.std(-1) / np.sqrt(found.shape[-1]) + 1e-6)).max(-1)


# ---- objectives observed, to evaluate the equations of their papers in NumPy -------------------


def answer(scale, x, sigma, label, strength=0.0):
    """A denoiser whose answer tells all of its inputs apart."""
    return scale * x / (1 + sigma)[:, None] + (0.3 * label - 0.1 * strength * label)[:, None]


class Observed:
    """The denoiser `answer` of a scale, and the inputs of its calls as NumPy arrays.

    A frozen one is told strength 0, as by the Task.
    """

    def __init__(self, scale, frozen):
        self.scale, self.frozen, self.calls = scale, frozen, []

    def __call__(self, x, sigma, condition):
        strength = 0.0 if condition.strength is None or self.frozen else condition.strength
        told = np.broadcast_to(strength, len(x)).astype(np.float64)
        self.calls.append([np.asarray(a, np.float64) for a in (x, sigma, condition.label, told)])
        return answer(self.scale, x, sigma, label_of(condition), strength)

    def pairs(self):
        """(x, sigma, label, strength) of the first and the second half of the only call."""
        (call,) = self.calls
        return zip(*(np.split(part, 2) for part in call), strict=True)


def error(scale, x0, x, sigma, label, strength=0.0):
    """Mean square error (B,) of `answer`."""
    return ((answer(scale, x, sigma, label, strength) - x0) ** 2).mean(-1)


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


# ---- tasks ---------------------------------------------------------------------------------------

DATA = DataInfo((2,), 3, 1.0, (0.5, 0.3, 0.2))
OPTIONS = ("negatives", "weighting", "bound", "target", "negative_share", "sigma_interval",
           "strength")  # fmt: skip
BAND, RANGE = (0.2, 1.5), (0.0, 2.0)
MCLR = (
    ("prior", "none", "clip", "data", 0.5, BAND, RANGE),
    ("prior", "cfg", "clip", "reference", 0.25, (), ()),
    ("prior", "cfg", "none", "reference", 1.0, BAND, ()),
    ("mismatched", "none", "none", "reference", 0.25, (), RANGE),
    ("mismatched", "cfg", "none", "data", 1.0, BAND, ()),
    ("mismatched", "cfg", "clip", "reference", 0.5, BAND, RANGE),
    ("posterior", "none", "clip", "reference", 1.0, (), RANGE),
    ("posterior", "none", "none", "data", 0.5, (), ()),
    ("posterior", "none", "clip", "data", 0.25, BAND, RANGE),
)


TRAJECTORIES = DataInfo((8, 2), 3, 1.0)  # for the networks with frames


def _case(objective: str, posterior: str = "", strength: tuple = (), **options: Any) -> dict:
    """Changes of `tiny.config`."""
    changes = {"objective.name": objective, "strength": strength}
    if posterior:
        changes["posterior.name"] = posterior
    if objective != "classify":
        options["label_dropout"] = 0.3
    return changes | {f"objective.{key}": value for key, value in options.items()}


def _trajectories(noise: str, **changes: Any) -> dict:
    """Plain training of a trajectory network; its tokens are of 2 frames."""
    network = {"network.name": "trajectory", "network.frames_per_token": 2, "network.heads": 2}
    return _case("dsm") | network | {"noise.name": noise} | changes


def _mclr(row: tuple) -> dict:
    *options, strength = row
    return _case("mclr", "exact", strength, **dict(zip(OPTIONS, options, strict=False)))


CASES: dict[str, dict] = {
    "dsm": _case("dsm"),
    "dsm levels by frame": _trajectories("forcing"),
    "dsm variance": _trajectories("forcing", **{"network.variance": True}),
    "dsm fused weight": _trajectories("causal_forcing", weight="fused_snr"),
    "classify": _case("classify") | {"network.name": "mlp_classifier"},
    "cca": _case("cca"),
    "cca second positives": _case("cca", second_positives=True),
    "contrastive_flow": _case("contrastive_flow", contrast=0.2),
    "ddo": _case("ddo"),
    "dpo": _case("dpo", beta=10.0),  # 5000 makes rounding errors of the answers large
    "gft": _case("gft"),
    "gft strength": _case("gft", strength=(0.0, 4.0)),
    "model_guidance": _case("model_guidance"),
    "mclr_null": _case("mclr_null", wrong_label=0.5, negative_share=0.25, step_interval=(0.0, 9.0)),
    "mclr_null average": _case("mclr_null", strength=RANGE, teacher="average", wrong="weak"),
    "mclr classifier": _case("mclr", "classifier"),
    **{" ".join(["mclr", *(str(value) for value in row if value)]): _mclr(row) for row in MCLR},
}
ROWS = [*CASES][-len(MCLR) :]  # of MCLR's options


def config(case: str, **changes: Any) -> Any:
    """The config of a case, with dropout in the network."""
    return tiny.config("mixture", **CASES[case] | {"network.dropout": 0.3} | changes)


def task(case: str, **changes: Any) -> Task:
    """The task of a case, with changes of its config; the companions take no strength."""
    base = tiny.config("mixture", **{"network.dropout": 0.3})
    judge = tiny.classifier()
    judge.network.dropout = 0.3
    companions: dict[str, Model] = {
        "reference": Training.parse(base).model(DATA),
        "weak": Training.parse(base).model(DATA),
        "classifier": Training.parse(judge).model(DATA),
    }
    made = config(case, **changes)
    data = TRAJECTORIES if "frames_per_token" in made.network else DATA
    return Training.parse(made).task(data, companions)


def moved(tree: Any, seed: int, size: float = 0.1) -> Any:
    """Parameters with normal noise, so that those that start at zero have an effect."""
    rng = np.random.default_rng(seed)

    def shifted(x):  # in NumPy, which compiles nothing
        return jnp.asarray(np.asarray(x) + size * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map(shifted, tree)


def params(task: Task) -> Any:
    """Parameters of the model in training, none of which is zero."""
    return tiny.drawn(task.shapes, 1, 0.3)


def frozen(task: Task) -> dict[str, Any]:
    """Parameters of all frozen companions by name; each differs from the model in training."""
    return {n: tiny.weights(m, 2 + i, 0.3) for i, (n, m) in enumerate(task.frozen.items())}


def batch(task: Task, size: int = 16) -> dict[str, jax.Array]:
    """Rows (size, ...) of all that a batch may hold, as `data.pipeline` names it."""
    image, label = toy().sample(jax.random.key(3), size)
    if frames := task.model.frames:
        image, _ = toy().sample(jax.random.key(3), size * frames[0])
        image = image.reshape(size, *task.model.data.shape)
    rows = {"index": jnp.arange(size, dtype=jnp.int32), "image": image, "label": label}
    for seed, name in enumerate(sorted(task.needs & {"other", "generated"})):
        extra = toy().sample(jax.random.key(4 + seed), size)
        rows |= dict(zip((f"{name}_image", f"{name}_label"), extra, strict=True))
    return rows


# ---- runs ----------------------------------------------------------------------------------------


def untrained(workdir: Any, given: Any, step: int = 12, size: float = 0.3) -> None:
    """Write a run of a config: random weights, and another average of them."""
    _, model = tiny.describe(workdir, given=given)
    params = tiny.weights(model, 1, size)
    average = moved(params, 2, 0.03)
    tiny.with_weights(workdir, {"params": params, "ema": {"halflife": average}}, step)
