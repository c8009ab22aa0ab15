"""The UNet: the names and shapes of the real files, and the maps it hands out."""
import copy
import dataclasses

import pytest
import torch

from mcl import InputError
from mcl.config import SD15, SD15_V2, UNetConfig
from mcl.networks.layers import GEGLU, Conv2d, Linear, attention
from mcl.networks.temporal import AttentionMaps, AttentionRequest, sinusoidal_positional_encoding
from mcl.networks.text_encoder import TextEncoder
from mcl.networks.ops import GEGLUFunction
from mcl.networks.unet import UNet3D
from mcl.networks.vae import AutoencoderKL

from tests.conftest import SMALL, randomize
from tests.foreign import listing

BLOCK = "up_blocks.1"


@pytest.mark.parametrize("network, config, name", [
    (UNet3D, SD15.unet, "official_unet3d_v3"), (UNet3D, SD15_V2.unet, "official_unet3d_v2"),
    (AutoencoderKL, SD15.vae, "diffusers_vae"), (TextEncoder, SD15.text_encoder, "diffusers_text_encoder")])
def test_names_and_shapes_are_those_of_the_real_checkpoints(network, config, name):
    with torch.device("meta"):
        state = network(config).state_dict()
    assert {k: "x".join(map(str, v.shape)) for k, v in state.items()} == listing(name)


def test_size_of_sd15_with_v3_modules():
    with torch.device("meta"):
        unet = UNet3D(SD15.unet)
    assert sum(p.numel() for p in unet.parameters()) == 1_276_658_564


def inputs(frames=5, h=8, w=12, batch=1, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, 4, frames, h, w, generator=g, dtype=dtype)
    text = torch.randn(batch, 7, SMALL.unet.cross_attention_dim, generator=g, dtype=dtype)
    return z, text


def test_maps_are_named_shaped_and_normalised(small):
    z, text = inputs(batch=2)
    eps, seen = small.unet(z, 500, text, temporal=(BLOCK,))
    maps = seen.temporal
    assert eps.shape == z.shape and not seen.temporal_keys and not seen.cross
    assert list(maps) == [f"{BLOCK}.motion_modules.{m}.temporal_transformer.transformer_blocks.0."
                          f"attention_blocks.{k}" for m in range(2) for k in range(2)]
    for probs in maps.values():
        assert probs.shape == (2 * 4 * 6, 2, 5, 5) and probs.dtype == torch.float32
        assert torch.allclose(probs.sum(dim=-1), torch.ones(()), atol=1e-6)


def test_asking_for_maps_does_not_change_the_noise(small):
    z, text = inputs()
    plain, none = small.unet(z, 300, text)
    asked, _ = small.unet(z, 300, text, temporal=("down_blocks.0", BLOCK),
                          cross=("mid_block",))
    assert none == AttentionMaps()
    assert torch.allclose(plain, asked, atol=1e-5 * float(plain.std()))


def test_the_pass_can_end_after_the_last_block_asked_for(small):
    z, text = inputs()
    _, whole = small.unet(z, 10, text, temporal=(BLOCK,), cross=(BLOCK,))
    ended = small.unet.attend(z, 10, text, AttentionRequest((BLOCK,), cross=(BLOCK,)))
    for kind in AttentionRequest._fields:
        one, other = getattr(whole, kind), getattr(ended, kind)
        assert list(one) == list(other) and all(torch.equal(one[n], other[n]) for n in one)


def test_a_single_layer_can_be_asked_for(small):
    z, text = inputs()
    layer = small.unet.resolve(AttentionRequest((BLOCK,))).temporal[2]
    seen = small.unet.attend(z, 10, text, AttentionRequest(temporal=(layer,), temporal_keys=(layer,)))
    assert list(seen.temporal) == list(seen.temporal_keys) == [layer]


@pytest.mark.parametrize("kind", ["temporal_maps", "temporal_keys", "text_maps"])
def test_a_block_without_such_attention_is_refused_with_those_that_have_it(small, kind):
    z, text = inputs()
    there = {"text_maps": "down_blocks.0, .*mid_block, .*up_blocks.2"}.get(
        kind, "down_blocks.0, .*down_blocks.2, up_blocks.0, .*up_blocks.2")
    for name in ("up_blocks.7", "up_blocks.1.motion", "u"):
        with pytest.raises(InputError, match=f"'{name}'.* {there}"):
            small.unet(z, 10, text, **{kind: (name,)})


def test_no_gradient_past_the_last_block_asked_for_but_in_training(small):
    z, text = inputs()
    z.requires_grad_()
    eps, seen = small.unet(z, 10, text, temporal=(BLOCK,))
    assert not eps.requires_grad
    assert all(probs.requires_grad for probs in seen.temporal.values())
    trained = copy.deepcopy(small.unet).requires_grad_(True).train()
    eps, seen = trained(z, 10, text, temporal=(BLOCK,))
    probs = next(iter(seen.temporal.values()))
    (eps.square().mean() + probs.square().mean()).backward()
    assert all(p.grad is not None for name, p in trained.named_parameters())


def test_the_gradient_is_also_that_of_torch_func(small):
    z, text = inputs(frames=2, h=4, w=4)

    def loss(x):
        return small.unet(x, 10, text, temporal=(BLOCK,))[1].temporal[layer].var()

    layer = small.unet.resolve(AttentionRequest((BLOCK,))).temporal[0]
    x = z.clone().requires_grad_()
    expected, = torch.autograd.grad(loss(x), x)
    assert torch.allclose(torch.func.grad(loss)(z), expected, atol=1e-5 * float(expected.std()))


def test_it_compiles_to_one_graph():
    unet = randomize(UNet3D(dataclasses.replace(SMALL.unet, block_out_channels=(8, 12),
                                                cross_attention_levels=(0,))))
    z, text = inputs(frames=2, h=4, w=4)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    asked = {"temporal_maps": ("up_blocks.0",), "text_maps": ("mid_block",)}
    eps, seen = compiled(z, torch.tensor(10), text, **asked)
    expected, plain = unet(z, 10, text, **asked)
    assert torch.allclose(eps, expected, atol=1e-5)
    assert list(seen.temporal) == list(plain.temporal)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_are_float32_in_half_precision_too(dtype):
    """Of queries and keys whose products half precision cannot hold."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (s * torch.randn(1, 5, 8, generator=g).to(dtype) for s in (200, 200, 1))
    out, probs = attention(q, k, v, heads=1, return_map=True)
    expected = (q.double() @ k.double().transpose(1, 2) / 8 ** 0.5).softmax(dim=-1)
    assert probs.dtype == torch.float32 and out.dtype == dtype
    assert torch.allclose(probs[:, 0].double(), expected, atol=1e-4)


@pytest.mark.parametrize("n, m", [(4, 5), (256, 300)], ids=["short", "long"])
def test_maps_are_softmax_of_scaled_products(n, m):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, tokens, 6, generator=g) for tokens in (n, m, m))
    out, probs = attention(q, k, v, heads=2, return_map=True)
    fused, none = attention(q, k, v, heads=2)
    head = (q[1, :, 3:] @ k[1, :, 3:].T / 3 ** 0.5).softmax(dim=-1)
    assert none is None
    assert torch.allclose(probs[1, 1], head, atol=1e-6)
    assert torch.allclose(out[1, :, 3:], head @ v[1, :, 3:], atol=1e-6)
    assert torch.allclose(out, fused, atol=1e-6)


@pytest.mark.parametrize("n", [5, 300], ids=["short", "long"])
def test_a_causal_token_sees_itself_and_those_before_it(n):
    q, k, v = torch.randn(3, 1, n, 4, generator=torch.Generator().manual_seed(1))
    out, _ = attention(q, k, v, heads=2, causal=True)
    for i in (0, 1, n - 1):
        alone, _ = attention(q[:, i:i + 1], k[:, :i + 1], v[:, :i + 1], heads=2)
        assert torch.allclose(out[:, i:i + 1], alone, atol=1e-6)


def test_the_gate_has_its_gradient_and_keeps_what_it_is_given_alone():
    value, gate = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True,
                              generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(GEGLUFunction.apply, (value, gate))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda saved: saved):
        GEGLUFunction.apply(value, gate)
    assert len(kept) == 2


def test_frames_are_told_apart_by_position_alone(small):
    """The same picture in all frames: what is not the position cannot differ."""
    z, text = inputs(frames=1)
    _, seen = small.unet(z.expand(-1, -1, 6, -1, -1), 10, text, temporal=(BLOCK,))
    probs = next(iter(seen.temporal.values()))
    assert (probs[..., 0, :] - probs[..., 5, :]).abs().max() > 1e-3


def test_position_encoding_is_the_interleaved_table():
    table = sinusoidal_positional_encoding(24, 6)
    assert table.shape == (24, 6)
    assert table[5, 2].item() == pytest.approx(torch.tensor(5 * 10000 ** (-2 / 6)).sin().item())
    assert table[5, 3].item() == pytest.approx(torch.tensor(5 * 10000 ** (-2 / 6)).cos().item())


def test_v1_norms_mix_frames_and_v3_norms_do_not():
    z, text = inputs(frames=4)
    other = z.clone()
    other[:, :, 3] *= 5
    for per_frame in (True, False):
        config = dataclasses.replace(SMALL.unet, inflated_groupnorm=per_frame, motion_modules=False)
        unet = randomize(UNet3D(config))
        same = torch.equal(unet(z, 10, text)[0][:, :, 0], unet(other, 10, text)[0][:, :, 0])
        assert same == per_frame


@pytest.mark.parametrize("h, w", [(9, 13), (8, 8), (5, 4)])
def test_odd_latents_come_back_at_their_size(small, h, w):
    z, text = inputs(frames=2, h=h, w=w)
    assert small.unet(z, 0, text)[0].shape == z.shape


def test_more_frames_than_positions_are_refused(small):
    z, text = inputs(frames=25)
    with pytest.raises(InputError, match="25 frames.* up to 24"):
        small.unet(z, 0, text)


def test_default_config_is_sd15():
    assert UNetConfig().block_out_channels == (320, 640, 1280, 1280)


def kept_for_gradient(unet, z, text, gradient_checkpointing):
    """The gradient of a loss on the maps, the maps, and the bytes that autograd kept for it."""
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    z = z.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        eps, seen = unet(z, 500, text, temporal=(BLOCK,), gradient_checkpointing=gradient_checkpointing)
        loss = sum(m[..., :2].square().mean() for m in seen.temporal.values())
    grad, = torch.autograd.grad(loss, z)
    return grad, eps, sum(size for size, _ in sizes.values())


def test_recomputing_gives_the_same_gradient_from_less_memory(small):
    z, text = torch.randn(1, 4, 8, 16, 16), torch.randn(1, 77, 12)
    plain, eps, kept = kept_for_gradient(small.unet, z, text, gradient_checkpointing=False)
    again, same, less = kept_for_gradient(small.unet, z, text, gradient_checkpointing=True)
    assert torch.equal(eps, same)
    assert torch.allclose(plain, again, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))
    assert less < 0.3 * kept


@pytest.mark.parametrize("layer, shape", [
    (Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 9, 8)), (Conv2d(6, 4, 1), (2, 6, 3, 3)),
    (Linear(6, 4), (2, 3, 6)), (Linear(6, 4, bias=False), (5, 6)), (GEGLU(6, 4), (2, 3, 6))])
def test_frozen_weights_give_the_same_gradient_and_keep_no_input(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def gradient():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
                lambda saved: kept.append(saved) or saved, lambda saved: saved):
            y = layer(x)
        return torch.autograd.grad(y.square().sum(), x)[0], kept

    expected, kept = gradient()
    assert any(saved.numel() == x.numel() for saved in kept)
    layer.requires_grad_(False)
    found, kept = gradient()
    assert torch.allclose(found, expected, atol=1e-5)
    assert not any(saved.numel() == x.numel() for saved in kept)


def test_frozen_weights_pass_gradient_on_under_autocast():
    layer = Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected, = torch.autograd.grad(layer(x).square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    found, = torch.autograd.grad(y.float().square().sum(), x)
    assert y.dtype == torch.bfloat16 and found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=0.05 * float(expected.abs().max()))
