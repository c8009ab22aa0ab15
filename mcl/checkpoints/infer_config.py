"""The sizes of networks, read off their weights' shapes and, where it is there, config.json."""
import re
from typing import Any, Mapping, TypeVar

from ..config import (VOCABULARY_SIZE, SparseCtrlConfig, CLIPTextConfig, UNetConfig, VAEConfig, short_repr)
from ..errors import InputError

Shapes = Mapping[str, tuple[int, ...]]

# What our networks do not vary. A config that says otherwise is of another architecture.
FIXED: dict[str, dict[str, Any]] = {
    "unet": {"act_fn": "silu", "flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5,
             "center_input_sample": False, "downsample_padding": 1, "mid_block_scale_factor": 1,
             "use_linear_projection": False, "dual_cross_attention": False},
    "vae": {"act_fn": "silu"},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "text_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "vision_config": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}}
CLIP_PARTS = ("text_config", "vision_config")
CLIP_HEAD = 64                              # channels of each head, in all that OpenAI has
T = TypeVar("T")


def made(path: Any, config: type[T], /, **values: Any) -> T:
    """A config of a file's sizes. Raises InputError, with the file's name, for impossible ones."""
    try:
        return config(**values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def check_config(path: Any, part: str, config: Mapping[str, Any]) -> None:
    """Raises InputError for a config.json that describes what this project has no network for."""
    for key, value in FIXED[part].items():
        if config.get(key) not in (None, value):
            raise InputError(f"{path}: its {part} config has {key} = {short_repr(config[key])}; "
                             f"{'CLIP' if part in CLIP_PARTS else 'Stable Diffusion 1.5'} has "
                             f"{value!r}, and only that runs here")


def shape_of(shapes: Shapes, name: str, path: Any) -> tuple[int, ...]:
    """Of a convolution, a linear layer or an embedding: two or four numbers."""
    if name not in shapes:
        raise InputError(f"{path}: the tensor {name} is missing")
    if len(shapes[name]) not in (2, 4):
        raise InputError(f"{path}: the tensor {name} is {shapes[name]}, which is no weight")
    return shapes[name]


def widths(shapes: Shapes, before: str, path: Any) -> tuple[int, ...]:
    """Channels of each resolution, by the last convolution of its first residual block."""
    levels = count(shapes, before)
    return tuple(shape_of(shapes, f"{before}.{b}.resnets.0.conv2.weight", path)[0]
                 for b in range(levels))


def count(names: Any, before: str) -> int:
    """One more than the highest number that follows `before` in a name."""
    pattern = re.compile(re.escape(before) + r"\.(\d\d?)\.")
    return max((int(m[1]) + 1 for m in map(pattern.match, names) if m), default=0)


def number_of_heads(config: Mapping[str, Any], keys: tuple[str, ...], default: int,
                    path: Any) -> Any:
    """Shapes do not tell it. diffusers calls the number of heads of a UNet `attention_head_dim`."""
    for key in keys:
        given: Any = config.get(key)
        if given is not None:
            each = given if isinstance(given, list) else [given]
            if not each or any(one != each[0] for one in each):
                raise InputError(f"{path}: {key} = {short_repr(given)}: Stable Diffusion 2 or later; "
                                 "the same number of heads everywhere is what runs here")
            return each[0]
    return default


def unet_config(path: Any, unet: Shapes, config: Mapping[str, Any], motion: Shapes,
                motion_config: Mapping[str, Any], version: str, motion_max_seq_length: int) -> UNetConfig:
    """Of a UNet and a motion module, both under our names."""
    attends = tuple(level for level in range(count(unet, "down_blocks"))
                    if count(unet, f"down_blocks.{level}.attentions"))
    to_k = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return made(
        path, UNetConfig,
        in_channels=shape_of(unet, "conv_in.weight", path)[1],
        out_channels=shape_of(unet, "conv_out.weight", path)[0],
        block_out_channels=widths(unet, "down_blocks", path),
        layers_per_block=count(unet, "down_blocks.0.resnets"),
        cross_attention_levels=attends,
        num_attention_heads=number_of_heads(config, ("num_attention_heads", "attention_head_dim"), 8, path),
        cross_attention_dim=shape_of(unet, to_k, path)[1],
        norm_num_groups=given(config, "norm_num_groups", 32),
        motion_num_attention_heads=given(motion_config, "motion_num_attention_heads", 8),
        motion_mid_block=any(name.startswith("mid_block.motion_modules.") for name in motion),
        inflated_groupnorm=version != "v1", motion_max_seq_length=motion_max_seq_length)


def given(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """A value of a config.json, where null stands for none; the dataclass checks it."""
    value = config.get(key)
    return default if value is None else value


def sparsectrl_config(path: Any, control: Shapes, config: Mapping[str, Any], motion_max_seq_length: int
                      ) -> SparseCtrlConfig:
    embedding = "controlnet_cond_embedding"
    sizes = {"motion_heads": given(config, "motion_num_attention_heads", 8),
             "max_frames": motion_max_seq_length}
    if f"{embedding}.weight" in control:
        return made(path, SparseCtrlConfig, kind="rgb", **sizes)
    strided = range(1, count(control, f"{embedding}.blocks"), 2)
    return made(path, SparseCtrlConfig, kind="scribble", **sizes, conditioning_embedding_channels=(
        shape_of(control, f"{embedding}.conv_in.weight", path)[0],
        *(shape_of(control, f"{embedding}.blocks.{i}.weight", path)[0] for i in strided)))


def vae_config(path: Any, vae: Shapes, config: Mapping[str, Any]) -> VAEConfig:
    return made(
        path, VAEConfig,
        latent_channels=shape_of(vae, "decoder.conv_in.weight", path)[1],
        block_out_channels=widths(vae, "encoder.down_blocks", path),
        layers_per_block=count(vae, "encoder.down_blocks.0.resnets"),
        norm_num_groups=given(config, "norm_num_groups", 32),
        scaling_factor=given(config, "scaling_factor", 0.18215))


def text_config(path: Any, text: Shapes, config: Mapping[str, Any]) -> CLIPTextConfig:
    vocabulary, hidden = shape_of(text, "text_model.embeddings.token_embedding.weight", path)[:2]
    if vocabulary < VOCABULARY_SIZE:
        raise InputError(f"{path}: its text encoder knows {vocabulary} tokens, CLIP's tokenizer "
                         f"has {VOCABULARY_SIZE}")
    return made(
        path, CLIPTextConfig,
        vocab_size=vocabulary, hidden_size=hidden,
        intermediate_size=shape_of(text, "text_model.encoder.layers.0.mlp.fc1.weight", path)[0],
        num_hidden_layers=count(text, "text_model.encoder.layers"),
        num_attention_heads=number_of_heads(config, ("num_attention_heads",), 12, path),
        max_position_embeddings=shape_of(text, "text_model.embeddings.position_embedding.weight", path)[0])
