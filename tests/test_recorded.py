"""Trajectories of files: windows, units, held-out parts, orders of axes, and what is refused."""

import sys

import numpy as np
import pytest

from mclr_jax import configs
from mclr_jax.config import Training
from mclr_jax.data import recorded
from mclr_jax.data.sources import Data, at, place_of
from mclr_jax.experiment import Experiment
from mclr_jax.extras import MissingExtraError

# trajectory i, frame k, coordinate j: a number that says all three
N, T, D = 20, 30, 3
VALUES = (np.arange(N)[:, None, None] * 100 + np.arange(T)[:, None] + np.arange(D) / 10).astype(
    "f4"
)
FIELDS = np.random.default_rng(0).normal(2, 3, (4, 12, 4, 6, 2)).astype("f4")


@pytest.fixture
def saved(tmp_path):
    def save(values=VALUES, name="x.npy", **arrays):
        path = tmp_path / name
        np.savez(path, **arrays) if arrays else np.save(path, values)
        return f"npy:{path}"

    return save


def source(name, split="train", frames=5, **keys):
    known = {key: keys.pop(key) for key in ("held_out", "test", "limit") if key in keys}
    return Data(name, options={"frames": frames, **keys}, **known).source(split, 0)


def states(windows):
    """All windows of a source, in the units of its file."""
    x, labels = windows[np.arange(len(windows))]
    assert x.dtype == np.float32
    assert x.shape == (len(windows), *windows.shape)
    np.testing.assert_array_equal(labels, windows.labels)
    return np.array(windows.offset) + np.array(windows.scale) * x


def test_windows_are_those_of_the_file_and_standardised_by_the_frames_of_training(saved):
    train, test = (source(saved(), split) for split in ("train", "test"))
    assert (len(train), len(test)) == (18 * 26, 2 * 26)
    numbers = []
    for part in (train, test):
        x = states(part)
        rows, starts = np.divmod(np.rint(x[:, 0, 0]).astype(int), 100)
        want = np.stack([VALUES[i, k : k + 5] for i, k in zip(rows, starts, strict=True)])
        np.testing.assert_allclose(x, want, atol=1e-3)
        assert len({*zip(rows.tolist(), starts.tolist(), strict=True)}) == len(part)
        numbers.append({*rows.tolist()})
    assert numbers[0] | numbers[1] == {*range(N)}
    assert len(numbers[1]) == 2
    seen = VALUES[sorted(numbers[0])].astype("f8")
    np.testing.assert_allclose(train.offset, seen.mean((0, 1)), rtol=1e-9)
    np.testing.assert_allclose(train.scale, seen.std((0, 1)), rtol=1e-9)
    assert (test.offset, test.scale) == (train.offset, train.scale)
    assert {*states(source(saved(), "test"))[:, 0, 0]} == {*states(test)[:, 0, 0]}  # same rows


@pytest.mark.parametrize("one", [True, False])
def test_of_few_trajectories_the_last_frames_are_held_out_without_a_common_window(saved, one):
    name = saved(VALUES[0] if one else VALUES[:4])
    train, test = (states(source(name, split, 4, held_out=0.2)) for split in ("train", "test"))
    count = 1 if one else 4
    assert (len(train), len(test)) == (count * 21, count * 3)
    assert (np.rint(train[..., 0]) % 100).max() == 23
    assert (np.rint(test[..., 0]) % 100).min() == 24
    assert len(source(name, frames=4, held_out=0.0)) == count * 27
    if not one:  # six frames are no window of seven
        parts = [source(name, split, 7, held_out=0.2) for split in ("train", "test")]
        assert [len(part) for part in parts] == [3 * 24, 24]


def test_all_orders_of_axes_are_the_same_data(saved):
    want = states(source(saved(FIELDS), held_out=0.0))
    assert want.shape == (4 * 8, 5, 4, 6, 2)
    turned = saved(FIELDS.transpose(1, 4, 0, 3, 2), "turned.npy")
    np.testing.assert_allclose(states(source(turned, axes="TCNWH", held_out=0.0)), want, rtol=1e-6)
    grey = source(saved(FIELDS[0, ..., 0], "grey.npy"), axes="THW", held_out=0.0)
    assert grey.shape == (5, 4, 6, 1)
    np.testing.assert_allclose(states(grey)[3], FIELDS[0, 3:8, ..., :1], rtol=1e-4, atol=1e-6)
    assert source(saved(VALUES[0, :, 0], "one.npy"), held_out=0.5).shape == (5, 1)


def test_a_file_is_mapped_and_of_a_large_one_parts_are_measured(saved, monkeypatch):
    train = source(saved())
    assert isinstance(train.data, np.memmap)
    assert train.in_memory
    read, reads = recorded.Windows.read, []
    monkeypatch.setattr(recorded, "SCANNED", 3 * T * D)
    monkeypatch.setattr(recorded, "BLOCK", T * D)
    monkeypatch.setattr(recorded, "HELD_IN_MEMORY", 100)
    monkeypatch.setattr(
        recorded.Windows, "read", lambda self, *where: reads.append(where) or read(self, *where)
    )
    some = source(saved())
    assert not some.in_memory
    rows = train.rows[[0, 8, 17]]
    assert sum(stop - start for _, start, stop in reads) == 3 * T
    np.testing.assert_allclose(some.offset, VALUES[rows].mean((0, 1)), rtol=1e-6)


def test_a_file_of_other_trajectories_has_the_units_of_training(saved):
    other = saved(7 * VALUES[:3] + 5, "test.npz", y=VALUES[:2, :, 0], x=7 * VALUES[:3] + 5)
    train = source(name := saved(x=VALUES, name="x.npz"), array="x", test=other)
    test = source(name, "test", array="x", test=other)
    assert (len(train), len(test)) == (N * 26, 3 * 26)
    assert (test.offset, test.scale) == (train.offset, train.scale)
    np.testing.assert_allclose(states(test).max(), 7 * VALUES[2].max() + 5, rtol=1e-5)


def test_the_config_trains_on_them_and_the_run_has_their_units(saved, tmp_path, monkeypatch):
    measured, scans = recorded.Windows.measured, []
    monkeypatch.setattr(
        recorded.Windows, "measured", lambda self: scans.append(self) or measured(self)
    )
    for kind, values in {"trajectories": VALUES, "trajectories:fields": FIELDS}.items():
        config = configs.load(kind)
        config.data.name, config.data.frames = saved(values), 8
        config.data.time_step, config.data.limit = 0.5, 7
        if "fields" in kind:
            config.network.patch_size = 2
        training = Training.parse(config)
        experiment = Experiment(training, tmp_path)
        found, data, test = experiment.source, experiment.data, experiment.held_out[""]
        assert (len(found), len(scans)) == (7, 1)  # the file is scanned once
        assert (test.offset, test.scale) == (found.offset, found.scale)
        scans.clear()
        assert (data.shape, data.num_classes) == ((8, *values.shape[2:]), 1)
        assert (data.offset, data.scale, data.time_step) == (found.offset, found.scale, 0.5)
        assert training.model(data).frames == (8,)


def test_netcdf_is_read_where_it_is_asked_for(saved, tmp_path, monkeypatch):
    import xarray

    path, want = tmp_path / "x.nc", states(source(saved()))
    table = xarray.Dataset(
        {"state": (("time", "member", "x"), VALUES.swapaxes(0, 1)), "other": ("time", np.ones(T))}
    )
    table.to_netcdf(path, engine="scipy")
    for size in (2**30, 100):
        monkeypatch.setattr(recorded, "HELD_IN_MEMORY", size)
        found = source(f"nc:{path}", axes="TND", array="state")
        assert isinstance(found.data, np.ndarray) == found.in_memory == (size > 100)
        np.testing.assert_allclose(states(found), want, rtol=1e-6)
    with pytest.raises(ValueError, match=r"expected an array of .*x\.nc\. .*Known: other, state"):
        source(f"nc:{path}", array="sate")
    (tmp_path / "bad.nc").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"bad\.nc cannot be opened by xarray"):
        source(f"nc:{tmp_path / 'bad.nc'}")
    monkeypatch.setitem(sys.modules, "xarray", None)
    with pytest.raises(MissingExtraError, match=r"the extra xarray: pip install 'mclr_jax\[xarray"):
        source(f"nc:{path}")


def changed(place, value):
    values = VALUES.copy()
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("values", "keys", "message"),
    [
        (changed((3, 17, 1), np.nan), {}, "trajectory 3 has missing or infinite values.* frame 17"),
        (changed((3, 17, 1), np.inf), {}, "Fill them, as by interpolation"),
        (changed((..., 2), 4), {}, r"coordinates or channels \[2\] have one value in all frames"),
        (VALUES > 0, {}, r"has bool \(20, 30, 3\); expected numbers"),
        (VALUES[:0], {}, r"has float32 \(0, 30, 3\); expected numbers"),
        (FIELDS[0], {}, r"shape \(12, 4, 6, 2\), and .*axes is ''; .* say THWC or NTHW"),
        (VALUES, {"axes": "NTHW"}, "expected a letter for each axis"),
        (VALUES, {"axes": "NDC"}, "expected a letter for each axis"),
        (VALUES, {"axes": "NTT"}, "expected a letter for each axis"),
        (VALUES, {"frames": 31}, "split 'train' has 30 frames of each trajectory; expected at"),
        (VALUES[0], {"frames": 4}, "split 'test' has 3 frames of each .* or name a file of"),
        (VALUES, {"frames": 0}, r"config\.data\.frames is 0"),
        (VALUES, {"time_step": -1}, r"config\.data\.time_step is -1"),
        (VALUES, {"axes": 3}, r"config\.data\.axes is 3; expected a text"),
        (VALUES, {"held_out": 0.0, "split": "test"}, r"no test split; set config\.data\.held_out"),
        (VALUES, {"frame": 3}, "option 'frame' .* Did you mean 'frames'"),
        (np.array([None]), {}, "no readable file of NumPy"),
    ],
)
def test_what_cannot_be_meant_is_refused(saved, values, keys, message):
    with pytest.raises(ValueError, match=message):
        source(saved(values), **keys)


def test_other_files_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no file missing\.npy"):
        source("npy:missing.npy")
    several = saved(name="x.npz", a=VALUES, b=VALUES)
    with pytest.raises(ValueError, match=r"array is ''; expected an array of .*Known: a, b"):
        source(several)
    wide = saved(np.zeros((2, 9, 4)), "wide.npy")
    with pytest.raises(ValueError, match=r"shape \(4,\); those of training have 3 coordinates"):
        source(saved(), "test", test=wide)
    (tmp_path / "text.npy").write_text("text")
    with pytest.raises(ValueError, match="no readable file of NumPy"):
        source(f"npy:{tmp_path / 'text.npy'}")


def test_a_moved_run_finds_them_where_they_are_now(saved, tmp_path):
    """A run stores the paths of its data; the name of a format without a file is no path."""
    assert [place_of(name) for name in ("npy:a/x.npy", "zarr:x", "tfds:x", "digits")] == [
        "a/x.npy", "x", "", ""]  # fmt: skip
    name = saved()
    assert at(name.removeprefix("npy:")) == name
    (tmp_path / "x.zarr").mkdir()
    assert at(str(tmp_path / "x.zarr")) == f"zarr:{tmp_path / 'x.zarr'}"
    assert Data("npy:gone.npy").moved(name.removeprefix("npy:")).name == name
