"""The figure of launch.assimilate: what is drawn where."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mclr_jax.assimilation import figure
from mclr_jax.assimilation.observe import Downsample, Matrix, Operator, Random, Select

ROWS = ((0.0, -2.0, 0.0), (1.0, 1.0, 0.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.5))
RNG = np.random.default_rng(0)


def drawn(monkeypatch, *arguments):
    """The figure whose PNG file `trajectory` gives, which must be that of a picture."""
    found, save = [], Figure.savefig

    def keep(self, *places, **options):
        found.append(self)
        save(self, *places, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    assert Image.open(io.BytesIO(figure.trajectory(*arguments))).size[0] > 300
    return found[-1]


def test_observations_lie_on_their_coordinate_or_in_a_panel_of_their_own(monkeypatch):
    """y = (L x - 1) / 4: the values of one coordinate are shown in its units, from frame 2 on."""
    members, truth = (RNG.normal(size=size).astype(np.float32) for size in ((5, 8, 3), (4, 3)))
    operator = Operator(Matrix(ROWS), offset=1.0, scale=4.0)
    values = np.array(operator(truth[None]))[0]
    values[0] = np.nan
    axes = drawn(monkeypatch, members, values, operator, truth, 2).axes
    names = [axis.get_ylabel() for axis in axes]
    assert names == ["coordinate 0", "coordinate 1", "coordinate 2", "A(x), value 1",
                     "A(x), value 2"]  # fmt: skip
    lines = [[line.get_ydata() for line in axis.lines] for axis in axes]
    assert [len(line) for line in lines] == [2, 3, 3, 3, 3]
    for i in range(3):
        np.testing.assert_allclose(lines[i][0], members[..., i].mean(0))
        np.testing.assert_allclose(lines[i][1][2:6], truth[:, i], rtol=1e-5)
    for i in (1, 2):
        np.testing.assert_allclose(lines[i][2][3:6], truth[1:, i], rtol=1e-4)
        assert np.isnan(lines[i][2][[0, 1, 2, 6, 7]]).all()
    np.testing.assert_allclose(
        lines[3][0], ((members[..., 0] + members[..., 1]).mean(0) - 1) / 4, rtol=1e-4
    )
    np.testing.assert_allclose(lines[3][2][3:6], values[1:, 1])
    band = axes[0].collections[0].get_paths()[0].vertices[:, 1]
    high = (members[..., 0].mean(0) + 2 * members[..., 0].std(0)).max()
    np.testing.assert_allclose(band.max(), high)
    nonlinear = Operator(Select((1,)), "arctan")
    axes = drawn(monkeypatch, members, np.zeros((6, 1)), nonlinear).axes
    assert [len(axis.lines) for axis in axes] == [1, 1, 1, 2]


@pytest.mark.parametrize(
    ("operator", "rows"),
    [(Operator(Random(0.5)), 4), (Operator(Downsample(2), scale=2.0), 4),
     (Operator(Random(0.5), "arctan"), 3)],
)  # fmt: skip
def test_fields_have_rows_of_truth_observations_mean_and_std(monkeypatch, operator, rows):
    truth = RNG.normal(size=(8, 4, 4, 1)).astype(np.float32)
    members = truth + RNG.normal(size=(5, 8, 4, 4, 1)).astype(np.float32)
    values = np.asarray(operator(truth[None]))[0]
    axes = drawn(monkeypatch, members, values, operator, truth).axes
    pictures = [axis.images[0].get_array() for axis in axes if axis.images]
    first = truth[0, ..., 0]
    assert len(pictures) == 6 * rows
    np.testing.assert_allclose(pictures[:6], truth[[0, 1, 2, 4, 5, 7], ..., 0])
    np.testing.assert_allclose(pictures[-1], members[:, 7, ..., 0].std(0))
    if isinstance(operator.linear, Downsample):
        np.testing.assert_allclose(pictures[6], first.reshape(2, 2, 2, 2).mean((1, 3)), rtol=1e-5)
    elif rows == 4:
        seen = np.ma.filled(pictures[6], np.nan)
        known = np.isfinite(seen)
        assert known.sum() == 8
        np.testing.assert_allclose(seen[known], first[known], rtol=1e-5)
