import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from mclr_jax.data import pipeline
from mclr_jax.training import loop, step


def setup(**changes):
    config = tiny.config(**changes)
    source = loop.load_source(config, "train")
    experiment = loop.make_experiment(config, source)
    return experiment, source, step.init_state(experiment)


def batches(experiment, source, count, length=None):
    stream = pipeline.stream(source, experiment.config.batch_size, experiment.config.seed)
    return loop.stack(stream, count, length or count)


def test_an_update_is_the_optimizer_on_the_mean_gradient():
    """Two steps against optax, jax.grad and the EMA formula used directly."""
    experiment, source, state = setup()
    data = batches(experiment, source, 2)
    got, metrics = jax.jit(step.make_update(experiment))(state, {}, data, 2)

    params, opt_state, averages = state.params, state.opt_state, state.ema
    for i in range(2):
        batch = {name: rows[i] for name, rows in data.items()}
        keys = step.example_keys(experiment.step_key, i, batch["index"])

        def loss(params, batch=batch, keys=keys):
            return experiment.loss(params, {}, batch, keys, train=True)[0].mean()

        value, gradient = jax.value_and_grad(loss)(params)
        np.testing.assert_allclose(metrics["loss"][i], value, rtol=1e-5)
        np.testing.assert_allclose(metrics["grad_norm"][i], optax.tree.norm(gradient), rtol=1e-4)
        updates, opt_state = experiment.optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, decay in experiment.ema_tracks.items():
            beta = float(decay(i))
            averages[name] = jax.tree.map(
                lambda e, p, b=beta: b * e + (1 - b) * p, averages[name], params
            )
    chex.assert_trees_all_close(got.params, params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(got.ema, averages, rtol=1e-4, atol=1e-6)
    assert int(got.step) == 2


def test_dispatches_of_any_length_give_the_same_bits_and_compile_once():
    experiment, source, state = setup()
    data = batches(experiment, source, 5)
    traced = chex.assert_max_traces(step.make_update(experiment), n=1)
    update = jax.jit(traced)
    whole, metrics = update(state, {}, data, 5)
    parts, start, losses = state, 0, []
    for count in (2, 1, 2):
        rows = np.resize(np.arange(start, start + count), 5)
        parts, log = update(parts, {}, jax.tree.map(lambda x, r=rows: x[r], data), count)
        losses.append(np.asarray(log["loss"][:count]))
        start += count
    chex.assert_trees_all_equal(whole, parts)
    np.testing.assert_array_equal(metrics["loss"], np.concatenate(losses))


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_those_of_the_whole_batch(parts):
    experiment, source, state = setup()
    accumulating, _, _ = setup(grad_accumulation=parts)
    data = batches(experiment, source, 2)
    whole, log = jax.jit(step.make_update(experiment))(state, {}, data, 2)
    split, split_log = jax.jit(step.make_update(accumulating))(state, {}, data, 2)
    chex.assert_trees_all_close(log, split_log, rtol=1e-4)
    chex.assert_trees_all_close(whole.params, split.params, rtol=1e-3, atol=1e-5)


def test_evaluation_is_repeatable_and_without_dropout():
    experiment, source, state = setup(**{"network.dropout": 0.5})
    params = jax.tree.map(lambda x: x + 0.02, state.params)  # zero-initialised layers move
    data = batches(experiment, source, 3)
    evaluate = jax.jit(step.make_evaluate(experiment))
    first, again = evaluate(params, {}, data), evaluate(params, {}, data)
    chex.assert_trees_all_equal(first, again)
    plain, _, _ = setup(**{"network.dropout": 0.0})
    chex.assert_trees_all_close(
        jax.jit(step.make_evaluate(plain))(params, {}, data), first, rtol=1e-5
    )


def test_keys_address_the_example_and_the_step():
    key = jax.random.key(0)
    keys = step.example_keys(key, jnp.int32(3), jnp.array([5, 1]))
    expected = jax.random.fold_in(jax.random.fold_in(key, 3), 1)
    chex.assert_trees_all_equal(jax.random.key_data(keys[1]), jax.random.key_data(expected))
