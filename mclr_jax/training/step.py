"""The training state and its update, written once for all device layouts."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from mclr_jax import backend
from mclr_jax.reductions import Metrics, mean, over_devices, over_rows
from mclr_jax.task import Task

BLOCK = 4  # rows that accumulation keeps together, for losses of every second or fourth row


@struct.dataclass
class TrainState:
    """Everything that training changes. Random keys follow from (seed, step) and are not stored."""

    step: jax.Array  # () int32, number of updates done
    params: Any  # parameters of the network
    opt_state: Any  # optax state
    ema: dict[str, Any]  # averages of params by the name of the track, see `ema.tracks`


def init_state(task: Task, params: Any = None) -> TrainState:
    """The state before the first step, of the initial parameters `task.init()` or of others."""
    params = task.model.normalised(task.init() if params is None else params)
    averages = {name: params for name in task.averages}
    return TrainState(jnp.int32(0), params, task.optimizer.init(params), averages)


def example_keys(key: jax.Array, step: jax.Array, index: jax.Array) -> jax.Array:
    """Keys (B,) of the examples numbered `index` (B,) in the batch of `step`, on any device."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), index)


def _parts(tree: Any, parts: int) -> Any:
    """(B, ...) -> (parts, B / parts, ...) without moving rows between devices or cutting blocks."""

    def split(x):
        block = math.gcd(BLOCK, len(x) // parts)
        x = x.reshape(-1, parts, block, *x.shape[1:]).swapaxes(0, 1)
        return x.reshape(parts, -1, *x.shape[3:])

    return jax.tree.map(split, tree)


def _gradients(task: Task, params, frozen, batch, keys) -> tuple[Any, Metrics]:
    """Mean gradient over the batch, in task.grad_accumulation parts, and metrics."""

    def mean_loss(params, batch, keys):
        loss, metrics = task.loss(params, frozen, batch, keys, train=True)
        return loss.mean(), over_rows({**metrics, "loss": mean(loss)})

    gradient = jax.grad(mean_loss, has_aux=True)
    parts = task.grad_accumulation
    if parts == 1:
        return gradient(params, batch, keys)

    def accumulate(total, part):
        gradients, metrics = gradient(params, *part)
        return jax.tree.map(jnp.add, total, gradients), metrics

    # Inside a loop XLA:CPU computes the gradients of convolutions with slow code.
    unroll = parts if backend.traced_for() == "cpu" else 1
    zeros, pieces = jax.tree.map(jnp.zeros_like, params), _parts((batch, keys), parts)
    total, metrics = jax.lax.scan(accumulate, zeros, pieces, unroll=unroll)
    return jax.tree.map(lambda x: x / parts, total), over_rows(metrics)


def make_update(task: Task, axis_name: str | None = None) -> Callable:
    """update(state, frozen, batches, count) -> (state, metrics): `count` steps in one dispatch.

    `frozen` has the parameters of `task.frozen`. Of the batches, a tree of (K, B, ...), the first
    count <= K are used; B counts the rows of this shard if axis_name is given, else all rows. The
    parts of the metrics are (K,), of which the first `count` are set. `count` () int32 is traced:
    all dispatches run the same compiled steps, so that an interruption changes no bit of the
    result. K = 1 needs no loop and implies count = 1.
    """

    @jax.jit  # so that it is traced once, for the shapes of the metrics and for the loop
    def one_step(state: TrainState, frozen, batch):
        held = frozen | {"average": task.default(state.params, state.ema)}
        # The key is made in the program: one that is captured is read back from the device.
        keys = example_keys(task.step_key, state.step, batch["index"])
        if "step" in task.needs:
            batch = batch | {"step": jnp.full_like(batch["index"], state.step)}
        gradients, metrics = _gradients(task, state.params, held, batch, keys)
        if axis_name is not None:
            gradients = jax.lax.pmean(gradients, axis_name)
            metrics = over_devices(metrics, axis_name)
        updates, opt_state = task.optimizer.update(gradients, state.opt_state, state.params)
        params = task.model.normalised(optax.apply_updates(state.params, updates))
        averages = {
            name: optax.incremental_update(params, state.ema[name], 1 - decay(state.step))
            for name, decay in task.averages.items()
        }
        metrics |= over_rows({"grad_norm": mean(optax.tree.norm(gradients)[None])})
        return TrainState(state.step + 1, params, opt_state, averages), metrics

    def update(state: TrainState, frozen, batches, count):
        first = jax.tree.map(lambda x: x[0], batches)
        length = len(batches["index"])
        if length == 1:
            state, metrics = one_step(state, frozen, first)
            return state, jax.tree.map(lambda value: value[None], metrics)

        def body(i, carry):
            state, log = carry
            batch = jax.tree.map(lambda x: x[i], batches)
            state, metrics = one_step(state, frozen, batch)
            return state, jax.tree.map(lambda rows, value: rows.at[i].set(value), log, metrics)

        _, metrics = jax.eval_shape(one_step, state, frozen, first)
        log = jax.tree.map(lambda value: jnp.zeros((length,), value.dtype), metrics)
        return jax.lax.fori_loop(0, count, body, (state, log))

    return update


def make_evaluate(task: Task) -> Callable:
    """evaluate(params, frozen, batches (K, B, ...)) -> metrics reduced over all batches.

    The noise is the same for every checkpoint, so that losses of checkpoints can be compared.
    """

    def evaluate(params, frozen, batches):
        def one(numbered):
            number, batch = numbered
            keys = example_keys(task.eval_key, number, batch["index"])
            held = frozen | {"average": params}
            loss, metrics = task.loss(params, held, batch, keys, train=False)
            return over_rows({**metrics, "loss": mean(loss)})

        numbers = jnp.arange(len(batches["index"]))
        return over_rows(jax.lax.map(one, (numbers, batches)))

    return evaluate
