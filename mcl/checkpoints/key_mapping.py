"""The names that weights go by elsewhere, as ours, which are those of AnimateDiff and diffusers.

Each function takes one name out of a checkpoint, its prefix removed, and gives ours. A name that
is not known comes back as it is, and will be reported as belonging to no part of the model.
"""
import re

RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
          "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}
ENDS = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
MIDDLE = ("resnets.0", "attentions.0", "resnets.1")
MOTION_ADAPTER = {"attn1": "attention_blocks.0", "attn2": "attention_blocks.1",
                  "norm1": "norms.0", "norm2": "norms.1", "norm3": "ff_norm"}
POSITIONS = re.compile(r"\.pos_(encoder|embed)\.pe$")


def unet_from_ldm(name: str, layers: int) -> str:
    """Of "model.diffusion_model." in LDM's files; `layers` is layers_per_block.

    "input_blocks.4.1.norm.weight" -> "down_blocks.1.attentions.0.norm.weight"
    """
    for theirs, ours in ENDS.items():
        if name.startswith(theirs + "."):
            return ours + name[len(theirs):]
    middle = re.fullmatch(r"middle_block\.([012])\.(.+)", name)
    if middle:
        return f"mid_block.{MIDDLE[int(middle[1])]}.{within(middle[2])}"
    side = re.fullmatch(r"(input|output)_blocks\.(\d\d?)\.(\d)\.(.+)", name)
    if not side:
        return name
    n, rest = int(side[2]), within(side[4])
    kind = "resnets" if side[3] == "0" else "attentions"
    if side[1] == "output":
        block, layer = divmod(n, layers + 1)
        # Where a block has no attention its upsampler has the attention's number.
        if rest.startswith("conv."):
            return f"up_blocks.{block}.upsamplers.0.{rest}"
        return f"up_blocks.{block}.{kind}.{layer}.{rest}"
    block, layer = divmod(n - 1, layers + 1)
    if layer == layers:
        return f"down_blocks.{block}.downsamplers.0.{rest}"
    return f"down_blocks.{block}.{kind}.{layer}.{rest}"


def within(rest: str) -> str:
    """A name inside one of LDM's residual blocks or downsamplers; others stay as they are."""
    for theirs, ours in (RESNET | {"op": "conv"}).items():
        if rest.startswith(theirs + "."):
            return ours + rest[len(theirs):]
    return rest


def vae_name(name: str, levels: int) -> str:
    """Of an autoencoder: LDM's names, and diffusers' before and since 0.17.

    LDM counts the decoder's levels from the picture, we from the latents: `levels` of them.
    """
    up = re.fullmatch(r"decoder\.up\.(\d\d?)\.(.+)", name)
    if up:
        name = f"decoder.up_blocks.{levels - 1 - int(up[1])}.{up[2]}"
    for pattern, ours in (
            (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
            (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."),
            (r"\.downsample\.conv\.", ".downsamplers.0.conv."),
            (r"\.upsample\.conv\.", ".upsamplers.0.conv."),
            (r"\.nin_shortcut\.", ".conv_shortcut."),
            (r"coder\.norm_out\.", "coder.conv_norm_out."),
            (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
            (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
            (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
            (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
            (r"\.attentions\.0\.(q|query)\.", ".attentions.0.to_q."),
            (r"\.attentions\.0\.(k|key)\.", ".attentions.0.to_k."),
            (r"\.attentions\.0\.(v|value)\.", ".attentions.0.to_v."),
            (r"\.attentions\.0\.(proj_out|proj_attn)\.", ".attentions.0.to_out.0.")):
        name = re.sub(pattern, ours, name)
    return name


def text_name(name: str) -> str:
    """Of CLIP's text encoder, with or without "text_model." before."""
    return name if name.startswith("text_model.") else "text_model." + name


def motion_name(name: str) -> str:
    """Of a motion module or SparseCtrl: AnimateDiff's names, under any prefix, or diffusers'."""
    name = re.sub(r"^(?:(?:module|unet|model|controlnet)\.)+(?=(?:down_blocks|mid_block|up_blocks|"
                  r"conv_in|time_embedding|controlnet_\w+)\.)", "", name)
    adapter = re.fullmatch(r"(.*\.motion_modules\.\d+\.)(?!temporal_transformer\.)(.+)", name)
    if not adapter:
        return name
    inner = re.sub(r"(?<=transformer_blocks\.0\.)(\w+)",
                   lambda m: MOTION_ADAPTER.get(m[1], m[1]), adapter[2])
    return f"{adapter[1]}temporal_transformer.{inner}"


def ema_name(name: str) -> str:
    """Where LDM keeps the moving average of a weight: "model.a.b" -> "model_ema.ab"."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")
