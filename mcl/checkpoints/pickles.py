"""Opens pickled PyTorch checkpoints (.ckpt, .pt, .bin) without running the code they contain.

A pickle is a program that may call any function it names. The interpreter in this file knows only
plain data and the few functions that describe a tensor. A global is only its name, a string, and
every other object is None. Tensors stay on disk until they are read.

The interpreter hashes and prints only strings and short integers, so the length of a hostile
pickle limits its time and memory. `torch.load(weights_only=True)` has no such limit: a key of
nested tuples in 400 bytes stalls it, and a short pickle can make it allocate any amount of memory.
"""
import io
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch

from ..errors import InputError
from ..files import LazyTensor, report_corruption

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
    """A storage of a checkpoint: its key in the file, data type, and size in bytes."""

    key: str
    dtype: torch.dtype
    size: int


class TensorUnpickler:
    """Interpreter of pickles that builds dicts, lists, tuples, plain values and LazyTensors."""

    def __init__(self, path: Path, read_bytes: Callable[[str, int, int], Any]):
        """Create an interpreter.

        Args:
            path: The checkpoint, for error messages.
            read_bytes: Function of a storage's key, a first byte and a number of bytes that returns
                these bytes of the storage.
        """
        self.path, self.read_bytes = path, read_bytes
        self.max_size = max(MAX_STORAGE, MAX_RATIO * path.stat().st_size)
        self.storages: dict[str, Storage] = {}

    def load(self, file: IO[bytes]) -> Any:
        """Return the object of the next pickle in a file.

        Raises:
            Exception: Any, if the pickle is damaged.
        """
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
                container_type = None if before[:1] == after else after[0].obtype
                stack.append(build(container_type, used if arg is None else [arg]))
        return used[0]

    def call(self, function: Any, args: Any) -> Any:
        """Return a new dict or a LazyTensor for the functions that create them, otherwise None."""
        if function in ("torch._utils _rebuild_tensor", "torch._utils _rebuild_tensor_v2"):
            return self.make_tensor(*args[:4])
        if function == "torch._utils _rebuild_tensor_v3" and isinstance(args[6], str):
            return self.make_tensor(args[0]._replace(dtype=DTYPES[args[6]]), *args[1:4])
        if function == "torch._utils _rebuild_parameter":
            return args[0]
        return {} if function == "collections OrderedDict" else None

    def find_storage(self, pid: Any) -> Storage:
        """Return the storage that a persistent id describes.

        Raises:
            ValueError: If its description is unknown, or its size impossible.
        """
        kind, dtype, key, _, numel = pid[:5]
        if (kind != "storage" or any(pid[5:6]) or {type(key), type(dtype)} != {str}
                or not 0 <= numel <= self.max_size // DTYPES[dtype].itemsize):
            raise ValueError("a storage has an unknown description or an impossible size")
        storage = Storage(key, DTYPES[dtype], numel * DTYPES[dtype].itemsize)
        return self.storages.setdefault(key, storage)

    def make_tensor(self, storage: Storage, offset: int, size: Any, stride: Any) -> LazyTensor:
        """Return a tensor on disk.

        Args:
            storage: The storage of its elements.
            offset: Index of its first element in the storage.
            size: Its shape.
            stride: Its stride, in elements.

        Raises:
            ValueError: If its elements lie outside of its storage, or it repeats too many of them.
        """
        view = torch.empty_strided(size[:64], stride[:64], dtype=storage.dtype, device="meta")
        start, count = offset * view.itemsize, view.untyped_storage().nbytes()
        if not 0 <= start <= start + count <= storage.size or view.nbytes > max(count, MAX_STORAGE):
            raise ValueError(f"its storage cannot hold a tensor of shape {tuple(view.shape)}")

        def read() -> torch.Tensor:
            with report_corruption(self.path):
                data = self.read_bytes(storage.key, start, count) if count else bytes(view.itemsize)
                flat = torch.frombuffer(bytearray(data), dtype=view.dtype)
                return flat.as_strided(view.shape, view.stride())
        return LazyTensor(tuple(view.shape), view.dtype, read)


def build(container_type: Any, operands: list[Any]) -> Any:
    """Return the result of an opcode that creates or extends a container.

    Args:
        container_type: The type of a new container; another value for an opcode that extends its
            first operand.
        operands: The operands. The keys and values of a dict alternate.
    """
    if container_type is tuple:
        return tuple(operands)
    if container_type in (list, dict, frozenset) or not operands:
        operands = [container_type(), *operands]
    target, *items = operands
    if target == "torch.nn.modules.container ParameterDict" and items and items[0]:
        return items[0].get("_parameters")      # of the first embeddings
    if isinstance(target, list):
        target += items
    elif isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=False):
            # A key that is not text is known by its type.
            name = key if isinstance(key, str) else f"<{type(key).__name__} {len(target)}>"
            if target.setdefault(name, value) is not value:
                raise ValueError(f"two entries have the name {name!r:.99}")
    return target


def open_zip(path: Path) -> Any:
    """Return the object in a zip checkpoint (PyTorch 1.6 and later).

    Raises:
        InputError: If the archive is not a checkpoint.
        Exception: Any other, if the archive is damaged.
    """
    archive = zipfile.ZipFile(path)
    records = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
    if not records:
        raise InputError(f"{path}: the file is a zip archive, not a PyTorch checkpoint. Unpack it")

    def read_bytes(key: str, start: int, count: int) -> bytes:
        with archive.open(f"{records[0].removesuffix('data.pkl')}data/{key}") as file:
            file.seek(start)
            return file.read(count)
    with archive.open(records[0]) as file:
        return TensorUnpickler(path, read_bytes).load(io.BytesIO(file.read(MAX_PICKLE)))


def open_legacy(path: Path) -> Any:
    """Return the object in a checkpoint of PyTorch before 1.6: five pickles, then the storages.

    Raises:
        Exception: Any, if the file is damaged.
    """
    offsets: dict[str, int] = {}
    unpickler = TensorUnpickler(path, lambda key, start, count: np.fromfile(
        path, np.uint8, count, offset=offsets[key] + start))
    with open(path, "rb") as file:
        pickles = io.BytesIO(file.read(MAX_PICKLE))
    _, _, _, content, keys = [unpickler.load(pickles) for _ in range(5)]
    for key in map(str.__str__, keys):      # raises TypeError for what is not a string
        offsets[key] = pickles.seek(8, io.SEEK_CUR)          # eight bytes repeat the length
        pickles.seek(unpickler.storages[key].size, io.SEEK_CUR)
    if pickles.tell() > path.stat().st_size or offsets.keys() != unpickler.storages.keys():
        raise EOFError("its end is missing")
    return content
