"""Batches against the arithmetic they promise."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mclr_jax.data import pipeline
from mclr_jax.data.protocol import Arrays, Lazy, Subset

LENGTH = 23


def source(lazy: bool, decoded=None):
    """Example i is an image of value i with label i % 3; `decoded` collects what was read."""

    def read(index):
        if decoded is not None:
            decoded.append(index)
        return np.full((2, 2, 1), index, np.uint8), index % 3

    labels = np.arange(LENGTH, dtype=np.int32) % 3
    if lazy:
        return Lazy(LENGTH, (2, 2, 1), 3, read, lambda: labels)
    return Arrays(np.stack([read(i)[0] for i in range(LENGTH)]), labels, 3)


def take(stream, n):
    return list(itertools.islice(stream, n))


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def assert_same(got, expected):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys() == {"image", "label", "index"}
        for name in one:
            np.testing.assert_array_equal(one[name], other[name])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**40),
    length=st.integers(1, 40),
    batch_size=st.integers(1, 100),
    first=st.integers(0, 50),
)
def test_every_epoch_has_every_example_once(seed, length, batch_size, first):
    """Also for batches larger than the set, in an order that does not depend on the batch size;
    and each step is as if asked for alone."""
    steps = range(first, first + 2 + 2 * length // batch_size)
    parts = [pipeline.step_indices(seed, step, batch_size, length) for step in steps]
    assert all(part.shape == (batch_size,) and part.dtype == np.int64 for part in parts)
    flat = np.concatenate(parts)
    one = pipeline.step_indices(seed, 0, steps.stop * batch_size, length)
    np.testing.assert_array_equal(flat, one[first * batch_size :])
    start = -first * batch_size % length
    whole = flat[start : start + (len(flat) - start) // length * length].reshape(-1, length)
    assert len(whole) >= 1
    expected = np.tile(np.arange(length), (len(whole), 1))
    np.testing.assert_array_equal(np.sort(whole, axis=1), expected)
    pipeline._permutation.cache_clear()
    again = pipeline.step_indices(seed, steps[-1], batch_size, length)
    np.testing.assert_array_equal(again, parts[-1])


@given(seed=st.integers(0, 2**32 - 10), epoch=st.integers(0, 8), other=st.integers(0, 8))
def test_epochs_and_seeds_differ(seed, epoch, other):
    """Of neighbouring seeds too, at whatever epochs: not so with Grain's own shuffle."""
    mine = pipeline.step_indices(seed, epoch, 50, 50)
    assert not np.array_equal(mine, pipeline.step_indices(seed, epoch + 1, 50, 50))
    assert not np.array_equal(mine, pipeline.step_indices(seed + 1, other, 50, 50))


def test_the_order_of_examples_is_that_of_earlier_versions():
    """A run that is continued goes on in the order in which it began."""
    assert pipeline.step_indices(5, 3, 6, 11).tolist() == [3, 4, 5, 10, 5, 1]  # two epochs
    assert pipeline.step_indices(5, 0, 4, 10**6).tolist() == [65170, 418192, 97559, 917464]
    other = pipeline.step_indices(5 + 2**31, 2, 4, 10**6)  # of a companion
    assert other.tolist() == [428563, 804002, 752603, 967237]


@pytest.mark.parametrize("lazy", [False, True])
def test_stream_is_the_arithmetic(lazy):
    for step, batch in enumerate(take(pipeline.stream(source(lazy), 7, seed=5), 9)):
        expected = pipeline.step_indices(5, step, 7, LENGTH)
        np.testing.assert_array_equal(batch["image"][:, 1, 1, 0], expected)
        np.testing.assert_array_equal(batch["label"], expected % 3)
        np.testing.assert_array_equal(batch["index"], np.arange(7))
        assert batch["image"].shape == (7, 2, 2, 1)
        assert batch["image"].dtype == np.uint8
        assert batch["label"].dtype == batch["index"].dtype == np.int32


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("done", [0, 1, 6])
def test_resumed_stream_continues_exactly(lazy, done):
    """From the step alone: what was read ahead of it when the run stopped is read again."""
    whole = take(pipeline.stream(source(lazy), 6, seed=1), 12)
    decoded = []
    stopped = pipeline.stream(source(lazy, decoded), 6, seed=1)
    assert_same(take(stopped, done), whole[:done])
    if lazy and done:
        wait_for(lambda: len(decoded) > 6 * done)
    resumed = pipeline.stream(source(lazy), 6, seed=1, start_step=done)
    assert_same(take(resumed, 12 - done), whole[done:])
    assert_same(take(stopped, 12 - done), whole[done:])


def test_nothing_in_memory_is_read_ahead():
    reads = []

    class Watched(Subset):
        def __getitem__(self, indices):
            reads.append(indices)
            return super().__getitem__(indices)

    watched = Watched(source(False), np.arange(LENGTH))
    take(pipeline.stream(watched, 4, seed=0, extra={"other": watched}), 3)
    assert len(reads) == 6


@pytest.mark.parametrize("lazy", [False, True])
def test_processes_share_the_global_batch(lazy):
    whole = take(pipeline.stream(source(lazy), 12, seed=2), 5)
    parts = [
        take(pipeline.stream(source(lazy), 12, 2, process_index=p, process_count=4), 5)
        for p in range(4)
    ]
    joined = [
        {name: np.concatenate([part[step][name] for part in parts]) for name in whole[0]}
        for step in range(5)
    ]
    assert_same(joined, whole)


def test_a_process_decodes_only_its_rows_from_the_step_on():
    """Nothing of other processes, and nothing before the step, however far the run has come."""
    decoded, step = [], 10**9
    shard = {"start_step": step, "process_index": 1, "process_count": 4, "threads": 1}
    batch = next(pipeline.stream(source(True, decoded), 8, 0, **shard))
    rows = [pipeline.step_indices(0, step + ahead, 8, LENGTH)[2:4] for ahead in range(4)]
    seen = list(decoded)  # more may come at any time
    assert seen == list(np.concatenate(rows)[: len(seen)])
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], rows[0])


def test_stream_refuses_what_cannot_work():
    empty = Subset(source(False), np.arange(0))
    with pytest.raises(ValueError, match="positive multiple of 4"):
        pipeline.stream(source(False), 6, seed=0, process_count=4)
    with pytest.raises(ValueError, match="process_index=4"):
        pipeline.stream(source(False), 8, seed=0, process_index=4, process_count=4)
    with pytest.raises(ValueError, match="no examples"):
        pipeline.stream(empty, 8, seed=0)
    with pytest.raises(ValueError, match="no examples"):
        pipeline.stream(source(False), 8, seed=0, extra={"other": empty})


@pytest.mark.parametrize("value", [np.nan, -np.inf, None])
def test_an_image_that_is_not_finite_or_cannot_be_read_is_named(value):
    def read(index):
        if index == 20 and value is None:
            raise ValueError("image 20 of the data is not finite, nor anything else")
        return np.full((2,), value if index == 20 else 0.0), 0

    bad = Lazy(LENGTH, (2,), 1, read, lambda: np.zeros(LENGTH, np.int32))
    with pytest.raises(ValueError, match="image 20 of the data is not finite"):
        take(pipeline.stream(bad, 5, seed=0), 5)


@pytest.mark.parametrize(("name", "lazy"), [("other", False), ("generated", True)])
def test_a_companion_has_the_rows_that_runs_were_trained_on(name, lazy):
    """Of another length than the source, in a share of the batch, from a later step."""
    generated = Subset(source(lazy), np.arange(17))
    stream = pipeline.stream(
        source(False), 8, 5, start_step=6, process_index=1, process_count=2, extra={name: generated}
    )
    expected = pipeline.step_indices(5 + 2**31, 6, 8, 17)[4:]
    batch = next(stream)
    np.testing.assert_array_equal(batch[f"{name}_image"][:, 0, 0, 0], expected)
    np.testing.assert_array_equal(batch[f"{name}_label"], expected % 3)
    assert batch.keys() == {"image", "label", "index", f"{name}_image", f"{name}_label"}


def test_two_companions_are_drawn_apart_in_whatever_order_they_are_named():
    """A set of names has another order in every process: the batch must not."""
    extra = {"other": source(False), "generated": Subset(source(False), np.arange(LENGTH)[::-1])}
    backwards = dict(reversed(extra.items()))
    one, two = (
        next(pipeline.stream(source(False), LENGTH, 3, extra=named)) for named in (extra, backwards)
    )
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    rows = [pipeline.step_indices(3 + k * 2**31, 0, LENGTH, LENGTH) for k in range(3)]
    assert len(set(map(bytes, rows))) == 3
    np.testing.assert_array_equal(one["image"][:, 0, 0, 0], rows[0])
    np.testing.assert_array_equal(one["generated_image"][:, 0, 0, 0], LENGTH - 1 - rows[1])
    np.testing.assert_array_equal(one["other_image"][:, 0, 0, 0], rows[2])


def test_stack_repeats_the_last():
    batches = take(pipeline.stream(source(False), 4, seed=0), 4)
    stream = pipeline.stream(source(False), 4, seed=0)
    stacked = pipeline.stack(stream, 3, 5)
    assert stacked.keys() == batches[0].keys()
    for name, values in stacked.items():
        expected = np.stack([batches[i][name] for i in (0, 1, 2, 2, 2)])
        np.testing.assert_array_equal(values, expected)
        assert values.dtype == batches[0][name].dtype
    np.testing.assert_array_equal(next(stream)["image"], batches[3]["image"])  # no more was taken
