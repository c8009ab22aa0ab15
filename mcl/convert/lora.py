"""Low-rank changes to weights: the domain adapter, motion LoRAs, and LoRAs of every dialect.

All say the same: W += scale * alpha / rank * up @ down, for one weight. It is computed and added
in float32, and the sum is cast once. AnimateDiff's own loader leaves alpha / rank out.
"""
import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

import torch
from einops import einsum
from torch import Tensor

from ..errors import InputError
from . import names as rename
from .formats import LORAS, Source, read_source
from .lazy import LazyTensor
from .sizes import count

ROLES = re.compile(
    r"^(?P<module>.+?)(?:"
    r"(?:\.lora_A(?:\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down|\.lora_down)\.(?P<down>weight)"
    r"|(?:\.lora_B(?:\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up|\.lora_up)\.(?P<up>weight)"
    r"|\.lora_mid\.(?P<mid>weight)|\.(?P<alpha>alpha))$")
PREFIXES = ((r"(^|\.)base_model\.model\.", r"\1"), (r"^lora_unet_", "unet."),
            (r"^lora_te1?_", "text_encoder."), (r"^(?=(down|up)_blocks\.|mid_block\.)", "unet."),
            (r"^(?=text_model\.|encoder\.layers\.)", "text_encoder."),
            (r"^text_encoder\.encoder\.", "text_encoder.text_model.encoder."))
IGNORE_ALPHA = "merge LoRAs as AnimateDiff's own loader does, by up @ down without alpha / rank"
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Lora:
    source: Source
    scale: float = 1.0
    ignore_alpha: bool = False          # as AnimateDiff's own loader does: W += scale * up @ down


@dataclass(frozen=True)
class Delta:
    """One change to one weight. down (r, in, kh, kw) and up (out, r, 1, 1), or both 2-D.

    With `mid` (r, r, kh, kw), Tucker's form, down is (r, in, 1, 1). `scale` is all factors.
    """
    down: LazyTensor
    up: LazyTensor
    mid: LazyTensor | None
    scale: float

    def add_to(self, weight: Tensor) -> Tensor:
        """weight, float32, with the change added."""
        down, up = (t.read().to(weight.device, torch.float32).flatten(1)
                    for t in (self.down, self.up))
        if self.mid is not None:
            mid = self.mid.read().to(weight.device, torch.float32)
            down = einsum(mid, down, "p q h w, q i -> p i h w").flatten(1)
        return weight + self.scale * (up @ down).reshape(weight.shape)


def parse_scaled(text: str) -> tuple[Path, float]:
    """"file.safetensors:0.8" -> (file.safetensors, 0.8); 1 where no scale is given."""
    path, colon, scale = text.rpartition(":")
    try:
        value = float(scale) if colon and not Path(text).exists() else math.nan
    except ValueError:
        value = math.nan
    return (Path(text), 1.0) if math.isnan(value) else (Path(path), value)


def open_lora(option: str, path: Path, scale: float = 1.0, ignore_alpha: bool = False) -> Lora:
    """A LoRA by the option it was given with. Raises InputError if it is something else."""
    source = read_source(path)
    if source.slot != option:
        fit = f"give it with {source.slot}" if source.slot in LORAS else (
            "convert_weights.py makes a model of it" if source.slot else "it is no LoRA")
        raise InputError(f"{path}: {source.title}, which is not for {option}: {fit}")
    if not math.isfinite(scale):
        raise InputError(f"{path}: the scale {scale} is not possible: a finite number")
    return Lora(source, scale, ignore_alpha)


def deltas(lora: Lora, shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Delta],
                                                                     dict[str, str]]:
    """What a LoRA changes: {weight's name, as "unet.conv_in.weight": its change}.

    shapes  of all the model's weights, by name
    Returns also {tensor of the LoRA: why it is not used}. Raises InputError for a module that the
    model does not have, a shape that does not fit, and half a pair.
    """
    path, tensors = lora.source.path, lora.source.checkpoint.tensors
    weights = {flat(name.removesuffix(".weight")): name for name, shape in shapes.items()
               if name.endswith(".weight") and len(shape) > 1}
    layers = count(shapes, "unet.down_blocks.0.resnets")
    has_middle = any(".mid_block.motion_modules." in name for name in shapes)
    peft = peft_config(lora.source)
    result: dict[str, Delta] = {}
    dropped: dict[str, str] = {}
    for module, roles in by_module(path, tensors).items():
        if "mid_block" in module and "motion_modules" in module and not has_middle:
            dropped |= {name: "of the middle block's motion module, which only v2 has"
                        for name in roles.values()}
            continue
        weight = weights.get(flat(our_module(module, layers)))
        if weight is None:
            raise InputError(f"{path}: it changes {module}, which this model does not have")
        if weight in result or "down" not in roles or "up" not in roles:
            raise InputError(f"{path}: {module} has not exactly one pair of down and up")
        part = weight.partition(".")[0]
        alpha = peft.get(f"{part}.lora_alpha") or peft.get("lora_alpha")
        result[weight] = one_delta(path, module, {r: tensors[n] for r, n in roles.items()},
                                   shapes[weight], alpha, lora)
    return result, dropped


def by_module(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, str]]:
    """{module as the LoRA calls it: {"down", "up", "mid" or "alpha": tensor's name}}."""
    modules: dict[str, dict[str, str]] = {}
    for name in tensors:
        found = ROLES.match(name)
        if not found:
            raise InputError(f"{path}: {name} is nothing that a LoRA of a known kind holds")
        role = next(role for role in ("down", "up", "mid", "alpha") if found[role])
        if role in modules.setdefault(found["module"], {}):
            raise InputError(f"{path}: {found['module']} has two of {role}")
        modules[found["module"]][role] = name
    return modules


def one_delta(path: Path, module: str, factors: Mapping[str, LazyTensor], shape: Sequence[int],
              alpha: float | None, lora: Lora) -> Delta:
    """Raises InputError where the factors have not the shape of the weight between them."""
    down, up, mid = factors["down"], factors["up"], factors.get("mid")
    core = math.prod((mid or down).shape[2:])
    rank = down.shape[0] if len(down.shape) > 1 else 0
    fits = (rank > 0 and down.shape[1] == shape[1] and core == math.prod(shape[2:])
            and up.shape[:2] == (shape[0], rank) and math.prod(up.shape[2:]) == 1
            and (mid is None or mid.shape[:2] == (rank, rank) and math.prod(down.shape[2:]) == 1))
    if not fits:
        raise InputError(f"{path}: {module} is {down.shape} and {up.shape}, made for another "
                         f"model: the weight here is {tuple(shape)}")
    if "alpha" in factors:
        alpha = float(factors["alpha"].read().flatten()[0])
    if alpha is not None and not math.isfinite(alpha):
        raise InputError(f"{path}: the alpha of {module} is {alpha}")
    if lora.ignore_alpha:
        alpha = rank
    # kohya's trainer takes an alpha of zero for the rank, too.
    return Delta(down, up, mid, lora.scale * (alpha or rank) / rank)


def all_deltas(loras: Sequence[Lora], shapes: Mapping[str, Sequence[int]]
               ) -> tuple[dict[str, list[Delta]], dict[Path, dict[str, str]]]:
    """`deltas` of several: {weight's name: its changes, in order}, {file: what is not used}."""
    changes: dict[str, list[Delta]] = {}
    unused: dict[Path, dict[str, str]] = {}
    for lora in loras:
        found, unused[lora.source.path] = deltas(lora, shapes)
        for weight, delta in found.items():
            changes.setdefault(weight, []).append(delta)
    return changes, unused


def merged(weight: Tensor, changes: Sequence[Delta], dtype: torch.dtype) -> Tensor:
    """A weight with its changes, added in float32, in the dtype wanted; always a new tensor."""
    for change in changes:
        weight = change.add_to(weight.float())
    return weight.to(dtype, copy=True)


def fingerprint(lora: Lora) -> str:
    """What tells a merge from any other: the sha256 of the files, and the scale."""
    digests = []
    for path in lora.source.checkpoint.files:
        with open(path, "rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return f"{' '.join(digests)}:{lora.scale}{' without alpha' * lora.ignore_alpha}"


def flat(name: str) -> str:
    return name.replace(".", "_")


def our_module(module: str, layers: int) -> str:
    """The module of a LoRA's name as we call it; dots may be underscores."""
    for pattern, ours in PREFIXES:
        module = re.sub(pattern, ours, module)
    module = module.replace(".processor.", ".")
    if module.startswith("text_encoder."):
        before, _, last = module.removesuffix(".0").rpartition(".")
        return f"{before}.{OLD_TEXT[last]}" if last in OLD_TEXT else module
    ldm = re.fullmatch(r"unet\.(?:(input|output)_blocks_(\d+)_(\d+)|middle_block_(\d)|"
                       r"(time_embed_\d|out_\d))(?:_(.+))?", module)
    if ldm:
        inner = {flat(theirs): theirs for theirs in rename.RESNET}.get(ldm[6], ldm[6] or "")
        head = (f"{ldm[1]}_blocks.{ldm[2]}.{ldm[3]}" if ldm[1] else
                f"middle_block.{ldm[4]}" if ldm[4] else f"{ldm[5][:-2]}.{ldm[5][-1]}")
        return "unet." + rename.unet_from_ldm(f"{head}.{inner}.", layers).rstrip(".")
    if ".motion_modules." in module:
        module = "unet." + rename.motion_name(module)
    return module + ".0" if module.endswith("to_out") else module


def peft_config(source: Source) -> dict[str, Any]:
    """What PEFT keeps beside the tensors, alpha above all; empty for a LoRA of another kind."""
    config = dict(source.checkpoint.configs.get("peft", {}))
    config |= json.loads(source.checkpoint.metadata.get("lora_adapter_metadata", "{}"))
    for key, value in config.items():
        if value and key.rpartition(".")[2] in ("alpha_pattern", "use_rslora", "use_dora"):
            raise InputError(f"{source.path}: a PEFT LoRA with {key}, which is not read here")
    return config
