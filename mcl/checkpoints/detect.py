"""Detects what a checkpoint is by the keys and shapes of its tensors, and rejects the rest."""
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import short_repr
from ..errors import InputError
from . import key_mapping
from .containers import Checkpoint, open_checkpoint

# The command line option of each part of a model, and of each kind of LoRA.
OPTIONS = {"unet": "--base", "vae": "--vae", "text_encoder": "--text-encoder",
           "motion": "--motion-module", "sparsectrl": "--sparsectrl"}
ADAPTER, LORA, MOTION_LORA = LORAS = "--adapter", "--lora", "--motion-lora"
PART_NAMES = {"unet": "UNet", "vae": "VAE", "text_encoder": "text encoder",
              "motion": "motion module", "sparsectrl": "SparseCtrl"}

LDM_UNET = "model.diffusion_model."
PREFIXES = {LDM_UNET: "unet", "unet.": "unet", "first_stage_model.": "vae", "vae.": "vae",
            "cond_stage_model.transformer.": "text_encoder", "text_encoder.": "text_encoder"}
SIGNATURE_KEYS = {"unet": "down_blocks.0.resnets.0.conv1.weight", "vae": "decoder.conv_in.weight",
                  "text_encoder": "embeddings.token_embedding.weight"}
# A key that matches says that the checkpoint belongs to another method, and to which.
UNSUPPORTED_PATTERNS = (
    (r"^(conditioner\.embedders\.|lora_te2_|clip_[lg]$)|\badd_embedding\.", "Stable Diffusion XL"),
    (r"^cond_stage_model\.model\.", "Stable Diffusion 2"),
    (r"\.oft_(blocks|diag)|\.oft_R\b|\.on_input$|(^|\.)ia3_", "an OFT or IA3 (LyCORIS)"),
    (r"temporal_attentions|positional_encoding$", "a Hotshot-XL motion module"),
    (r"time_embed(ding)?\.cond_proj\.", "LCM's UNet, which LCM-LoRA or AnimateLCM can replace"),
    (r"^(image_proj|ip_adapter)\b", "an IP-Adapter"),
    (r"^(v_pred|ztsnr)$", "a v-prediction model"))      # empty tensors that trainers add
# Tensors of a base that are not used, and why.
IGNORED_PATTERNS = (
    (r"position_ids$", "position numbers, computed here"),
    (r"\.loss\.|^loss\.", "of the training loss"),
    (r"num_batches_tracked$|\.colorize$", "training counters"),
    (r"^model_ema\.", "moving averages, which --ema takes"),
    (r"^(betas|alphas|sqrt_|log_one|posterior_|logvar$|lvlb_|scale_factor$)",
     "Stable Diffusion's noise schedule; AnimateDiff's is used"),
    (r"(^|\.)(vision_model\.|text_projection(\.|$)|visual_projection\.|logit_scale$)",
     "of CLIP, but not of its text encoder"))
FOREIGN_PART_NOTE = "another method's part, without which the motion may differ"
V_PREDICTION_METADATA = ("modelspec.prediction_type", "prediction_type", "yaml")
# Values that the networks support. A config.json with others describes another architecture.
SUPPORTED_VALUES: dict[str, dict[str, Any]] = {
    "unet": {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
             "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
             "use_linear_projection": False, "dual_cross_attention": False},
    "vae": {"act_fn": "silu"}, "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}}
UNET_KEY = re.compile(r"((down|up)_blocks|mid_block|conv_(in|out|norm_out)|time_embedding)\.")
CONTROLNET_KEY = re.compile(r"control_model\.|((controlnet|module)\.)*controlnet_cond_embedding\.")
DOMAIN_ADAPTER_KEY = re.compile(r"(down|mid|up)_blocks?\..*\.processor\.")
TEXT_WIDTHS = {1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL",
               1280: "the refiner of Stable Diffusion XL"}
INPUT_CHANNELS = {9: "an inpainting model", 8: "InstructPix2Pix"}
# The projections of text embeddings, in networks and LoRAs.
TEXT_PROJECTION = re.compile(r"^(?!.*motion_modules).*attn2[._](processor\.)?to_k"
                             r"(\.weight$|.*(down|lora_A|hada_w1_b|\.diff$))")
FIRST_PROJECTION = "down_blocks.0.motion_modules.0.temporal_transformer.proj_in.weight"
V1_MAX_SEQ_LENGTH = 24


@dataclass(frozen=True, kw_only=True)
class DetectedCheckpoint(Checkpoint):
    """A checkpoint that can be used.

    Attributes:
        option: The command line option that takes it.
        description: What it is, in words.
        key_maps: For each part that it has, the checkpoint's keys by this project's keys.
        ignored: For each of its keys that is not used, the reason.
        motion_max_seq_length: Number of frames that its motion modules support.
    """

    option: str = ""
    description: str = ""
    key_maps: dict[str, dict[str, str]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)
    motion_max_seq_length: int = 0

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one part's tensors by this project's keys."""
        return {name: self.tensors[key].shape for name, key in self.key_maps.get(part, {}).items()}

    def config(self, part: str) -> Mapping[str, Any]:
        """Return the config.json of one part, or of the file's own folder; empty without any."""
        return self.configs.get(part, self.configs.get("", {}))


def detect_file(path: Path, option: str = "") -> DetectedCheckpoint:
    """Open a checkpoint and return what it is, without reading its weights.

    Args:
        path: The file or folder.
        option: The command line option that must take it; "" for any.

    Raises:
        InputError: If it cannot be used, or not with the option; the message says what it is.
    """
    checkpoint = detect(replace(open_checkpoint(path), path=path))
    if option not in ("", checkpoint.option):
        raise wrong_option_error(checkpoint, option)
    return checkpoint


def detect(checkpoint: Checkpoint) -> DetectedCheckpoint:
    """Return what an open checkpoint is. Raises InputError as `detect_file` does."""
    path, tensors = checkpoint.path, checkpoint.tensors
    for pattern, family in UNSUPPORTED_PATTERNS:
        for key in filter(re.compile(pattern).search, (*tensors, *checkpoint.non_tensors)):
            raise unsupported(path, f"{family} ({key})")
    file_format = checkpoint.metadata.get("format", "")
    if file_format.startswith("mcl-model"):
        return DetectedCheckpoint(**vars(checkpoint), option="--weights",
                                  description="a converted model of this project")
    if file_format.startswith("mcl-motion"):
        raise InputError(f"{path}: a saved motion, not a checkpoint. Run sample.py --motion {path}")
    if not tensors:
        raise InputError(f"{path}: a checkpoint without tensors. Give another file")
    for key in filter(TEXT_PROJECTION.search, tensors):
        for width in TEXT_WIDTHS.keys() & tensors[key].shape[1:2]:
            raise unsupported(path, f"{TEXT_WIDTHS[width]} (text embeddings of {width}, not 768)")
    has_motion = any(".motion_modules." in key for key in tensors)
    if any(map(CONTROLNET_KEY.match, tensors)) and not has_prefix(tensors, LDM_UNET):
        if not has_motion:
            raise unsupported(path, "a ControlNet without motion modules")
        return detect_sparsectrl(checkpoint)
    if any(map(key_mapping.LORA_KEY.match, tensors)):
        return detect_lora(checkpoint)
    if has_motion and not (has_prefix(tensors, "unet.") and has_prefix(tensors, "vae.")):
        return detect_motion_module(checkpoint)
    return detect_networks(checkpoint)


def unsupported(path: Path, family: str) -> InputError:
    """Return the error for a checkpoint of another method."""
    return InputError(f"{path}: {family} is not supported. Give a checkpoint for Stable Diffusion "
                      "1.5 or AnimateDiff")


def wrong_option_error(checkpoint: DetectedCheckpoint, option: str) -> InputError:
    """Return the error for a checkpoint that was given with a wrong option."""
    subject = f"{checkpoint.path}: {checkpoint.description}"
    if checkpoint.option == "--weights":
        return InputError(f"{subject}. Run python sample.py --weights {checkpoint.path}")
    if option == "--weights" and checkpoint.key_maps:
        other = "--motion-module" if "unet" in checkpoint.key_maps else "--base"
        return InputError(f"{subject}, not a converted model. Run convert_weights.py "
                          f"{checkpoint.option} {checkpoint.path} {other} FILE --out FILE first")
    command = " of convert_weights.py" if checkpoint.key_maps else ""
    return InputError(f"{subject}, not for {option}. Pass it with {checkpoint.option}{command}")


def has_prefix(keys: Iterable[str], prefix: str) -> bool:
    """Return True if a key starts with the prefix."""
    return any(key.startswith(prefix) for key in keys)


def detect_sparsectrl(checkpoint: Checkpoint) -> DetectedCheckpoint:
    """Return a SparseCtrl and its kind."""
    key_map, ignored, length = split_encodings(checkpoint)
    kind = "rgb" if "controlnet_cond_embedding.weight" in key_map else "scribble"
    return DetectedCheckpoint(
        **vars(checkpoint), option=OPTIONS["sparsectrl"], key_maps={"sparsectrl": key_map},
        ignored=ignored, motion_max_seq_length=length or 32,
        description=f"AnimateDiff's SparseCtrl ({kind})")


def split_encodings(checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, str], int]:
    """Return the key map, the ignored positional encodings, and their length or 0."""
    ignored = {key: "positional encodings, computed here" for key in checkpoint.tensors
               if key_mapping.POSITIONAL_ENCODING.search(key)}
    key_map = make_key_map(checkpoint.path, {
        key: key_mapping.map_motion_key(key) for key in checkpoint.tensors if key not in ignored})
    lengths = {length for key in ignored for length in checkpoint.tensors[key].shape[1:2]}
    if len(lengths) > 1:
        raise InputError(f"{checkpoint.path}: its positional encodings differ in length: "
                         f"{sorted(lengths)}. Give another file")
    return key_map, ignored, min(lengths, default=0)


def make_key_map(path: Path, targets: Mapping[str, str]) -> dict[str, str]:
    """Return the keys by their targets. Raises InputError if two keys have one target."""
    key_map: dict[str, str] = {}
    for key, target in targets.items():
        if key_map.setdefault(target, key) != key:
            raise InputError(f"{path}: {key} and {key_map[target]} are the same tensor, {target}. "
                             "Give another file")
    return key_map


def detect_lora(checkpoint: Checkpoint) -> DetectedCheckpoint:
    """Return which of the three kinds of LoRA it is."""
    option, description = LORA, "a LoRA for Stable Diffusion 1.5"
    if any("motion_modules" in key for key in checkpoint.tensors):
        option, description = MOTION_LORA, "a motion LoRA of AnimateDiff"
    elif all(map(DOMAIN_ADAPTER_KEY.match, checkpoint.tensors)):
        option, description = ADAPTER, "AnimateDiff's domain adapter (v3_sd15_adapter)"
    return DetectedCheckpoint(**vars(checkpoint), option=option, description=description)


def detect_motion_module(checkpoint: Checkpoint) -> DetectedCheckpoint:
    """Return AnimateDiff's motion modules, alone or in the whole UNet of a training checkpoint."""
    path, tensors = checkpoint.path, checkpoint.tensors
    key_map, ignored, length = split_encodings(checkpoint)
    shapes = {target: tensors[key].shape for target, key in key_map.items()}
    if shapes.get("conv_in.weight", ())[1:2] == (9,):
        raise unsupported(path, "PIA (a UNet with 9 channels)")
    num_blocks = key_mapping.count_blocks(shapes, "down_blocks")
    if num_blocks == 3 and shapes.get(FIRST_PROJECTION, ())[:1] == (320,):
        raise unsupported(path, "a motion module for Stable Diffusion XL")
    for target in [target for target in key_map if ".motion_modules." not in target]:
        ignored[key_map.pop(target)] = (
            "of the UNet, which --base gives" if UNET_KEY.match(target) else
            f"of {target.partition('.')[0]}, {FOREIGN_PART_NOTE}")
    version = motion_version(checkpoint, key_map, length)
    preset = distillation_of(path)
    return DetectedCheckpoint(
        **vars(checkpoint) | {"version": version}, option=OPTIONS["motion"],
        description=f"an AnimateDiff motion module, {version}{preset and ', '}{preset}",
        key_maps={"motion": key_map}, ignored=ignored,
        motion_max_seq_length=V1_MAX_SEQ_LENGTH if version == "v1" else length or 32)


def name_hint(path: Path) -> str:
    """Return the names of a file and its folder in lower case."""
    return "/".join(path.absolute().parts[-2:]).lower()


def distillation_of(path: Path) -> str:
    """Return the preset that a motion module is distilled for, or "".

    Distilled modules have the tensors of ordinary ones. Only the names of the file and its folder
    tell them apart.
    """
    steps = re.search(r"lightning.*?([248])step", name_hint(path))
    return f"lightning-{steps[1]}" if steps else "animatelcm" * ("animatelcm" in name_hint(path))


def motion_version(checkpoint: Checkpoint, key_map: Mapping[str, str], length: int) -> str:
    """Return "v1", "v2" or "v3".

    Only v2 has a module in the middle block. The positional encodings of v1 have 24 positions,
    later ones more. Converters to diffusers' MotionAdapter always write 32 positions, and some
    files have none; then the caller or the file's name tells v1 from v3.

    Raises:
        InputError: If the version is not known, or differs from the caller's.
    """
    is_adapter = not any(".temporal_transformer." in key for key in checkpoint.tensors)
    detected = ("v2" if has_prefix(key_map, "mid_block.") else
                "v1" if length == V1_MAX_SEQ_LENGTH else "v3" if length and not is_adapter else "")
    if checkpoint.version not in (detected or ("", "v1", "v3")) and checkpoint.version:
        raise InputError(f"{checkpoint.path}: motion_version = {checkpoint.version!r} does not fit "
                         f"its tensors. Pass {detected or 'v1 or v3'}")
    name = name_hint(checkpoint.path) if checkpoint.files else ""
    version = detected or checkpoint.version or (
        "v3" if re.search(r"v3|v1-5-3", name) else "v1" if re.search(r"v1(?!\d)|v14|v15", name)
        else "v3" if length else "")
    if not version:
        fix = "Add v1 or v3 to its name" if checkpoint.files else 'Pass motion_version="v1" or "v3"'
        raise InputError(f"{checkpoint.path}: the motion module has no positional encodings, which "
                         f"tell v1 from v3. {fix}")
    return version


def detect_networks(checkpoint: Checkpoint) -> DetectedCheckpoint:
    """Return UNet, VAE and text encoder: several under prefixes, or a single one without."""
    tensors = checkpoint.tensors
    single = next((part for part, key in SIGNATURE_KEYS.items()
                   if {key, f"text_model.{key}"} & tensors.keys()), "")
    keys: dict[str, dict[str, str]] = {}
    ignored: dict[str, str] = {}
    for name in tensors:
        prefix = next(filter(name.startswith, PREFIXES), "")
        part = PREFIXES.get(prefix, single)
        reason = next((reason for pattern, reason in IGNORED_PATTERNS if re.search(pattern, name)),
                      "" if part else "outside of UNet, VAE and text encoder")
        if reason:
            ignored[name] = reason
        else:
            keys.setdefault(part, {})[name.removeprefix(prefix)] = name
    if not keys:
        return detect_embedding(checkpoint)
    motion = split_motion_modules(checkpoint, keys.get("unet", {}))
    parts = [part for part in OPTIONS if part in keys or part in motion.key_maps]
    names = ", ".join(PART_NAMES[part] for part in parts)
    container = ("single file" if has_prefix(tensors, LDM_UNET) else
                 "diffusers folder" if checkpoint.path.is_dir() else "diffusers file")
    detected = replace(
        motion, option=OPTIONS[parts[0]], ignored=ignored | motion.ignored,
        key_maps=motion.key_maps | {part: map_keys(checkpoint.path, part, names)
                                    for part, names in keys.items()},
        description=f"Stable Diffusion 1.5, {container} ({names})" if "unet" in parts else
        f"a {names} of Stable Diffusion 1.5")
    check_networks(detected)
    return detected


def detect_embedding(checkpoint: Checkpoint) -> DetectedCheckpoint:
    """Return the embedding of a word. Raises InputError for all tensors of an unknown kind."""
    path, tensors = checkpoint.path, checkpoint.tensors
    for key, t in tensors.items():
        is_vectors = len(t.shape) in (1, 2) and 0 not in t.shape and t.dtype.is_floating_point
        if len(tensors) == 1 and is_vectors and (
                re.fullmatch(r"\*|emb_params|<.+>", key) or t.shape[-1] in (768, *TEXT_WIDTHS)):
            return DetectedCheckpoint(**vars(checkpoint), option="--embedding",
                                      description="a textual inversion embedding, for sample.py")
    raise InputError(f"{path}: {len(tensors)} tensors ({', '.join(sorted(tensors)[:2])}, ...) of "
                     "an unknown kind. python convert_weights.py --help lists the known kinds")


def split_motion_modules(checkpoint: Checkpoint, unet: dict[str, str]) -> DetectedCheckpoint:
    """Remove the motion modules, if any, from the keys of a UNet and return them as a key map."""
    modules = {key: unet.pop(key) for key in list(unet) if ".motion_modules." in key}
    if not modules:
        return DetectedCheckpoint(**vars(checkpoint))
    motion = detect_motion_module(replace(checkpoint, tensors={
        key: checkpoint.tensors[name] for key, name in modules.items()}))
    key_map = {target: modules[key] for target, key in motion.key_maps["motion"].items()}
    return replace(motion, tensors=checkpoint.tensors, key_maps={"motion": key_map},
                   ignored={modules[key]: reason for key, reason in motion.ignored.items()})


def map_keys(path: Path, part: str, keys: Mapping[str, str]) -> dict[str, str]:
    """Return the key map of one network.

    Args:
        path: The checkpoint.
        part: "unet", "vae" or "text_encoder".
        keys: The checkpoint's keys by the same keys without prefix.
    """
    downsamplers = map(re.compile(r"input_blocks\.(\d\d?)\.0\.op\.").match, keys)
    layers = min((int(match[1]) for match in downsamplers if match), default=3) - 1
    levels = key_mapping.count_blocks(keys, "decoder.up")
    map_key: Callable[[str], str] = {
        "unet": lambda key: key_mapping.map_unet_key(key, layers),
        "vae": lambda key: key_mapping.map_vae_key(key, levels),
        "text_encoder": lambda key: "text_model." + key.removeprefix("text_model.")}[part]
    return make_key_map(path, {name: map_key(key) for key, name in keys.items()})


def check_networks(checkpoint: DetectedCheckpoint) -> None:
    """Raise InputError for networks of another architecture, and for models that predict v."""
    path, metadata = checkpoint.path, checkpoint.metadata
    conv_in = checkpoint.shapes("unet").get("conv_in.weight", ())
    for channels in INPUT_CHANNELS.keys() & conv_in[1:2]:
        raise unsupported(path, f"{INPUT_CHANNELS[channels]} (a UNet with {channels} channels)")
    for key in V_PREDICTION_METADATA:
        if "unet" in checkpoint.key_maps and str(metadata.get(key, "")).lower().startswith("v"):
            raise unsupported(path, f"a v-prediction model ({key}: {metadata[key]})")
    signs = f"{checkpoint.config('vae').get('scaling_factor')} {metadata} {path.name}".lower()
    if [*checkpoint.key_maps] == ["vae"] and re.search(r"\b0\.13025\b|diffusion-xl|sdxl", signs):
        raise unsupported(path, "the VAE of Stable Diffusion XL")
    for part in checkpoint.key_maps.keys() & SUPPORTED_VALUES.keys() | {"scheduler"}:
        config = checkpoint.config(part)
        for key, value in SUPPORTED_VALUES[part].items():
            if config.get(key) not in (None, value):
                raise unsupported(path, f"{key} = {short_repr(config[key])} in the {part} config")
