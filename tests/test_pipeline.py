"""A pipeline that diffusers has written gives the numbers of diffusers after conversion."""
import pytest
import torch

from mcl import load_model, model_from_state_dicts, sparsectrl_condition
from tests import foreign
from tests.conftest import randn, randomize
from tests.foreign import convert
from tests.lazy import LazyModule
from tests.networks.diffusers_oracle import max_error, use_animatediff_norms

diffusers = LazyModule("diffusers")
sparse_unet = LazyModule("diffusers.models.controlnets.controlnet_sparsectrl")
motion_unet = LazyModule("diffusers.models.unets.unet_motion_model")
transformers = LazyModule("transformers")

WIDTHS = (16, 24, 32, 32)
CLIP_BATCH = 2


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a folder of networks in diffusers' format, and the networks by name."""
    folder = tmp_path_factory.mktemp("pipeline")
    sizes = dict(block_out_channels=WIDTHS, norm_num_groups=4, cross_attention_dim=12)
    pipeline = {
        "unet": diffusers.UNet2DConditionModel(attention_head_dim=2, **sizes),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2, scaling_factor=0.2),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
            vocab_size=49408, projection_dim=12))}
    adapters = {version: diffusers.MotionAdapter(
        block_out_channels=WIDTHS, motion_num_attention_heads=4, motion_norm_num_groups=4,
        motion_max_seq_length=24 if version == "v1" else 32, use_motion_mid_block=version == "v2")
        for version in ("v1", "v2", "v3")}
    # SparseCtrl has as many heads as the UNet, whose config.json gives the number.
    adapters["rgb"] = sparse_unet.SparseControlNetModel(
        attention_head_dim=2, motion_num_attention_heads=4, **sizes)
    for name, network in pipeline.items():
        randomize(network).save_pretrained(folder / "sd15" / name)
    for name, network in adapters.items():
        randomize(network).save_pretrained(folder / name)
    return folder, pipeline | adapters


def converted(folder, version="v3", *options):
    out = folder / f"{version}.safetensors"
    assert convert("--base", folder / "sd15", "--motion-module", folder / version, *options,
                   "--out", out, "--dtype", "fp32") == 0
    return load_model(out, device="cpu")


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_unet_with_motion_adapter_equals_diffusers(version, written):
    folder, networks = written
    model = converted(folder, version)
    oracle = use_animatediff_norms(motion_unet.UNetMotionModel.from_unet2d(
        networks["unet"], networks[version]), version != "v1", CLIP_BATCH)
    z, text = randn(CLIP_BATCH, 4, 6, 9, 13), randn(CLIP_BATCH, 7, 12, seed=1)
    with torch.no_grad():
        eps, _ = model.unet(z, 300, text)
        expected = oracle(z, 300, text.repeat_interleave(6, dim=0)).sample
    assert model.config.unet.motion_mid_block == (version == "v2")
    assert model.config.unet.num_attention_heads == 2
    assert max_error(eps, expected) < 1e-4


def test_sparsectrl_equals_diffusers(written):
    folder, networks = written
    model = converted(folder, "v3", "--sparsectrl", folder / "rgb")
    z, text, condition = randn(1, 4, 6, 8, 8), randn(1, 7, 12, seed=1), sparsectrl_condition(
        randn(1, 4, 8, 8, seed=2), [2], 6)
    with torch.no_grad():
        residuals = model.controlnet_residuals(condition, 300, text)
        down, mid = use_animatediff_norms(networks["rgb"])(
            z, 300, text.repeat_interleave(6, dim=0), condition[:, :4],
            conditioning_mask=condition[:, 4:], return_dict=False)
    assert max_error(residuals.mid, mid.reshape(residuals.mid.shape)) < 1e-4
    for actual, expected in zip(residuals.down, down, strict=True):
        assert max_error(actual, expected.reshape(actual.shape)) < 1e-4


def test_vae_equals_diffusers(written):
    folder, networks = written
    model = converted(folder)
    z = randn(1, 4, 1, 6, 5)
    with torch.no_grad():
        expected = networks["vae"].decode(z[:, :, 0] / 0.2).sample.clamp(-1, 1)
        assert max_error(model.vae.decode(z), expected) < 1e-4


def test_text_encoder_equals_transformers(written):
    folder, networks = written
    model = converted(folder)
    ids = model.tokenizer(["a photo of a cat", ""])
    with torch.no_grad():
        expected = networks["text_encoder"](ids).last_hidden_state
    assert model.config.text_encoder.num_attention_heads == 3
    assert max_error(model.encode_text(["a photo of a cat", ""]), expected) < 1e-4


def test_weights_in_memory_give_the_model_of_the_files(written):
    """The weights are those of a pipeline's parts, or of a whole UNetMotionModel."""
    folder, networks = written
    expected = converted(folder).state_dict()
    states = {name: networks[name].state_dict() for name in ("unet", "vae", "text_encoder")}
    configs = {"unet": networks["unet"].config, "vae": networks["vae"].config,
               "text_encoder": networks["text_encoder"].config.to_dict(),
               "motion": networks["v3"].config}
    whole = motion_unet.UNetMotionModel.from_unet2d(networks["unet"], networks["v3"])
    first, second = (model_from_state_dicts(**weights, configs=configs, device="cpu")
                     for weights in (states | {"motion": networks["v3"].state_dict()},
                                     states | {"unet": whole.state_dict()}))
    for model in (first, second):
        state = model.state_dict()
        assert model.config.text_encoder.num_attention_heads == 3 and list(state) == list(expected)
        assert all(torch.equal(weight, expected[name]) for name, weight in state.items())
    assert first.sha256 == second.sha256 and len(first.sha256) == 64
    first.unet.conv_in.bias.add_(1)
    assert first.sha256 != second.sha256


def test_single_file_weights_in_memory_give_the_model():
    model = model_from_state_dicts(base=foreign.ldm(), motion=foreign.motion(), device="cpu")
    weights, state = foreign.mini_weights(), model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in state.items())
    assert len(state) == sum("mid_block.motion" not in name for name in weights)
