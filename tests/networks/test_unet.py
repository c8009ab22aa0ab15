"""UNet: names and shapes of the real checkpoints, returned attention, gradients, memory."""
import copy
import dataclasses

import einops
import pytest
import torch
from torch import nn

from mcl import InputError
from mcl.config import ModelConfig, UNetConfig
from mcl.networks.attention import AttentionMaps, AttentionRequest, attention
from mcl.networks.layers import GEGLU
from mcl.networks.ops import Conv2d, GEGLUFunction
from mcl.networks.temporal import sinusoidal_positional_encoding
from mcl.networks.text_encoder import TextEncoder
from mcl.networks.unet import UNet3D
from mcl.networks.vae import AutoencoderKL
from tests.conftest import SMALL, randomize
from tests.foreign import listing

SD15 = ModelConfig()
BLOCK = "up_blocks.1"
REQUEST = AttentionRequest(temporal=(BLOCK,))


@pytest.mark.parametrize("network, config, name", [
    (UNet3D, SD15.unet, "official_unet3d_v3"),
    (UNet3D, UNetConfig(motion_mid_block=True), "official_unet3d_v2"),
    (AutoencoderKL, SD15.vae, "diffusers_vae"),
    (TextEncoder, SD15.text_encoder, "diffusers_text_encoder")])
def test_names_and_shapes_are_those_of_the_real_checkpoints(network, config, name):
    with torch.device("meta"):
        state = network(config).state_dict()
    assert {k: "x".join(map(str, v.shape)) for k, v in state.items()} == listing(name)


def test_default_config_has_the_size_of_sd15_with_v3_motion_modules():
    with torch.device("meta"):
        unet = UNet3D(SD15.unet)
    assert sum(p.numel() for p in unet.parameters()) == 1_276_658_564


def inputs(num_frames=5, h=8, w=12, batch=1, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, 4, num_frames, h, w, generator=g)
    return z, torch.randn(batch, 7, SMALL.unet.cross_attention_dim, generator=g)


def test_attention_maps_have_full_names_and_rows_that_sum_to_one(small):
    z, text = inputs(batch=2)
    eps, attention = small.unet(z, 500, text, request=REQUEST)
    maps = attention.temporal
    assert eps.shape == z.shape and not attention.temporal_keys and not attention.cross
    assert list(maps) == [f"{BLOCK}.motion_modules.{m}.temporal_transformer.transformer_blocks.0."
                          f"attention_blocks.{k}" for m in range(2) for k in range(2)]
    assert attention.grids == dict.fromkeys(maps, (4, 6))
    for probs in maps.values():
        assert probs.shape == (2 * 4 * 6, 2, 5, 5) and probs.dtype == torch.float32
        assert torch.allclose(probs.sum(dim=-1), torch.ones(()), atol=1e-6)


def test_requested_maps_do_not_change_the_noise(small):
    z, text = inputs()
    plain, attention = small.unet(z, 300, text)
    eps, _ = small.unet(z, 300, text, request=AttentionRequest(("down_blocks.0", BLOCK),
                                                               cross=("mid_block",)))
    assert attention == AttentionMaps()
    assert torch.allclose(plain, eps, atol=1e-5 * float(plain.std()))


def test_forward_to_attention_returns_the_maps_of_a_whole_pass(small):
    z, text = inputs()
    request = AttentionRequest((BLOCK,), cross=(BLOCK,))
    _, whole = small.unet(z, 10, text, request=request)
    partial = small.unet.forward_to_attention(z, 10, text, request)
    assert whole.grids == partial.grids
    for kind in AttentionRequest._fields:
        expected, actual = getattr(whole, kind), getattr(partial, kind)
        assert list(actual) == list(expected)
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_single_layer_can_be_requested(small):
    z, text = inputs()
    layer = small.unet.resolve_layers(REQUEST).temporal[2]
    attention = small.unet.forward_to_attention(
        z, 10, text, AttentionRequest(temporal=(layer,), temporal_keys=(layer,)))
    assert list(attention.temporal) == list(attention.temporal_keys) == [layer]


@pytest.mark.parametrize("kind", AttentionRequest._fields)
@pytest.mark.parametrize("name", ["up_blocks.7", "up_blocks.1.motion", "u"])
def test_unknown_layer_is_rejected_with_the_blocks_that_exist(small, kind, name):
    z, text = inputs()
    blocks = {"cross": "down_blocks.0, .*mid_block, .*up_blocks.2"}.get(
        kind, "down_blocks.0, .*down_blocks.2, up_blocks.0, .*up_blocks.2")
    with pytest.raises(InputError, match=f"'{name}'.* {blocks}"):
        small.unet(z, 10, text, request=AttentionRequest(**{kind: (name,)}))


def test_gradient_ends_after_the_last_requested_block_except_in_training(small):
    z, text = inputs()
    z.requires_grad_()
    eps, attention = small.unet(z, 10, text, request=REQUEST)
    assert not eps.requires_grad
    assert all(probs.requires_grad for probs in attention.temporal.values())
    trained = copy.deepcopy(small.unet).requires_grad_(True).train()
    eps, attention = trained(z, 10, text, request=REQUEST)
    probs = next(iter(attention.temporal.values()))
    (eps.square().mean() + probs.square().mean()).backward()
    assert all(p.grad is not None for p in trained.parameters())


def test_torch_func_grad_gives_the_same_gradient(small):
    z, text = inputs(num_frames=2, h=4, w=4)
    layer = small.unet.resolve_layers(REQUEST).temporal[0]

    def loss(x):
        return small.unet(x, 10, text, request=REQUEST)[1].temporal[layer].var()

    x = z.clone().requires_grad_()
    expected, = torch.autograd.grad(loss(x), x)
    assert torch.allclose(torch.func.grad(loss)(z), expected, atol=1e-5 * float(expected.std()))


def test_unet_compiles_to_one_graph():
    for operation in (einops.rearrange, einops.repeat, einops.reduce):      # tracing them is slow
        torch.compiler.allow_in_graph(operation)
    unet = randomize(UNet3D(dataclasses.replace(SMALL.unet, block_out_channels=(8, 12),
                                                cross_attention_levels=(0,))))
    z, text = inputs(num_frames=2, h=4, w=4)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    request = AttentionRequest(temporal=("up_blocks.0",), cross=("mid_block",))
    eps, attention = compiled(z, torch.tensor(10), text, request=request)
    expected, expected_attention = unet(z, 10, text, request=request)
    assert torch.allclose(eps, expected, atol=1e-5)
    assert list(attention.temporal) == list(expected_attention.temporal)
    assert list(attention.cross) == list(expected_attention.cross)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_are_float32_in_half_precision(dtype):
    """The products of these queries and keys overflow in half precision."""
    g = torch.Generator().manual_seed(1)
    q, k, v = (s * torch.randn(1, 5, 8, generator=g).to(dtype) for s in (200, 200, 1))
    out, probs = attention(q, k, v, heads=1, return_map=True)
    expected = (q.double() @ k.double().transpose(1, 2) / 8 ** 0.5).softmax(dim=-1)
    assert probs.dtype == torch.float32 and out.dtype == dtype
    assert torch.allclose(probs[:, 0].double(), expected, atol=1e-4)


@pytest.mark.parametrize("n, m", [(4, 5), (256, 300)], ids=["short", "long"])
def test_maps_are_the_softmax_of_scaled_products(n, m):
    g = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, tokens, 6, generator=g) for tokens in (n, m, m))
    out, probs = attention(q, k, v, heads=2, return_map=True)
    fused, no_map = attention(q, k, v, heads=2)
    head = (q[1, :, 3:] @ k[1, :, 3:].T / 3 ** 0.5).softmax(dim=-1)
    assert no_map is None
    assert torch.allclose(probs[1, 1], head, atol=1e-6)
    assert torch.allclose(out[1, :, 3:], head @ v[1, :, 3:], atol=1e-6)
    assert torch.allclose(out, fused, atol=1e-6)


@pytest.mark.parametrize("n", [5, 300], ids=["short", "long"])
def test_causal_token_sees_itself_and_earlier_tokens(n):
    q, k, v = torch.randn(3, 1, n, 4, generator=torch.Generator().manual_seed(1))
    out, _ = attention(q, k, v, heads=2, causal=True)
    for i in (0, 1, n - 1):
        expected, _ = attention(q[:, i:i + 1], k[:, :i + 1], v[:, :i + 1], heads=2)
        assert torch.allclose(out[:, i:i + 1], expected, atol=1e-6)


def stored_for_backward(function):
    """Return the function's result and the tensors that autograd stores for the backward pass."""
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x) or x, lambda x: x):
        return function(), stored


def test_geglu_has_the_right_gradient_and_stores_only_its_inputs():
    value, gate = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True,
                              generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(GEGLUFunction.apply, (value, gate))
    assert len(stored_for_backward(lambda: GEGLUFunction.apply(value, gate))[1]) == 2


def test_position_alone_distinguishes_equal_frames(small):
    z, text = inputs(num_frames=1)
    _, attention = small.unet(z.expand(-1, -1, 6, -1, -1), 10, text, request=REQUEST)
    probs = next(iter(attention.temporal.values()))
    assert (probs[..., 0, :] - probs[..., 5, :]).abs().max() > 1e-3


def test_positional_encoding_interleaves_sine_and_cosine():
    table = sinusoidal_positional_encoding(24, 6)
    angle = torch.tensor(5 * 10000 ** (-2 / 6))
    assert table.shape == (24, 6)
    assert table[5, 2].item() == pytest.approx(angle.sin().item())
    assert table[5, 3].item() == pytest.approx(angle.cos().item())


@pytest.mark.parametrize("inflated_groupnorm", [True, False])
def test_only_v1_group_norms_mix_frames(inflated_groupnorm):
    z, text = inputs(num_frames=4)
    changed = z.clone()
    changed[:, :, 3] *= 5
    unet = randomize(UNet3D(dataclasses.replace(
        SMALL.unet, inflated_groupnorm=inflated_groupnorm, motion_modules=False)))
    is_unchanged = torch.equal(unet(z, 10, text)[0][:, :, 0], unet(changed, 10, text)[0][:, :, 0])
    assert is_unchanged == inflated_groupnorm


@pytest.mark.parametrize("h, w", [(9, 13), (8, 8), (5, 4)])
def test_latents_of_odd_size_are_supported(small, h, w):
    z, text = inputs(num_frames=2, h=h, w=w)
    assert small.unet(z, 0, text)[0].shape == z.shape


def test_more_frames_than_the_motion_modules_can_see_are_rejected(small):
    z, text = inputs(num_frames=25)
    with pytest.raises(InputError, match="num_frames = 25 .* at most 24 frames"):
        small.unet(z, 0, text)


def motion_gradient(unet, z, text, gradient_checkpointing):
    """Return the gradient of a loss on the maps, the noise, and the bytes stored for backward."""
    z = z.clone().requires_grad_()

    def forward():
        eps, attention = unet(z, 500, text, request=REQUEST,
                              gradient_checkpointing=gradient_checkpointing)
        return eps, sum(m[..., :2].square().mean() for m in attention.temporal.values())

    (eps, loss), stored = stored_for_backward(forward)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in stored}
    return torch.autograd.grad(loss, z)[0], eps, sum(storages.values())


def test_gradient_checkpointing_gives_the_same_gradient_with_less_memory(small):
    z, text = torch.randn(1, 4, 8, 16, 16), torch.randn(1, 77, 12)
    expected, eps, num_bytes = motion_gradient(small.unet, z, text, False)
    grad, same_eps, fewer_bytes = motion_gradient(small.unet, z, text, True)
    assert torch.equal(eps, same_eps)
    assert torch.allclose(grad, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert fewer_bytes < 0.3 * num_bytes


@pytest.mark.parametrize("layer, shape", [
    (Conv2d(6, 4, 3, stride=2, padding=1), (2, 6, 9, 8)), (Conv2d(6, 4, 1), (2, 6, 3, 3)),
    (nn.Linear(6, 4), (2, 3, 6)), (GEGLU(6, 4), (2, 3, 6))])
def test_frozen_layers_give_the_same_gradient_and_do_not_store_their_input(layer, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)

    def gradient():
        y, stored = stored_for_backward(lambda: layer(x))
        stores_input = any(tensor.numel() == x.numel() for tensor in stored)
        return torch.autograd.grad(y.square().sum(), x)[0], stores_input

    expected, stores_input = gradient()
    assert stores_input
    layer.requires_grad_(False)
    grad, stores_input = gradient()
    assert torch.allclose(grad, expected, atol=1e-5) and not stores_input


def test_frozen_layers_have_gradients_under_autocast():
    layer = Conv2d(6, 4, 3, padding=1).requires_grad_(False)
    x = torch.randn(2, 6, 8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected, = torch.autograd.grad(layer(x).square().sum(), x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    grad, = torch.autograd.grad(y.float().square().sum(), x)
    assert y.dtype == torch.bfloat16 and grad.dtype == torch.float32
    assert torch.allclose(grad, expected, atol=0.05 * float(expected.abs().max()))
