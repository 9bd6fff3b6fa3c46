"""The training state, and one update of it, written once for every device layout."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mclr_jax.experiment import Experiment


@struct.dataclass
class TrainState:
    """All that training changes. Randomness is addressed by (seed, step), so no key is kept.

    Attributes:
      step: () int32, updates done.
      params: the network's parameters.
      opt_state: optax state.
      ema: averages of params by track name, see `ema.tracks`.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: dict[str, Any]


def init_state(experiment: Experiment) -> TrainState:
    """The state before the first step; pure, so that it can be jitted with sharded results."""
    params = experiment.init()
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=experiment.optimizer.init(params),
        ema={name: params for name in experiment.ema_tracks},
    )


def example_keys(key: jax.Array, step: jax.Array, index: jax.Array) -> jax.Array:
    """Keys (B,) of the examples `index` (B,) of the batch of `step`, whatever holds them."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def _reduce(metrics: dict[str, jax.Array], mean: Callable, maximum: Callable) -> dict:
    """Metrics whose name ends in _max are reduced by their maximum, the others by their mean."""
    return {name: (maximum if name.endswith("_max") else mean)(x) for name, x in metrics.items()}


def _finish(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Puts the effective sample size of weights, as a share of all, for their mean square."""
    if "weight_square" in metrics:
        metrics["weight_ess"] = metrics["weight"] ** 2 / metrics.pop("weight_square")
    return metrics


def _mean_loss(experiment: Experiment, params, frozen, batch, keys):
    loss, metrics = experiment.loss(params, frozen, batch, keys, train=True)
    return loss.mean(), _reduce({"loss": loss} | metrics, jnp.mean, jnp.max)


def _gradients(experiment: Experiment, params, frozen, batch, keys):
    """Mean gradient and metrics over the batch, in config.grad_accumulation parts."""
    differentiate = jax.grad(functools.partial(_mean_loss, experiment), has_aux=True)

    def gradient(params, batch, keys):
        return differentiate(params, frozen, batch, keys)

    parts = experiment.config.grad_accumulation
    if parts == 1:
        return gradient(params, batch, keys)

    def split(x):  # every device keeps its own rows: row r goes to part r % parts
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        return jax.tree.map(jnp.add, total, gradient(params, *part)), None

    pieces = jax.tree.map(split, (batch, keys))
    first = jax.tree.map(lambda x: x[0], pieces)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(gradient, params, *first)
    )
    total, _ = jax.lax.scan(add, zeros, pieces)
    return jax.tree.map(lambda x: x / parts, total)


def make_update(experiment: Experiment, axis_name: str | None = None) -> Callable:
    """update(state, frozen, batches, count) -> (state, metrics): `count` steps in one dispatch.

    Args of update:
      state: TrainState.
      frozen: parameters that the objective needs and training leaves alone, see
        `Experiment.init_frozen`.
      batches: tree of (K, B, ...), of which the first count <= K are used. B counts the rows of
        this shard where axis_name is given, else all rows.
      count: () int32. It is traced: dispatches of any length run the same compiled steps, so that
        where a run was interrupted changes no bit of its result.

    Returns of update: the new state, and metrics by name, (K,), of which the first count are set.
    """
    key = experiment.step_key
    tracks = experiment.ema_tracks

    def one_step(state: TrainState, frozen, batch):
        if experiment.averages:
            frozen = frozen | {"average": next(iter(state.ema.values()), state.params)}
        keys = example_keys(key, state.step, batch["index"])
        gradients, metrics = _gradients(experiment, state.params, frozen, batch, keys)
        if axis_name is not None:
            gradients = jax.lax.pmean(gradients, axis_name)
            over_devices = [
                functools.partial(f, axis_name=axis_name) for f in (jax.lax.pmean, jax.lax.pmax)
            ]
            metrics = _reduce(metrics, *over_devices)
        updates, opt_state = experiment.optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        averages = {
            name: optax.incremental_update(params, state.ema[name], 1 - decay(state.step))
            for name, decay in tracks.items()
        }
        metrics = _finish(metrics) | {"grad_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, opt_state, averages), metrics

    def update(state: TrainState, frozen, batches, count):
        def body(i, carry):
            state, log = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, metrics = one_step(state, frozen, batch)
            return state, jax.tree.map(lambda rows, value: rows.at[i].set(value), log, metrics)

        first = jax.tree.map(lambda x: x[0], batches)
        _, metrics = jax.eval_shape(one_step, state, frozen, first)
        length = len(batches["index"])
        log = jax.tree.map(lambda value: jnp.zeros((length,), value.dtype), metrics)
        return jax.lax.fori_loop(0, count, body, (state, log))

    return update


def make_evaluate(experiment: Experiment) -> Callable:
    """evaluate(params, frozen, batches) -> loss and metrics over all of batches (K, B, ...).

    Noise is that of a step that training never reaches: the same for every checkpoint, so that
    their losses can be compared.
    """

    def evaluate(params, frozen, batches):
        frozen = frozen | {"average": params}

        def one(number, batch):
            keys = example_keys(experiment.eval_key, number, batch["index"])
            loss, metrics = experiment.loss(params, frozen, batch, keys, train=False)
            return {"loss": loss} | metrics

        numbers = jnp.arange(len(batches["index"]))
        metrics = jax.lax.map(lambda pair: one(*pair), (numbers, batches))
        return _finish(_reduce(metrics, jnp.mean, jnp.max))

    return evaluate
