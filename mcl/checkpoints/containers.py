"""Any container of weights, opened without reading them: names, shapes, dtypes.

safetensors; pickles of every age; folders of diffusers, transformers and PEFT, in one file or in
shards. What is no container at all is told what it is.
"""
import json
import re
from functools import partial
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from .lazy_tensor import Checkpoint, LazyTensor
from .pickles import LEGACY_START, corrupt_file_error, open_legacy, open_zip

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
V_YAML = re.compile(rb"^\s*parameterization:\s*[\"']?v\b", re.MULTILINE)
MOST_YAML = 1 << 20
PEFT = "lora_adapter_metadata"                      # what PEFT keeps beside the tensors
PARTS = ("unet", "vae", "text_encoder")
WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model",
                "pytorch_lora_weights")
WRAPPERS = ("state_dict", "controlnet")
MAX_NESTING = 4                                     # levels of wrappers that are opened


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a file or a folder of any kind.

    Raises InputError, with what it is, for what holds no weights, and for what is damaged or
    cannot be read.
    """
    try:
        if path.is_dir():
            return open_folder(path)
        if not path.is_file():
            raise InputError(f"{path}: neither a file nor a folder" if path.exists() else
                             f"{path}: no such file or folder")
        checkpoint = open_file(path)
        config = path.with_name("config.json")
        if path.name.partition(".")[0].partition("-0")[0] in WEIGHT_STEMS and config.is_file():
            checkpoint.configs[""] = read_json(config)
        for beside in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
            if beside.is_file() and V_YAML.search(beside.read_bytes()[:MOST_YAML]):
                checkpoint.metadata["yaml"] = f"v-prediction, by {beside.name}"
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return checkpoint


def open_file(path: Path) -> Checkpoint:
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith((b"PK\x03\x04", LEGACY_START)):
        return open_pickle(path, open_zip if start.startswith(b"PK") else open_legacy)
    if start[8:9] == b"{":
        header = int.from_bytes(start[:8], "little")
        if 8 + header > size:
            raise corrupt_file_error(path, f"it has {size} bytes, its header alone {header}")
        return open_safetensors(path)
    raise InputError(f"{path}: {describe_unknown_file(start)}")


def open_pickle(path: Path, open_container: Callable[[Path], Any]) -> Checkpoint:
    """Return the tensors of a pickled checkpoint, which `open_container` opens."""
    try:
        tensors, non_tensors = unwrap_state_dict(open_container(path))
    except InputError:
        raise
    except Exception as error:              # a corrupt file may cause any exception
        raise corrupt_file_error(path, error) from error
    for name, tensor in tensors.items():
        if tensor.dtype.is_complex:
            raise InputError(f"{path}: the tensor {name} has the type {tensor.dtype}, which is "
                             "not supported. Convert it to float32.")
    return Checkpoint(tensors, (path,), tuple(non_tensors))


def unwrap_state_dict(content: Any) -> tuple[dict[str, LazyTensor], list[str]]:
    """Return the tensors of a checkpoint's object by name, and the names of its other entries."""
    non_tensors: list[str] = []
    content = content if isinstance(content, dict) else {}
    for wrapper in WRAPPERS * MAX_NESTING:
        if isinstance(content.get(wrapper), dict):
            non_tensors += [key for key in content if key != wrapper]
            content = content[wrapper]
    tensors = {key: value for key, value in content.items() if isinstance(value, LazyTensor)}
    return tensors, non_tensors + [key for key in content if key not in tensors]


def describe_unknown_file(start: bytes) -> str:
    """Return what a file without weights is, judged by its first bytes, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "the file is empty. Fetch it again."
    if text.startswith(b"version https://git-lfs"):
        return ("the file is a git-lfs pointer, not the weights. Run `git lfs pull` in its folder, "
                "or fetch the weights themselves.")
    if re.match(rb"<(!doctype html|html|head|\?xml|!--)", text, re.IGNORECASE):
        return ("the file is an HTML page that a web site sent in place of the weights. Fetch it "
                "again from its download link.")
    # The last character may be cut in two: up to three of its bytes are not text.
    if b"\0" not in start and len(start.decode("utf-8", "ignore").encode()) >= len(start) - 3:
        return "the file is text, not weights. Check its name."
    return ("the file is neither safetensors nor a PyTorch checkpoint. If it is an archive, "
            "unpack it.")


def open_safetensors(path: Path) -> Checkpoint:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
        metadata = file.metadata() or {}
        kinds = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise corrupt_file_error(path, error) from error
    for name, (_, dtype) in kinds.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: the tensor {name} has the type {dtype}, which is not "
                             "supported. Convert it to float32.")
    return Checkpoint({name: LazyTensor(shape, DTYPES[dtype], partial(read, path, file, name))
                       for name, (shape, dtype) in kinds.items()}, (path,), metadata=metadata,
                      configs={"peft": parse_json(f"{path}: its {PEFT}", metadata[PEFT])}
                      if PEFT in metadata else {})


def read(path: Path, file: Any, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise corrupt_file_error(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises InputError for anything else."""
    try:
        return parse_json(path, path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: the file cannot be read ({error}). Check it.") from error


def parse_json(what: Any, text: str | bytes) -> dict[str, Any]:
    """Return a JSON object. Raises InputError, which names `what`, for anything else."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: not JSON that can be read ({error})") from error
    if not isinstance(values, dict):
        raise InputError(f"{what}: not a config, which is a JSON object")
    return values


def open_folder(path: Path) -> Checkpoint:
    """A pipeline of diffusers (unet/, vae/, text_encoder/), or a folder with one network."""
    parts = [part for part in PARTS if (path / part).is_dir()]
    if not parts:
        return open_network(path)
    opened = {part: open_network(path / part) for part in parts}
    scheduler = path / "scheduler" / "scheduler_config.json"
    configs = {part: one.configs.get("", {}) for part, one in opened.items()}
    configs |= {"scheduler": read_json(scheduler)} if scheduler.is_file() else {}
    return Checkpoint(
        {f"{part}.{name}": t for part, one in opened.items() for name, t in one.tensors.items()},
        tuple(file for one in opened.values() for file in one.files),
        tuple(f"{part}.{name}" for part, one in opened.items() for name in one.non_tensors),
        configs=configs)


def open_network(folder: Path) -> Checkpoint:
    """The weights in a folder, safetensors before .bin and full precision before fp16."""
    files = find_weights(folder)
    opened = [open_file(file) for file in files]
    tensors: dict[str, LazyTensor] = {}
    for file, one in zip(files, opened):
        for name in one.tensors:
            if name in tensors:
                raise InputError(f"{file}: the tensor {name} is in another shard too")
        tensors |= one.tensors
    configs = {key: read_json(folder / name) | opened[0].configs.get(key, {}) for key, name in
               (("", "config.json"), ("peft", "adapter_config.json")) if (folder / name).is_file()}
    configs = opened[0].configs | configs
    return Checkpoint(tensors, tuple(files), tuple(o for one in opened for o in one.non_tensors),
                      opened[0].metadata, configs)


def find_weights(folder: Path) -> list[Path]:
    for ending in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for stem in WEIGHT_STEMS:
                whole = folder / f"{stem}{variant}.{ending}"
                if whole.is_file():
                    return [whole]
                for index in (f"{stem}{variant}.{ending}.index.json",
                              f"{stem}.{ending}.index{variant}.json"):
                    if (folder / index).is_file():
                        return shards(folder / index)
    raise InputError(f"{folder}: a folder without weights. It must contain {WEIGHT_STEMS[0]} or "
                     f"{WEIGHT_STEMS[1]}, as .safetensors, .fp16.safetensors, .bin or shards.")


def shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(
            isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: not an index of shards: it has no weight_map of names")
    # A shard lies beside its index; a path that leads elsewhere is not followed.
    files = [index.parent / Path(name).name for name in sorted(set(weight_map.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: this shard, which {index.name} names, is missing; fetch it")
    return files
