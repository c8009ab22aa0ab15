"""The project's own model file: strict loading, and matrices as int8."""
import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mcl import InputError, Motion, load_model, save_model
from tests.foreign import ldm, motion, part, save


def change_tensors(path, change):
    """Write a model file again with changed tensors."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


def test_saved_model_is_loaded_unchanged(small, tmp_path):
    save_model(small, tmp_path / "w.safetensors", torch.float32, {})
    loaded = load_model(tmp_path / "w.safetensors", device="cpu")
    assert loaded.config == small.config
    weights = loaded.state_dict()
    for name, weight in small.state_dict().items():
        assert torch.equal(weights[name], weight)


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("unet.conv_in.bias"), "unet.conv_in.bias is missing"),
    (lambda t: t.update({"unet.more": torch.ones(1)}), "unet.more belongs to no part"),
    (lambda t: t.update({"unet.conv_in.bias": torch.ones(3)}), r"bias is \(3,\); expected"),
    (lambda t: t["unet.conv_in.bias"].fill_(float("nan")), "unet.conv_in.bias .* not finite")])
def test_missing_extra_misshapen_or_infinite_tensor_is_rejected(small, tmp_path, change, message):
    save_model(small, tmp_path / "w.safetensors", torch.float32, {})
    change_tensors(tmp_path / "w.safetensors", change)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "w.safetensors", device="cpu")


@pytest.fixture(scope="module")
def quantized(small):
    """Return the small model with one row of zeros."""
    model = copy.deepcopy(small)
    model.unet.conv_in.weight[3] = 0
    return model


def test_int8_weights_differ_by_half_a_step_of_their_row(quantized, tmp_path):
    path = tmp_path / "w.safetensors"
    save_model(quantized, path, torch.float16, {}, quantize_min_numel=500)
    is_int8 = {name: tensor.dtype == torch.int8 for name, tensor in load_file(path).items()}
    assert is_int8["unet.conv_in.weight"] and not is_int8["unet.conv_in.bias"]
    loaded = load_model(path, device="cpu").unet.state_dict()
    for name, weight in quantized.unet.state_dict().items():
        rows = weight.flatten(1).abs().amax(dim=1) if weight.ndim > 1 else weight.abs()
        error = (loaded[name] - weight).abs().reshape(len(rows), -1).amax(dim=1)
        assert (error <= rows * (1 / 254 + 1e-3) + 1e-6).all()


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("unet.conv_in.weight.scale"), "unet.conv_in.weight has no valid scale"),
    (lambda t: t.update({"unet.conv_in.bias.scale": torch.ones(1)}),
     "unet.conv_in.bias has no valid scale"),
    (lambda t: t.update({"unet.conv_in.weight.scale": torch.ones(2)}), "weight has no valid scale"),
    (lambda t: t.update({"unet.more.scale": torch.ones(1)}), "unet.more.scale belongs to no part")])
def test_wrong_scale_is_rejected(quantized, tmp_path, change, message):
    path = tmp_path / "w.safetensors"
    save_model(quantized, path, torch.float16, {}, quantize_min_numel=500)
    change_tensors(path, change)
    with pytest.raises(InputError, match=message):
        load_model(path, device="cpu")


FOREIGN = {
    "mm.ckpt": (lambda: motion("v3"), "an AnimateDiff motion module, v3, not a converted model. "
                "Run convert_weights.py --motion-module {} --base FILE --out FILE first"),
    "sd.safetensors": (ldm, "Stable Diffusion 1.5, single file (UNet, VAE, text encoder), not a "
                       "converted model. Run convert_weights.py --base {} --motion-module FILE "
                       "--out FILE first"),
    "vae.pt": (lambda: part("vae"), "a VAE of Stable Diffusion 1.5, not a converted model. Run "
               "convert_weights.py --vae {} --base FILE --out FILE first"),
    "lora.safetensors": (lambda: {"unet.conv_in.lora_A.weight": torch.ones(1, 4)},
                         "a LoRA for Stable Diffusion 1.5, not for --weights. Pass it with --lora"),
    "easy.pt": (lambda: {"emb_params": torch.ones(1, 768)},
                "a textual inversion embedding, for sample.py, not for --weights. Pass it with "
                "--embedding"),
    "text.safetensors": (lambda: "some text", "the file is text, not weights. Check its name")}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_converted_model_is_named_with_the_command_to_run(name, tmp_path):
    content, message = FOREIGN[name]
    path, content = tmp_path / name, content()
    if isinstance(content, str):
        path.write_text(content)
    else:
        save(path, content)
    with pytest.raises(InputError) as error:
        load_model(path)
    assert str(error.value) == f"{path}: {message.format(path)}"


def test_a_folder_a_saved_motion_and_a_damaged_model_are_no_models(small, tmp_path):
    Motion.save(Motion({}, {}, {}), tmp_path / "motion.safetensors")
    save_model(small, tmp_path / "cut.safetensors", torch.float32, {})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-9])
    save_file({"w": torch.zeros(1)}, tmp_path / "old.safetensors", {"format": "mcl-model-1"})
    for name, message in (
            ("", "a folder without weights"), ("cut.safetensors", "the file is truncated or damag"),
            ("motion.safetensors", "a saved motion, .* Run sample.py --motion"),
            ("old.safetensors", r"a converted model that cannot be read \(its format is not mcl")):
        with pytest.raises(InputError, match=f"^{tmp_path / name}: {message}"):
            load_model(tmp_path / name)
