"""LoRAs of every dialect: the domain adapter, motion LoRAs, and LoRAs of Stable Diffusion 1.5.

Most add W += scale * alpha / rank * up @ down to a weight; `lora_math` has the other forms. The
change is computed and added in float32, and the sum is converted once. AnimateDiff's own loader
leaves alpha / rank out.
"""
import contextlib
import hashlib
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import has_type, short_repr
from ..errors import InputError
from ..files import LazyTensor
from ..ownership import sha256_of
from .containers import Shapes, parse_json
from .detect import DetectedCheckpoint, detect_file
from .key_mapping import LORA_KEY, count_blocks, map_motion_key, map_unet_key, replace_patterns
from .lora_math import WeightDelta, infer_rank
from .model_file import WeightTransform

IGNORED_LORA_PATTERNS = (
    (r"^bundle_emb\.", "an embedding bundled with the LoRA, whose word prompts do not know"),
    (r"text_projection|vision_model|visual_projection", "of CLIP, but not of its text encoder"))
PREFIX_PATTERNS = (
    (r"(^|\.)base_model\.model\.", r"\1"), (r"^lora_unet_", "unet."),
    (r"^lora_te1?_", "text_encoder."), (r"^(?=(down|up)_blocks\.|mid_block\.)", "unet."),
    (r"^(?=text_model\.|encoder\.layers\.)", "text_encoder."),
    (r"^text_encoder\.(?=encoder[._])", "text_encoder.text_model."), (r"\.processor\.", "."))
# LDM's names, with underscores in place of dots.
LDM_PATTERNS = (
    (r"^(input|output)_blocks_(\d+)_(\d+)_?", r"\1_blocks.\2.\3."),
    (r"^middle_block_(\d)_?", r"middle_block.\1."), (r"^(time_embed|out)_(\d)$", r"\1.\2"),
    (r"\.(in_layers|emb_layers|out_layers)_(\d)$", r".\1.\2"))
# The regular expressions that PEFT's patterns may be. They are short of what takes long to match.
PEFT_PATTERN = re.compile(r"\^?([\w.|-]|\\[.dw])*((\.\*|\\[dw]\+|\((\?:)?[\w.|-]+\))"
                          r"([\w.|-]|\\[.dw])*){0,3}\$?")
PEFT_METADATA = "lora_adapter_metadata"     # PEFT's config in the metadata of safetensors
TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
IGNORE_ALPHA_HELP = "merge LoRAs as AnimateDiff's own loader does: up @ down without alpha / rank"


@dataclass(frozen=True)
class Lora:
    """A LoRA and how it is merged.

    Attributes:
        checkpoint: The file.
        scale: Factor of the change.
        ignore_alpha: Leave alpha / rank out, as AnimateDiff's own loader does.
    """

    checkpoint: DetectedCheckpoint
    scale: float = 1.0
    ignore_alpha: bool = False

    def __post_init__(self) -> None:
        """Raise InputError if the scale is not finite."""
        if not math.isfinite(self.scale):
            raise InputError(f"{self.checkpoint.path}: the scale {self.scale} is out of range: it "
                             "must be a finite number")


def parse_scaled(text: str) -> tuple[Path, float]:
    """Return (file.safetensors, 0.8) for "file.safetensors:0.8"; the default scale is 1."""
    path, colon, scale = text.rpartition(":")
    if colon and not os.path.exists(text):
        with contextlib.suppress(ValueError):
            return Path(path), float(scale)
    return Path(text), 1.0


def open_lora(option: str, path: Path, scale: float = 1.0, ignore_alpha: bool = False) -> Lora:
    """Open a LoRA. Raises InputError if it is not what `option` takes."""
    return Lora(detect_file(path, option), scale, ignore_alpha)


def lora_deltas(lora: Lora, shapes: Shapes) -> tuple[dict[str, WeightDelta], dict[str, str]]:
    """Return the changes of weights by name, and for each key that is not used the reason.

    Args:
        lora: The LoRA.
        shapes: Shapes of all the model's weights by name, such as "unet.conv_in.weight".

    Raises:
        InputError: If the LoRA changes a module that the model does not have, a shape does not
            fit, or a tensor is missing.
    """
    path, tensors = lora.checkpoint.path, lora.checkpoint.tensors
    # kohya's trainer writes underscores in place of dots.
    modules = {(name := weight.rpartition(".")[0]).replace(".", "_"): name for weight in shapes}
    layers = count_blocks(shapes, "unet.down_blocks.0.resnets")
    has_mid_block = any(".mid_block.motion_modules." in name for name in shapes)
    peft = peft_config(lora.checkpoint)
    deltas: dict[str, WeightDelta] = {}
    ignored = {key: reason for pattern, reason in IGNORED_LORA_PATTERNS for key in tensors
               if re.search(pattern, key)}
    groups = group_by_module(path, tensors.keys() - ignored.keys())
    for (module, kind), keys in groups.items():
        if "mid_block" in module and "motion_modules" in module and not has_mid_block:
            ignored |= dict.fromkeys(keys.values(), "of v2's motion module in the middle block")
            continue
        name = modules.get(map_lora_module(module, layers).replace(".", "_"), "")
        if not name:
            raise InputError(f"{path}: this model has no {module}. Give a LoRA for this model")
        weight, part = f"{name}.{kind}", name.partition(".")[0]
        if weight in deltas:
            raise InputError(f"{path}: it changes {module} twice. Give another file")
        if weight not in shapes:
            ignored[keys["diff"]] = "of a bias that this layer does not have"
        elif keys.keys() != {"alpha"} or (module, "bias") not in groups:
            deltas[weight] = make_delta(
                lora, module, {role: tensors[key] for role, key in keys.items()}, shapes[weight],
                {**peft, **{key.removeprefix(f"{part}."): value for key, value in peft.items()}})
    return deltas, ignored


def group_by_module(path: Path, keys: Iterable[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Return, for "weight" and "bias" of each module that a LoRA changes, its keys by role."""
    groups: dict[tuple[str, str], dict[str, str]] = {}
    for key in sorted(keys):
        match = LORA_KEY.match(key)
        if not match:
            raise InputError(f"{path}: {key} is of no known kind of LoRA. Give another file")
        role = match["same"] or match["glora"] or str(match.lastgroup)
        kind, role = ("bias", "diff") if role == "diff_b" else ("weight", role)
        if groups.setdefault((match["module"], kind), {}).setdefault(role, key) != key:
            raise InputError(f"{path}: {match['module']} has two of {role}. Give another file")
    return groups


def make_delta(lora: Lora, module: str, factors: dict[str, LazyTensor], shape: Sequence[int],
               peft: Mapping[str, Any]) -> WeightDelta:
    """Return the change of one weight.

    Args:
        lora: The LoRA.
        module: The LoRA's name of the module.
        factors: Its tensors by role.
        shape: Shape of the weight.
        peft: PEFT's config for the module's network, which a tensor "alpha" replaces.

    Raises:
        InputError: If the factors do not fit the weight, or alpha is not one finite number.
    """
    path, alpha_tensor = lora.checkpoint.path, factors.pop("alpha", None)
    if alpha_tensor is not None:
        values = alpha_tensor.read().flatten()[:2].float().tolist()
        peft = {"lora_alpha": values[0] if len(values) == 1 else values}
    default = peft.get("lora_alpha", peft.get("alpha"))
    alpha = peft_value(path, peft, "alpha_pattern", module, default)
    if alpha is not None and not has_type(alpha, float):
        raise InputError(f"{path}: the alpha of {module} is {short_repr(alpha)}. Give another file")
    try:
        rank = infer_rank({role: t.shape for role, t in factors.items()})
        if rank is None:        # whole matrices have no rank, but PEFT divides LoKr's by its own
            peft_rank = peft_value(path, peft, "rank_pattern", module, peft.get("r"))
            has_rank = alpha and has_type(peft_rank, int) and peft_rank and "lokr_w1" in factors
            alpha, rank = (alpha, peft_rank) if has_rank else (1, 1)
        divisor = math.sqrt(rank) if peft.get("use_rslora") else rank
        # kohya's trainer uses the rank for an alpha of zero.
        alpha = divisor if lora.ignore_alpha or not alpha else alpha
        delta = WeightDelta(path, module, factors, alpha, divisor, lora.scale)
        delta.add_to(torch.empty(tuple(shape), device="meta"))
        if not all(t.dtype.is_floating_point for t in factors.values()):
            raise ValueError("quantized")
    except (ArithmeticError, IndexError, KeyError, RuntimeError, ValueError) as error:
        roles = ", ".join(f"{role} {t.shape}" for role, t in factors.items())
        raise InputError(f"{path}: {module} has {roles or 'no factors'}, which make no change of a "
                         f"weight {tuple(shape)}. Give a LoRA for this model") from error
    return delta


def peft_config(checkpoint: DetectedCheckpoint) -> Mapping[str, Any]:
    """Return PEFT's config, above all alpha and the rank; empty for a LoRA of another kind."""
    path, metadata = checkpoint.path, checkpoint.metadata.get(PEFT_METADATA, "{}")
    config = checkpoint.configs.get("peft", {}) | parse_json(f"{path}: {PEFT_METADATA}", metadata)
    has_dora = any("magnitude_vector" in key for key in checkpoint.tensors)
    if not has_dora and any(value for key, value in config.items() if key.endswith("use_dora")):
        raise InputError(f"{path}: a PEFT LoRA with use_dora is not supported. Give another file")
    return config


def peft_value(path: Path, config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    """Return the value of a module by PEFT's rule.

    Args:
        path: The LoRA.
        config: PEFT's config.
        key: The key of values by patterns, such as "alpha_pattern". The first pattern that the end
            of the module's name matches gives the value.
        module: The LoRA's name of the module.
        default: The value without such a pattern.

    Raises:
        InputError: If a pattern is not one of PEFT_PATTERN.
    """
    patterns, prefix = config.get(key) or {}, r"((unet|text_encoder|base_model\.model)\.)*"
    if not isinstance(patterns, dict) or not all(map(PEFT_PATTERN.fullmatch, patterns)):
        raise InputError(f"{path}: {key} {short_repr(patterns)} is unsupported. Give another file")
    name = re.sub(prefix, "", module, count=1)
    return next((value for pattern, value in patterns.items()
                 if re.match(rf"(.*\.)?({pattern})$", name)), default)


def collect_deltas(loras: Sequence[Lora], shapes: Shapes
                   ) -> tuple[dict[str, list[WeightDelta]], dict[Path, dict[str, str]]]:
    """Return the changes of all LoRAs by weight, in order, and the ignored keys of each file."""
    deltas: dict[str, list[WeightDelta]] = {}
    ignored: dict[Path, dict[str, str]] = {}
    for lora in loras:
        lora_changes, ignored[lora.checkpoint.path] = lora_deltas(lora, shapes)
        for weight, delta in lora_changes.items():
            deltas.setdefault(weight, []).append(delta)
    return deltas, ignored


def apply_deltas(weight: Tensor, deltas: Sequence[WeightDelta], dtype: torch.dtype) -> Tensor:
    """Return a new weight in `dtype`: the weight with its changes added in float32."""
    for delta in deltas:
        weight = delta.add_to(weight.float())
    return weight.to(dtype, copy=True)


def merge_loras(loras: Sequence[Lora], shapes: Shapes) -> WeightTransform:
    """Return the transform that merges LoRAs into a model with these shapes.

    Raises:
        InputError: As `lora_deltas` does.
    """
    deltas = collect_deltas(loras, shapes)[0]
    identity = " ".join(text for lora in loras for text in (*map(sha256_of, lora.checkpoint.files),
                        f":{lora.scale}{' without alpha' * lora.ignore_alpha}"))
    return WeightTransform(
        lambda name, weight: apply_deltas(weight, deltas[name], torch.float32) if (
            name in deltas) else weight, hashlib.sha256(identity.encode()).hexdigest())


def map_lora_module(module: str, layers: int) -> str:
    """Return this project's name of a LoRA's module, in which dots may be underscores."""
    module = replace_patterns(module, PREFIX_PATTERNS)
    if module.startswith("text_encoder."):
        start, _, last = module.removesuffix(".0").rpartition(".")
        return f"{start}.{TEXT_PROJECTIONS[last]}" if last in TEXT_PROJECTIONS else module
    key = replace_patterns(module.removeprefix("unet."), LDM_PATTERNS)
    key = map_motion_key(map_unet_key(f"{key}.", layers).rstrip("."))
    return f"unet.{key}.0" if key.endswith("to_out") else f"unet.{key}"
