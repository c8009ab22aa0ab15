"""Any container of weights, opened without reading them: names, shapes, dtypes.

safetensors; pickles of every age; folders of diffusers, transformers and PEFT, in one file or in
shards. What is no container at all is told what it is.
"""
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from .lazy import Checkpoint, LazyTensor
from .pickles import LEGACY_START, damaged, flatten, open_legacy, open_zip

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
V_YAML = re.compile(rb"^\s*parameterization:\s*[\"']?v\b", re.MULTILINE)
MOST_YAML = 1 << 20
PEFT = "lora_adapter_metadata"                      # what PEFT keeps beside the tensors
PARTS = ("unet", "vae", "text_encoder")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model",
         "pytorch_lora_weights")


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
        if path.name.partition(".")[0].partition("-0")[0] in STEMS and config.is_file():
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
    if start[:4] == b"PK\x03\x04":
        tensors, others = unwrapped(path, open_zip(path))
    elif start.startswith(LEGACY_START):
        tensors, others = unwrapped(path, open_legacy(path))
    elif start[8:9] == b"{":
        header = int.from_bytes(start[:8], "little")
        if 8 + header > size:
            raise damaged(path, f"{size} bytes, and its header alone has {header}")
        return open_safetensors(path)
    else:
        raise InputError(f"{path}: {not_weights(start)}")
    return Checkpoint(tensors, (path,), tuple(others))


def unwrapped(path: Path, content: Any) -> tuple[dict[str, LazyTensor], list[str]]:
    try:
        return flatten(content)
    except (ValueError, RecursionError) as error:       # a key that cannot be written as text
        raise damaged(path, error) from error


def not_weights(start: bytes) -> str:
    """What a file is that is no container of weights, by its first bytes."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        return "an empty file; fetch it again"
    if text.startswith(b"version https://git-lfs"):
        return ("a git-lfs pointer of a few lines, not the weights that it points to; "
                "run `git lfs pull` beside it, or fetch the file itself")
    if re.match(rb"<(!doctype html|html|head|\?xml|!--)", text, re.IGNORECASE):
        return ("an HTML page, not weights: a web site answered with a page in place of the file; "
                "fetch it again from its download link")
    if b"\0" not in start and is_text(start):
        return "a text file, not weights"
    return "neither safetensors nor a PyTorch checkpoint; if it is an archive, unpack it"


def is_text(start: bytes) -> bool:
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start >= len(start) - 3        # a character that the 4096th byte cut
    return True


def open_safetensors(path: Path) -> Checkpoint:
    try:
        file = safe_open(path, framework="pt")
        slices = {name: file.get_slice(name) for name in file.keys()}
        metadata = file.metadata() or {}
        kinds = {name: (tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error
    for name, (_, dtype) in kinds.items():
        if dtype not in DTYPES:
            raise InputError(f"{path}: {name} is {dtype}, which is not read here")
    return Checkpoint({name: LazyTensor(shape, DTYPES[dtype], partial(read, path, file, name))
                       for name, (shape, dtype) in kinds.items()}, (path,), metadata=metadata,
                      configs={"peft": parse_json(f"{path}: its {PEFT}", metadata[PEFT])}
                      if PEFT in metadata else {})


def read(path: Path, file: Any, name: str) -> Tensor:
    try:
        return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_json(path, path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON that can be read ({error})") from error


def parse_json(what: Any, text: str) -> dict[str, Any]:
    """A JSON object. Raises InputError, with what it is of, for anything else."""
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
        tuple(f"{part}.{name}" for part, one in opened.items() for name in one.others),
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
    return Checkpoint(tensors, tuple(files), tuple(o for one in opened for o in one.others),
                      opened[0].metadata, configs)


def find_weights(folder: Path) -> list[Path]:
    for ending in ("safetensors", "bin"):
        for variant in ("", ".fp16"):
            for stem in STEMS:
                whole = folder / f"{stem}{variant}.{ending}"
                if whole.is_file():
                    return [whole]
                for index in (f"{stem}{variant}.{ending}.index.json",
                              f"{stem}.{ending}.index{variant}.json"):
                    if (folder / index).is_file():
                        return shards(folder / index)
    raise InputError(f"{folder}: a folder without weights that are known: "
                     f"{STEMS[0]}.safetensors, {STEMS[1]}.safetensors, their .fp16, .bin or shards")


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
