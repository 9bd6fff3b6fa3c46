"""PyTorch files against what PyTorch 2.13 wrote into them."""

import collections
import pathlib
import pickle
import zipfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from mclr_jax.pretrained import torch_file

DATA = pathlib.Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["tensors.pt", "tensors_legacy.pt"])
def test_tensors_in_containers_are_read(name):
    """The script that wrote the files: weight = torch.arange(12.).reshape(3, 4), and so on."""
    found = torch_file.load(DATA / name)
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    state = found["state"]
    assert list(state) == ["weight", "transposed", "part", "half", "count"]
    np.testing.assert_array_equal(state["weight"], weight)
    np.testing.assert_array_equal(state["transposed"], weight.T)  # strides of one storage
    np.testing.assert_array_equal(state["part"], weight[1:, 2])  # an offset
    assert state["half"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(state["half"].astype(np.float32), [1.5, -2])
    assert state["count"] == 7
    assert state["count"].dtype == np.int64
    np.testing.assert_array_equal(found["parameter"], [[1, 2]])
    assert found["empty"].shape == (0, 3)
    assert found["config"] == {"depth": 3, "names": ["a", "b"], "pair": (1, 2.5)}


def test_code_is_neither_imported_nor_run(tmp_path):
    with pytest.raises(ValueError, match=r"holds a torch.nn.modules.linear.Linear, not tensors"):
        torch_file.load(DATA / "module.pt")
    harmful = tmp_path / "harmful.pt"
    harmful.write_bytes(pickle.dumps(collections.deque))
    with pytest.raises(ValueError, match=r"holds a collections.deque, not tensors"):
        torch_file.load(harmful)


@hypothesis.given(
    offset=st.integers(-3, 12),
    shape=st.lists(st.integers(-2, 4), max_size=3).map(tuple),
    strides=st.lists(st.integers(-4, 6), max_size=3).map(tuple),
)
@hypothesis.example(offset=0, shape=(2, 2), strides=(-6, 6))  # first and last element are inside
@hypothesis.example(offset=11, shape=(3, 2), strides=(-5, 0))
@hypothesis.example(offset=0, shape=(), strides=())
def test_a_view_has_elements_of_its_storage_alone(offset, shape, strides):
    """Against the place of every element; what is not inside is refused."""
    storage = np.arange(10.0)
    places = [
        offset + sum(i * s for i, s in zip(index, strides, strict=False))
        for index in (np.ndindex(*shape) if min(shape, default=0) >= 0 else [])
    ]
    fine = len(shape) == len(strides) and min((offset, *shape, *strides)) >= 0
    if fine and all(0 <= place < 10 for place in places) and offset <= 10:
        found = torch_file.KNOWN["torch._utils", "_rebuild_tensor_v2"](
            storage, offset, shape, strides
        )
        np.testing.assert_array_equal(found.reshape(-1), places)
    else:
        with pytest.raises(KeyError, match="a tensor of shape"):
            torch_file.KNOWN["torch._utils", "_rebuild_tensor_v2"](storage, offset, shape, strides)


CUT = [
    whole[: int(share * len(whole))]
    for whole in ((DATA / name).read_bytes() for name in ("tensors.pt", "tensors_legacy.pt"))
    for share in (0.3, 0.6, 0.95)
]


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(5), *CUT])
def test_other_files_and_cut_ones_are_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pt is not a file of tensors"):
        torch_file.load(path)


def test_a_storage_that_is_a_text_is_refused():
    with pytest.raises(TypeError, match="storage is 'abc'"):
        torch_file.KNOWN["torch._utils", "_rebuild_tensor_v2"]("abc", 0, (), ())


def test_a_zip_without_one_data_pkl_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/version", "3")
    with pytest.raises(ValueError, match=r"x\.pt is not a file of tensors.* 0 files data\.pkl"):
        torch_file.load(tmp_path / "x.pt")
