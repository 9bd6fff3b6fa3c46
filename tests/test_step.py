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
from mclr_jax.data import pipeline, sources
from mclr_jax.training import step


def setup(**changes):
    config = tiny.config(**changes)
    source = sources.from_config(config.data, "train", config.seed)
    task = Training.parse(config).task(Training.parse(config).data_info(source), {})
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

    params, opt_state, averages = state.params, state.opt_state, state.ema
    for i in range(2):
        batch = {name: rows[i] for name, rows in data.items()}
        keys = step.example_keys(task.step_key, i, batch["index"])

        def loss(params, batch=batch, keys=keys):
            return task.loss(params, {}, batch, keys, train=True)[0].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        numbers = report(found, i)
        np.testing.assert_allclose(numbers["loss"], value, rtol=1e-5)
        np.testing.assert_allclose(numbers["grad_norm"], optax.tree.norm(gradient), rtol=1e-4)
        updates, opt_state = task.optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, decay in task.averages.items():
            beta = float(decay(i))
            averages[name] = jax.tree.map(
                lambda e, p, b=beta: b * e + (1 - b) * p, averages[name], params
            )
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
    np.testing.assert_array_equal(
        [report(found, row)["loss"] for row in range(5)], np.concatenate(losses)
    )


def test_evaluation_is_repeatable_and_without_dropout():
    task, source, state = setup(**{"network.dropout": 0.5})
    params = jax.tree.map(lambda x: x + 0.02, state.params)  # zero-initialised layers move
    data = batches(source, 3)
    evaluate = jax.jit(step.make_evaluate(task))
    first, again = evaluate(params, {}, data), evaluate(params, {}, data)
    chex.assert_trees_all_equal(first, again)
    plain, _, _ = setup(**{"network.dropout": 0.0})
    expected = reductions.report(
        jax.device_get(jax.jit(step.make_evaluate(plain))(params, {}, data))
    )
    chex.assert_trees_all_close(reductions.report(jax.device_get(first)), expected, rtol=1e-5)


def test_evaluation_is_the_mean_over_all_examples():
    task, source, state = setup()
    data = batches(source, 3)
    found = reductions.report(
        jax.device_get(jax.jit(step.make_evaluate(task))(state.params, {}, data))
    )
    losses = []
    for number in range(3):
        batch = {name: rows[number] for name, rows in data.items()}
        keys = step.example_keys(task.eval_key, number, batch["index"])
        losses.append(task.loss(state.params, {}, batch, keys, train=False)[0])
    np.testing.assert_allclose(found["loss"], np.mean(losses), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class Extremes:
    """An objective without a network in its loss but for a linear pull; every kind of metric."""

    needs = frozenset[str]()

    def __call__(self, models, problem, batch, keys):
        label = batch.condition.label
        value = batch.x0[:, 0]
        zeros = jnp.zeros(len(label))
        pull = models.denoise(batch.x0, jnp.ones(len(label)), batch.condition).mean(-1)
        return pull, {
            "value_max": reductions.maximum(value),
            "negative_max": reductions.maximum(value - 100),
            "some": reductions.mean(value, where=label == 0),
            "none": reductions.mean(value, where=label < 0),
            "ratio": reductions.ratio(value, value**2),
            "share": reductions.effective_share(jnp.abs(value)),
            "nothing": reductions.effective_share(zeros),
        }

    def advice(self):
        return ""


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_metrics_of_a_batch_in_parts_are_those_of_the_batch(parts):
    """Maxima, also of negative numbers; means over a subset whose size differs between parts."""
    task, source, state = setup()
    task = dataclasses.replace(task, objective=Extremes(), grad_accumulation=parts)
    data = batches(source, 1)
    _, found = jax.jit(step.make_update(task))(state, {}, data, 1)
    value, label = data["image"][0][:, 0], data["label"][0]
    got, size = report(found, 0), np.abs(value)
    for name, expected in {
        "value_max": value.max(),
        "negative_max": value.max() - 100,
        "some": value[label == 0].mean(),
        "ratio": value.sum() / (value**2).sum(),
        "share": size.sum() ** 2 / (len(value) * (value**2).sum()),
        "nothing": 0.0,
    }.items():
        np.testing.assert_allclose(got[name], expected, rtol=1e-5, err_msg=name)
    assert "none" not in got


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
