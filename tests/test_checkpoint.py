import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import SingleDeviceSharding

from mclr_jax.training.checkpoint import Checkpoints, MismatchError


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict


def state_at(step):
    params = {"a": jnp.full((40, 30), float(step)), "b": {"c": jnp.arange(3.0) + step}}
    return State(jnp.int32(step), params, {"halflife": jax.tree.map(lambda x: 2 * x, params)})


def like(tree):
    sharding = SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def write(directory, steps, losses=None):
    with Checkpoints(directory) as checkpoints:
        for i, step in enumerate(steps):
            metrics = {"loss": losses[i]} if losses else None
            checkpoints.save(step, state_at(step), {"position": step}, metrics)


def test_round_trip_of_the_newest_and_of_a_branch(tmp_path):
    write(tmp_path / "c", [10, 20])
    with Checkpoints(tmp_path / "c") as checkpoints:
        state, data, step = checkpoints.restore(like(state_at(0)))
        assert (step, data) == (20, {"position": 20})
        chex.assert_trees_all_equal(state, state_at(20))
        branch = {"ema": {"halflife": like(state_at(0).params)}}
        state, _, _ = checkpoints.restore(branch, step=10)
        chex.assert_trees_all_equal(state["ema"]["halflife"], state_at(10).ema["halflife"])


def test_nothing_there_gives_none(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(like(state_at(0))) is None


def test_the_last_two_and_the_best_are_kept(tmp_path):
    write(tmp_path / "c", [1, 2, 3, 4, 5], losses=[3.0, 1.0, 2.0, 4.0, 5.0])
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2


def cut_to_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damage_to_any_file_falls_back_or_does_not_matter(tmp_path, caplog):
    """Each file of the newest checkpoint in turn is cut to half, and then removed."""
    write(tmp_path / "good", [10, 20], losses=[1.0, 2.0])
    files = [
        p.relative_to(tmp_path / "good")
        for p in sorted((tmp_path / "good" / "20").rglob("*"))
        if p.is_file()
    ]
    fell_back = 0
    for i, file in enumerate(files):
        for j, damage in enumerate([cut_to_half, pathlib.Path.unlink]):
            run = tmp_path / f"{i}_{j}"
            shutil.copytree(tmp_path / "good", run / "c")
            damage(run / "c" / file)
            caplog.clear()
            with Checkpoints(run / "c") as checkpoints:
                state, data, step = checkpoints.restore(like(state_at(0)))
                chex.assert_trees_all_equal(state, state_at(step))
                assert data == {"position": step}
                if step == 10:
                    fell_back += 1
                    assert "20 cannot be read" in caplog.text
                    assert (run / "broken" / "20").exists()
                    checkpoints.save(20, state_at(20), {}, {"loss": 0.0})  # the way is free again
                    checkpoints.wait()
                    assert checkpoints.steps() == [10, 20]
    assert fell_back > len(files) / 2


def test_all_broken_is_an_error_and_not_a_new_start(tmp_path):
    write(tmp_path / "c", [10, 20])
    for step in ("10", "20"):
        shutil.rmtree(tmp_path / "c" / step / "state")
    with Checkpoints(tmp_path / "c") as checkpoints, pytest.raises(RuntimeError, match="broken"):
        checkpoints.restore(like(state_at(0)))


def test_another_architecture_names_the_first_differing_parameter(tmp_path):
    write(tmp_path / "c", [10])
    other = state_at(0).replace(params={"a": jnp.zeros((40, 31)), "b": {"c": jnp.zeros(3)}})
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(MismatchError, match=r"params/a: expected shape \(40, 31\).*\(40, 30\)"):
            checkpoints.restore(like(other))
        missing = state_at(0).replace(params={"z": np.zeros(3)})
        with pytest.raises(MismatchError, match=r"params/z.*no such parameter"):
            checkpoints.restore(like(missing))
        with pytest.raises(RuntimeError, match=r"No checkpoint of step 7.*\[10\]"):
            checkpoints.restore(like(state_at(0)), step=7)
        assert checkpoints.steps() == [10]
