"""Read PyTorch's weight files (torch.save, both formats) without PyTorch.

Reads tensors in plain containers alone: no code that a file names is imported or run.
"""

import collections
import functools
import io
import os
import pickle
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mclr_jax.files import named

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before PyTorch 1.6
DTYPES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16, "Long": "<i8",
    "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip


def load(path: str | os.PathLike) -> Any:
    """The object in a file of torch.save, with NumPy arrays for its tensors; some share memory.

    Raises ValueError for other files and for objects other than tensors in plain containers.
    """
    with named(f"{os.fspath(path)} is not a file of tensors written by torch.save"):
        if zipfile.is_zipfile(path):
            return _load_zip(path)
        with open(path, "rb") as file:
            return _load_legacy(file)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """A strided view of a storage; the arguments are those of `_rebuild_tensor_v2`."""
    if not isinstance(storage, np.ndarray):
        raise TypeError(f"a tensor's storage is {storage!r:.20}")
    inside = len(shape) == len(strides) and min((offset, *shape, *strides)) >= 0
    if inside and 0 not in shape:  # nothing is negative: the last element is the farthest
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        inside = last < len(storage)
    if not inside or offset > len(storage):
        raise KeyError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} is not inside its "
            f"storage of {len(storage)} numbers"
        )
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps)


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
}
for _kind, _dtype in DTYPES.items():
    KNOWN["torch", f"{_kind}Storage"] = KNOWN["torch.storage", f"{_kind}Storage"] = np.dtype(_dtype)


class _Unpickler(pickle.Unpickler):
    """Gets the values of tensors from storage(kind, dtype, key, location, count, ...)."""

    def __init__(self, file: BinaryIO, storage: Any = None):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not tensors in containers only")

    def persistent_load(self, identifier: tuple) -> np.ndarray:
        return self._storage(*identifier)


def _load_zip(path: str | os.PathLike) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(names) != 1:
            raise pickle.UnpicklingError(f"it holds {len(names)} files data.pkl, expected one")
        name = names[0]

        @functools.cache
        def storage(kind: str, dtype: np.dtype, key: str, *_: Any) -> np.ndarray:
            content = archive.read(f"{name.removesuffix('data.pkl')}data/{key}")
            return np.frombuffer(bytearray(content), dtype)

        return _Unpickler(io.BytesIO(archive.read(name)), storage).load()


def _load_legacy(file: io.BufferedReader) -> Any:
    magic, *_ = [_Unpickler(file).load() for _ in range(3)]  # then protocol, sizes of C's types
    if magic != MAGIC:
        raise pickle.UnpicklingError(f"it starts with {magic!r:.20}, expected {MAGIC}")
    storages: dict[str, np.ndarray] = {}

    def storage(kind: str, dtype: np.dtype, key: str, location: str, count: int, view: Any = None):
        if view is not None:
            raise pickle.UnpicklingError("it holds a view of a storage, as in files of PyTorch 0.3")
        return storages.setdefault(key, np.zeros(count, dtype))  # the values follow the tree

    tree = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        count, data = int.from_bytes(file.read(8), "little"), storages[key].view(np.uint8).data
        if count != len(storages[key]) or file.readinto(data) < len(data):
            raise EOFError("it is truncated")
    return tree
