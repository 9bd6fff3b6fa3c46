"""Windows of trajectories as a data source: made once, addressed by seed and number."""

import numpy as np
import pytest
import tiny

from mclr_jax.assimilation import trajectories
from mclr_jax.assimilation.dynamics import Lorenz63, Lorenz96
from mclr_jax.assimilation.trajectories import Trajectories
from mclr_jax.config import Training

NAME = "mclr_jax.assimilation.trajectories:Trajectories"
SMALL = {"frames": 5, "trajectories": 16, "length": 12}


def test_frames_follow_each_other_in_the_units_of_the_system(tmp_path):
    source = Trajectories(system="lorenz96", path=str(tmp_path), **SMALL)
    windows, labels = source[np.array([0, 3, 16, 127])]
    assert windows.shape == (4, 5, 40) == (4, *source.shape)
    assert windows.dtype == np.float32
    np.testing.assert_array_equal(labels, np.zeros(4))
    states = np.array(source.offset) + np.array(source.scale) * windows
    expected = Lorenz96().advance(np.float32(states[:, :-1]))
    np.testing.assert_allclose(states[:, 1:], expected, atol=1e-4)
    # 8 windows in each of 16 trajectories, one frame apart
    assert len(source) == 16 * 8 == len(source.labels)
    np.testing.assert_array_equal(windows[2, :-1], windows[0, 1:])
    assert np.abs(windows[1, 0] - windows[0, 0]).max() > 0.1  # of another trajectory


def test_a_trajectory_depends_on_seed_split_and_number_alone(tmp_path, monkeypatch):
    def windows(folder, **changes):
        source = Trajectories(path=str(tmp_path / folder), **SMALL | changes)
        return source[np.arange(source.count)][0]

    first = windows("a")
    monkeypatch.setattr(trajectories, "PART", 5 * 12 * 3)
    np.testing.assert_allclose(windows("b"), first, rtol=1e-4, atol=1e-5)
    assert len(list((tmp_path / "b").rglob("*.npy"))) == 4
    assert len(list((tmp_path / "a").rglob("*.npy"))) == 1
    for other in (windows("a", seed=1)[:2], windows("a", split="test")):
        assert other.shape == first[:2].shape
        assert np.abs(other - first[:2]).min() > 0


def test_files_of_other_splits_and_lengths_are_not_taken(tmp_path, monkeypatch):
    """2 trajectories in a file, as many as are held out: the names of files are alike."""
    monkeypatch.setattr(trajectories, "PART", 2 * 13 * 3)

    def windows(**changes):
        options = {"path": str(tmp_path), **SMALL, **changes}
        return Trajectories(**options)[np.arange(2)][0]

    train, test, longer = windows(), windows(split="test"), windows(length=13)
    assert np.abs(test - train).min() > 0
    assert longer.shape == train.shape
    np.testing.assert_allclose(longer[0], train[0], rtol=1e-4, atol=1e-5)
    source = Trajectories(path=str(tmp_path), **SMALL | {"length": 13})
    assert len(source) == 16 * 9
    assert source[np.array([16 * 8])][0].shape == (1, 5, 3)


def test_parts_that_exist_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "PART", 5 * 12 * 3)
    options = {"path": str(tmp_path), **SMALL}
    everything = np.arange(16 * 8)
    before = Trajectories(**options)[everything][0]
    gone = sorted(tmp_path.rglob("*.npy"))[1]
    gone.unlink()
    made, make = [], Trajectories._make
    monkeypatch.setattr(Trajectories, "_make", lambda s, n: made.append(list(n)) or make(s, n))
    np.testing.assert_array_equal(Trajectories(**options)[everything][0], before)
    first = int(gone.name.partition("_")[0])
    assert made == [list(range(first, first + 5))]
    np.testing.assert_array_equal(Trajectories(**options)[everything][0], before)
    assert len(made) == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_config_names_it_and_the_run_gets_its_units(tmp_path):
    config = tiny.config("mixture", sigma_data=0.0)
    config.data.update({"name": NAME, "path": str(tmp_path), "limit": 50, **SMALL})
    training = Training.parse(config)
    source = training.data.source("train", 0)
    assert len(source) == 50
    data = training.data_info(source)
    system = Lorenz63()
    assert (data.shape, data.num_classes) == ((5, 3), 1)
    assert (data.offset, data.scale, data.time_step) == (system.offset, system.scale, 0.025)
    assert abs(data.sigma_data - 1) < 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "lorenz36"}, "Unknown system 'lorenz36'.*Did you mean 'lorenz96'"),
        ({"split": "all"}, "split is 'all'; expected 'train' or 'test'"),
        ({"frames": 13}, r"data\.frames is 13; expected an integer of at least 1 and at most 12"),
        ({"trajectories": 0}, r"data\.trajectories is 0"),
    ],
)
def test_mistakes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        len(Trajectories(**SMALL | options)[np.array([0])])
