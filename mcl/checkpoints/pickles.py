"""PyTorch's pickled checkpoints (.ckpt, .pt, .bin), read without running what they contain.

A pickle is a program that may call any function it names. Here it gets no function but the few
that describe a tensor; every other name is answered by an inert stand-in, so that the foreign
objects of training tools do no harm and hostile ones nothing. It gets no more time and memory
than its size: tuples are not looked into, states are not set. Tensors stay on disk until read.
"""
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Callable, ClassVar

import torch
from torch import Tensor

from ..errors import InputError
from .lazy import LazyTensor

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."     # torch's magic number, pickled
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "UntypedStorage": torch.uint8}
KINDS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# What reading a zip archive raises: among them RuntimeError, where it wants a password, and
# UnicodeDecodeError, where a name in it is no text.
DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, EOFError, KeyError, RuntimeError,
          UnicodeDecodeError)
WRAPPERS = ("state_dict", "controlnet")
NESTED = 4                                          # wrappers in wrappers that are looked into
MOST_PICKLE, MOST_ARCHIVE, RATIO = 1 << 24, 1 << 26, 100
ReadBytes = Callable[[str, int, int], bytes]        # storage key, first byte, number of bytes


class StandIn:
    """Takes the place of any foreign object: it accepts everything and does nothing."""

    def __init__(self, *_: Any, **__: Any):
        pass

    def __call__(self, *_: Any, **__: Any) -> "StandIn":
        return self

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    extend = append


class Opaque(tuple):
    """A tuple that nobody looks into: one nested a hundredfold would be hashed without end."""
    __hash__ = object.__hash__
    __repr__ = object.__repr__

    def __eq__(self, other: object) -> bool:
        return self is other


@dataclass(frozen=True)
class Storage:
    key: str
    dtype: torch.dtype
    numel: int


class TensorUnpickler(pickle._Unpickler):           # in Python: its steps can be replaced
    """Builds dicts, lists, numbers, strings, and LazyTensors; anything else is a StandIn."""
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: Any, read_bytes: ReadBytes):
        super().__init__(file)
        self.read_bytes = read_bytes
        self.storages: dict[str, Storage] = {}
        self.stand_ins: dict[tuple[str, str], Any] = {}

    def close_tuple(self) -> None:
        items = self.pop_mark()
        self.append(Opaque(items))

    def close_small_tuple(self, count: int) -> None:
        self.stack[-count:] = [Opaque(self.stack[-count:])]

    def ignore_state(self) -> None:
        self.stack.pop()

    dispatch: ClassVar[Any] = pickle._Unpickler.dispatch | {
        pickle.TUPLE[0]: close_tuple, pickle.BUILD[0]: ignore_state,
        pickle.TUPLE1[0]: partial(close_small_tuple, count=1),
        pickle.TUPLE2[0]: partial(close_small_tuple, count=2),
        pickle.TUPLE3[0]: partial(close_small_tuple, count=3)}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in KINDS:
            return KINDS[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self.tensor
        if (module, name) == ("torch._utils", "_rebuild_tensor_v3"):
            return self.tensor_of_bytes
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return self.parameter
        # One of its own for each name: they may be keys of a dict.
        new = type(StandIn.__name__, (StandIn,), {})
        return self.stand_ins.setdefault((module, name), new)

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, numel, *view = pid
        known = kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str)
        if not known or any(view):
            raise pickle.UnpicklingError("a storage of a kind that is not read here, as of complex "
                                         "numbers")
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

    def tensor_of_bytes(self, storage: Storage, offset: int, size: tuple[int, ...],
                        stride: tuple[int, ...], _: Any, __: Any, dtype: torch.dtype, *___: Any
                        ) -> LazyTensor:
        """A tensor of a dtype that has no storage class: its storage counts bytes."""
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError("a tensor of a kind that is not read here")
        typed = Storage(storage.key, dtype, storage.numel // dtype.itemsize)
        return self.tensor(typed, offset, size, stride)

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


def unpickle(path: Path, unpickler: TensorUnpickler) -> Any:
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
    except DAMAGE as error:
        raise damaged(path, error) from error
    unpacked = sum(record.file_size for record in archive.infolist())
    if unpacked > max(MOST_ARCHIVE, RATIO * path.stat().st_size):
        raise InputError(f"{path}: a zip bomb: {unpacked} bytes when it is unpacked")
    records = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if not records:
        raise InputError(f"{path}: a zip archive, but not a PyTorch checkpoint; if it holds one, "
                         "unpack it first")
    if archive.getinfo(records[0]).file_size > MOST_PICKLE:
        raise InputError(f"{path}: its pickle alone has more than {MOST_PICKLE} bytes, which no "
                         "checkpoint needs")
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
    for _ in range(NESTED):
        wrapper = next((w for w in WRAPPERS if isinstance(content, dict)
                        and isinstance(content.get(w), dict)), None)
        if wrapper is None:
            break
        others += [str(key) for key in content if key != wrapper]
        content = content[wrapper]
    if not isinstance(content, dict):
        return {}, others
    tensors = {str(key): value for key, value in content.items() if isinstance(value, LazyTensor)}
    return tensors, others + [str(key) for key in content if str(key) not in tensors]
