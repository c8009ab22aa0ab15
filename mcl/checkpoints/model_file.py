"""The project's own model file: one self-describing safetensors file, loaded strictly."""
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..config import ModelConfig, from_dict
from ..device import resolve_device, resolve_dtype
from ..errors import InputError
from ..files import open_safetensors, save_safetensors
from ..model import Model
from ..networks.ops import channels_last_weight
from ..ownership import sha256_of

# The built-in demo model lies inside an installed package, and beside the package in a checkout.
PACKAGED, CHECKOUT = (folder / "weights/tiny.safetensors" for folder in Path(__file__).parents[1:3])
DEFAULT_WEIGHTS = PACKAGED if PACKAGED.exists() else CHECKOUT
FORMAT = "mcl-model-2"
SCALE_SUFFIX = ".scale"         # tensor of the row scales of an int8 matrix
N = TypeVar("N", bound=nn.Module)


class WeightTransform(NamedTuple):
    """A change of the weights while they are loaded, such as merging LoRAs (`checkpoints.lora`).

    Attributes:
        function: Function of a name, such as "unet.conv_in.weight", and its weight that returns the
            new weight, of the same shape.
        sha256: Hash that distinguishes the transform from every other one.
    """

    function: Callable[[str, Tensor], Tensor]
    sha256: str


def load_model(path: str | Path | None = None, device: str | torch.device = "auto",
               dtype: str | torch.dtype = "auto", transform: WeightTransform | None = None
               ) -> Model:
    """Load a model that convert_weights.py or `save_model` wrote.

    Args:
        path: The file; None for the built-in demo model.
        device: "auto" takes cuda, then mps, then cpu.
        dtype: A torch dtype, or "float32", "float16", "bfloat16" (fp32, fp16, bf16); "auto" takes
            float32 on the CPU and float16 elsewhere.
        transform: Changes the weights while they are loaded; the model's sha256 covers it.

    Raises:
        InputError: If the file is missing, damaged or of another kind, a tensor is missing, extra,
            misshapen or not finite, or the device is not available.
    """
    path = DEFAULT_WEIGHTS if path is None else Path(path)
    place = resolve_device(device)
    resolved_dtype = resolve_dtype(dtype, place)
    model, file_sha256 = build_on_meta(read_model_config(path)), sha256_of(path)
    if transform is not None:
        file_sha256 = hashlib.sha256(f"{file_sha256}\n{transform.sha256}".encode()).hexdigest()
    model.file_sha256 = file_sha256

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in read_tensors(path, model.state_dict(), place):
            weight = tensor if transform is None else transform.function(name, tensor)
            weight = weight.to(resolved_dtype, copy=True)
            check_finite(path, name, weight)
            yield name, weight
    return load_weights(model, weights())


def build_on_meta(config: ModelConfig) -> Model:
    """Return a model without weights, on the meta device, for its names and shapes."""
    with torch.device("meta"):
        return Model(config)


def load_weights(module: N, weights: Iterable[tuple[str, Tensor]]) -> N:
    """Load weights by name into a module on the meta device, and freeze it."""
    module.load_state_dict({n: channels_last_weight(w) for n, w in weights}, assign=True)
    return module.requires_grad_(False).eval()


def read_tensors(path: Path, like: Mapping[str, Tensor], place: torch.device
                 ) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a file, in order; int8 matrices are converted to float32.

    `like` has the names and the shapes of the tensors.

    Raises:
        InputError: If a tensor is missing, extra or misshapen, or an int8 tensor has no scale, or
            another tensor has one.
    """
    tensors = open_safetensors(path)[1]
    check_names(path, tensors.keys() - {name + SCALE_SUFFIX for name in like}, like)
    for name in like:
        tensor, scale = tensors[name].read(), tensors.get(name + SCALE_SUFFIX)
        if tensor.shape != (shape := like[name].shape):
            raise InputError(f"{path}: {name} is {tuple(tensor.shape)}; expected {tuple(shape)}")
        rows = (*tensor.shape[:1], *[1] * (tensor.ndim - 1))    # one scale for each row
        if getattr(scale, "shape", None) != (rows if tensor.dtype == torch.int8 else None):
            raise InputError(f"{path}: {name} has no valid scale. Download the file again")
        weight = tensor if scale is None else tensor.float() * scale.read().float()
        yield name, weight.to(place)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight as int8 and the float16 scale of each row.

    The error is at most a 254th of the largest value of a row.
    """
    largest = weight.float().abs().amax(dim=list(range(1, weight.ndim)), keepdim=True)
    scale = (largest / 127).half()
    levels = weight / scale.float().clamp(min=torch.finfo(torch.float16).tiny)
    return levels.round().clamp(-127, 127).to(torch.int8), scale


def save_model(model: Model, path: str | Path, dtype: torch.dtype, sources: Mapping[str, str],
               quantize_min_numel: int | None = None) -> None:
    """Write a model and its config.

    Args:
        model: The model.
        path: The file, a .safetensors.
        dtype: Data type of the weights in the file.
        sources: sha256 of the files that the model was made from, by name.
        quantize_min_numel: Write matrices with this many elements or more as int8.
    """
    tensors = {}
    for name, tensor in model.state_dict().items():
        if quantize_min_numel and tensor.ndim > 1 and tensor.numel() >= quantize_min_numel:
            tensors[name], tensors[name + SCALE_SUFFIX] = quantize_int8(tensor.cpu())
        else:
            tensors[name] = tensor.to("cpu", dtype)
    save_safetensors(path, tensors, file_metadata(model.config, sources, dtype))


def file_metadata(config: ModelConfig, sources: Mapping[str, str], dtype: torch.dtype
                  ) -> dict[str, str]:
    """Return the metadata of a model file."""
    return {"format": FORMAT, "config": json.dumps(asdict(config)),
            "sources": json.dumps(dict(sources)), "dtype": str(dtype).removeprefix("torch.")}


def read_model_config(path: str | Path) -> ModelConfig:
    """Return the config of a model file without loading its weights.

    Raises:
        InputError: If the file is missing, damaged or of another kind.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file. Run convert_weights.py, or leave out --weights")
    try:
        metadata = open_safetensors(path)[0]
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        return from_dict(ModelConfig, json.loads(metadata["config"]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        # Imported here, so that `import mcl` does not import the converter.
        from .detect import detect_file
        detect_file(path, "--weights")
        raise InputError(f"{path}: a converted model that cannot be read ({error}). Convert or "
                         "download it again") from error


def read_shapes(path: str | Path) -> dict[str, torch.Size]:
    """Return the shapes of a model file's weights by name, as its config defines them."""
    model = build_on_meta(read_model_config(path))
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def check_names(path: Path, names: set[str], expected: Collection[str]) -> None:
    """Raise InputError for a missing or an extra tensor."""
    for name in sorted(names ^ set(expected)):
        problem = "is missing" if name in expected else "belongs to no part of the model"
        raise InputError(f"{path}: the tensor {name} {problem}. Use another file")


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise InputError for a tensor with values that are not finite."""
    if (tensor - tensor).count_nonzero():           # inf - inf and nan - nan are nan
        advice = "Use another file" + (", or float32" if tensor.dtype != torch.float32 else "")
        raise InputError(f"{path}: the tensor {name} is not finite in {tensor.dtype}. {advice}")
