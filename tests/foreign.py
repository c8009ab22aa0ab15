"""A small Stable Diffusion 1.5 with random weights, written in the formats of other projects.

The names come from the listings of the real files (tests/data), not from the code that is tested:
the small model has as many blocks, layers and heads as the real one, and so the same names.
"""
import functools
import gzip
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from mcl import ModelConfig
from mcl.checkpoints.model_file import build_on_meta
from mcl.cli import convert as command
from mcl.config import CLIPTextConfig, SampleConfig, SparseCtrlConfig, UNetConfig, VAEConfig
from mcl.networks.sparsectrl import SparseCtrl

DATA = Path(__file__).parent / "data"
MINI = ModelConfig(
    name="mini",
    unet=UNetConfig(block_out_channels=(32, 64, 96, 96), cross_attention_dim=12,
                    motion_mid_block=True),
    vae=VAEConfig(block_out_channels=(32, 64, 96, 96)),
    text_encoder=CLIPTextConfig(hidden_size=12, intermediate_size=24),
    sample=SampleConfig())
PARTS = ("unet", "vae", "text_encoder")


@functools.cache
def listing(name):
    """{name: shape as text, or the other name of a map} of a real file."""
    lines = gzip.open(DATA / f"{name}.txt.gz", "rt").read().splitlines()
    return dict(line.split("\t") for line in lines)


@functools.cache
def mini_weights():
    """Return the small model's weights by name, such as "unet.conv_in.weight".

    They include a motion module in the middle block.
    """
    model, g = build_on_meta(MINI), torch.Generator().manual_seed(0)
    return {f"{part}.{name}": 0.1 * torch.randn(t.shape, generator=g)
            for part in PARTS for name, t in getattr(model, part).state_dict().items()}


@functools.cache
def part(name):
    """Return the weights of one part by their names in it; the UNet's without motion modules."""
    return {key[len(name) + 1:]: t for key, t in mini_weights().items()
            if key.startswith(name + ".") and ".motion_modules." not in key}


def ldm(parts=PARTS):
    """A single file in the names of LDM."""
    unet, vae = listing("map_unet_ldm_to_diffusers"), listing("map_vae_ldm_to_diffusers")
    result = {}
    if "unet" in parts:
        result |= {target: part("unet")[source] for target, source in unet.items()}
    if "vae" in parts:
        for target, source in vae.items():
            t = part("vae")[source]
            conv = ".attn_1." in target and target.endswith("weight") and ".norm." not in target
            result[target] = t[:, :, None, None] if conv else t
    if "text_encoder" in parts:
        result |= {f"cond_stage_model.transformer.{k}": t for k, t in part("text_encoder").items()}
    return result


def motion(version="v3"):
    """A motion module under its official names, with its encodings of positions."""
    length = 24 if version == "v1" else 32
    result = {}
    for name, t in mini_weights().items():
        if ".motion_modules." in name and (version == "v2" or "mid_block" not in name):
            name = name.removeprefix("unet.")
            result[name] = t
            if name.endswith("to_q.weight"):
                result[name.replace("to_q.weight", "pos_encoder.pe")] = sinusoid(length, len(t))
    return result


def sinusoid(length, channels):
    rate = 10000 ** (-torch.arange(0, channels, 2) / channels)
    angle = torch.arange(length)[:, None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).reshape(1, length, channels)


def motion_adapter(version="v2"):
    names = listing("map_mm_v2_to_motion_adapter")
    weights = motion(version)
    result = {names[name]: t for name, t in weights.items() if name in names}
    for name, t in weights.items():
        if "attention_blocks.0.pos_encoder" in name:
            new = name.replace("temporal_transformer.", "").replace(
                "attention_blocks.0.pos_encoder", "pos_embed")
            result[new] = t
    return result


def sparsectrl(kind, names_of_diffusers=False):
    """A SparseCtrl for the small model, with its encodings of positions."""
    with torch.device("meta"):
        shapes = SparseCtrl(MINI.unet, SparseCtrlConfig(kind)).state_dict()
    g = torch.Generator().manual_seed(1)
    result = {}
    for name, t in shapes.items():
        if names_of_diffusers and ".motion_modules." in name:
            for old, new in ((".temporal_transformer", ""), ("attention_blocks.0", "attn1"),
                             ("norms.0", "norm1"), ("ff_norm", "norm3")):
                name = name.replace(old, new)
        result[name] = 0.1 * torch.randn(t.shape, generator=g)
    assert set(result) <= set(listing(f"{'diffusers_' * names_of_diffusers}sparsectrl_{kind}"))
    for name, t in list(result.items()):
        if name.endswith("to_q.weight") and ".motion_modules." in name:
            pe = (name.replace("attn1.to_q.weight", "pos_embed.pe") if names_of_diffusers
                  else name.replace("to_q.weight", "pos_encoder.pe"))
            result[pe] = sinusoid(32, len(t))
    return result


def old_attention(vae):
    """The VAE's attention as diffusers called it before 0.17."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    result = {}
    for name, t in vae.items():
        for new, former in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{former}.")
        result[name] = t
    return result


def diffusers_folder(folder, variant="", ending="safetensors", sharded=False, configs=True):
    """The pipeline's folder; text encoder flat, as transformers 5 writes it, with `variant`."""
    configs_of = {
        "unet": {"attention_head_dim": 8, "norm_num_groups": 32, "act_fn": "silu",
                 "num_attention_heads": None, "sample_size": 64},
        "vae": {"norm_num_groups": 32, "act_fn": "silu"},
        "text_encoder": {"num_attention_heads": 12, "hidden_act": "quick_gelu"}}
    for name in PARTS:
        state = dict(part(name))
        if name == "vae" and ending == "bin":
            state = old_attention(state)
        if name == "text_encoder" and variant:
            state = {key.removeprefix("text_model."): t for key, t in state.items()}
        if name == "text_encoder" and not variant:
            state["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        place = folder / name
        place.mkdir(parents=True)
        stem = "diffusion_pytorch_model" if name != "text_encoder" else (
            "model" if ending == "safetensors" else "pytorch_model")
        if sharded and name == "unet":
            write_shards(place, stem, state)
        else:
            if variant:
                state = {key: t.half() for key, t in state.items()}
            save(place / f"{stem}{variant}.{ending}", state)
        if configs:
            (place / "config.json").write_text(json.dumps(configs_of[name]))
    return folder


def write_shards(place, stem, state):
    names = sorted(state)
    shards = [names[::2], names[1::2]]
    weight_map = {}
    for i, keys in enumerate(shards):
        file = f"{stem}-0000{i + 1}-of-00002.safetensors"
        save(place / file, {key: state[key] for key in keys})
        weight_map |= dict.fromkeys(keys, file)
    (place / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def save(path, state, metadata=None):
    if path.suffix == ".safetensors":
        save_file({name: t.contiguous().clone() for name, t in state.items()}, path, metadata)
    else:
        torch.save(state, path)
    return path


def convert(*argv):
    """Run convert_weights.py in this process and return its exit code."""
    return command.main([str(arg) for arg in argv])
