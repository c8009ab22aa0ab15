"""Infers the sizes of networks from the shapes of their weights and from config.json."""
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..config import CLIPTextConfig, ModelConfig, SparseCtrlConfig, UNetConfig, VAEConfig
from ..errors import InputError
from ..presets import DISTILLED_PRESETS, PRESETS
from .containers import Shapes
from .detect import DetectedCheckpoint, distillation_of
from .key_mapping import count_blocks

T = TypeVar("T")
Config = Mapping[str, Any]                 # content of a config.json


def infer_config(name: str, parts: Mapping[str, DetectedCheckpoint]) -> ModelConfig:
    """Return the config of a whole model.

    Args:
        name: Name of the model.
        parts: The checkpoint of each part, as for `plan_conversion`.

    Raises:
        InputError: If the sizes are impossible, or the parts do not fit one another.
    """
    def infer(part: str, config_of: Callable[..., T], *args: Any) -> T:
        checkpoint = parts[part]
        return build_config(checkpoint.path, config_of, checkpoint.shapes(part),
                            checkpoint.config(part), *args)

    motion = parts["motion"]
    sample = DISTILLED_PRESETS.get(
        distillation_of(motion.path) if motion.files else "", PRESETS["camera"])
    return build_config(
        motion.path, ModelConfig, name, infer("unet", unet_config, motion),
        infer("vae", vae_config), infer("text_encoder", text_config),
        sparsectrl=infer("sparsectrl", sparsectrl_config, parts["sparsectrl"]) if (
            "sparsectrl" in parts) else SparseCtrlConfig(),
        sample=dataclasses.replace(sample, num_frames=min(16, motion.motion_max_seq_length)))


def build_config(path: Path, config_of: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Return `config_of(*args, **kwargs)`.

    Raises:
        InputError: If a size is impossible, or a tensor that tells a size is missing or no weight;
            the message names the file.
    """
    try:
        return config_of(*args, **kwargs)
    except (KeyError, IndexError) as error:
        raise InputError(f"{path}: a tensor is missing or has too few dimensions ({error}). Give a "
                         "complete file") from error
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def unet_config(shapes: Shapes, config: Config, motion: DetectedCheckpoint) -> UNetConfig:
    """Return the sizes of a UNet with a motion module."""
    to_k = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    return UNetConfig(
        in_channels=shapes["conv_in.weight"][1], out_channels=shapes["conv_out.weight"][0],
        block_out_channels=block_widths(shapes, "down_blocks"),
        layers_per_block=count_blocks(shapes, "down_blocks.0.resnets"),
        cross_attention_levels=tuple(
            level for level in range(count_blocks(shapes, "down_blocks"))
            if count_blocks(shapes, f"down_blocks.{level}.attentions")),
        # diffusers gives the number of a UNet's heads as attention_head_dim.
        num_attention_heads=config_value(config, 8, "num_attention_heads", "attention_head_dim"),
        cross_attention_dim=shapes[to_k][1],
        norm_num_groups=config_value(config, 32, "norm_num_groups"),
        motion_num_attention_heads=config_value(
            motion.config("motion"), 8, "motion_num_attention_heads"),
        motion_mid_block=motion.version == "v2", inflated_groupnorm=motion.version != "v1",
        motion_max_seq_length=motion.motion_max_seq_length)


def sparsectrl_config(shapes: Shapes, config: Config, control: DetectedCheckpoint
                      ) -> SparseCtrlConfig:
    """Return the sizes of a SparseCtrl."""
    embedding = "controlnet_cond_embedding"
    heads = config_value(config, 8, "motion_num_attention_heads")
    if f"{embedding}.weight" in shapes:
        return SparseCtrlConfig("rgb", heads, control.motion_max_seq_length)
    strided = range(1, count_blocks(shapes, f"{embedding}.blocks"), 2)
    names = ("conv_in", *(f"blocks.{i}" for i in strided))
    widths = tuple(shapes[f"{embedding}.{name}.weight"][0] for name in names)
    return SparseCtrlConfig("scribble", heads, control.motion_max_seq_length, widths)


def vae_config(shapes: Shapes, config: Config) -> VAEConfig:
    """Return the sizes of an autoencoder."""
    return VAEConfig(
        latent_channels=shapes["decoder.conv_in.weight"][1],
        block_out_channels=block_widths(shapes, "encoder.down_blocks"),
        layers_per_block=count_blocks(shapes, "encoder.down_blocks.0.resnets"),
        norm_num_groups=config_value(config, 32, "norm_num_groups"),
        scaling_factor=config_value(config, 0.18215, "scaling_factor"))


def text_config(shapes: Shapes, config: Config) -> CLIPTextConfig:
    """Return the sizes of a CLIP text encoder."""
    embeddings, layers = "text_model.embeddings", "text_model.encoder.layers"
    return CLIPTextConfig(
        vocab_size=shapes[f"{embeddings}.token_embedding.weight"][0],
        hidden_size=shapes[f"{embeddings}.token_embedding.weight"][1],
        intermediate_size=shapes[f"{layers}.0.mlp.fc1.weight"][0],
        num_hidden_layers=count_blocks(shapes, layers),
        num_attention_heads=config_value(config, 12, "num_attention_heads"),
        max_position_embeddings=shapes[f"{embeddings}.position_embedding.weight"][0])


def block_widths(shapes: Shapes, prefix: str) -> tuple[int, ...]:
    """Return the channels of each resolution, from the first residual block of each."""
    return tuple(shapes[f"{prefix}.{block}.resnets.0.conv2.weight"][0]
                 for block in range(count_blocks(shapes, prefix)))


def config_value(config: Config, default: float, *keys: str) -> Any:
    """Return the value of the first of `keys` that config.json has, or the default.

    In config.json null means the default, and a list has the value of each block.

    Raises:
        InputError: If the blocks have different values.
    """
    value = next((config[key] for key in keys if config.get(key) is not None), default)
    values = value if isinstance(value, list) else [value]
    if not values or any(value != values[0] for value in values):
        raise InputError(f"{keys[-1]} must be the same in all blocks. Give another checkpoint")
    return values[0]
