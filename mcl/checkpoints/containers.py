"""Opens the containers of weights (files and folders) without reading the weights.

Containers are safetensors, pickles of every version of PyTorch, and folders of diffusers,
transformers and PEFT, each as one file or in shards. Opening one gives the names, shapes and data
types of its tensors.
"""
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import LazyTensor, open_safetensors, report_corruption, unique_names
from .pickles import LEGACY_START, open_legacy, open_zip

Shapes = Mapping[str, Sequence[int]]                # shapes of tensors by name
PARTS = ("unet", "vae", "text_encoder")             # folders of a pipeline
WEIGHT_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model",
                "pytorch_lora_weights")
# The files beside weights that describe them, by their keys in `Checkpoint.configs`.
CONFIG_FILES = {"": "config.json", "peft": "adapter_config.json",
                "scheduler": "scheduler/scheduler_config.json"}
V_PREDICTION_YAML = re.compile(rb"^\s*parameterization:\s*[\"']?v\b", re.MULTILINE)
MAX_YAML = 1 << 20                                  # bytes
# Keys of dicts around the tensors of a pickle.
WRAPPERS = ("state_dict", "controlnet", "string_to_param")
MAX_NESTING = 4                                     # levels of wrappers that are opened
# Files without weights: a pattern of their first bytes, what they are, and what to do.
UNKNOWN_FILES = (
    (rb"$", "empty. Download it again"),
    (rb"version https://git-lfs", "a git-lfs pointer, not the weights. Run `git lfs pull`"),
    (rb"(?i)<(!doctype html|html|head|\?xml|!--)",
     "an HTML page that a web site sent in place of the weights. Use the download link"))


@dataclass(frozen=True)
class Checkpoint:
    """The content of one file, or of one folder of diffusers.

    Attributes:
        tensors: Tensors by key. The keys of a pipeline's folder start with "unet.", "vae." or
            "text_encoder.".
        files: The files that hold the tensors; empty for tensors in memory.
        non_tensors: Keys of a pickle's entries that are not tensors.
        metadata: Metadata of a safetensors file.
        configs: Content of config.json by part; "" is the config in the file's own folder.
        version: Version of the motion modules, "v1", "v2" or "v3"; "" if it is not known.
        path: The file or folder, for error messages.
    """

    tensors: dict[str, LazyTensor]
    files: tuple[Path, ...]
    non_tensors: tuple[str, ...] = ()
    metadata: dict[str, str] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: str = ""
    path: Path = Path()


def wrap_tensor(tensor: torch.Tensor) -> LazyTensor:
    """Return a tensor in memory as a LazyTensor."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, tensor.detach)


def open_checkpoint(path: Path) -> Checkpoint:
    """Return the content of a file or folder.

    Args:
        path: A file of weights, a folder with the weights of one network, or a pipeline's folder.

    Raises:
        InputError: If it has no weights, is damaged, or cannot be read. The message says what an
            unknown file is.
    """
    try:
        if path.is_dir():
            return open_folder(path)
        if not path.is_file():
            kind = "neither a file nor a folder" if path.exists() else "no such file or folder"
            raise InputError(f"{path}: {kind}. Check the path")
        checkpoint = open_file(path)
        if path.name.partition(".")[0].partition("-0")[0] in WEIGHT_STEMS:
            checkpoint.configs.update(read_configs(path.parent))
        for yaml in (path.with_suffix(".yaml"), path.with_suffix(".yml")):
            if yaml.is_file() and V_PREDICTION_YAML.search(yaml.read_bytes()[:MAX_YAML]):
                checkpoint.metadata["yaml"] = f"v-prediction, by {yaml.name}"
    except OSError as error:
        raise InputError(f"{error.filename or path}: cannot be read: {error.strerror or error}. "
                         "Check the file and its permissions") from error
    return checkpoint


def open_file(path: Path) -> Checkpoint:
    """Return the content of one file, whose first bytes tell its format."""
    with open(path, "rb") as file:
        start = file.read(4096)
    if start.startswith((b"PK\x03\x04", LEGACY_START)):
        return open_pickle(path, open_zip if start.startswith(b"PK") else open_legacy)
    if start[8:9] == b"{":
        metadata, tensors = open_safetensors(path)
        return Checkpoint(tensors, (path,), metadata=metadata)
    raise InputError(f"{path}: the file is {describe_unknown_file(start)}")


def open_pickle(path: Path, open_container: Callable[[Path], Any]) -> Checkpoint:
    """Return the content of a pickled checkpoint, which `open_container` opens."""
    with report_corruption(path):
        content = open_container(path)
    content = content if isinstance(content, dict) else {}
    non_tensors: list[str] = []
    for wrapper in WRAPPERS * MAX_NESTING:
        if isinstance(content.get(wrapper), dict):
            non_tensors += [key for key in content if key != wrapper]
            content = content[wrapper]
    tensors = {key: value for key, value in content.items() if isinstance(value, LazyTensor)}
    for name, tensor in tensors.items():
        if tensor.dtype.is_complex:
            raise InputError(f"{path}: the tensor {name} is complex. Use float32")
    return Checkpoint(tensors, (path,), (*non_tensors, *(k for k in content if k not in tensors)))


def describe_unknown_file(start: bytes) -> str:
    """Return what a file without weights is, by its first bytes, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for pattern, description in UNKNOWN_FILES:
        if re.match(pattern, text):
            return description
    # The last character may be incomplete: up to three of its bytes are not text.
    if b"\0" not in start and len(start.decode("utf-8", "ignore").encode()) >= len(start) - 3:
        return "text, not weights. Check its name"
    return "neither safetensors nor a PyTorch checkpoint. If it is an archive, unpack it"


def open_folder(path: Path) -> Checkpoint:
    """Return the content of a folder of diffusers: one network, or a pipeline's networks.

    The keys of a pipeline start with the folder of their network, such as "unet.".
    """
    parts = [part for part in PARTS if (path / part).is_dir()]
    folders = {f"{part}.": path / part for part in parts} or {"": path}
    opened = [(prefix, checkpoint) for prefix, folder in folders.items()
              for checkpoint in open_weights(find_weights(folder))]
    return Checkpoint(
        {prefix + name: tensor for prefix, checkpoint in opened
         for name, tensor in checkpoint.tensors.items()},
        tuple(file for _, checkpoint in opened for file in checkpoint.files),
        tuple(prefix + name for prefix, checkpoint in opened for name in checkpoint.non_tensors),
        opened[0][1].metadata,
        read_configs(path) | {part: read_configs(path / part).get("", {}) for part in parts})


def find_weights(folder: Path) -> Path:
    """Return the file with the weights of a network's folder, or the index of its shards.

    Safetensors is preferred to .bin, and full precision to fp16.

    Raises:
        InputError: If the folder has no weights.
    """
    for end, kind, stem in itertools.product(("safetensors", "bin"), ("", ".fp16"), WEIGHT_STEMS):
        for name in (f"{stem}{kind}.{end}", f"{stem}{kind}.{end}.index.json",
                     f"{stem}.{end}.index{kind}.json"):
            if (file := folder / name).is_file():
                return file
    raise InputError(f"{folder}: a folder without weights. It must contain {WEIGHT_STEMS[0]} or "
                     f"{WEIGHT_STEMS[1]}, as .safetensors, .bin or shards")


def open_weights(path: Path) -> list[Checkpoint]:
    """Return the content of a file of weights, or of all shards that an index (.json) names.

    Raises:
        InputError: If the index is damaged, or does not name exactly the tensors of all shards.
    """
    if path.suffix != ".json":
        return [open_file(path)]
    weight_map = parse_json(path, path.read_bytes()).get("weight_map")
    if not weight_map or not isinstance(weight_map, dict):
        raise InputError(f"{path}: it has no weight_map of file names. Download it again")
    # A shard lies beside its index; a path that leads elsewhere is not followed.
    expected = {(name, Path(str(file)).name) for name, file in weight_map.items()}
    files = sorted({file for _, file in expected})
    shards = {file: open_file(path.parent / file) for file in files}
    actual = {(name, file) for file, shard in shards.items() for name in shard.tensors}
    totals = {int(total) for file in shards for total in re.findall(r"-of-(\d+)\.", file)}
    problems = [f"{len(shards)} of {total} shards" for total in totals - {len(shards)}]
    if problems := [*problems, *(f"{name} in {file}" for name, file in sorted(expected ^ actual))]:
        raise InputError(f"{path}: does not fit its shards: {problems[0]}. Download them again")
    return list(shards.values())


def read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the configs that lie beside weights, by the keys of `CONFIG_FILES`."""
    return {key: parse_json(path, path.read_bytes()) for key, name in CONFIG_FILES.items()
            if (path := folder / name).is_file()}


def parse_json(subject: object, text: str | bytes) -> dict[str, Any]:
    """Return a JSON object. Raises InputError, which starts with `subject`, for anything else."""
    try:
        # Raises TypeError for JSON of another type.
        return {**json.loads(text, object_pairs_hook=unique_names)}
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{subject}: not a JSON object ({error}). Download it again") from error
