"""Files of weights against what PyTorch 2.13 and NVlabs' code wrote into them."""

import argparse
import collections
import io
import json
import pathlib
import pickle
import pickletools
import struct
import subprocess
import sys
import zipfile

import hypothesis
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

from mclr_jax.pretrained import tensors

DATA = pathlib.Path(__file__).parent / "data"


@pytest.mark.parametrize("name", ["tensors.pt", "tensors_legacy.pt"])
def test_tensors_in_containers_are_read(name):
    """The script that wrote the files: weight = torch.arange(12.).reshape(3, 4), and so on."""
    found = tensors.load(DATA / name)
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
        tensors.load(DATA / "module.pt")
    harmful = tmp_path / "harmful.pt"
    harmful.write_bytes(pickle.dumps(collections.deque))
    with pytest.raises(ValueError, match=r"holds a collections.deque, not tensors"):
        tensors.load(harmful)


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
        found = tensors.KNOWN["torch._utils", "_rebuild_tensor_v2"](storage, offset, shape, strides)
        np.testing.assert_array_equal(found.reshape(-1), places)
    else:
        with pytest.raises(KeyError, match="a tensor of shape"):
            tensors.KNOWN["torch._utils", "_rebuild_tensor_v2"](storage, offset, shape, strides)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps(5)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.pt is not a file of tensors"):
        tensors.load(path)


BROKEN = DATA / "formats" / "broken"


@pytest.mark.parametrize(("name", "step"), [("tensors.pt", 7), ("tensors_legacy.pt", 7),
    ("formats/broken/edm2-good-tiny.pkl", 97)])  # fmt: skip
def test_files_cut_anywhere_are_refused(tmp_path, name, step):
    whole = (DATA / name).read_bytes()
    for size in (*range(0, len(whole), step), len(whole) - 1):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(ValueError, match="x is not a file of tensors"):
            tensors.load(tmp_path / "x")


def test_a_pickle_of_modules_becomes_placeholders():
    """edm2-good-tiny.pkl: MANIFEST.json has the arguments of its network."""
    found = tensors.load(BROKEN / "edm2-good-tiny.pkl")
    network = found["ema"]
    assert network.class_name == "Precond"
    assert {"sigma_data": 0.5, "label_dim": 3}.items() <= network.items()
    weights = network.tensors()
    assert weights["unet.enc.4x4_conv.weight"].shape == (4, 4, 3, 3)
    assert weights["unet.enc.4x4_conv.weight"].dtype == np.float16
    assert weights["unet.out_gain"].shape == ()
    assert weights["logvar_fourier.freqs"].shape == (8,)
    assert len(weights) == 34
    assert np.isfinite(np.concatenate([w.ravel() for w in weights.values()])).all()


def loaded(tree, path):
    path.write_bytes(pickle.dumps(tree, protocol=4))
    return tensors.load(path)


def test_numpy_arrays_and_scalars_are_read_and_objects_are_refused(tmp_path):
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    tree = {"a": values, "t": np.asfortranarray(values), "n": np.float64(0.1), "i": np.int64(3)}
    found = loaded(tree, tmp_path / "x")
    np.testing.assert_array_equal(np.asarray(found["a"]), values)
    np.testing.assert_array_equal(np.asarray(found["t"]), values)
    assert (found["n"], found["i"]) == (0.1, 3)
    for bad in (np.array([None]), np.array(["a"]), np.array([(1, 2)], "i4,i4")):
        with pytest.raises(ValueError, match="x is not a file of tensors"):
            loaded({"a": bad}, tmp_path / "x")


def test_a_file_changes_nothing_of_the_reader(tmp_path):
    """BUILD sets attributes of any object, and would those of functions and classes."""
    for module, name in tensors.KNOWN:
        code = b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"N}X\x01\0\0\0aK\x01s\x86b."
        (tmp_path / "x").write_bytes(code)
        with pytest.raises(ValueError, match="x is not a file of tensors"):
            tensors.load(tmp_path / "x")
        known = tensors.KNOWN[module, name]
        assert not hasattr(known, "a")
        assert not hasattr(getattr(known, "value", None), "a")


@pytest.mark.parametrize(("code", "match"), [
    (b"}r\xff\xff\xff\x3f.", "LONG_BINPUT"),  # a memo of 2^31 pointers
    (b"}\x96" + b"\xff" * 4 + b"\0" * 4 + b".", "BYTEARRAY8|bytearray8"),
    (b"]" + b"2\x862\x86" * 40 + b".", r"it holds \(|BINGET|tuple"),
])  # fmt: skip
def test_operations_that_take_more_memory_than_the_file_are_refused(tmp_path, code, match):
    """The last one is a tuple of 2^80 entries that share their parts."""
    (tmp_path / "x").write_bytes(b"\x80\x02" + code)
    with pytest.raises(ValueError, match=match):
        tensors.load(tmp_path / "x")


def test_a_storage_of_an_old_file_without_numbers_is_refused(tmp_path):
    whole = (DATA / "tensors_legacy.pt").read_bytes()
    file = io.BytesIO(whole)
    for _ in range(4):  # magic number, protocol, sizes, tree; the list of storages follows
        assert [*pickletools.genops(file)]
    (tmp_path / "x.pt").write_bytes(whole[: file.tell()] + pickle.dumps([], 2))
    with pytest.raises(ValueError, match="it has no numbers of the storage"):
        tensors.load(tmp_path / "x.pt")


def test_modules_without_end_and_values_that_are_no_tensors_are_refused():
    module = tensors.Module()
    module["_modules"] = {"again": module}
    with pytest.raises(ValueError, match="again is there twice"):
        module.tensors()
    for state in ({"_parameters": {"w": "text"}}, {"_buffers": [1]}, {"_modules": {"a": "text"}}):
        with pytest.raises((ValueError, TypeError), match=r"text|sequence"):
            tensors.Module(state).tensors()


def safetensors_file(path, **arrays):
    """Written by its specification: a length, a header in JSON, and the numbers."""
    header, data = {}, b""
    for name, (kind, value) in arrays.items():
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": kind, "shape": value.shape, "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_safetensors(tmp_path):
    """By its content, whatever the file's name."""
    single = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = np.array([1.5, -2], ml_dtypes.bfloat16)
    safetensors_file(tmp_path / "x.bin", a=("F32", single), b=("BF16", half))
    found = tensors.load(tmp_path / "x.bin")
    np.testing.assert_array_equal(found["a"], single)
    assert found["b"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(found["b"].astype(np.float32), [1.5, -2])


def test_what_is_saved_is_loaded_again_bit_for_bit(tmp_path):
    state = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "half": np.float16([0.1, np.inf]),
        "b": np.array([[1.5, -2]], ml_dtypes.bfloat16),
        "n": np.array(7),
    }
    tensors.save(tmp_path / "x.safetensors", state)
    found = tensors.load(tmp_path / "x.safetensors")
    assert found.keys() == state.keys()
    for name, value in state.items():
        assert found[name].dtype == value.dtype
        assert (found[name].shape, found[name].tobytes()) == (value.shape, value.tobytes())


def test_arguments_of_a_training_are_a_dictionary(tmp_path):
    arguments = argparse.Namespace(model="DiT-XL/2", num_classes=1000)
    found = loaded({"args": arguments}, tmp_path / "x")["args"]
    assert (found["model"], found.get("path_type")) == ("DiT-XL/2", None)


@pytest.mark.parametrize("count", [2**20 + 1, 2**60])
def test_few_numbers_that_repeat_are_not_many(count):
    with pytest.raises(KeyError, match="repeats 10 numbers"):
        tensors.KNOWN["torch._utils", "_rebuild_tensor_v2"](np.arange(10.0), 0, (count,), (0,))


PEAK = """
import resource, sys
import numpy as np
from mclr_jax.pretrained import tensors
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
state = tensors.load(sys.argv[1])
total = sum(float(value.sum()) for value in state.values())
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, total)
"""


def torch_zip(path, tensors_of_storages, values):
    """A file of torch.save, written by hand: {storage: {name: shape}}, all from the beginning."""

    def text(value):
        return b"X" + struct.pack("<i", len(value)) + value.encode()

    def numbers(*value):
        return b"(" + b"".join(b"J" + struct.pack("<i", number) for number in value) + b"t"

    code = b"\x80\x02}("
    for key, named in tensors_of_storages.items():
        for name, shape in named.items():
            strides = [int(np.prod(shape[i + 1 :])) for i in range(len(shape))]
            code += text(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(("
            code += text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu")
            code += b"J" + struct.pack("<i", values[key].size) + b"tQK\0"
            code += numbers(*shape) + numbers(*strides) + b"\x89}tR"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", code + b"u.")
        for key, value in values.items():
            archive.writestr(f"x/data/{key}", value.tobytes())


def test_tensors_share_a_storage_and_damage_is_found(tmp_path):
    values = {"0": np.arange(6, dtype=np.float32), "1": np.ones(2, np.float32)}
    torch_zip(tmp_path / "x", {"0": {"a": (2, 3), "b": (4,)}, "1": {"c": ()}}, values)
    found = tensors.load(tmp_path / "x")
    np.testing.assert_array_equal(found["a"], values["0"].reshape(2, 3))
    assert np.shares_memory(found["a"], found["b"])
    assert found["c"] == 1
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content.replace(values["1"].tobytes(), b"x" * 8))
    with pytest.raises(ValueError, match="x/data/1 is compressed, damaged or truncated"):
        tensors.load(tmp_path / "x")


def test_a_zip_is_mapped_and_not_copied(tmp_path):
    """Reading all of 256 MiB takes the pages of the file and no more."""
    values = {str(i): np.full(2**24, i, np.float32) for i in range(4)}
    torch_zip(tmp_path / "x", {key: {f"w{key}": (2**12, 2**12)} for key in values}, values)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "x")]
    peak, total = map(float, subprocess.check_output(command, text=True).split())
    assert total == 6 * 2**24
    assert peak < 1.2 * 256


def test_a_storage_that_is_a_text_is_refused():
    with pytest.raises(TypeError, match="storage is 'abc'"):
        tensors.KNOWN["torch._utils", "_rebuild_tensor_v2"]("abc", 0, (), ())


def test_a_zip_without_one_data_pkl_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/version", "3")
    with pytest.raises(ValueError, match=r"x\.pt is not a file of tensors.* 0 files data\.pkl"):
        tensors.load(tmp_path / "x.pt")
