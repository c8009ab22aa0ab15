"""The library inside another program: data types, devices, imports and training."""
import copy
import dataclasses
import warnings

import pytest
import torch

from mcl import (
    AttentionRequest,
    InputError,
    Model,
    NumericalError,
    extract_motion,
    invert_reference,
    load_model,
    sample,
    semantic_guidance,
    sparsectrl_condition,
)
from mcl.config import SparseCtrlConfig
from mcl.inversion import inversion_guidance
from mcl.semantic import make_subject_masks, noised_reference_attention
from tests.conftest import SMALL, randn


def last_latents(states):
    *_, state = states
    return state.latents


def random_latents(seed=0):
    return randn(1, 4, 4, 8, 8, seed=seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "bf16", "bfloat16"])
def test_a_dtype_is_one_of_torch_or_its_name(dtype):
    model = load_model(device=torch.device("cpu"), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.to(torch.float32) is model and model.dtype == torch.float32
    assert model.half().vae.quant_conv.weight.dtype == torch.float16


def test_each_network_converts_its_inputs_to_its_own_dtype(small):
    model = copy.deepcopy(small)
    model.unet.to(torch.bfloat16)
    model.vae.to(torch.float64)
    latents = model.vae.encode(randn(4, 3, 32, 32).half())
    motion = extract_motion(model, latents, noise=random_latents(1))
    result = last_latents(sample(model, "a star", motion, latents=random_latents(2)))
    assert result.dtype == torch.float32 and model.vae.decode(result).shape == (4, 3, 32, 32)
    metadata = motion.metadata | {"model": small.sha256}
    expected = last_latents(sample(
        small, "a star", dataclasses.replace(motion, metadata=metadata), latents=random_latents(2)))
    assert (result - expected).norm() < 0.1 * expected.norm()


def test_vae_that_overflows_in_half_precision_is_repeated_in_float32(small):
    """A residual branch of 1e5 overflows in float16.

    The encoder's latents are small differences between such numbers, which float32 rounds to 0.008.
    """
    model = copy.deepcopy(small)
    for mid in (model.vae.encoder.mid_block, model.vae.decoder.mid_block):
        mid.resnets[0].conv2.bias.fill_(6e4)
        mid.resnets[1].conv2.bias.fill_(6e4)
    half = copy.deepcopy(model.vae).half()
    for name, inputs, tolerance in (("encode", randn(5, 3, 32, 32), 0.05),
                                   ("decode", random_latents(), 1e-4)):
        with pytest.warns(UserWarning, match="the VAE overflows in float16") as caught:
            result = getattr(half, name)(inputs)
        assert len(caught) == 1 and {p.dtype for p in half.parameters()} == {torch.float16}
        expected = getattr(half.float(), name)(inputs)
        assert (result - expected).norm() < tolerance * expected.norm() and expected.std() > 0.01
        half.half()
        for vae in (half, model.vae):
            with pytest.raises(NumericalError, match="not finite, even in float32"):
                with warnings.catch_warnings(action="ignore"):
                    getattr(vae, name)(inputs * float("nan"))


def test_motions_of_models_in_memory_belong_to_their_model(small):
    other = copy.deepcopy(small)
    motion = extract_motion(small, random_latents(), noise=random_latents(1))
    sample(other, "a star", motion)
    next(iter(other.vae.parameters())).mul_(2)
    with pytest.raises(InputError, match="another model"):
        sample(other, "a star", motion)


def test_the_whole_pipeline_runs_on_another_device(monkeypatch):
    """The meta device has shapes but no values: a tensor that stays on the CPU raises an error."""
    monkeypatch.setattr(torch, "isfinite", lambda values: torch.ones(1))
    config = dataclasses.replace(
        SMALL, unet=dataclasses.replace(SMALL.unet, block_out_channels=(16, 24)),
        sparsectrl=SparseCtrlConfig(kind="rgb", motion_num_attention_heads=2),
        sample=dataclasses.replace(SMALL.sample, steps=2, guidance_steps=1, inversion_steps=1,
                                   semantic_scale=1.0, semantic_blocks=("up_blocks.1",),
                                   mask_threshold=0.5))
    with torch.device("meta"):
        model = Model(config).requires_grad_(False).eval()
    model.file_sha256 = "no file"
    latents = model.vae.encode(torch.zeros(4, 3, 32, 32))
    control = sparsectrl_condition(latents[0, :, 0][None], [1], 4)
    motion = extract_motion(model, latents, noise=random_latents(), control=control)
    inverted = invert_reference(model, latents, "a ball", model.config.sample)
    attention = noised_reference_attention(model, latents, "a ball", model.config.sample,
                                           random_latents())
    subject = make_subject_masks(model, "a star", "star", "a ball", "ball", attention,
                                 model.config.sample)
    guidance = [inversion_guidance(inverted, model.config.sample),
                semantic_guidance(model, "a star", random_latents(1), model.config.sample, subject,
                                  control)]
    states = sample(model, "a star", motion, latents=random_latents(1), guidance=guidance,
                    control=control, gradient_checkpointing=True)
    with pytest.raises(RuntimeError, match="meta"):     # the first step asks for a value
        next(states)


def test_a_unet_in_training_learns_from_its_maps(small):
    unet = copy.deepcopy(small.unet).requires_grad_(True).train()
    request = small.unet.resolve_layers(AttentionRequest(temporal=("up_blocks.1",)))
    optimizer = torch.optim.SGD(unet.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        eps, maps = unet(random_latents(), 500, small.encode_text(["a star"]),
                         request=request)
        losses.append(eps.square().mean() + sum(
            probs.var() for probs in maps.temporal.values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
