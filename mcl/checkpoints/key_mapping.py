"""Maps the keys of other projects' checkpoints to this project's, which are AnimateDiff's names.

Each function takes one key without its prefix, such as "model.diffusion_model.", and returns this
project's key. An unknown key is returned unchanged, and is reported later as part of no network.
"""
import re
from collections.abc import Iterable, Mapping

# LDM's names: inside a residual block or downsampler, at the top level, and in the middle block.
RESNET_KEYS = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
               "out_layers.0": "norm2", "out_layers.3": "conv2",
               "skip_connection": "conv_shortcut", "op": "conv"}
TOP_LEVEL_KEYS = {
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out"}
MID_BLOCK_KEYS = ("resnets.0", "attentions.0", "resnets.1")
VAE_PATTERNS = (
    (r"^encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1."),
    (r"_blocks\.(\d+)\.block\.", r"_blocks.\1.resnets."),
    (r"\.(down|up)sample\.conv\.", r".\1samplers.0.conv."),
    (r"\.nin_shortcut\.", ".conv_shortcut."), (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."), (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.attentions\.0\.([qkv])(?:uery|ey|alue)?\.", r".attentions.0.to_\1."),
    (r"\.attentions\.0\.proj_(?:out|attn)\.", ".attentions.0.to_out.0."))
MOTION_ADAPTER_KEYS = {"attn1": "attention_blocks.0", "attn2": "attention_blocks.1",
                       "norm1": "norms.0", "norm2": "norms.1", "norm3": "ff_norm"}
# The keys of a LoRA: the module, and the role of the tensor in its change.
LORA_KEY = re.compile(
    r"^(?P<module>.+?)(?:"
    r"(?:\.lora_A(?:\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down|\.lora_down)\.(?P<down>weight)"
    r"|(?:\.lora_B(?:\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up|\.lora_up)\.(?P<up>weight)"
    r"|\.lora_mid\.(?P<mid>weight)|\.(?P<diff>diff|w_norm)|\.(?P<diff_b>diff_b|b_norm)"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.default)?(?:\.weight)?"
    r"|\.(?P<same>alpha|dora_scale|hada_w[12]_[ab]|hada_t[12]|lokr_w[12]|lokr_w[12]_[ab]|lokr_t2)"
    r"|\.(?P<glora>[ab][12])\.weight)$")
POSITIONAL_ENCODING = re.compile(r"\.pos_(encoder|embed)\.pe$")


def map_unet_key(key: str, layers: int) -> str:
    """Map a key of LDM's UNet; `layers` is layers_per_block.

    "input_blocks.4.1.norm.weight" becomes "down_blocks.1.attentions.0.norm.weight".
    """
    if (renamed := replace_start(key, TOP_LEVEL_KEYS)) != key:
        return renamed
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", key):
        return f"mid_block.{MID_BLOCK_KEYS[int(match[1])]}.{replace_start(match[2], RESNET_KEYS)}"
    match = re.fullmatch(r"(input|output)_blocks\.(\d\d?)\.(\d)\.(.+)", key)
    if not match:
        return key
    is_down, rest = match[1] == "input", replace_start(match[4], RESNET_KEYS)
    side, (block, layer) = "down" if is_down else "up", divmod(int(match[2]) - is_down, layers + 1)
    # An upsampler follows the attention; in a block without attention it has its number.
    if layer == layers if is_down else rest.startswith("conv."):
        return f"{side}_blocks.{block}.{side}samplers.0.{rest}"
    kind = "resnets" if match[3] == "0" else "attentions"
    return f"{side}_blocks.{block}.{kind}.{layer}.{rest}"


def replace_start(key: str, names: Mapping[str, str]) -> str:
    """Return the key with its start replaced by the first of `names` that it starts with."""
    for source, target in names.items():
        if key.startswith(source + "."):
            return target + key[len(source):]
    return key


def map_vae_key(key: str, levels: int) -> str:
    """Map a key of LDM's autoencoder, or of diffusers' before or since version 0.17.

    LDM counts the decoder's `levels` from the pixels; this project counts them from the latents.
    """
    if match := re.fullmatch(r"decoder\.up\.(\d\d?)\.(.+)", key):
        key = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{match[2]}"
    return replace_patterns(key, VAE_PATTERNS)


def replace_patterns(text: str, patterns: Iterable[tuple[str, str]]) -> str:
    """Return the text after all replacements of regular expressions, in order."""
    for pattern, replacement in patterns:
        text = re.sub(pattern, replacement, text)
    return text


def map_motion_key(key: str) -> str:
    """Map a key of a motion module or SparseCtrl: AnimateDiff's under any prefix, or diffusers'."""
    key = re.sub(r"^(?:(?:module|unet|model|controlnet)\.)+(?=(?:down_blocks|mid_block|up_blocks|"
                 r"conv_in|time_embedding|controlnet_\w+)\.)", "", key)
    match = re.fullmatch(r"(.*\.motion_modules\.\d+\.)(?!temporal_transformer\.)(.+)", key)
    if not match:
        return key
    inner = re.sub(r"(?<=transformer_blocks\.0\.)\w+",
                   lambda name: MOTION_ADAPTER_KEYS.get(name[0], name[0]), match[2])
    return f"{match[1]}temporal_transformer.{inner}"


def ema_key(key: str) -> str:
    """Return LDM's key of the moving average of a weight: "model_ema.ab" for "model.a.b"."""
    return "model_ema." + key.removeprefix("model.").replace(".", "")


def count_blocks(keys: Iterable[str], prefix: str) -> int:
    """Return one more than the highest number that follows `prefix` in a key, or 0."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d\d?)\.")
    return max((int(match[1]) + 1 for match in map(pattern.match, keys) if match), default=0)
