"""A pipeline that diffusers has written, converted, gives the numbers that diffusers gives."""
import pytest
import torch

from mcl import load_model

from .conftest import randomize
from .foreign import convert
from .test_oracles import PerFrame, error, randn

diffusers = pytest.importorskip("diffusers")
motion_unet = pytest.importorskip("diffusers.models.unets.unet_motion_model")
transformers = pytest.importorskip("transformers")

WIDTHS = (16, 24, 32, 32)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Networks of widths, heads and groups of their own, and the model converted from them."""
    place = tmp_path_factory.mktemp("pipeline")
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=WIDTHS, attention_head_dim=2, cross_attention_dim=12,
        norm_num_groups=4)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=2, scaling_factor=0.2)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
        vocab_size=49408, projection_dim=12))
    adapter = diffusers.MotionAdapter(
        block_out_channels=WIDTHS, motion_num_attention_heads=4, motion_norm_num_groups=4)
    parts = {"unet": unet, "vae": vae, "text_encoder": text}
    for part, network in parts.items():
        randomize(network).save_pretrained(place / "sd15" / part)
    randomize(adapter).save_pretrained(place / "adapter")
    out = place / "model.safetensors"
    assert convert("--base", place / "sd15", "--motion-module", place / "adapter", "--out", out,
                   "--dtype", "fp32") == 0
    return load_model(out, device="cpu"), parts | {"adapter": adapter}


def test_unet_with_motion_adapter(written):
    model, networks = written
    oracle = motion_unet.UNetMotionModel.from_unet2d(networks["unet"], networks["adapter"]).eval()
    for module in list(oracle.modules()):
        if isinstance(module, motion_unet.AnimateDiffTransformer3D):
            module.norm = PerFrame(module.norm)
    z, text = randn(1, 4, 6, 8, 8), randn(1, 7, 12, seed=1)
    with torch.no_grad():
        ours, _ = model.unet(z, 300, text)
        expected = oracle(z, 300, text.repeat_interleave(6, dim=0)).sample
    assert model.config.unet.motion_mid_block and model.config.unet.heads == 2
    assert error(ours, expected) < 1e-4


def test_vae(written):
    model, networks = written
    z = randn(1, 4, 1, 6, 5)
    with torch.no_grad():
        expected = networks["vae"].decode(z[:, :, 0] / 0.2).sample.clamp(-1, 1)
        assert error(model.vae.decode(z), expected) < 1e-4


def test_text_encoder(written):
    model, networks = written
    ids = model.tokenizer(["a photo of a cat", ""])
    with torch.no_grad():
        expected = networks["text_encoder"](ids).last_hidden_state
    assert model.config.text.heads == 3
    assert error(model.encode_text(["a photo of a cat", ""]), expected) < 1e-4
