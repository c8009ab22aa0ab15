"""PyTorch's pickled checkpoints (.ckpt, .pt, .bin), read without running what they contain.

A pickle is a program that may call any function it names. Here it gets no function but the three
that describe a tensor; every other name is answered by an inert stand-in, so that the foreign
objects of training tools do no harm and hostile ones nothing. Tensors stay on disk until read.
"""
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable

import torch
from torch import Tensor

from ..errors import InputError
from .lazy import LazyTensor

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."     # torch's magic number, pickled
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool}
# What reading a zip archive raises: among them RuntimeError, where it wants a password.
DAMAGE = (zipfile.BadZipFile, zlib.error, OSError, EOFError, KeyError, RuntimeError)
WRAPPERS = ("state_dict", "controlnet")
ReadBytes = Callable[[str, int, int], bytes]        # storage key, first byte, number of bytes


class StandIn:
    """Takes the place of any foreign object: it accepts everything and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "StandIn":
        return self

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = append


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


class TensorUnpickler(pickle.Unpickler):
    """Builds dicts, lists, numbers, strings, and LazyTensors; anything else is a StandIn."""

    def __init__(self, file: Any, read_bytes: ReadBytes):
        super().__init__(file)
        self.read_bytes = read_bytes
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self.parameter
        return type(StandIn.__name__, (StandIn,), {})       # a new one: they may be keys of a dict

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel, *view = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or any(view):
            raise pickle.UnpicklingError(f"a storage of an unknown kind, {pid[:2]}")
        self.storages[key] = Storage(key, dtype, int(numel))
        return self.storages[key]

    def tensor(self, storage: Storage, offset: int, size: tuple[int, ...],
               stride: tuple[int, ...], *_: Any) -> LazyTensor:
        shape = tuple(int(n) for n in size)
        span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        span = 0 if 0 in shape else span
        if min(shape + tuple(stride) + (offset,)) < 0 or offset + span > storage.numel:
            raise pickle.UnpicklingError(f"a tensor {shape} that its storage cannot hold")
        return LazyTensor(shape, storage.dtype, partial(
            read_tensor, self.read_bytes, storage, offset, span, shape, tuple(stride)))

    @staticmethod
    def parameter(tensor: LazyTensor, *_: Any) -> LazyTensor:
        return tensor


def read_tensor(read_bytes: ReadBytes, storage: Storage, offset: int, span: int,
                shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    if span == 0:
        return torch.empty(shape, dtype=storage.dtype)
    size = storage.dtype.itemsize
    data = bytearray(read_bytes(storage.key, offset * size, span * size))
    return torch.frombuffer(data, dtype=storage.dtype).as_strided(shape, stride)


def damaged(path: Path, why: Any) -> InputError:
    return InputError(f"{path}: truncated or damaged ({why}); fetch it again")


def unpickle(path: Path, unpickler: pickle.Unpickler) -> Any:
    try:
        return unpickler.load()
    except Exception as error:              # a malformed pickle may end in any exception there is
        raise damaged(path, f"its pickle cannot be read: {error}") from error


def open_zip(path: Path) -> Any:
    """The object in a zip checkpoint (torch 1.6 and later), its tensors as LazyTensors.

    Raises InputError for a damaged archive, and for one that is no checkpoint.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise damaged(path, error) from error
    records = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if not records:
        raise InputError(f"{path}: a zip archive, but not a PyTorch checkpoint; if it holds one, "
                         "unpack it first")
    root = records[0].removesuffix("data.pkl")

    def read_bytes(key: str, start: int, count: int) -> bytes:
        try:
            with archive.open(f"{root}data/{key}") as file:
                file.seek(start)
                return exactly(file, count)
        except DAMAGE as error:
            raise damaged(path, error) from error

    try:
        with archive.open(records[0]) as file:
            return unpickle(path, TensorUnpickler(file, read_bytes))
    except DAMAGE as error:
        raise damaged(path, error) from error


def open_legacy(path: Path) -> Any:
    """The object in a checkpoint of torch before 1.6: pickles in a row, then the storages.

    Raises InputError for a damaged file.
    """
    places: dict[str, int] = {}

    def read_bytes(key: str, start: int, count: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(places[key] + start)
            return exactly(file, count)

    with open(path, "rb") as file:
        for _ in ("magic number", "protocol version", "system"):
            unpickle(path, TensorUnpickler(file, read_bytes))
        content = TensorUnpickler(file, read_bytes)
        result = unpickle(path, content)
        keys = unpickle(path, TensorUnpickler(file, read_bytes))
        try:
            for key in keys:
                numel, = struct.unpack("<q", exactly(file, 8))
                places[key] = file.tell()
                file.seek(numel * content.storages[key].dtype.itemsize, 1)
        except (EOFError, KeyError, OSError, TypeError, OverflowError) as error:
            raise damaged(path, error) from error
        if file.tell() > path.stat().st_size or set(places) != set(content.storages):
            raise damaged(path, "its end is missing")
    return result


def exactly(file: BinaryIO | Any, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise EOFError("its end is missing")
    return data


def flatten(content: Any) -> tuple[dict[str, LazyTensor], list[str]]:
    """The tensors of a checkpoint's object, out of their wrappers, and the names of the rest."""
    others: list[str] = []
    while isinstance(content, dict):
        wrapper = next((w for w in WRAPPERS if isinstance(content.get(w), dict)), None)
        if wrapper is None:
            break
        others += [str(key) for key in content if key != wrapper]
        content = content[wrapper]
    if not isinstance(content, dict):
        return {}, others
    tensors = {str(key): value for key, value in content.items() if isinstance(value, LazyTensor)}
    return tensors, others + [str(key) for key in content if str(key) not in tensors]
