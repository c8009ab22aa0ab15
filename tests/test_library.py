"""The library in another program: types, devices, what is refused, and when."""
import copy
import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch

from mcl import (Guidance, InputError, Model, NumericalError, SampleConfig, AttentionRequest, extract_motion,
                 invert_reference, load_model, motion_guidance, sample, semantic_guidance, sparsectrl_condition,
                 make_subject_masks)
from mcl.config import SparseCtrlConfig
from mcl.inversion import inversion_guidance
from mcl.semantic import noised

from tests.conftest import SMALL, randn


def last(states):
    *_, state = states
    return state.latents


def clip(seed=0):
    return randn(1, 4, 4, 8, 8, seed=seed)


@pytest.mark.parametrize("given", [torch.bfloat16, "bf16", "bfloat16"])
def test_types_are_torch_s_or_their_names(given):
    model = load_model(device=torch.device("cpu"), dtype=given)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.to(torch.float32) is model and model.dtype == torch.float32
    assert model.half().vae.quant_conv.weight.dtype == torch.float16
    for wrong in ("fp8", torch.int8):
        with pytest.raises(InputError, match="dtype '.*8' is not known: auto, float32, .*bf16"):
            load_model(device="cpu", dtype=wrong)


def test_each_network_brings_what_it_is_given_to_its_own_type(small):
    model = copy.deepcopy(small)
    model.unet.to(torch.bfloat16)
    model.vae.to(torch.float64)
    latents = model.vae.encode(randn(4, 3, 32, 32).half())
    motion = extract_motion(model, latents, noise=clip(1))
    found = last(sample(model, "a star", motion, latents=clip(2)))
    assert found.dtype == torch.float32 and model.vae.decode(found).shape == (4, 3, 32, 32)
    expected = last(sample(small, "a star", dataclasses.replace(motion, info={}), latents=clip(2)))
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_vae_that_overflows_in_half_precision_is_run_again_in_float32(small):
    """A residual branch of 1e5 overflows in float16.

    The encoder's latents are small differences between such numbers, which float32 knows to 0.008.
    """
    model = copy.deepcopy(small)
    for mid in (model.vae.encoder.mid_block, model.vae.decoder.mid_block):
        mid.resnets[0].conv2.bias.fill_(6e4)
        mid.resnets[1].conv2.bias.fill_(6e4)
    half = copy.deepcopy(model.vae).half()
    for name, given, relative in (("encode", randn(5, 3, 32, 32), 0.05), ("decode", clip(), 1e-4)):
        with pytest.warns(UserWarning, match="the VAE overflows in float16") as said:
            found = getattr(half, name)(given)
        assert len(said) == 1 and {p.dtype for p in half.parameters()} == {torch.float16}
        expected = getattr(half.float(), name)(given)
        assert (found - expected).norm() < relative * expected.norm() and expected.std() > 0.01
        half.half()
        for vae in (half, model.vae):
            with pytest.raises(NumericalError, match="not finite, not even in float32"):
                with warnings.catch_warnings(action="ignore"):
                    getattr(vae, name)(given * float("nan"))


def test_embeddings_are_as_good_as_the_text(small):
    config = dataclasses.replace(small.config.sample, negative_prompt="a ring")
    both = small.encode_text(["a star", "a ring"])
    expected = last(sample(small, "a star", None, config, latents=clip()))
    for prompt in (both, both[:1]):
        found = last(sample(small, prompt, None, config, latents=clip()))
        # The texts are encoded together or one by one, which sums in another order.
        assert (found - expected).norm() < 1e-4 * expected.norm()


def test_what_cannot_be_is_refused_when_called(small):
    """Not at the first step, and in the words of arguments."""
    config = small.config.sample
    guide = Guidance(AttentionRequest(temporal=("up_blocks.9",)), lambda seen, t: torch.zeros(()))
    for arguments, message in (
            ({"prompt": ["a", "b"]}, "the prompt is list, where one text is wanted"),
            ({"prompt": randn(1, 77, 13)}, r"the prompt is \(1, 77, 13\), where"),
            ({"latents": randn(2, 4, 4, 8, 8)}, r"latents of shape \(2, .*make one clip of \(1, 4"),
            ({"config": dataclasses.replace(config, width=34)}, "34x32 .* multiples of 4"),
            ({"guides": [guide]}, "no temporal attention under 'up_blocks.9': this model has it"),
            ({"config": dataclasses.replace(config, motion_weight=0.0), "guides": [guide]},
             "motion_weight = 0 is not possible with guides"),
            ({"condition": randn(1, 5, 4, 8, 8)}, "this model has no SparseCtrl")):
        with pytest.raises(InputError, match=message) as caught:
            sample(small, **{"prompt": "a star"} | arguments)
        assert "--" not in str(caught.value)
    with pytest.raises(InputError, match="blocks = 'up_blocks.1' is not possible: a list, each"):
        SampleConfig(guidance_blocks="up_blocks.1")
    assert SampleConfig(guidance_blocks=["up_blocks.1"]).blocks == ("up_blocks.1",)


def test_a_motion_is_one_guide_among_others(small):
    """Given as a guide it does what it does as a motion; a loss of one's own is descended too."""
    motion = extract_motion(small, clip(), noise=clip(1))
    config = dataclasses.replace(small.config.sample, motion_weight=3e5)
    expected = list(sample(small, "a star", motion, config, latents=clip(2)))
    found = list(sample(small, "a star", None, config, latents=clip(2),
                        guides=[motion_guidance(motion)]))
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(found, expected))

    def spread(seen, t):
        return sum(probs.var(dim=-1).mean() for probs in seen.temporal.values())

    own = Guidance(AttentionRequest(temporal=("down_blocks.1",)), spread)
    both = list(sample(small, "a star", motion, config, latents=clip(2), guides=[own]))
    z = clip(2).requires_grad_()
    seen = small.unet.attend(z, both[0].t, small.encode_text(["a star"]), own.wanted)
    loss = spread(seen, both[0].t)
    assert both[0].loss == pytest.approx(expected[0].loss + float(loss), rel=1e-4)
    grad, = torch.autograd.grad(loss, z)
    noises = [(1 - small.schedule.alpha_bar(state.t)).sqrt() for state in both[:2]]
    moved = -noises[0] * noises[1] * 3e5 * 4 * 8 * 8 / (16 * 64 * 64) / 2 * grad
    difference = both[0].latents - expected[0].latents
    assert (difference - moved).norm() < 1e-2 * moved.norm()


def test_motions_of_models_in_memory_are_told_apart(small):
    other = copy.deepcopy(small)
    motion = extract_motion(small, clip(), noise=clip(1))
    sample(other, "a star", motion)
    next(iter(other.vae.parameters())).mul_(2)
    with pytest.raises(InputError, match="another model"):
        sample(other, "a star", motion)


@pytest.mark.parametrize("kind", ["", "rgb"])
def test_the_whole_pipeline_runs_on_another_device(kind, monkeypatch):
    """The meta device has shapes and no values: what was left on the CPU would be found."""
    monkeypatch.setattr(torch, "isfinite", lambda values: torch.ones(1))
    config = dataclasses.replace(SMALL, sparsectrl=SparseCtrlConfig(kind=kind, motion_num_attention_heads=2),
                                 sample=dataclasses.replace(
                                     SMALL.sample, semantic_scale=1.0, mask_threshold=0.5))
    with torch.device("meta"):
        model = Model(config).requires_grad_(False).eval()
    model.file_sha256 = "of no file"
    frames = torch.zeros(4, 3, 32, 32)
    latents = model.vae.encode(frames)
    condition = sparsectrl_condition(latents[0, :, 0][None], [1], 4) if kind else None
    motion = extract_motion(model, latents, noise=clip(), condition=condition)
    inversion = invert_reference(model, latents, "a ball", model.config.sample)
    subject = make_subject_masks(model, "a star", "star", "a ball", "ball",
                         noised(model, latents, "a ball", model.config.sample, clip()),
                         model.config.sample)
    guides = [inversion_guidance(inversion, model.config.sample),
              semantic_guidance(model, "a star", clip(1), model.config.sample, subject, condition)]
    states = sample(model, "a star", motion, latents=clip(1), guides=guides, condition=condition,
                    gradient_checkpointing=True)
    with pytest.raises(RuntimeError, match="meta"):     # in the end a value is asked for
        next(states)


def test_nothing_is_said_and_no_seed_set_on_import():
    done = subprocess.run([sys.executable, "-W", "error", "-c", "import mcl"], text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_model_under_training_learns_from_its_maps(small):
    unet = copy.deepcopy(small.unet).requires_grad_(True).train()
    optimizer = torch.optim.SGD(unet.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        eps, seen = unet(clip(), 500, small.encode_text(["a star"]),
                         temporal=("up_blocks.1",))
        losses.append(eps.square().mean() + sum(
            probs.var() for probs in seen.temporal.values()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
