"""Read PyTorch's weight files (torch.save, both formats) without PyTorch.

Only tensors in plain containers are read: nothing that a file names is imported or run.
"""

import collections
import io
import os
import pickle
import zipfile
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before PyTorch 1.6
DTYPES = {
    "DoubleStorage": np.dtype("<f8"),
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("i1"),
    "ByteStorage": np.dtype("u1"),
    "BoolStorage": np.dtype("?"),
}


def load(path: str | os.PathLike) -> Any:
    """The object in a file of torch.save, with NumPy arrays for its tensors.

    Raises:
      ValueError: if it is no such file, or holds anything but tensors in plain containers.
    """
    try:
        if zipfile.is_zipfile(path):
            return _load_zip(path)
        with open(path, "rb") as file:
            return _load_legacy(file)
    except (pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a file of tensors written by torch.save: {error}"
        ) from error


class _Storage:
    """The place of some numbers; filled when they are read."""

    def __init__(self, dtype: np.dtype):
        self.dtype, self.data = dtype, np.zeros(0, dtype)


class _Tensor:
    """A strided view of a storage, as `_rebuild_tensor_v2` gets it."""

    def __init__(self, storage: _Storage, offset: int, shape: tuple, strides: tuple, *_: Any):
        self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides

    def array(self) -> np.ndarray:
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if 0 not in self.shape and not 0 <= last < len(self.storage.data):
            raise KeyError(f"a tensor of shape {self.shape} reaches beyond its storage")
        steps = [stride * self.storage.dtype.itemsize for stride in self.strides]
        start = self.storage.data[self.offset :]
        return np.lib.stride_tricks.as_strided(start, self.shape, steps).copy()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, storage: Any = None):
        super().__init__(file)
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
        if module in ("torch", "torch.storage") and name in DTYPES:
            return DTYPES[name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not tensors in containers alone")

    def persistent_load(self, identifier: tuple) -> _Storage:
        return self._storage(*identifier)


def _arrays(tree: Any) -> Any:
    """The tree with arrays for its tensors."""
    if isinstance(tree, _Tensor):
        return tree.array()
    if isinstance(tree, dict):
        return {key: _arrays(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(map(_arrays, tree))
    return tree


def _load_zip(path: str | os.PathLike) -> Any:
    storages: dict[str, _Storage] = {}
    with zipfile.ZipFile(path) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        root = name.removesuffix("data.pkl")

        def storage(kind: str, dtype: np.dtype, key: str, *_: Any) -> _Storage:
            if key not in storages:
                storages[key] = _Storage(dtype)
                storages[key].data = np.frombuffer(archive.read(f"{root}data/{key}"), dtype)
            return storages[key]

        return _arrays(_Unpickler(io.BytesIO(archive.read(name)), storage).load())


def _load_legacy(file: BinaryIO) -> Any:
    if _Unpickler(file).load() != MAGIC:
        raise pickle.UnpicklingError("it does not begin as one")
    _Unpickler(file).load()  # protocol version
    _Unpickler(file).load()  # sizes of C's types
    storages: dict[str, _Storage] = {}

    def storage(kind: str, dtype: np.dtype, key: str, location: str, count: int, view: Any = None):
        if view is not None:
            raise pickle.UnpicklingError("it holds a view of a storage, as PyTorch 0.3 wrote them")
        return storages.setdefault(key, _Storage(dtype))

    tree = _Unpickler(file, storage).load()
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        found = storages[key]
        data = file.read(count * found.dtype.itemsize)
        if len(data) < count * found.dtype.itemsize:
            raise EOFError("it was cut short")
        found.data = np.frombuffer(data, found.dtype)
    return _arrays(tree)
