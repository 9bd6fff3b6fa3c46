import dataclasses

import accelerator_sections as sections
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mclr_jax import plan, reductions
from mclr_jax.config import OBJECTIVES, Training
from mclr_jax.data import pipeline
from mclr_jax.training import step


def setup(**changes):
    training = Training.parse(tiny.config(**changes))
    source = training.data.source("train", 0)
    task = training.task(training.data_info(source), {})
    return task, source, step.init_state(task)


def batches(source, count, length=None):
    config = tiny.config()
    stream = pipeline.stream(source, config.batch_size, config.seed)
    return pipeline.stack(stream, count, length or count)


def report(reduced, row):
    """The numbers of one step."""
    return reductions.report(jax.tree.map(lambda x: x[row], jax.device_get(reduced)))


def test_an_update_is_the_optimizer_on_the_mean_gradient():
    """Two steps against optax, jax.grad and the EMA formula used directly."""
    task, source, state = setup(**tiny.POWER)
    data = batches(source, 2)
    got, found = jax.jit(step.make_update(task))(state, {}, data, 2)

    @jax.jit
    def by_hand(params, opt_state, batch, i):
        keys = step.example_keys(task.step_key, i, batch["index"])

        def loss(params):
            return task.loss(params, {}, batch, keys, train=True)[0].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, opt_state = task.optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, value, optax.tree.norm(gradient)

    params, opt_state, averages = state.params, state.opt_state, state.ema
    for i in range(2):
        batch = {name: rows[i] for name, rows in data.items()}
        params, opt_state, value, norm = by_hand(params, opt_state, batch, i)
        numbers = report(found, i)
        np.testing.assert_allclose(numbers["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(numbers["grad_norm"], norm, rtol=1e-4)
        for name, decay in task.averages.items():
            beta = float(decay(i))
            averages[name] = jax.tree.map(
                lambda e, p, b=beta: b * np.asarray(e) + (1 - b) * np.asarray(p),
                averages[name], params,
            )  # fmt: skip
    chex.assert_trees_all_close(got.params, params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(got.ema, averages, rtol=1e-4, atol=1e-6)
    assert int(got.step) == 2


def captured(program):
    """Arrays of a device that a traced program and the programs in it hold."""
    found = [value for value in getattr(program, "consts", ()) if isinstance(value, jax.Array)]
    for equation in getattr(program, "eqns", ()):
        for value in jax.tree.leaves(list(equation.params.values())):
            found += captured(value)
    inner = getattr(program, "jaxpr", program)
    return found if inner is program else found + captured(inner)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_captures_no_array_of_a_device(name):
    """JAX would read it back to compile the step, which the loop does not allow on a GPU."""
    task = sections.TINY_MLP.task(name)
    if name == "classify":
        task = dataclasses.replace(task, model=task.companions["classifier"])
    arguments = plan.shapes(task, batch_size=8, length=2)
    assert not captured(jax.make_jaxpr(step.make_update(task))(*arguments))
    key = jax.random.key(0)
    assert captured(jax.make_jaxpr(jax.jit(lambda x: x + jax.random.normal(key)))(1.0))


def test_dispatches_of_any_length_give_the_same_bits_and_compile_once():
    task, source, state = setup()
    data = batches(source, 5)
    traced = chex.assert_max_traces(step.make_update(task), n=1)
    update = jax.jit(traced)
    whole, found = update(state, {}, data, 5)
    parts, start, losses = state, 0, []
    for count in (2, 1, 2):
        rows = np.resize(np.arange(start, start + count), 5)
        parts, log = update(parts, {}, jax.tree.map(lambda x, r=rows: x[r], data), count)
        losses.append([report(log, row)["loss"] for row in range(count)])
        start += count
    chex.assert_trees_all_equal(whole, parts)
    expected = [report(found, row)["loss"] for row in range(5)]
    np.testing.assert_array_equal(expected, np.concatenate(losses))


def test_the_objective_is_told_the_number_of_the_step():
    task, source, state = setup()

    @dataclasses.dataclass(frozen=True)
    class Count:
        needs = frozenset({"step"})

        def __call__(self, models, problem, batch, keys):
            answer = models.denoise(batch.x0, jnp.ones(len(batch.x0)), batch.condition)
            return batch.step + 0 * answer.mean(-1), {}

    update = jax.jit(step.make_update(dataclasses.replace(task, objective=Count())))
    found = update(state.replace(step=jnp.int32(7)), {}, batches(source, 2), 2)[1]
    assert [report(found, row)["loss"] for row in (0, 1)] == [7.0, 8.0]


def test_evaluation_is_repeatable_and_without_dropout():
    """It is the mean over all examples."""
    task, source, state = setup(**{"network.dropout": 0.5})
    params = jax.tree.map(lambda x: x + 0.02, state.params)  # zero-initialised layers move
    data = batches(source, 3)
    evaluate = jax.jit(step.make_evaluate(task))
    first, again = evaluate(params, {}, data), evaluate(params, {}, data)
    chex.assert_trees_all_equal(first, again)
    plain, _, _ = setup(**{"network.dropout": 0.0})

    @jax.jit
    def loss(batch, number):
        keys = step.example_keys(plain.eval_key, number, batch["index"])
        return plain.loss(params, {}, batch, keys, train=False)[0]

    losses = [loss({name: rows[n] for name, rows in data.items()}, n) for n in range(3)]
    found = reductions.report(jax.device_get(first))
    np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-5)


def test_keys_address_the_example_and_the_step():
    key = jax.random.key(0)
    keys = step.example_keys(key, jnp.int32(3), jnp.array([5, 1]))
    expected = jax.random.fold_in(jax.random.fold_in(key, 3), 1)
    chex.assert_trees_all_equal(jax.random.key_data(keys[1]), jax.random.key_data(expected))


def test_the_parts_of_accumulation_keep_whole_blocks_on_their_device():
    """8 devices of 8 rows, in 2 parts: each part has whole blocks of 4, from every device."""
    first, second = step._parts(np.arange(64), 2)
    assert first.tolist() == [row for row in range(64) if row % 8 < 4]
    assert sorted([*first, *second]) == list(range(64))
    assert step._parts(np.arange(4), 4).tolist() == [[0], [1], [2], [3]]  # too few for blocks
