import pathlib
import resource
import shutil
import types
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from jax.sharding import SingleDeviceSharding

from mclr_jax.files import read_lines
from mclr_jax.training import checkpoint
from mclr_jax.training.checkpoint import Checkpoints, MismatchError, digests


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    ema: dict


def lowest(checkpoints):
    """The step with the lowest loss, which is kept beside the newest; None: none has a loss."""
    return checkpoints._lowest("loss", checkpoints.steps())


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
            checkpoints.save(step, state_at(step), metrics)


def test_round_trip_of_the_newest_and_of_a_branch(tmp_path):
    with Checkpoints(tmp_path / "c") as checkpoints:
        assert checkpoints.restore(like(state_at(0))) is None
    write(tmp_path / "c", [10, 20])
    with Checkpoints(tmp_path / "c") as checkpoints:
        state, step = checkpoints.restore(like(state_at(0)))
        assert step == 20
        chex.assert_trees_all_equal(state, state_at(20))
        branch = {"ema": {"halflife": like(state_at(0).params)}}
        state, step = checkpoints.restore(branch, step=10)
        assert step == 10
        chex.assert_trees_all_equal(state["ema"]["halflife"], state_at(10).ema["halflife"])


@pytest.mark.parametrize(("keep", "kept"), [(1, [1, 3, 6]), (3, [1, 3, 4, 5, 6]), (0, [1, 3])])
def test_the_lowest_loss_and_the_last_before_a_warning_are_kept_across_runs(tmp_path, keep, kept):
    """Some checkpoints lack one metric, some both, and some have one that is not a number."""
    no_numbers = {"loss": float("nan"), "memorization": float("nan")}
    metrics = [{"loss": 1.0, "memorization": 0.0}, no_numbers, {"memorization": 0.0}, None,
               {"loss": 2.0}, {"loss": 3.0, "memorization": 1.0}]  # fmt: skip
    for step, values in enumerate(metrics, 1):
        with Checkpoints(tmp_path / "c", keep) as checkpoints:
            checkpoints.save(step, state_at(step), values)
    with Checkpoints(tmp_path / "c", keep) as checkpoints:
        assert checkpoints.steps() == kept
        assert lowest(checkpoints) == 1


def test_without_a_limit_all_are_kept(tmp_path):
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        for step in range(5):
            checkpoints.save(step, state_at(step))
        assert checkpoints.steps() == [0, 1, 2, 3, 4]
        assert lowest(checkpoints) is None
        checkpoints.save(3, state_at(7), {"loss": 0.0})  # it is saved already
        assert lowest(checkpoints) is None
        chex.assert_trees_all_equal(checkpoints.restore(like(state_at(0)), 3), (state_at(3), 3))


def test_the_best_is_remembered_until_its_successor_is_on_disk(tmp_path):
    """A kill between the two leaves the old best, which must still be known for it."""
    write(tmp_path / "c", [10, 20], losses=[1.0, 2.0])
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        checkpoints.save(30, state_at(30), {"loss": 0.5})
        shutil.copy(tmp_path / "c" / "metrics.jsonl", tmp_path)
        checkpoints.wait()
        assert (checkpoints.steps(), lowest(checkpoints)) == ([30], 30)
    write(tmp_path / "killed", [10, 20])
    shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "killed")
    with Checkpoints(tmp_path / "killed", keep=1) as checkpoints:
        assert lowest(checkpoints) == 10  # not 30, of which there is a record only
        checkpoints.save(30, state_at(30))  # now without metrics: the old record must go
        checkpoints.wait()
        assert (checkpoints.steps(), lowest(checkpoints)) == ([10, 30], 10)
        checkpoints.save(40, state_at(40))
        records = list(read_lines(tmp_path / "killed" / "metrics.jsonl"))
        assert [record["step"] for record in records] == [10, 30, 40]  # it does not grow for ever


@pytest.mark.parametrize(("damage", "best"), [
    (lambda file: file.unlink(), None),
    (lambda file: file.write_text(""), None),
    (lambda file: file.write_bytes(b"\xff\x00{"), None),
    (lambda file: file.write_text('{"step": 10, "loss": "1"}\n{"step": 20, "loss": null}'), None),
    (lambda file: file.write_text('3\n"x"\n{"loss": 1}\n{"step": 10, "loss": [1]}\n'), None),
    (lambda file: cut_to_half(file), 10),  # the first line is whole
    (lambda file: file.write_text(file.read_text().replace("1.0", "1.0.")), 20),
])  # fmt: skip
def test_damaged_metrics_only_hide_the_best(tmp_path, damage, best):
    write(tmp_path / "c", [10, 20], losses=[1.0, 2.0])
    damage(tmp_path / "c" / "metrics.jsonl")
    with Checkpoints(tmp_path / "c", keep=1) as checkpoints:
        assert lowest(checkpoints) == best
        chex.assert_trees_all_equal(checkpoints.restore(like(state_at(0))), (state_at(20), 20))
        checkpoints.save(30, state_at(30), {"loss": 3.0})
        assert checkpoints.steps() == ([30] if best is None else [best, 30])
        assert lowest(checkpoints) == (best or 30)


def cut_to_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def test_damage_to_any_file_falls_back_or_does_not_matter(tmp_path, caplog):
    """Each file of the newest checkpoint in turn is cut to half, emptied, and removed."""
    write(tmp_path / "good", [10, 20], losses=[1.0, 2.0])
    found = sorted((tmp_path / "good" / "20").rglob("*"))
    files, fell_back = [p.relative_to(tmp_path / "good") for p in found if p.is_file()], 0
    for i, file in enumerate(files):
        for j, damage in enumerate([cut_to_half, empty, pathlib.Path.unlink]):
            run = tmp_path / f"{i}_{j}"
            shutil.copytree(tmp_path / "good", run / "c")
            damage(run / "c" / file)
            caplog.clear()
            with Checkpoints(run / "c") as checkpoints:
                state, step = checkpoints.restore(like(state_at(0)))
                chex.assert_trees_all_equal(state, state_at(step))
                if step == 10:
                    fell_back += 1
                    assert "20 cannot be read" in caplog.text
                    assert (run / "broken" / "20").exists()
                    assert lowest(checkpoints) == 10
    assert fell_back > 3 / 4 * len(files)  # a quarter of all cases; the rest holds nothing needed


def test_a_reader_leaves_alone_what_is_being_written(tmp_path):
    write(tmp_path / "c", [10])
    unfinished = [tmp_path / "c" / f"{step}.orbax-checkpoint-tmp" for step in (15, 20)]
    for folder in unfinished:
        (folder / "state").mkdir(parents=True)
        (folder / "state" / "manifest.ocdbt").write_text("half")
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        assert checkpoints.steps() == [10]
        checkpoints.save(15, state_at(15))  # as snapshots are: over what a killed run left
    assert unfinished[1].exists()
    write(tmp_path / "c", [25])  # the run goes on, and cleans up
    assert not any(folder.exists() for folder in unfinished)
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        assert checkpoints.steps() == [15, 25]
        chex.assert_trees_all_equal(checkpoints.restore(like(state_at(0)), 15), (state_at(15), 15))


def test_a_reader_moves_nothing_and_where_all_are_broken_that_is_an_error_each_time(tmp_path):
    write(tmp_path / "c", [10, 20])
    shutil.rmtree(tmp_path / "c" / "20" / "state")
    with Checkpoints(tmp_path / "c", keep=None) as checkpoints:
        assert checkpoints.restore(like(state_at(0)))[1] == 10
    shutil.rmtree(tmp_path / "c" / "10" / "state")
    message = r"None of the checkpoints \[20, 10\].*--restart"
    for _ in range(2):
        with Checkpoints(tmp_path / "c") as checkpoints:
            with pytest.raises(RuntimeError, match=message):
                checkpoints.restore(like(state_at(0)))
    assert (tmp_path / "c" / "20").exists()
    assert not (tmp_path / "broken").exists()


def noise_at(step):
    """A state of numbers that do not compress, most of its bytes on disk."""
    x = jax.random.normal(jax.random.key(step), (64, 64))
    return State(jnp.int32(step), {"a": x}, {"halflife": {"a": -x}})


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_is_found_and_the_checkpoint_before_is_read(tmp_path, caplog, seed):
    with Checkpoints(tmp_path / "c") as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, noise_at(step))
    # Of the file that has most of the arrays.
    file = max((tmp_path / "c" / "20").rglob("d/*"), key=lambda path: path.stat().st_size)
    content, rng = bytearray(file.read_bytes()), np.random.default_rng(seed)
    content[rng.integers(len(content) // 4, 3 * len(content) // 4)] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    with Checkpoints(tmp_path / "c") as checkpoints:
        state, step = checkpoints.restore(like(noise_at(0)))
    assert step == 10
    assert "20 cannot be read" in caplog.text
    chex.assert_trees_all_equal(state, noise_at(10))


def test_a_checkpoint_that_cannot_be_written_is_named(tmp_path):
    """Files of at most 4 kB, for this process, are like a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"a": jnp.asarray(np.random.default_rng(0).normal(size=100_000), jnp.float32)}
    checkpoints = Checkpoints(tmp_path / "c")
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        checkpoints.save(1, state)
        with pytest.raises(OSError, match=r"could not be written to .*/c \(.*[Ff]ile too large"):
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "c").glob("1"))


def test_a_checkpoint_that_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    """16,000 bytes and 1 MB on a disk with that many free, and with one less."""
    state, free = {"a": jnp.ones((4000,))}, [16_000 + 2**20]
    usage = lambda path: types.SimpleNamespace(free=free[0])  # noqa: E731
    monkeypatch.setattr(checkpoint, "disk_usage", usage)
    with Checkpoints(tmp_path / "c") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        before = (tmp_path / "c" / "metrics.jsonl").read_bytes()
        free[0] -= 1
        with pytest.raises(OSError, match=r"needs 1\.1 MB; the disk of .*/c has 1\.1 MB free"):
            checkpoints.save(2, state)
    assert (tmp_path / "c" / "metrics.jsonl").read_bytes() == before
    assert not list((tmp_path / "c").glob("2*"))


def test_a_checkpoint_under_another_step_is_refused(tmp_path):
    write(tmp_path / "c", [10])
    shutil.copytree(tmp_path / "c" / "10", tmp_path / "c" / "30")
    with Checkpoints(tmp_path / "c") as checkpoints:
        with pytest.raises(RuntimeError, match="checkpoint 30: it is a copy of checkpoint 10"):
            checkpoints.restore(like(state_at(0)), 30)
        assert checkpoints.restore(like(state_at(0)))[1] == 10


def test_a_checkpoint_of_an_older_version_is_read_with_a_warning(tmp_path, caplog):
    write(tmp_path / "c", [10])
    shutil.rmtree(tmp_path / "c" / "10" / "digest")
    with Checkpoints(tmp_path / "c") as checkpoints:
        chex.assert_trees_all_equal(checkpoints.restore(like(state_at(0))), (state_at(10), 10))
    assert "10 has no digest" in caplog.text


def test_a_step_that_breaks_again_is_set_aside_beside_the_first(tmp_path):
    for _ in range(3):
        write(tmp_path / "c", [10, 20])
        shutil.rmtree(tmp_path / "c" / "20" / "state")
        with Checkpoints(tmp_path / "c") as checkpoints:
            assert checkpoints.restore(like(state_at(0)))[1] == 10
    found = sorted(path.name for path in (tmp_path / "broken").iterdir())
    assert found == ["20", "20_", "20__"]


def test_the_digest_is_its_definition_and_that_of_earlier_versions():
    """In whole numbers of Python; with other digests, old checkpoints would count as broken."""
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": {"c": np.array([1, -2], np.int32), "d": np.array([True, False])},
        "e": jnp.array([1.5], jnp.bfloat16),
    }
    bits = {"a": [np.float32(n).view(np.uint32) for n in range(6)], "b/c": [1, 2**32 - 2],
            "b/d": [1, 0], "e": [0x3FC0]}  # fmt: skip
    kinds = {"a": "(2, 3)float32", "b/c": "(2,)int32", "b/d": "(2,)bool", "e": "(1,)bfloat16"}
    expected = {
        name: (zlib.crc32(kinds[name].encode())
               + sum(int(n) * (2 * (i + 1) * 2654435761 + 1) for i, n in enumerate(bits[name])))
        % 2**32
        for name in bits
    }  # fmt: skip
    assert digests(arrays) == expected
    assert expected == {"a": 2986991379, "b/c": 1536961548, "b/d": 4104545962, "e": 3512861366}


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
