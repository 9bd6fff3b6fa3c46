"""Read files of weights without PyTorch: torch.save (both formats), NVlabs pickles, safetensors.

Reads tensors in plain containers alone: no code that a file names or holds is imported or run.
Classes become placeholders, and arrays are views of the file where the format allows it.
"""

import dataclasses
import functools
import io
import math
import mmap
import os
import pickle
import pickletools
import reprlib
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from mclr_jax import extras
from mclr_jax.files import named, write_atomically

MAGIC = 0x1950A86A20F9469CFC6C  # of the format before PyTorch 1.6
DTYPES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "BFloat16": ml_dtypes.bfloat16, "Long": "<i8",
    "Int": "<i4", "Short": "<i2", "Char": "i1", "Byte": "u1", "Bool": "?",
}  # fmt: skip


def load(path: str | os.PathLike) -> dict:
    """The tensors, or other things, in a file by name; arrays may share memory with the file.

    Raises ValueError for other files and for objects other than tensors in plain containers.
    """
    refused = f"{os.fspath(path)} is not a file of tensors that this project reads"
    with named(refused), open(path, "rb") as file:
        if file.read(9)[8:] == b"{" or os.fspath(path).endswith(".safetensors"):
            return extras.needed("safetensors.numpy", "published").load_file(path)
        file.seek(0)
        if file.read(2) == b"PK" or zipfile.is_zipfile(file):
            found = _load_zip(file)
        else:
            file.seek(0)
            found = _Unpickler(file).load()
            if isinstance(found, int) and found == MAGIC:
                found = _load_legacy(file)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {reprlib.repr(found):.20}, expected tensors by name")
        return found


def save(path: str | os.PathLike, state: Mapping[str, np.ndarray]) -> None:
    """Write tensors as a file of safetensors, atomically."""
    whole = {name: np.array(value, order="C") for name, value in sorted(state.items())}
    library: Any = extras.needed("safetensors.numpy", "published")
    write_atomically(path, library.save(whole, metadata={"format": "pt"}))


class Dict(dict):
    """A dictionary without the attributes that a file gives to it."""

    def __setstate__(self, state: Any) -> None: ...


class Namespace(Dict):
    """The attributes of an object, such as the arguments of a training, by name."""

    def __setstate__(self, state: dict) -> None:
        self.update(state)


class Module(Namespace):
    """Placeholder of a torch module: its attributes by name, and the name of its class."""

    class_name = "ModuleDict"

    def __missing__(self, name: str) -> Any:
        raise ValueError(f"its {self.class_name} has no attribute {name}.")

    def inside(self, name: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
        """The module and all modules, parameters and buffers in it, by dotted names.

        ValueError: one is something else, or a module is there twice.
        """
        if id(self) in seen:
            raise ValueError(f"module {name:.40} is there twice")
        seen.add(id(self))
        yield name, self
        for kind in ("_parameters", "_buffers", "_modules"):
            for key, value in dict(self.get(kind) or {}).items():
                full = f"{name}.{key}" if name else str(key)
                if isinstance(value, Module):
                    yield from value.inside(full, seen)
                elif isinstance(value, np.ndarray):
                    yield full, value
                elif value is not None:
                    raise ValueError(f"{full} is {reprlib.repr(value):.20}, expected a tensor")

    def tensors(self) -> dict[str, np.ndarray]:
        """All parameters and buffers by dotted name."""
        return {
            name: value for name, value in self.inside("", set()) if isinstance(value, np.ndarray)
        }

    def modules(self) -> "dict[str, Module]":
        """All modules by dotted name; its own is ""."""
        return {name: value for name, value in self.inside("", set()) if isinstance(value, Module)}


def _module(about: dict) -> Module:
    """The object of `torch_utils.persistence`, whose source text is in the file and is not used."""
    module = Module(about["state"])
    module.class_name = str(about["class_name"])
    return module


class Array:
    """Placeholder of numpy.ndarray, which `numpy.asarray` turns into it, or of numpy.dtype."""

    def __init__(self, name: str = "", *_: Any):
        self.dtype = np.dtype(name or "V")

    def __setstate__(self, state: tuple) -> None:
        if self.dtype.kind in "biuf":
            self.dtype = self.dtype.newbyteorder(state[1])
        else:
            _, shape, kind, fortran, data = state
            self.values = kind.read(data).reshape(shape, order="F" if fortran else "C")

    def read(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, self.dtype)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, dtype)


def _tensor(storage: np.ndarray, offset: int, shape: tuple, strides: tuple, *_: Any) -> np.ndarray:
    """A strided view of a storage; the arguments are those of `_rebuild_tensor_v2`."""
    if not isinstance(storage, np.ndarray):
        raise TypeError(f"a tensor's storage is {reprlib.repr(storage):.20}")
    inside = len(shape) == len(strides) and min((offset, *shape, *strides)) >= 0
    if inside and 0 not in shape:  # nothing is negative: the last element is the farthest
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        inside = last < len(storage)
    if not inside or offset > len(storage):
        raise KeyError(
            f"a tensor of shape {shape}, strides {strides} and offset {offset} is not inside its "
            f"storage of {len(storage)} numbers"
        )
    if math.prod(shape) > max(len(storage), 2**20):
        raise KeyError(f"a tensor of shape {shape} repeats {len(storage)} numbers")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps)


def _nested(content: bytes) -> np.ndarray:
    """The storage in a file in the file; its tree is nothing but the storage."""
    file = io.BytesIO(content)
    if _Unpickler(file, known=STORAGES).load() != MAGIC:
        raise pickle.UnpicklingError("a storage in it is not of torch.save")
    return _load_legacy(file, STORAGES)


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """The meaning of a name in a file: a value or a function, which no file can change."""

    value: Any

    def __call__(self, *inputs: Any) -> Any:
        return self.value(*inputs)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it changes {self.value!r:.20}")


Names = dict[tuple[str, str], Any]
STORAGES: Names = {
    (module, f"{kind}Storage"): Known(np.dtype(dtype))
    for kind, dtype in DTYPES.items()
    for module in ("torch", "torch.storage")
}
KNOWN: Names = STORAGES | {
    ("collections", "OrderedDict"): Dict,
    ("dnnlib.util", "EasyDict"): Dict,
    ("argparse", "Namespace"): Namespace,
    ("builtins", "set"): Known(set),
    ("_codecs", "encode"): Known(lambda text, _: text.encode("latin1")),
    ("torch._utils", "_rebuild_tensor_v2"): Known(_tensor),
    ("torch._utils", "_rebuild_parameter"): Known(lambda tensor, *_: tensor),
    ("torch.storage", "_load_from_bytes"): Known(_nested),
    ("torch.nn.modules.container", "ModuleDict"): Module,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): Known(_module),
    ("numpy", "dtype"): Array,
    ("numpy", "ndarray"): Array,
}
for _core in ("numpy.core.multiarray", "numpy._core.multiarray"):
    KNOWN[_core, "_reconstruct"] = Known(lambda *_: Array())
    KNOWN[_core, "scalar"] = Known(lambda dtype, data: dtype.read(data)[0].item())


class _Unpickler(pickle.Unpickler):
    """Gets the values of tensors from storage(kind, dtype, key, location, count, ...)."""

    def __init__(self, file: BinaryIO, storage: Callable | None = None, known: Names = KNOWN):
        super().__init__(file)
        self._file, self._storage, self._known = file, storage, known

    def load(self) -> Any:
        """The object; operations that would take more memory than the file are refused before."""
        start = self._file.tell()
        for count, (code, value, _) in enumerate(pickletools.genops(self._file)):
            if code.name == "BYTEARRAY8" or (code.name.endswith("PUT") and (value or 0) > count):
                raise pickle.UnpicklingError(f"it has the operation {code.name} of {value!r:.20}")
        self._file.seek(start)
        return super().load()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._known:
            return self._known[module, name]
        raise pickle.UnpicklingError(f"it holds a {module}.{name}, not tensors in containers only")

    def persistent_load(self, identifier: tuple) -> np.ndarray:
        if self._storage is None:
            raise pickle.UnpicklingError("it holds a storage without its numbers")
        return self._storage(*identifier)


def _load_zip(file: BinaryIO) -> Any:
    content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    with zipfile.ZipFile(file) as archive:
        names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(names) != 1:
            raise pickle.UnpicklingError(f"it holds {len(names)} files data.pkl, expected one")
        name = names[0].removesuffix("data.pkl")

        def record(key: str) -> np.ndarray:
            """The bytes of a record, in the file."""
            info = archive.getinfo(name + key)
            with archive.open(info):  # checks its header
                start = info.header_offset + 30  # then name and other fields, with these lengths
                start += content[start - 4 : start].view("<u2").sum(dtype=int)
            found = content[start : start + info.file_size]
            if info.compress_type or zlib.crc32(found.data) != info.CRC:
                raise zipfile.BadZipFile(f"{name}{key} is compressed, damaged or truncated")
            return found

        @functools.cache
        def storage(kind: str, dtype: Known, key: str, *_: Any) -> np.ndarray:
            return record(f"data/{key}").view(dtype.value)

        if f"{name}byteorder" in archive.namelist() and bytes(record("byteorder")) != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian, expected little-endian")
        return _Unpickler(io.BytesIO(record("data.pkl").tobytes()), storage).load()


def _load_legacy(file: io.BufferedReader | io.BytesIO, known: Names = KNOWN) -> Any:
    """The tree after the magic number, whose numbers follow it."""
    for _ in range(2):  # protocol, sizes of C's types
        _Unpickler(file, known=known).load()
    storages: dict[str, np.ndarray] = {}
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)

    def storage(kind: str, dtype: Known, key: str, place: str, count: int, view: Any = None):
        if view is not None:
            raise pickle.UnpicklingError("it holds a view of a storage, as in files of PyTorch 0.3")
        if not 0 <= count * dtype.value.itemsize <= size:
            raise EOFError("it is truncated")
        return storages.setdefault(key, np.zeros(count, dtype.value))

    tree = _Unpickler(file, storage, known).load()
    keys = _Unpickler(file, known=known).load()
    if missing := storages.keys() - {*keys}:
        raise EOFError(f"it has no numbers of the storage {min(missing)}")
    for key in keys:
        count, numbers = len(storages[key]).to_bytes(8, "little"), storages[key].view(np.uint8)
        if file.read(8) != count or file.readinto(numbers.data) < len(numbers):
            raise EOFError("it is truncated")
    return tree
