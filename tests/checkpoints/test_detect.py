"""What files are: the listings of the real ones, and what is refused by name."""
import math
from pathlib import Path

import pytest
import torch

from mcl import InputError, Model, Motion
from mcl.checkpoints.model_file import build_on_meta, save_model
from mcl.checkpoints.convert import check_positions, plan
from mcl.checkpoints.detect import detect
from mcl.checkpoints.lazy import Checkpoint, LazyTensor
from mcl.checkpoints.lora import Lora, deltas
from mcl.config import SD15, SD15_V1, SD15_V2, SparseCtrlConfig

from tests.foreign import convert, listing, save, sinusoid

# Of the real files: what stands in the listing, and what of it is no weight of the model.
BASES = {"ldm": ("ldm_single_file",),
         "diffusers": ("diffusers_unet", "diffusers_vae", "diffusers_text_encoder"),
         "diffusers, old": ("diffusers_unet", "diffusers_vae_oldattn",
                            "diffusers_text_encoder_flat")}
MOTIONS = {"mm_v1": "v1", "mm_v2": "v2", "mm_v3": "v3", "diffusers_motion_adapter_v1": "v1",
           "diffusers_motion_adapter_v2": "v2", "diffusers_motion_adapter_v3": "v3"}
PRESETS = {"v1": SD15_V1, "v2": SD15_V2, "v3": SD15}


def lazy(shape, name=""):
    def read():
        if name.endswith(".pe"):
            return sinusoid(*shape[1:])
        return torch.ones(())               # of what is read while planning, an alpha
    return LazyTensor(shape, torch.float32, read)


def real(name, rank=8):
    """A checkpoint with the names and shapes of a real file and no values."""
    def size(text):
        return tuple(rank if n == "r" else int(n) for n in text.split("x"))
    return {key: lazy(() if shape == "scalar" else size(shape), key)
            for key, shape in listing(name).items()}


def source(tensors, path="file", configs=None):
    return detect(Path(path), Checkpoint(tensors, (), configs=configs or {}))


def base(kind="ldm"):
    names = BASES[kind]
    if len(names) == 1:
        return source(real(*names), "base")
    return source({f"{part}.{key}": t for part, name in zip(("unet", "vae", "text_encoder"), names)
                   for key, t in real(name).items()}, "base")


def parts(base, motion):
    return {part: base for part in ("unet", "vae", "text_encoder")} | {"motion": motion}


@pytest.mark.parametrize("kind, name", [("ldm", name) for name in MOTIONS]
                         + [(kind, "mm_v3") for kind in BASES if kind != "ldm"])
def test_real_listings_fill_the_real_model_and_nothing_is_left(kind, name):
    motion = source(real(name))
    assert (motion.slot, motion.version) == ("--motion-module", MOTIONS[name])
    found = plan("sd15", parts(base(kind), motion), [])
    preset = PRESETS[MOTIONS[name]]
    assert (found.config.unet, found.config.vae, found.config.text_encoder) == (
        preset.unet, preset.vae, preset.text)
    assert found.weights.keys() == found.shapes.keys()
    # Each tensor of the files once: used, or dropped and then an encoding of positions.
    assert all(math.prod(found.shapes[key]) == math.prod(t.shape)
               for key, t in found.weights.items())
    assert len({id(t) for t in found.weights.values()}) == len(found.weights)
    whys = {why for counter in found.dropped.values() for why in counter}
    assert whys == {"encodings of positions, computed here"}


def test_optional_keys_of_the_real_single_file_are_dropped_for_reasons():
    tensors = real("ldm_single_file") | real("ldm_single_file_optional")
    motion = source(real("mm_v3"), "mm")
    found = plan("sd15", parts(source(tensors), motion), [])
    assert found.used[Path("file")] == 1130
    assert dict(found.dropped[Path("file")]) == {
        "moving averages, which --ema takes": 688, "numbers of positions, counted here": 1,
        "Stable Diffusion's own noise schedule; AnimateDiff's is used": 12}
    averaged = plan("sd15", parts(source(tensors), motion), [], ema=True)
    used = averaged.weights["unet.up_blocks.1.attentions.2.proj_in.weight"]
    assert used is tensors["model_ema.diffusion_modeloutput_blocks51proj_inweight"]
    assert sum(averaged.dropped[Path("file")].values()) == 701


@pytest.mark.parametrize("name", ["official_unet3d_v2", "official_unet3d_v3"])
def test_the_whole_unet_of_a_training_gives_its_motion_modules(name):
    found = source(real(name) | {"mid_block.motion_modules.0.temporal_transformer."
                                 "transformer_blocks.0.attention_blocks.0.pos_encoder.pe":
                                 lazy((1, 32, 1280))} if "v2" in name else
                   {f"module.{key}": t for key, t in real(name).items()}, path="v3")
    assert (found.slot, found.version) == ("--motion-module", name[-2:])
    assert len(found.parts["motion"]) == {"v2": 546, "v3": 520}[name[-2:]]
    assert "which --base gives" in "".join(found.dropped.values())


@pytest.mark.parametrize("name, kind", [
    ("sparsectrl_rgb", "rgb"), ("diffusers_sparsectrl_rgb", "rgb"),
    ("sparsectrl_scribble", "scribble"), ("diffusers_sparsectrl_scribble", "scribble")])
def test_real_sparsectrl_listings_fill_the_real_model_and_nothing_is_left(name, kind):
    control = source(real(name), "control")
    assert (control.slot, control.title) == ("--sparsectrl", f"AnimateDiff's SparseCtrl ({kind})")
    found = plan("sd15", parts(base(), source(real("mm_v3"), "mm")) | {"sparsectrl": control}, [])
    assert found.config.sparsectrl == SparseCtrlConfig(kind)
    own = {key: t for key, t in found.weights.items() if key.startswith("sparsectrl.")}
    assert len(own) == found.used[Path("control")] == len(real(name)) - 8
    assert found.dropped[Path("control")] == {"encodings of positions, computed here": 8}
    assert all(math.prod(found.shapes[key]) == math.prod(t.shape) for key, t in own.items())


@pytest.mark.parametrize("name, slot, changed, dropped", [
    ("v3_sd15_adapter", "--adapter", 128, 0), ("v2_motion_lora", "--motion-lora", 160, 16),
    ("kohya_lora", "--lora", 264, 0)])
def test_real_loras_change_weights_that_the_real_model_has(name, slot, changed, dropped):
    found = source(real(name))
    assert found.slot == slot
    model = build_on_meta(SD15)
    shapes = {f"{part}.{key}": t.shape for part in ("unet", "vae", "text_encoder")
              for key, t in getattr(model, part).state_dict().items()}
    change, why = deltas(Lora(found), shapes)
    assert len(change) == changed and len(why) == dropped
    assert len(real(name)) == dropped + sum(
        2 + (name == "kohya_lora") for _ in change)
    if name == "v2_motion_lora":
        shapes |= {key.replace("up_blocks.0.motion_modules.0", "mid_block.motion_modules.0"): s
                   for key, s in shapes.items() if "unet.up_blocks.0.motion_modules.0" in key}
        assert len(deltas(Lora(found), shapes)[0]) == 168


@pytest.mark.parametrize("name, slot, title", [
    ("diffusers_vae", "--vae", "a VAE of Stable Diffusion 1.5"),
    ("diffusers_vae_oldattn", "--vae", "a VAE of Stable Diffusion 1.5"),
    ("diffusers_text_encoder", "--text-encoder", "a text encoder of Stable Diffusion 1.5"),
    ("diffusers_text_encoder_flat", "--text-encoder", "a text encoder of Stable Diffusion 1.5"),
    ("diffusers_unet", "--base", "Stable Diffusion 1.5, diffusers file (UNet)"),
    ("ldm_single_file", "--base",
     "Stable Diffusion 1.5, single file (UNet, VAE, text encoder)")])
def test_networks_alone_are_known(name, slot, title):
    found = source(real(name))
    assert (found.slot, found.title) == (slot, title)
    assert found.dropped == {}


UNET = "model.diffusion_model."
TO_K = UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
MM = "down_blocks.{}.motion_modules.0.temporal_transformer.proj_in.weight"
OTHERS = {
    "Stable Diffusion 2 ": {TO_K: (320, 1024)},
    "Stable Diffusion XL ": {TO_K: (320, 2048)},
    "Stable Diffusion XL's refiner": {TO_K: (320, 1280)},
    r"Stable Diffusion XL \(cond": {UNET + "out.2.bias": (4,), "conditioner.embedders.0.x": (1,)},
    r"Stable Diffusion 2 \(cond": {UNET + "out.2.bias": (4,), "cond_stage_model.model.x": (1,)},
    "inpainting": {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)},
    "InstructPix2Pix": {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "an OFT": {"lora_unet_x.oft_blocks": (4, 8)},
    "a LoRA for Stable Diffusion XL": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight":
            (4, 2048)},
    "a LoRA for Stable Diffusion 2": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 1024)},
    "Hotshot-XL": {"down_blocks.0.temporal_attentions.0.x.weight": (4, 8)},
    "PIA": {"conv_in.weight": (320, 9, 3, 3), MM.format(0): (320, 320)},
    "motion module for Stable Diffusion XL": {MM.format(b): (320, 320) for b in range(3)},
    "a plain ControlNet, .* has motion modules": {
        "controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)},
    "a plain ControlNet, which": {"control_model.x.weight": (4, 8)},
    "textual inversion": {"emb_params": (2, 768)},
    "textual inversion .*<cat>": {"<cat>": (768,)},
    "textual inversion .*a cat": {"a cat": (3, 768)},
    "textual inversion .*a dog": {"a dog": (768,), "a ring": (768,)},
    r"a v-prediction model \(v_pred\)": {UNET + "out.2.bias": (4,), "v_pred": (0,)},
    r"a v-prediction model \(ztsnr\)": {UNET + "out.2.bias": (4,), "ztsnr": (0,)},
    "IP-Adapter": {"image_proj.proj.weight": (2, 768)},
    "rename it so that v1 or v3": {MM.format(0): (320, 320)},
    "of a kind that is not known": {"fc.weight": (2, 3), "fc.bias": (2,)},
    "a checkpoint without tensors": {},
}


@pytest.mark.parametrize("what", OTHERS)
def test_other_families_are_refused_by_name(what):
    with pytest.raises(InputError, match=f"^file: .*{what}"):
        source({name: lazy(shape) for name, shape in OTHERS[what].items()})


@pytest.mark.parametrize("part, config", [
    ("unet", {"use_linear_projection": True}), ("unet", {"act_fn": "gelu"}),
    ("vae", {"act_fn": "relu"}), ("text_encoder", {"hidden_act": "gelu"}),
    ("scheduler", {"prediction_type": "v_prediction"}),
    ("scheduler", {"rescale_betas_zero_snr": True})])
def test_a_config_of_another_architecture_is_refused(part, config):
    key, value = next(iter(config.items()))
    with pytest.raises(InputError, match=f"{part} config has {key} = {value!r}; Stable"):
        source({f"unet.{key}": t for key, t in real("diffusers_unet").items()}
               | {f"vae.{key}": t for key, t in real("diffusers_vae").items()}
               | {f"text_encoder.{key}": t for key, t in real("diffusers_text_encoder").items()},
               configs={part: config})


def test_a_config_may_hold_nulls():
    tensors = {f"unet.{key}": t for key, t in real("diffusers_unet").items()}
    config = {"act_fn": None, "num_attention_heads": None, "attention_head_dim": 4}
    found = source(tensors, "unet", {"unet": config})
    whole = parts(base(), source(real("mm_v3"))) | {"unet": found}
    assert plan("sd15", whole, []).config.unet.heads == 4


@pytest.mark.parametrize("name, shape, message", [
    ("text_model.embeddings.token_embedding.weight", (49407, 768), "knows 49407 tokens"),
    ("text_model.embeddings.token_embedding.weight", (49408, 504),
     "its UNet takes 768 channels of text, the rest gives 504")])
def test_a_text_encoder_that_does_not_fit_is_refused(name, shape, message):
    text = source(real("diffusers_text_encoder") | {name: lazy(shape)}, "text")
    whole = parts(base(), source(real("mm_v3"))) | {"text_encoder": text}
    with pytest.raises(InputError, match=message):
        plan("sd15", whole, [])


def test_a_vae_of_other_latents_and_quantised_weights_are_refused():
    vae = source(real("diffusers_vae") | {"decoder.conv_in.weight": lazy((512, 16, 3, 3))}, "vae")
    whole = parts(base(), source(real("mm_v3")))
    with pytest.raises(InputError, match="takes 4 channels of latents, the rest gives 16"):
        plan("sd15", whole | {"vae": vae}, [])
    bias = LazyTensor((4,), torch.int8, lambda: torch.zeros(4))
    vae = source(real("diffusers_vae") | {"post_quant_conv.bias": bias}, "vae")
    with pytest.raises(InputError, match="^vae: .*post_quant_conv.bias is torch.int8: quantised"):
        plan("sd15", whole | {"vae": vae}, [])


def test_heads_that_differ_by_block_are_refused():
    tensors = {f"unet.{key}": t for key, t in real("diffusers_unet").items()}
    found = source(tensors, "unet", {"unet": {"attention_head_dim": [5, 10, 20, 20]}})
    whole = parts(base(), source(real("mm_v3"))) | {"unet": found}
    with pytest.raises(InputError, match="the same number of heads everywhere"):
        plan("sd15", whole, [])


def test_what_else_a_network_alone_carries_is_dropped():
    text = real("diffusers_text_encoder") | {name: lazy((2, 2)) for name in (
        "vision_model.x.weight", "logit_scale", "text_projection.weight", "visual_projection.x",
        "text_projection")}
    assert set(source(text).dropped.values()) == {"of CLIP, but not of its text encoder"}
    vae = real("diffusers_vae") | {name: lazy((2, 2)) for name in (
        "loss.logvar", "encoder.x.num_batches_tracked", "vae.colorize")}
    found = source({f"first_stage_model.{name}": t for name, t in vae.items()} | {
        "model_ema.decay": lazy(())})
    assert found.slot == "--vae" and len(found.parts["vae"]) == 248
    assert sorted(found.dropped) == ["first_stage_model.encoder.x.num_batches_tracked",
                                     "first_stage_model.loss.logvar",
                                     "first_stage_model.vae.colorize", "model_ema.decay"]


def test_a_text_projection_in_a_base_is_dropped():
    name = "cond_stage_model.transformer.text_projection.weight"
    assert set(source(real("ldm_single_file") | {name: lazy((768, 768))}).dropped) == {name}


@pytest.mark.parametrize("metadata, refused", [
    ({"modelspec.prediction_type": "v"}, True), ({"modelspec.prediction_type": "epsilon"}, False),
    ({"prediction_type": "v_prediction"}, True)])
def test_the_metadata_tell_a_v_prediction_model(metadata, refused):
    def known():
        return detect(Path("file"), Checkpoint(real("diffusers_unet"), (), metadata=metadata))
    if not refused:
        assert known().slot == "--base"
        return
    with pytest.raises(InputError, match="a v-prediction model"):
        known()


def test_the_folder_of_an_animatediff_pipeline_is_a_base_with_motion_modules():
    """Its UNet is a UNetMotionModel: the names of a UNet and of a MotionAdapter in one file."""
    unet = real("diffusers_unet") | real("diffusers_motion_adapter_v2")
    tensors = {f"unet.{key}": t for key, t in unet.items()}
    for part, name in (("vae", "diffusers_vae"), ("text_encoder", "diffusers_text_encoder")):
        tensors |= {f"{part}.{key}": t for key, t in real(name).items()}
    found = source(tensors, configs={"unet": {"motion_num_attention_heads": 8}})
    assert (found.slot, found.version) == ("--base", "v2")
    whole = plan("sd15", dict.fromkeys(("unet", "vae", "text_encoder", "motion"), found), [])
    assert whole.config.unet == SD15_V2.unet and whole.weights.keys() == whole.shapes.keys()
    assert dict(whole.dropped[Path("file")]) == {"encodings of positions, computed here": 21}


@pytest.mark.parametrize("before", ["controlnet.", "controlnet.module."])
def test_sparsectrl_is_known_under_prefixes(before):
    found = source({before + key: t for key, t in real("sparsectrl_rgb").items()})
    assert found.slot == "--sparsectrl"
    assert found.parts["sparsectrl"].keys() == source(real("sparsectrl_rgb")).parts[
        "sparsectrl"].keys()


def test_parts_of_other_methods_in_a_motion_module_are_named():
    parts = ("img_encoder.conv.weight", "fps_embedding.linear.weight", "pose_encoder.x")
    found = source(real("mm_v3") | {name: lazy((2,)) for name in parts})
    assert found.version == "v3"
    for name in parts:
        assert found.dropped[name].startswith(f"of {name.partition('.')[0]}, another method's")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("then", [None, torch.float16])
def test_positions_that_fp8_rounded_are_known(kind, then):
    tensors = real("mm_v3")
    for name, t in tensors.items():
        if name.endswith(".pe"):
            rounded = sinusoid(*t.shape[1:]).to(kind)
            rounded = rounded if then is None else rounded.to(then)
            tensors[name] = LazyTensor(t.shape, rounded.dtype, lambda rounded=rounded: rounded)
    check_positions(source(tensors))
    name = next(name for name in tensors if name.endswith(".pe"))
    moved = tensors[name].read().float().roll(1, 1).to(kind)
    tensors[name] = LazyTensor(moved.shape, kind, lambda: moved)
    with pytest.raises(InputError, match="not AnimateDiff's encoding of positions"):
        check_positions(source(tensors))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_positions_may_differ_by_the_rounding_of_half_precision_and_no_more(kind):
    tensors = real("mm_v3")
    name = next(name for name in tensors if name.endswith(".pe"))
    shape = tensors[name].shape
    rounded = sinusoid(*shape[1:]).to(kind)
    tensors[name] = LazyTensor(shape, kind, lambda: rounded)
    check_positions(source(tensors))
    moved = sinusoid(*shape[1:])
    moved[0, 5, 7] += 0.02
    tensors[name] = LazyTensor(shape, torch.float32, lambda: moved)
    with pytest.raises(InputError, match="not AnimateDiff's encoding of positions"):
        check_positions(source(tensors))


def test_positions_of_different_lengths_are_refused():
    tensors = real("mm_v3")
    tensors[next(key for key in tensors if key.endswith(".pe"))] = lazy((1, 24, 320))
    with pytest.raises(InputError, match=r"differ in length: \[24, 32\]"):
        source(tensors)


def test_positions_that_are_learned_are_refused():
    tensors = real("mm_v3")
    name = next(key for key in tensors if key.endswith(".pe"))
    shape = tensors[name].shape
    tensors[name] = LazyTensor(shape, torch.float32, lambda: torch.zeros(shape))
    with pytest.raises(InputError, match="not AnimateDiff's encoding of positions"):
        plan("sd15", parts(base(), source(tensors)), [])


def test_two_names_for_one_tensor_are_refused():
    tensors = real("diffusers_vae") | {
        "encoder.mid_block.attentions.0.query.weight": lazy((512, 512))}
    with pytest.raises(InputError, match="query.weight and .*to_q.weight are the same tensor"):
        source(tensors)


@pytest.mark.parametrize("name, version", [
    ("mm_sd_v15.ckpt", "v1"), ("mm_sd_v14.ckpt", "v1"), ("mm_sd15_v3.safetensors", "v3"),
    ("motion-adapter-v1-5-3/diffusion_pytorch_model.safetensors", "v3"),
    ("motion-adapter-v1-5/diffusion_pytorch_model.safetensors", "v1")])
def test_where_positions_are_missing_the_name_tells_the_version(name, version):
    tensors = {key: t for key, t in real("mm_v3").items() if not key.endswith(".pe")}
    assert source(tensors, name).version == version


def test_check_says_what_each_file_is(tmp_path, capsys):
    from tests.conftest import SMALL
    vae = save(tmp_path / "vae.safetensors", {"decoder.conv_in.weight": torch.zeros(4, 4, 3, 3)})
    page = tmp_path / "page.ckpt"
    page.write_text("<!DOCTYPE html>")
    assert convert("--check", vae) == 0
    first, second, third, fourth = capsys.readouterr().out.splitlines()
    assert first == f"{vae}: a VAE of Stable Diffusion 1.5"
    assert second == "  1 tensors, 1 float32, 0.000 GB"
    assert third == ("  for --vae; a complete model still needs the UNet (--base), the text "
                     "encoder (--text-encoder), the motion module (--motion-module)")
    assert len(fourth.split()[1]) == 64
    save_model(Model(SMALL), tmp_path / "m.safetensors", torch.float16, {})
    assert convert("--check", page, tmp_path / "m.safetensors") == 2
    assert "an HTML page" in (out := capsys.readouterr().out)
    assert "a converted model of this project" in out and "--weights" in out
    x = {"up_blocks.1.motion_modules.0": torch.zeros(64, 1, 4, 1)}
    info = {"model": "", "t": 400, "k": 1, "blocks": [], "frames": 4, "height": 8, "width": 8}
    Motion(x, {name: v.long() for name, v in x.items()}, info).save(tmp_path / "kept")
    assert convert("--check", tmp_path / "kept") == 2
    assert "a kept motion, which python sample.py --motion takes" in capsys.readouterr().out
