"""Numerical equality with diffusers and transformers, element by element, at small random size."""
import dataclasses
import functools

import pytest
import torch
from einops import rearrange, repeat
from torch import nn

from mcl import AttentionRequest, InputError, sparsectrl_condition
from mcl.config import CLIPTextConfig, SparseCtrlConfig, UNetConfig
from mcl.motion import Motion, motion_loss
from mcl.networks.sparsectrl import SparseCtrl
from mcl.networks.text_encoder import TextEncoder
from mcl.networks.tokenizer import Tokenizer
from mcl.networks.unet import UNet3D
from mcl.networks.vae import AutoencoderKL
from tests.conftest import SMALL, randn, randomize
from tests.lazy import LazyModule
from tests.networks.diffusers_oracle import (
    diffusers_name,
    diffusers_noise,
    diffusers_unet,
    load_into_diffusers,
    max_error,
    relative_error,
    use_animatediff_norms,
)

diffusers = LazyModule("diffusers")
sparse_unet = LazyModule("diffusers.models.controlnets.controlnet_sparsectrl")
transformers = LazyModule("transformers")

# SD1.5's four levels and two layers. The numbers of the two kinds of attention heads differ.
V3 = UNetConfig(block_out_channels=(16, 24, 32, 32), layers_per_block=2, num_attention_heads=2,
                cross_attention_dim=12, norm_num_groups=4, motion_num_attention_heads=4,
                motion_max_seq_length=24)
V2 = dataclasses.replace(V3, motion_mid_block=True)
V1 = dataclasses.replace(V3, inflated_groupnorm=False)
BATCH = 2
BLOCK = "up_blocks.1"
REQUEST = AttentionRequest(temporal=(BLOCK,))


# The UNet

@functools.cache
def unets(config):
    """Return a UNet and diffusers' UNet with the same random weights and the same group norms."""
    unet = randomize(UNet3D(config))
    return unet, use_animatediff_norms(diffusers_unet(unet, config), config.inflated_groupnorm,
                                       BATCH)


def oracle_noise_and_maps(oracle, z, t, text):
    """Return diffusers' noise, and softmax(q k^T / sqrt(d)) of its projections in up_blocks.1."""
    projections = {}

    def store(name):
        return lambda module, args, output: projections.update({name: output})

    hooks = [layer.register_forward_hook(store(name)) for name, layer in oracle.named_modules()
             if name.startswith(f"{BLOCK}.motion_modules.") and name.endswith(("to_q", "to_k"))]
    eps = diffusers_noise(oracle, z, t, text)
    for hook in hooks:
        hook.remove()
    maps = {}
    for name in [name for name in projections if name.endswith(".to_q")]:
        q, k = (rearrange(projections[name[:-1] + letter], "b n (heads d) -> b heads n d",
                          heads=V3.motion_num_attention_heads) for letter in "qk")
        scores = torch.einsum("b a n d, b a m d -> b a n m", q, k) / q.shape[-1] ** 0.5
        maps[name.removesuffix(".to_q")] = scores.softmax(dim=-1)
    return eps, maps


def inputs(num_frames, h, w, batch=BATCH, seed=0):
    return (randn(batch, 4, num_frames, h, w, seed=seed),
            randn(batch, 77, V3.cross_attention_dim, seed=seed))


@pytest.mark.parametrize("config, num_frames, h, w, t", [
    (V3, 1, 9, 13, 0), (V3, 16, 8, 8, 400), (V3, 24, 9, 13, 999), (V3, 3, 8, 8, (0, 999)),
    (V2, 1, 8, 8, 400), (V2, 8, 9, 13, 999), (V2, 24, 8, 8, 0),
    (V1, 1, 8, 8, 0), (V1, 8, 9, 13, 400), (V1, 24, 8, 8, 999)])
def test_unet_noise_equals_diffusers(config, num_frames, h, w, t):
    unet, oracle = unets(config)
    z, text = inputs(num_frames, h, w)
    t = torch.tensor(t)
    with torch.no_grad():
        expected = diffusers_noise(oracle, z, t, text)
        assert max_error(unet(z, t, text)[0], expected) < 1e-4


def test_group_norms_over_whole_clips_change_the_noise():
    z, text = inputs(8, 8, 8)
    with torch.no_grad():
        v3, v1 = (diffusers_noise(unets(config)[1], z, 400, text) for config in (V3, V1))
    assert relative_error(v1, v3) > 0.05


def test_every_branch_of_the_compared_unet_has_an_effect():
    unet, _ = unets(V2)
    spread = {}

    def store(name):
        return lambda module, args, output: spread.update({name: float(output.std(dim=0).mean())})

    ends = ("to_out.0", "net.2", "proj_out", "conv2", "conv_shortcut")
    hooks = [layer.register_forward_hook(store(name)) for name, layer in unet.named_modules()
             if name.endswith(ends)]
    z, text = inputs(8, 8, 8)
    unet(z, 400, text)
    for hook in hooks:
        hook.remove()
    assert len(spread) == len(hooks) and min(spread.values()) > 0.02


def test_temporal_attention_maps_equal_diffusers():
    unet, oracle = unets(V3)
    z, text = inputs(8, 9, 13)
    with torch.no_grad():
        maps = unet(z, 400, text, request=REQUEST)[1].temporal
        _, expected = oracle_noise_and_maps(oracle, z, 400, text)
    assert [diffusers_name(name) for name in maps] == list(expected) and len(maps) == 6
    for name, probs in maps.items():
        assert max_error(probs, expected[diffusers_name(name)]) < 1e-4
        assert probs.std() > 0.05       # far from uniform


def test_gradient_of_the_motion_loss_equals_diffusers():
    unet, oracle = unets(V3)
    z, text = inputs(8, 9, 13)
    with torch.no_grad():
        maps = unet(randn(*z.shape, seed=1), 400, text, request=REQUEST)[1].temporal
    top = {name: probs.topk(2, dim=-1) for name, probs in maps.items()}
    motion = Motion({name: pairs.values for name, pairs in top.items()},
                    {name: pairs.indices for name, pairs in top.items()})
    z.requires_grad_()
    maps = unet(z, 700, text, request=REQUEST)[1].temporal
    grad, = torch.autograd.grad(motion_loss(maps, motion), z)

    _, maps = oracle_noise_and_maps(oracle, z, 700, text)
    loss = sum(((maps[diffusers_name(name)].gather(-1, indices) - values) ** 2).mean()
               for name, (values, indices) in top.items())
    expected, = torch.autograd.grad(loss, z)
    assert relative_error(grad, expected) < 1e-4


# SparseCtrl

@functools.cache
def sparse_controls(kind):
    """Return SparseCtrl and diffusers' SparseControlNetModel with the same random weights."""
    config = SparseCtrlConfig(kind, V3.motion_num_attention_heads, V3.motion_max_seq_length,
                              conditioning_embedding_channels=(4, 8, 8, 12))
    sparsectrl = randomize(SparseCtrl(V3, config))
    oracle = sparse_unet.SparseControlNetModel(
        conditioning_channels=4 if kind == "rgb" else 3, block_out_channels=V3.block_out_channels,
        layers_per_block=V3.layers_per_block, norm_num_groups=V3.norm_num_groups,
        cross_attention_dim=V3.cross_attention_dim, num_attention_heads=V3.num_attention_heads,
        motion_num_attention_heads=V3.motion_num_attention_heads,
        motion_max_seq_length=V3.motion_max_seq_length,
        conditioning_embedding_out_channels=config.conditioning_embedding_channels,
        use_simplified_condition_embedding=kind == "rgb")
    return sparsectrl, use_animatediff_norms(load_into_diffusers(oracle, sparsectrl))


@pytest.mark.parametrize("kind, num_frames, h, w, t", [
    ("rgb", 8, 9, 13, 400), ("rgb", 1, 8, 8, 999), ("scribble", 24, 8, 8, 0)])
def test_sparsectrl_residuals_equal_diffusers(kind, num_frames, h, w, t):
    sparsectrl, oracle = sparse_controls(kind)
    unet, unet_oracle = unets(V3)
    z, text = inputs(num_frames, h, w)
    images = randn(2, 4, h, w) if kind == "rgb" else randn(2, 3, 8 * h, 8 * w).sigmoid()
    condition = sparsectrl_condition(images, [0, -1], num_frames).repeat(BATCH, 1, 1, 1, 1)
    condition[1] = condition[1].flip(1) * 0.5           # the two clips of the batch differ
    flat = repeat(text, "b m c -> (b f) m c", f=num_frames)
    with torch.no_grad():
        residuals = sparsectrl(condition, t, text)
        down, mid = oracle(z, t, flat, condition[:, :-1], conditioning_mask=condition[:, -1:],
                           return_dict=False)
        assert len(residuals.down) == len(down) == 12
        for actual, expected in zip([*residuals.down, residuals.mid], [*down, mid]):
            assert max_error(actual, expected.reshape(actual.shape)) < 1e-4
        eps, _ = unet(z, t, text, residuals=residuals)
        expected = unet_oracle(z, t, flat, down_block_additional_residuals=down,
                               mid_block_additional_residual=mid).sample
        assert max_error(eps, expected) < 1e-4
        assert relative_error(unet(z, t, text)[0], expected) > 0.01


# The VAE and the text encoder

@functools.cache
def vaes():
    config = SMALL.vae
    vae, levels = randomize(AutoencoderKL(config)), len(config.block_out_channels)
    vae.quant_conv.bias[-2:] = torch.tensor([-60.0, 60.0])      # both clamps of the log-variance
    oracle = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.block_out_channels, layers_per_block=config.layers_per_block,
        latent_channels=config.latent_channels, norm_num_groups=config.norm_num_groups,
        scaling_factor=config.scaling_factor)
    oracle.load_state_dict(vae.state_dict())
    return vae, oracle.requires_grad_(False).eval()


def test_vae_latents_equal_diffusers():
    vae, oracle = vaes()
    frames = randn(5, 3, 24, 40).tanh()
    posterior = oracle.encode(frames).latent_dist
    for actual, expected in zip(vae.moments(frames), (posterior.mean, posterior.logvar)):
        assert max_error(actual, expected) < 1e-4
    assert posterior.logvar.aminmax() == (-30, 20)
    latents = rearrange(vae.encode(frames), "1 c f h w -> c f h w")
    expected = rearrange(posterior.mean * oracle.config.scaling_factor, "f c h w -> c f h w")
    for channel in range(4):        # one at a time: the clamped one is ten thousand times larger
        assert max_error(latents[channel], expected[channel]) < 1e-4


def test_vae_frames_equal_diffusers():
    vae, oracle = vaes()
    latents = 0.1 * randn(1, 4, 5, 6, 10)
    flat = rearrange(latents, "1 c f h w -> f c h w") / oracle.config.scaling_factor
    expected = oracle.decode(flat).sample.clamp(-1, 1)
    assert (expected.abs() < 1).float().mean() > 0.5
    assert max_error(vae.decode(latents), expected) < 1e-4


@pytest.mark.parametrize("h, w", [(24, 38), (23, 40), (2, 40)])
def test_vae_rejects_sizes_that_are_not_multiples_of_its_factor(h, w):
    with pytest.raises(InputError, match=f"{h}x{w} .*multiples of 4"):
        vaes()[0].encode(torch.zeros(1, 3, h, w))


@pytest.mark.filterwarnings("ignore")           # long prompts are cut
def test_text_embeddings_equal_transformers():
    config = CLIPTextConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=3,
                            num_attention_heads=4)
    encoder = randomize(TextEncoder(config))
    oracle = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407)).eval()
    inner = getattr(oracle, "text_model", oracle)       # before transformers 5.6
    inner.load_state_dict(encoder.text_model.state_dict())
    words = ["red", "star", "a", "moves", "left", "green", "fox"] * 43
    ids = Tokenizer()([" ".join(words[:n]) for n in (0, 1, 75, 76, 300)])
    assert (ids != 49407).sum(dim=1).tolist() == [1, 2, 76, 76, 76]
    with torch.no_grad():
        expected = oracle(ids).last_hidden_state
        for actual, row in zip(encoder(ids), expected):
            assert max_error(actual, row) < 1e-4


def test_every_norm_has_the_epsilon_of_the_oracle():
    def epsilons(network, rename=str):
        return {rename(f"{name}.weight"): module.eps for name, module in network.named_modules()
                if isinstance(module, (nn.GroupNorm, nn.LayerNorm))}

    text = TextEncoder(SMALL.text_encoder).text_model
    oracle_text = transformers.CLIPTextModel(transformers.CLIPTextConfig())
    unet, sparsectrl = UNet3D(V2), sparse_controls("rgb")[0]
    sparsectrl_oracle = sparse_unet.SparseControlNetModel(
        block_out_channels=V3.block_out_channels, norm_num_groups=V3.norm_num_groups)
    for actual, expected in (
            (epsilons(unet, diffusers_name), epsilons(diffusers_unet(unet, V2))),
            (epsilons(sparsectrl, diffusers_name), epsilons(sparsectrl_oracle)),
            (epsilons(vaes()[0]), epsilons(vaes()[1])),
            (epsilons(text), epsilons(getattr(oracle_text, "text_model", oracle_text)))):
        assert len(actual) > 2 and {name: expected[name] for name in actual} == actual
