"""One self-describing safetensors file per model; written whole, read strictly."""
import hashlib
import json
from pathlib import Path
from typing import Iterable, Iterator, Mapping, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..config import ModelConfig, from_dict, to_dict
from ..errors import InputError
from ..files import save_safetensors
from ..device import pick_device, pick_dtype
from ..model import Model
from ..networks.ops import layout

# In an installed package it lies inside; in a checkout beside it.
EMBEDDED = next(file for folder in Path(__file__).parents[1:3]
                if (file := folder / "weights" / "tiny.safetensors").exists()
                or folder.name != "mcl")
FORMAT = "mcl-model-1"
FEW = 64                                # tensors that are read while a file is open
SCALE = ".scale"                        # after a name: of each row of an int8 matrix
N = TypeVar("N", bound=nn.Module)


class Edit(Protocol):
    """Changes weights as they are read; convert.lora's `Merge` is one."""

    @property
    def sha256(self) -> str:
        """What tells it from every other edit."""

    def __call__(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The new weight of a name, as "unet.conv_in.weight", of the same shape."""


def load_model(path: str | Path | None = None, device: str | torch.device = "auto",
               dtype: str | torch.dtype = "auto", edit: Edit | None = None) -> Model:
    """A model from a file that `save_model` or convert_weights.py wrote, ready to sample.

    path     the embedded model's where not given
    device   "auto" takes cuda, then mps, then cpu
    dtype    torch's own, or "float32", "float16", "bfloat16" (fp32, fp16, bf16); "auto" is float32
             on the cpu, else float16
    edit     changes the weights as they are read; the model's sha256 then stands for both

    Raises InputError, naming the file, where it is missing, damaged or of another kind, where a
    tensor is missing, extra, mis-shaped or not finite, and for a device that is not there.
    """
    path = EMBEDDED if path is None else Path(path)
    chosen = pick_device(device)
    kind = pick_dtype(dtype, chosen)
    model = meta_model(read_header(path))
    with open(path, "rb") as binary:
        model.file_sha256 = hashlib.file_digest(binary, "sha256").hexdigest()
    if edit is not None:
        both = f"{model.file_sha256}\n{edit.sha256}"
        model.file_sha256 = hashlib.sha256(both.encode()).hexdigest()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    with safe_open(path, framework="pt") as file:
        check_names(path, {name for name in file.keys()
                           if name.removesuffix(SCALE) not in shapes or name in shapes}, shapes)

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in read_tensors(path, list(shapes), chosen):
            check_shape(path, name, tensor, shapes[name])
            weight = (tensor if edit is None else edit(name, tensor)).to(kind, copy=True)
            check_finite(path, name, weight)
            yield name, weight
    return fill(model, weights())


def meta_model(config: ModelConfig) -> Model:
    """A model without weights, of which names and shapes are known."""
    with torch.device("meta"):
        return Model(config)


def fill(model: N, weights: Iterable[tuple[str, torch.Tensor]]) -> N:
    """Puts weights, by name, into a model, or a network, on the meta device; only inputs will have
    gradients."""
    model.load_state_dict({name: layout(weight) for name, weight in weights}, assign=True)
    return model.requires_grad_(False).eval()


def read_tensors(path: Path, names: list[str], device: torch.device
                 ) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of some tensors of a file, in order; packed ones as float32.

    A file that is open stays in memory as far as it was read: it is opened anew for every few.
    Raises InputError where packed numbers have no scale, or others have one.
    """
    for i in range(0, len(names), FEW):
        with safe_open(path, framework="pt", device=str(device)) as file:
            there = set(file.keys())
            for name in names[i:i + FEW]:
                tensor, packed = file.get_tensor(name), name + SCALE in there
                if packed != (tensor.dtype == torch.int8):
                    raise InputError(f"{path}: the tensor {name} is {tensor.dtype} "
                                     f"{'with' if packed else 'without'} a scale")
                yield name, unpack(tensor, file.get_tensor(name + SCALE)) if packed else tensor


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix or convolution as int8, and what each row is to be multiplied by, float16.

    The error is a 254th of the largest value of a row at most.
    """
    largest = weight.float().flatten(1).abs().amax(dim=1)
    scale = (largest / 127).half().reshape(-1, *[1] * (weight.ndim - 1))
    steps = weight / scale.float().clamp(min=torch.finfo(torch.float16).tiny)
    return steps.round().clamp(-127, 127).to(torch.int8), scale


def unpack(steps: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return steps.float() * scale.float()


def save_model(model: Model, path: str | Path, dtype: torch.dtype, sources: Mapping[str, str],
               pack_from: int | None = None) -> None:
    """Writes a model with its config.

    dtype      of the weights in the file
    sources    the files that it was made of, by sha256
    pack_from  matrices of so many numbers or more are written as int8 with a scale for each row
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.detach().cpu()
        if pack_from is not None and tensor.ndim > 1 and tensor.numel() >= pack_from:
            tensors[name], tensors[name + SCALE] = pack(tensor)
        else:
            tensors[name] = tensor.to(dtype)
    save_safetensors(path, tensors, metadata(model.config, sources, dtype))


def metadata(config: ModelConfig, sources: Mapping[str, str], dtype: torch.dtype
             ) -> dict[str, str]:
    """What a model's file says of itself."""
    return {"format": FORMAT, "config": json.dumps(to_dict(config)),
            "sources": json.dumps(dict(sources)), "dtype": str(dtype).removeprefix("torch.")}


def read_header(path: str | Path) -> ModelConfig:
    """The config of a model file, without its weights. Raises InputError as `load_model` does."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such weights file; convert_weights.py makes them, and "
                         "without a file the embedded model runs")
    try:
        with safe_open(path, framework="pt") as file:
            return read_config(path, file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path}: not a safetensors file that can be read ({error}): fetch "
                         "a broken download again; of other checkpoints convert_weights.py makes "
                         "one") from error


def read_shapes(path: str | Path) -> dict[str, torch.Size]:
    """Of a model file's weights, by name, as its config has them. Raises InputError likewise."""
    return {name: t.shape for name, t in meta_model(read_header(path)).state_dict().items()}


def read_config(path: Path, metadata: Mapping[str, str]) -> ModelConfig:
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path}: a safetensors file, but not one of {FORMAT}: "
                         "convert_weights.py makes one of community checkpoints")
    try:
        return from_dict(ModelConfig, json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: its config cannot be read ({error})") from error


def check_names(path: Path, found: set[str], shapes: Mapping[str, torch.Size]) -> None:
    for name in sorted(set(shapes) - found):
        raise InputError(f"{path}: the tensor {name} is missing")
    for name in sorted(found - set(shapes)):
        raise InputError(f"{path}: the tensor {name} belongs to no part of the model")


def check_shape(path: Path, name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise InputError(f"{path}: the tensor {name} is {tuple(tensor.shape)}, "
                         f"the config says {tuple(shape)}")


def check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise InputError(f"{path}: the tensor {name} holds values that are not finite, "
                         f"or that {str(tensor.dtype).removeprefix('torch.')} cannot hold")
