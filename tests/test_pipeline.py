"""A pipeline that diffusers has written, converted, gives the numbers that diffusers gives."""
import pytest
import torch

from mcl import InputError, load_model, model_from_state_dicts, sparsectrl_condition

from tests import foreign
from tests.conftest import randn, randomize
from tests.foreign import convert
from tests.networks.test_oracles import OverFrames, PerFrame, error

diffusers = pytest.importorskip("diffusers")
sparse_unet = pytest.importorskip("diffusers.models.controlnets.controlnet_sparsectrl")
motion_unet = pytest.importorskip("diffusers.models.unets.unet_motion_model")
transformers = pytest.importorskip("transformers")

WIDTHS = (16, 24, 32, 32)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Where networks of widths, heads and groups of their own were written, and these networks."""
    place = tmp_path_factory.mktemp("pipeline")
    sizes = dict(block_out_channels=WIDTHS, norm_num_groups=4, cross_attention_dim=12)
    parts = {
        "unet": diffusers.UNet2DConditionModel(attention_head_dim=2, **sizes),
        "vae": diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4,
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            layers_per_block=2, scaling_factor=0.2),
        "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(
            hidden_size=12, intermediate_size=20, num_hidden_layers=2, num_attention_heads=3,
            vocab_size=49408, projection_dim=12))}
    others = {version: diffusers.MotionAdapter(
        block_out_channels=WIDTHS, motion_num_attention_heads=4, motion_norm_num_groups=4,
        motion_max_seq_length=24 if version == "v1" else 32, use_motion_mid_block=version == "v2")
        for version in ("v1", "v2", "v3")}
    for part, network in parts.items():
        randomize(network).save_pretrained(place / "sd15" / part)
    # As many heads as the UNet has, whose config.json tells the number.
    others["rgb"] = sparse_unet.SparseControlNetModel(
        attention_head_dim=2, motion_num_attention_heads=4, **sizes)
    for name, network in others.items():
        randomize(network).save_pretrained(place / name)
    return place, parts | others


def converted(place, version="v3", *more):
    out = place / f"{version}.safetensors"
    assert convert("--base", place / "sd15", "--motion-module", place / version, *more,
                   "--out", out, "--dtype", "fp32") == 0
    return load_model(out, device="cpu")


def inflated(network, per_frame=True):
    """The norms of diffusers' networks as AnimateDiff has them."""
    for module in list(network.modules()):
        if isinstance(module, motion_unet.AnimateDiffTransformer3D):
            module.norm = PerFrame(module.norm)
        elif isinstance(module, motion_unet.ResnetBlock2D) and not per_frame:
            module.norm1, module.norm2 = OverFrames(module.norm1), OverFrames(module.norm2)
    if not per_frame:
        network.conv_norm_out = OverFrames(network.conv_norm_out)
    return network.eval()


@pytest.mark.parametrize("version", ["v1", "v2", "v3"])
def test_unet_with_motion_adapter(version, written):
    place, networks = written
    model = converted(place, version)
    oracle = inflated(motion_unet.UNetMotionModel.from_unet2d(
        networks["unet"], networks[version]), version != "v1")
    z, text = randn(2, 4, 6, 9, 13), randn(2, 7, 12, seed=1)
    with torch.no_grad():
        ours, _ = model.unet(z, 300, text)
        expected = oracle(z, 300, text.repeat_interleave(6, dim=0)).sample
    assert model.config.unet.motion_mid_block == (version == "v2")
    assert model.config.unet.heads == 2
    assert error(ours, expected) < 1e-4


def test_sparsectrl(written):
    place, networks = written
    model = converted(place, "v3", "--sparsectrl", place / "rgb")
    z, text, condition = randn(1, 4, 6, 8, 8), randn(1, 7, 12, seed=1), sparsectrl_condition(
        randn(1, 4, 8, 8, seed=2), [2], 6)
    with torch.no_grad():
        ours = model.residuals(condition, 300, text)
        down, middle = inflated(networks["rgb"])(
            z, 300, text.repeat_interleave(6, dim=0), condition[:, :4],
            conditioning_mask=condition[:, 4:], return_dict=False)
    assert error(ours.middle, middle.reshape(ours.middle.shape)) < 1e-4
    for mine, expected in zip(ours.skips, down, strict=True):
        assert error(mine, expected.reshape(mine.shape)) < 1e-4


def test_vae(written):
    place, networks = written
    model = converted(place)
    z = randn(1, 4, 1, 6, 5)
    with torch.no_grad():
        expected = networks["vae"].decode(z[:, :, 0] / 0.2).sample.clamp(-1, 1)
        assert error(model.vae.decode(z), expected) < 1e-4


def test_text_encoder(written):
    place, networks = written
    model = converted(place)
    ids = model.tokenizer(["a photo of a cat", ""])
    with torch.no_grad():
        expected = networks["text_encoder"](ids).last_hidden_state
    assert model.config.text_encoder.num_attention_heads == 3
    assert error(model.encode_text(["a photo of a cat", ""]), expected) < 1e-4


def test_weights_in_memory_make_the_model_that_files_make(written):
    """A UNetMotionModel's, those of its parts, and those of a single file in LDM's names."""
    place, networks = written
    expected = converted(place).state_dict()
    states = {part: networks[part].state_dict() for part in ("unet", "vae", "text_encoder")}
    motion, configs = networks["v3"].state_dict(), {
        "unet": networks["unet"].config, "vae": networks["vae"].config,
        "text_encoder": networks["text_encoder"].config.to_dict(),
        "motion": networks["v3"].config}
    whole = motion_unet.UNetMotionModel.from_unet2d(networks["unet"], networks["v3"])
    first, second = (model_from_state_dicts(**given, configs=configs, device="cpu") for given in (
        states | {"motion": motion}, states | {"unet": whole.state_dict()}))
    for model in (first, second):
        found = model.state_dict()
        assert model.config.text_encoder.num_attention_heads == 3 and list(found) == list(expected)
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())
    assert first.sha256 == second.sha256 and len(first.sha256) == 64
    first.unet.conv_in.bias.add_(1)
    assert first.sha256 != second.sha256

    single = model_from_state_dicts(base=foreign.ldm(), motion=foreign.motion(), device="cpu")
    weights = foreign.mini_weights()
    assert all(torch.equal(weight, weights[name]) for name, weight in single.state_dict().items())
    assert len(single.state_dict()) == sum("mid_block.motion" not in name for name in weights)
    with pytest.raises(InputError, match="still needs the motion module"):
        model_from_state_dicts(base=foreign.ldm())
    with pytest.raises(InputError, match="motion: the tensor .*proj_in.bias is missing"):
        model_from_state_dicts(base=foreign.ldm(), motion={
            name: t for name, t in foreign.motion().items() if not name.endswith("proj_in.bias")})
