"""Pickled PyTorch checkpoints (.ckpt, .pt, .bin), read without running the code they contain.

A pickle is a program that may call any function it names. The interpreter here knows only plain
data and the few functions that describe a tensor. A global is only its name, a string, and every
other object is None. Tensors stay on disk until they are read.

The interpreter hashes and prints only strings and short integers, so a hostile pickle needs no
more time and memory than its length allows. `torch.load(weights_only=True)` gives no such limit:
a key of nested tuples in 400 bytes stalls it, and it can be made to allocate any amount of memory.
"""
import io
import pickletools
import zipfile
from pathlib import Path
from typing import IO, Any, Callable, NamedTuple

import numpy as np
import torch

from ..errors import InputError
from .lazy_tensor import LazyTensor

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."     # torch's magic number, pickled
DTYPES = {f"torch {name}Storage": getattr(torch, f"{name}Tensor").dtype for name in (
    "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")} | {
    "torch ComplexFloatStorage": torch.complex64, "torch ComplexDoubleStorage": torch.complex128,
    "torch float8_e4m3fn": torch.float8_e4m3fn, "torch float8_e5m2": torch.float8_e5m2,
    "torch.storage UntypedStorage": torch.uint8}
MAX_PICKLE = 1 << 22                # bytes; a checkpoint of Stable Diffusion needs about 1 << 19
# A storage may have MAX_STORAGE bytes, or MAX_RATIO bytes for each byte of the file. A tensor that
# repeats the elements of its storage may have MAX_STORAGE bytes.
MAX_STORAGE, MAX_RATIO = 1 << 26, 100


class Storage(NamedTuple):
    """A storage's key in the file, the type of its elements, and its size in bytes."""
    key: str
    dtype: torch.dtype
    size: int


class TensorUnpickler:
    """Interpreter of pickles that builds dicts, lists, tuples, plain values and LazyTensors.

    Args:
        path: The checkpoint, for error messages.
        read_bytes: Returns a part of a storage: key, first byte, number of bytes.
    """

    def __init__(self, path: Path, read_bytes: Callable[[str, int, int], Any]):
        self.path, self.read_bytes = path, read_bytes
        self.max_size = max(MAX_STORAGE, MAX_RATIO * path.stat().st_size)
        self.storages: dict[str, Storage] = {}

    def load(self, file: IO[bytes]) -> Any:
        """Return the object of the next pickle in `file`. A corrupt one raises any exception."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[Any, Any] = {}
        for opcode, arg, _ in pickletools.genops(file):
            before, after = opcode.stack_before, opcode.stack_after
            first = len(stack) - len(before)
            if pickletools.stackslice in before:
                first = marks.pop() - before.index(pickletools.markobject)
            used, stack[first:] = stack[first:], []
            if opcode.name == "MARK":
                marks.append(len(stack))
            elif opcode.name.endswith(("BINPUT", "MEMOIZE")):
                memo[len(memo) if arg is None else arg] = (used or stack)[-1]
                stack += used
            elif opcode.name.endswith("BINGET"):
                stack.append(memo[arg])
            elif opcode.name == "REDUCE":
                stack.append(self.call(*used))
            elif opcode.name == "BINPERSID":
                stack.append(self.find_storage(*used))
            elif opcode.name == "STACK_GLOBAL":
                stack.append(" ".join(part[:99] for part in used))
            elif after:
                makes = None if before[:1] == after else after[0].obtype
                stack.append(build(makes, used if arg is None else [arg]))
        return used[0]

    def call(self, function: Any, args: Any) -> Any:
        """Return a dict or LazyTensor for the functions that make one, otherwise None."""
        if function in ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"):
            return self.make_tensor(*args[:4])
        if function == "torch._utils _rebuild_tensor_v3" and isinstance(args[6], str):
            return self.make_tensor(args[0]._replace(dtype=DTYPES[args[6]]), *args[1:4])
        if function == "torch._utils _rebuild_parameter":
            return args[0]
        return {} if function == "collections OrderedDict" else None

    def find_storage(self, pid: Any) -> Storage:
        """Return the storage that a persistent id describes."""
        kind, dtype, key, _, numel = pid[:5]
        if (kind != "storage" or any(pid[5:6]) or {type(key), type(dtype)} != {str}
                or not 0 <= numel <= self.max_size // DTYPES[dtype].itemsize):
            raise ValueError("a storage has an unknown description or an impossible size")
        storage = Storage(key, DTYPES[dtype], numel * DTYPES[dtype].itemsize)
        return self.storages.setdefault(key, storage)

    def make_tensor(self, storage: Storage, offset: int, size: Any, stride: Any) -> LazyTensor:
        """Return a tensor on disk. Its elements must lie in its storage."""
        view = torch.empty_strided(size[:64], stride[:64], dtype=storage.dtype, device="meta")
        start, count = offset * view.itemsize, view.untyped_storage().nbytes()
        if not 0 <= start <= start + count <= storage.size or view.nbytes > max(count, MAX_STORAGE):
            raise ValueError(f"its storage cannot hold a tensor of shape {tuple(view.shape)}")

        def read() -> torch.Tensor:
            try:
                data = self.read_bytes(storage.key, start, count) if count else bytes(view.itemsize)
                flat = torch.frombuffer(bytearray(data), dtype=view.dtype)
                return flat.as_strided(view.shape, view.stride())
            except Exception as error:      # zipfile may raise any exception
                raise corrupt_file_error(self.path, error) from error
        return LazyTensor(tuple(view.shape), view.dtype, read)


def build(makes: Any, operands: list[Any]) -> Any:
    """Return a new container of type `makes`, or else the first operand, extended by the others."""
    if makes is tuple:
        return tuple(operands)
    if makes in (list, dict, frozenset) or not operands:
        operands = [makes(), *operands]
    target, *items = operands
    if isinstance(target, list):
        target += items
    elif isinstance(target, dict):          # a key that is not text is known by its type
        target |= {key if isinstance(key, str) else f"<{type(key).__name__}>": value
                   for key, value in zip(items[::2], items[1::2])}
    return target


def corrupt_file_error(path: Path, why: object) -> InputError:
    """Return the error for a file that is truncated or damaged."""
    return InputError(f"{path}: the file is truncated or damaged ({why!s:.200}). Fetch it again.")


def open_zip(path: Path) -> Any:
    """Return the object in a zip checkpoint (torch 1.6 and later).

    Raises:
        InputError: The archive is not a checkpoint.
        Exception: Any other, if the archive is corrupt.
    """
    archive = zipfile.ZipFile(path)
    records = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if not records:
        raise InputError(f"{path}: the file is a zip archive, not a PyTorch checkpoint. If it "
                         "contains a checkpoint, unpack it first.")

    def read_bytes(key: str, start: int, count: int) -> bytes:
        with archive.open(f"{records[0].removesuffix('data.pkl')}data/{key}") as file:
            file.seek(start)
            return file.read(count)
    with archive.open(records[0]) as file:
        return TensorUnpickler(path, read_bytes).load(io.BytesIO(file.read(MAX_PICKLE)))


def open_legacy(path: Path) -> Any:
    """Return the object in a checkpoint of torch before 1.6: five pickles, then the storages.

    Raises:
        Exception: Any, if the file is corrupt.
    """
    places: dict[str, int] = {}
    unpickler = TensorUnpickler(path, lambda key, start, count: np.fromfile(
        path, np.uint8, count, offset=places[key] + start))
    with open(path, "rb") as file:
        pickles = io.BytesIO(file.read(MAX_PICKLE))
    _, _, _, content, keys = [unpickler.load(pickles) for _ in range(5)]
    for key in map(str.__str__, keys):      # raises TypeError for what is not a string
        places[key] = pickles.seek(8, io.SEEK_CUR)          # eight bytes repeat the length
        pickles.seek(unpickler.storages[key].size, io.SEEK_CUR)
    if pickles.tell() > path.stat().st_size or places.keys() != unpickler.storages.keys():
        raise EOFError("its end is missing")
    return content
