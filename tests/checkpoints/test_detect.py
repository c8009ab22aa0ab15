"""Detection of checkpoints: listings of the real files, and rejected families by name."""
import math
from pathlib import Path

import pytest
import torch

from mcl import InputError, ModelConfig
from mcl.checkpoints.containers import Checkpoint, wrap_tensor
from mcl.checkpoints.convert import check_positional_encodings, plan_conversion
from mcl.checkpoints.detect import detect
from mcl.checkpoints.lora import Lora, lora_deltas
from mcl.checkpoints.model_file import build_on_meta
from mcl.config import CLIPTextConfig, SparseCtrlConfig, UNetConfig, VAEConfig
from mcl.files import LazyTensor
from tests.foreign import listing, sinusoid

# Listings of the real files' keys and shapes.
BASES = {"ldm": ("ldm_single_file",),
         "diffusers": ("diffusers_unet", "diffusers_vae", "diffusers_text_encoder"),
         "diffusers, old": ("diffusers_unet", "diffusers_vae_oldattn",
                            "diffusers_text_encoder_flat")}
MOTIONS = {"mm_v1": "v1", "mm_v2": "v2", "mm_v3": "v3", "diffusers_motion_adapter_v1": "v1",
           "diffusers_motion_adapter_v2": "v2", "diffusers_motion_adapter_v3": "v3"}
UNETS = {"v1": UNetConfig(inflated_groupnorm=False, motion_max_seq_length=24),
         "v2": UNetConfig(motion_mid_block=True), "v3": UNetConfig()}


def lazy(shape, name=""):
    def read():
        if name.endswith(".pe"):
            return sinusoid(*shape[1:])
        return torch.ones(())               # an alpha, which is read while planning
    return LazyTensor(shape, torch.float32, read)


def real(name, rank=8):
    """Tensors with the keys and shapes of a real file, without values."""
    def size(text):
        return tuple(rank if n == "r" else int(n) for n in text.split("x"))
    return {key: lazy(() if shape == "scalar" else size(shape), key)
            for key, shape in listing(name).items()}


def source(tensors, path="file", configs=None):
    return detect(Checkpoint(tensors, (Path(path),), configs=configs or {}, path=Path(path)))


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
def test_real_listings_give_every_weight_and_use_every_tensor(kind, name):
    motion = source(real(name))
    assert (motion.option, motion.version) == ("--motion-module", MOTIONS[name])
    plan = plan_conversion("sd15", parts(base(kind), motion), [])
    assert (plan.config.unet, plan.config.vae, plan.config.text_encoder) == (
        UNETS[MOTIONS[name]], VAEConfig(), CLIPTextConfig())
    assert plan.weights.keys() == plan.shapes.keys()
    # Each tensor of the files is used once, or is a positional encoding and ignored.
    assert all(math.prod(plan.shapes[key]) == math.prod(t.shape)
               for key, t in plan.weights.items())
    assert len({id(t) for t in plan.weights.values()}) == len(plan.weights)
    reasons = {reason for counter in plan.ignored.values() for reason in counter}
    assert reasons == {"positional encodings, computed here"}


def test_optional_keys_of_the_real_single_file_are_ignored_for_a_reason():
    tensors = real("ldm_single_file") | real("ldm_single_file_optional")
    motion = source(real("mm_v3"), "mm")
    plan = plan_conversion("sd15", parts(source(tensors), motion), [])
    assert len(tensors) - plan.ignored[Path("file")].total() == 1130
    assert dict(plan.ignored[Path("file")]) == {
        "moving averages, which --ema takes": 688, "position numbers, computed here": 1,
        "Stable Diffusion's noise schedule; AnimateDiff's is used": 12}
    averaged = plan_conversion("sd15", parts(source(tensors), motion), [], ema=True)
    weight = averaged.weights["unet.up_blocks.1.attentions.2.proj_in.weight"]
    assert weight is tensors["model_ema.diffusion_modeloutput_blocks51proj_inweight"]
    assert averaged.ignored[Path("file")].total() == 701
    assert averaged.ignored[Path("file")]["replaced by a moving average (--ema)"] == 686


@pytest.mark.parametrize("name", ["official_unet3d_v2", "official_unet3d_v3"])
def test_the_unet_of_a_training_checkpoint_gives_only_its_motion_modules(name):
    motion = source(real(name) | {"mid_block.motion_modules.0.temporal_transformer."
                                  "transformer_blocks.0.attention_blocks.0.pos_encoder.pe":
                                  lazy((1, 32, 1280))} if "v2" in name else
                    {f"module.{key}": t for key, t in real(name).items()}, path="v3")
    assert (motion.option, motion.version) == ("--motion-module", name[-2:])
    assert len(motion.key_maps["motion"]) == {"v2": 546, "v3": 520}[name[-2:]]
    assert "of the UNet, which --base gives" in motion.ignored.values()


@pytest.mark.parametrize("name, kind", [
    ("sparsectrl_rgb", "rgb"), ("diffusers_sparsectrl_rgb", "rgb"),
    ("sparsectrl_scribble", "scribble"), ("diffusers_sparsectrl_scribble", "scribble")])
def test_real_sparsectrl_listings_give_every_weight_and_use_every_tensor(name, kind):
    control = source(real(name), "control")
    assert (control.option, control.description) == (
        "--sparsectrl", f"AnimateDiff's SparseCtrl ({kind})")
    plan = plan_conversion("sd15", parts(base(), source(real("mm_v3"), "mm"))
                           | {"sparsectrl": control}, [])
    assert plan.config.sparsectrl == SparseCtrlConfig(kind)
    weights = {key: t for key, t in plan.weights.items() if key.startswith("sparsectrl.")}
    assert len(weights) == len(real(name)) - 8
    assert plan.ignored[Path("control")] == {"positional encodings, computed here": 8}
    assert all(math.prod(plan.shapes[key]) == math.prod(t.shape) for key, t in weights.items())


@pytest.mark.parametrize("name, option, num_changed, num_ignored", [
    ("v3_sd15_adapter", "--adapter", 128, 0), ("v2_motion_lora", "--motion-lora", 160, 16),
    ("kohya_lora", "--lora", 264, 0)])
def test_real_loras_change_weights_of_the_real_model(name, option, num_changed, num_ignored):
    lora = source(real(name))
    assert lora.option == option
    shapes = {key: t.shape for key, t in build_on_meta(ModelConfig()).state_dict().items()}
    deltas, ignored = lora_deltas(Lora(lora), shapes)
    assert len(deltas) == num_changed and len(ignored) == num_ignored
    assert len(real(name)) == num_ignored + sum(2 + (name == "kohya_lora") for _ in deltas)
    if name == "v2_motion_lora":
        shapes |= {key.replace("up_blocks.0.motion_modules.0", "mid_block.motion_modules.0"): s
                   for key, s in shapes.items() if "unet.up_blocks.0.motion_modules.0" in key}
        assert len(lora_deltas(Lora(lora), shapes)[0]) == 168


@pytest.mark.parametrize("name, option, description", [
    ("diffusers_vae", "--vae", "a VAE of Stable Diffusion 1.5"),
    ("diffusers_vae_oldattn", "--vae", "a VAE of Stable Diffusion 1.5"),
    ("diffusers_text_encoder", "--text-encoder", "a text encoder of Stable Diffusion 1.5"),
    ("diffusers_text_encoder_flat", "--text-encoder", "a text encoder of Stable Diffusion 1.5"),
    ("diffusers_unet", "--base", "Stable Diffusion 1.5, diffusers file (UNet)"),
    ("ldm_single_file", "--base",
     "Stable Diffusion 1.5, single file (UNet, VAE, text encoder)")])
def test_networks_are_detected_alone_and_together(name, option, description):
    network = source(real(name))
    assert (network.option, network.description) == (option, description)
    assert network.ignored == {}


UNET = "model.diffusion_model."
TO_K = UNET + "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
MM = "down_blocks.{}.motion_modules.0.temporal_transformer.proj_in.weight"
UNSUPPORTED = {
    r"Stable Diffusion 2 \(text": {TO_K: (320, 1024)},
    r"Stable Diffusion XL \(text": {TO_K: (320, 2048)},
    "the refiner of Stable Diffusion XL": {TO_K: (320, 1280)},
    r"Stable Diffusion XL \(cond": {UNET + "out.2.bias": (4,), "conditioner.embedders.0.x": (1,)},
    r"Stable Diffusion 2 \(cond": {UNET + "out.2.bias": (4,), "cond_stage_model.model.x": (1,)},
    "an inpainting model": {UNET + "input_blocks.0.0.weight": (320, 9, 3, 3)},
    "InstructPix2Pix": {UNET + "input_blocks.0.0.weight": (320, 8, 3, 3)},
    "an OFT": {"lora_unet_x.oft_blocks": (4, 8)},
    r"Stable Diffusion XL \(text embeddings of 2048": {
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight":
            (4, 2048)},
    r"Stable Diffusion 2 \(text embeddings of 1024": {
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (4, 1024)},
    "a Hotshot-XL": {"down_blocks.0.temporal_attentions.0.x.weight": (4, 8)},
    "PIA": {"conv_in.weight": (320, 9, 3, 3), MM.format(0): (320, 320)},
    "a motion module for Stable Diffusion XL": {MM.format(b): (320, 320) for b in range(3)},
    "a ControlNet without motion modules": {"controlnet_cond_embedding.conv_in.weight":
                                            (16, 3, 3, 3)},
    "a ControlNet without": {"control_model.x.weight": (4, 8)},
    r"Stable Diffusion XL \(clip_l\)": {"clip_l": (2, 768), "clip_g": (2, 1280)},
    r"LCM's UNet, .* or AnimateLCM can replace \(time_embedding.cond_proj": {
        "conv_in.weight": (320, 4, 3, 3), "time_embedding.cond_proj.weight": (320, 256)},
    r"a v-prediction model \(v_pred\)": {UNET + "out.2.bias": (4,), "v_pred": (0,)},
    r"a v-prediction model \(ztsnr\)": {UNET + "out.2.bias": (4,), "ztsnr": (0,)},
    "an IP-Adapter": {"image_proj.proj.weight": (2, 768)}}
UNKNOWN = {
    "Add v1 or v3 to its name": {MM.format(0): (320, 320)},
    r"2 tensors \(fc.bias, fc.weight, ...\) of an unknown kind": {"fc.weight": (2, 3),
                                                                 "fc.bias": (2,)},
    "1 tensors .* of an unknown kind": {"first_stage_model.loss.x": (2, 3)},
    r"2 tensors \(<dog>, <ring>, ...\) of an unknown kind": {"<dog>": (768,), "<ring>": (768,)},
    r"1 tensors \(<dog>, ...\) of an unknown kind": {"<dog>": (0, 768)},
    r"1 tensors \(emb_params, ...\) of an unknown kind": {"emb_params": (1, 2, 768)},
    "a checkpoint without tensors": {}}


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_other_families_are_rejected_by_name(family):
    with pytest.raises(InputError, match=f"^file: {family}.* is not supported. Give a checkpoint"):
        source({key: lazy(shape) for key, shape in UNSUPPORTED[family].items()})


@pytest.mark.parametrize("tensors", [{"emb_params": (2, 768)}, {"<cat>": (768,)},
                                     {"a cat": (3, 1024)}, {"*": (2, 12)}], ids=str)
def test_the_vectors_of_a_word_are_an_embedding(tensors):
    embedding = source({key: lazy(shape) for key, shape in tensors.items()})
    assert embedding.option == "--embedding"


@pytest.mark.parametrize("config, metadata, name", [
    ({"scaling_factor": 0.13025}, {}, "vae"),
    ({}, {"modelspec.architecture": "stable-diffusion-xl-v1-base/vae"}, "vae"),
    ({}, {}, "sdxl_vae.safetensors"), ({}, {}, "SDXL-VAE-fp16-fix.safetensors")])
def test_the_vae_of_stable_diffusion_xl_is_rejected(config, metadata, name):
    tensors = real("diffusers_vae")
    with pytest.raises(InputError, match=f"^{name}: the VAE of Stable Diffusion XL is not"):
        detect(Checkpoint(tensors, (), metadata=metadata, configs={"": config}, path=Path(name)))
    for others in ({"scaling_factor": 0.18215}, {"scaling_factor": None}, {}):
        assert source(tensors, "vae", {"": others}).option == "--vae"
    assert source(real("ldm_single_file"), "no_sdxl.safetensors").option == "--base"


@pytest.mark.parametrize("message", UNKNOWN)
def test_unknown_tensors_are_rejected(message):
    with pytest.raises(InputError, match=f"^file: .*{message}"):
        source({key: lazy(shape) for key, shape in UNKNOWN[message].items()})


@pytest.mark.parametrize("part, config", [
    ("unet", {"use_linear_projection": True}), ("unet", {"act_fn": "gelu"}),
    ("vae", {"act_fn": "relu"}), ("text_encoder", {"hidden_act": "gelu"}),
    ("scheduler", {"prediction_type": "v_prediction"}),
    ("scheduler", {"rescale_betas_zero_snr": True})])
def test_a_config_of_another_architecture_is_rejected(part, config):
    key, value = next(iter(config.items()))
    with pytest.raises(InputError, match=f"{key} = {value!r} in the {part} config is not"):
        source({f"unet.{key}": t for key, t in real("diffusers_unet").items()}
               | {f"vae.{key}": t for key, t in real("diffusers_vae").items()}
               | {f"text_encoder.{key}": t for key, t in real("diffusers_text_encoder").items()},
               configs={part: config})


def test_null_in_a_config_means_the_default():
    tensors = {f"unet.{key}": t for key, t in real("diffusers_unet").items()}
    config = {"act_fn": None, "num_attention_heads": None, "attention_head_dim": 4}
    unet = source(tensors, "unet", {"unet": config})
    all_parts = parts(base(), source(real("mm_v3"))) | {"unet": unet}
    assert plan_conversion("sd15", all_parts, []).config.unet.num_attention_heads == 4


@pytest.mark.parametrize("key, shape, message", [
    ("text_model.embeddings.token_embedding.weight", (49407, 768), "vocab_size = 49407"),
    ("text_model.embeddings.token_embedding.weight", (49408, 504), "hidden size 768, as the UNet"),
    ("text_model.embeddings.token_embedding.weight", (49408,), "has too few dimensions")])
def test_a_text_encoder_of_another_size_is_rejected(key, shape, message):
    text = source(real("diffusers_text_encoder") | {key: lazy(shape)}, "text")
    all_parts = parts(base(), source(real("mm_v3"))) | {"text_encoder": text}
    with pytest.raises(InputError, match=message):
        plan_conversion("sd15", all_parts, [])


def test_a_vae_of_other_latents_and_quantized_weights_are_rejected():
    vae = source(real("diffusers_vae") | {"decoder.conv_in.weight": lazy((512, 16, 3, 3))}, "vae")
    all_parts = parts(base(), source(real("mm_v3")))
    with pytest.raises(InputError, match="one with 4 latent channels, as the UNet takes"):
        plan_conversion("sd15", all_parts | {"vae": vae}, [])
    bias = LazyTensor((4,), torch.int8, lambda: torch.zeros(4))
    vae = source(real("diffusers_vae") | {"post_quant_conv.bias": bias}, "vae")
    with pytest.raises(InputError, match="^vae: .*post_quant_conv.bias is torch.int8: quantized"):
        plan_conversion("sd15", all_parts | {"vae": vae}, [])


@pytest.mark.parametrize("heads", [[5, 10, 20, 20], []])
def test_heads_that_differ_by_block_are_rejected(heads):
    tensors = {f"unet.{key}": t for key, t in real("diffusers_unet").items()}
    unet = source(tensors, "unet", {"unet": {"attention_head_dim": heads}})
    all_parts = parts(base(), source(real("mm_v3"))) | {"unet": unet}
    with pytest.raises(InputError, match="^unet: .*must be the same in all blocks"):
        plan_conversion("sd15", all_parts, [])


def test_tensors_of_a_single_network_that_are_not_used_are_ignored_for_a_reason():
    text = real("diffusers_text_encoder") | {name: lazy((2, 2)) for name in (
        "vision_model.x.weight", "logit_scale", "text_projection.weight", "visual_projection.x",
        "text_projection")}
    assert set(source(text).ignored.values()) == {"of CLIP, but not of its text encoder"}
    vae = real("diffusers_vae") | {name: lazy((2, 2)) for name in (
        "loss.logvar", "encoder.x.num_batches_tracked", "vae.colorize")}
    network = source({f"first_stage_model.{name}": t for name, t in vae.items()} | {
        "model_ema.decay": lazy(())})
    assert network.option == "--vae" and len(network.key_maps["vae"]) == 248
    assert sorted(network.ignored) == ["first_stage_model.encoder.x.num_batches_tracked",
                                       "first_stage_model.loss.logvar",
                                       "first_stage_model.vae.colorize", "model_ema.decay"]


def test_a_text_projection_in_a_base_is_ignored():
    name = "cond_stage_model.transformer.text_projection.weight"
    assert set(source(real("ldm_single_file") | {name: lazy((768, 768))}).ignored) == {name}


@pytest.mark.parametrize("metadata, is_rejected", [
    ({"modelspec.prediction_type": "v"}, True), ({"modelspec.prediction_type": "epsilon"}, False),
    ({"prediction_type": "v_prediction"}, True)])
def test_v_prediction_is_read_from_the_metadata(metadata, is_rejected):
    checkpoint = Checkpoint(real("diffusers_unet"), (), metadata=metadata)
    if not is_rejected:
        assert detect(checkpoint).option == "--base"
        return
    with pytest.raises(InputError, match="a v-prediction model"):
        detect(checkpoint)


def test_the_folder_of_an_animatediff_pipeline_is_a_base_with_motion_modules():
    """Its UNet is a UNetMotionModel: the keys of a UNet and of a MotionAdapter in one file."""
    unet = real("diffusers_unet") | real("diffusers_motion_adapter_v2")
    tensors = {f"unet.{key}": t for key, t in unet.items()}
    for part, name in (("vae", "diffusers_vae"), ("text_encoder", "diffusers_text_encoder")):
        tensors |= {f"{part}.{key}": t for key, t in real(name).items()}
    pipeline = source(tensors, configs={"unet": {"motion_num_attention_heads": 8}})
    assert (pipeline.option, pipeline.version) == ("--base", "v2")
    plan = plan_conversion("sd15", dict.fromkeys(pipeline.key_maps, pipeline), [])
    assert plan.config.unet == UNETS["v2"] and plan.weights.keys() == plan.shapes.keys()
    assert dict(plan.ignored[Path("file")]) == {"positional encodings, computed here": 21}
    other = source(real("mm_v3"), "mm")
    plan = plan_conversion("sd15", dict.fromkeys(pipeline.key_maps, pipeline) | {"motion": other},
                           [])
    assert dict(plan.ignored[Path("file")]) == {
        "positional encodings, computed here": 21,
        "of the motion module, which --motion-module gives": 546}


@pytest.mark.parametrize("before", ["controlnet.", "controlnet.module."])
def test_sparsectrl_is_detected_under_prefixes(before):
    control = source({before + key: t for key, t in real("sparsectrl_rgb").items()})
    assert control.option == "--sparsectrl"
    assert control.key_maps["sparsectrl"].keys() == source(real("sparsectrl_rgb")).key_maps[
        "sparsectrl"].keys()


def test_parts_of_other_methods_in_a_motion_module_are_named():
    names = ("img_encoder.conv.weight", "fps_embedding.linear.weight", "pose_encoder.x")
    motion = source(real("mm_v3") | {name: lazy((2,)) for name in names})
    assert motion.version == "v3"
    for name in names:
        assert motion.ignored[name].startswith(f"of {name.partition('.')[0]}, another method's")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("stored_as", [None, torch.float16])
def test_positional_encodings_rounded_to_fp8_are_accepted(dtype, stored_as):
    tensors = real("mm_v3")
    for name, t in tensors.items():
        if name.endswith(".pe"):
            rounded = sinusoid(*t.shape[1:]).to(dtype)
            rounded = rounded if stored_as is None else rounded.to(stored_as)
            tensors[name] = wrap_tensor(rounded)
    check_positional_encodings(source(tensors))
    name = next(name for name in tensors if name.endswith(".pe"))
    tensors[name] = wrap_tensor(tensors[name].read().float().roll(1, 1).to(dtype))
    with pytest.raises(InputError, match="not AnimateDiff's positional encoding"):
        check_positional_encodings(source(tensors))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positional_encodings_may_differ_only_by_the_rounding_of_half_precision(dtype):
    tensors = real("mm_v3")
    name = next(name for name in tensors if name.endswith(".pe"))
    shape = tensors[name].shape
    tensors[name] = wrap_tensor(sinusoid(*shape[1:]).to(dtype))
    check_positional_encodings(source(tensors))
    moved = sinusoid(*shape[1:])
    moved[0, 5, 7] += 0.02
    tensors[name] = wrap_tensor(moved)
    with pytest.raises(InputError, match="not AnimateDiff's positional encoding"):
        check_positional_encodings(source(tensors))


def test_positional_encodings_of_different_lengths_are_rejected():
    tensors = real("mm_v3")
    tensors[next(key for key in tensors if key.endswith(".pe"))] = lazy((1, 24, 320))
    with pytest.raises(InputError, match=r"differ in length: \[24, 32\]"):
        source(tensors)


def test_learned_positional_encodings_are_rejected():
    tensors = real("mm_v3")
    name = next(key for key in tensors if key.endswith(".pe"))
    tensors[name] = wrap_tensor(torch.zeros(tensors[name].shape))
    with pytest.raises(InputError, match="not AnimateDiff's positional encoding"):
        plan_conversion("sd15", parts(base(), source(tensors)), [])


def test_two_keys_for_one_tensor_are_rejected():
    tensors = real("diffusers_vae") | {
        "encoder.mid_block.attentions.0.query.weight": lazy((512, 512))}
    with pytest.raises(InputError, match="query.weight and .*to_q.weight are the same tensor"):
        source(tensors)


@pytest.mark.parametrize("name, version", [
    ("mm_sd_v15.ckpt", "v1"), ("mm_sd_v14.ckpt", "v1"), ("mm_sd15_v3.safetensors", "v3"),
    ("motion-adapter-v1-5-3/diffusion_pytorch_model.safetensors", "v3"),
    ("motion-adapter-v1-5/diffusion_pytorch_model.safetensors", "v1")])
def test_without_positional_encodings_the_name_tells_the_version(name, version):
    tensors = {key: t for key, t in real("mm_v3").items() if not key.endswith(".pe")}
    assert source(tensors, name).version == version
