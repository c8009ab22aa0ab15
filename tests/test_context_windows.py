"""Clips longer than the UNet sees at once: each window by itself, and the blended result."""
import dataclasses

import numpy as np
import pytest
import torch

from mcl import (
    AttentionRequest,
    Guidance,
    InputError,
    ModelConfig,
    Motion,
    SampleConfig,
    extract_motion,
    invert_reference,
    motion_guidance,
    sample,
    semantic_guidance,
    sparsectrl_condition,
)
from mcl.config import UNetConfig
from mcl.context_windows import ContextWindows, blend_windows, make_context_windows
from mcl.inversion import inversion_guidance
from mcl.motion import motion_loss
from mcl.sampler import Sampler
from tests.conftest import randn

MODEL = ModelConfig(unet=UNetConfig(motion_max_seq_length=16))
NUM_FRAMES, OFFSETS = 9, (0, 2, 5)      # windows of 4; neighbors share 1 or 2 frames
WEIGHTS = np.array([1, 2, 2, 1.0])      # of the frames of a window


def clip(seed=0, num_frames=NUM_FRAMES):
    return randn(1, 4, num_frames, 8, 8, seed=seed)


@pytest.fixture(scope="module")
def config(small):
    return dataclasses.replace(small.config.sample, num_frames=NUM_FRAMES, context_length=4,
                               context_overlap=0.3, motion_weight=3e5)


@pytest.fixture(scope="module")
def motion(small, config):
    return extract_motion(small, clip(), config, noise=clip(1))


def blend(parts):
    """Return the weighted mean of windows, written out frame by frame."""
    frames = []
    for f in range(NUM_FRAMES):
        terms = [(WEIGHTS[f - offset], part[:, :, f - offset])
                 for offset, part in zip(OFFSETS, parts) if 0 <= f - offset < 4]
        frames.append(sum(w * part for w, part in terms) / sum(w for w, _ in terms))
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("num_frames, settings, offsets, length", [
    (64, {}, (0, 12, 24, 36, 48), 16), (16, {}, (0,), 16), (5, {}, (0,), 5), (17, {}, (0, 1), 16),
    (40, {"context_overlap": 0.5}, (0, 8, 16, 24), 16),
    (9, {"context_length": 4, "context_overlap": 0.3}, OFFSETS, 4),
    (10, {"context_length": 4, "context_overlap": 0.3}, (0, 3, 6), 4),
    (10, {"context_length": 4, "context_overlap": 0.4}, (0, 2, 4, 6), 4),
    (32, {"closed_loop": True}, (0, 10, 21), 16), (16, {"closed_loop": True}, (0, 8), 16),
    (9, {"context_length": 4, "context_overlap": 0.5, "closed_loop": True}, (0, 1, 3, 5, 7), 4),
    (48, {"context_overlap": 0.0}, (0, 16, 32), 16), (1, {"closed_loop": True}, (0,), 1)])
def test_windows_are_evenly_spaced_and_cover_every_frame(num_frames, settings, offsets, length):
    windows = make_context_windows(SampleConfig(**settings), MODEL, num_frames)
    assert windows == ContextWindows(num_frames, length, offsets)
    assert sorted({int(f) for offset in offsets for f in windows.frame_indices(offset)}) == list(
        range(num_frames))


def test_window_of_a_closed_loop_continues_at_the_first_frame():
    windows = make_context_windows(SampleConfig(closed_loop=True), MODEL)
    assert windows.frame_indices(8).tolist() == [*range(8, 16), *range(8)]


def test_blended_frames_are_means_with_weights_that_fall_to_the_ends_of_a_window():
    parts = [clip(seed, 4) for seed in range(3)]
    blended = blend_windows(parts, ContextWindows(NUM_FRAMES, 4, OFFSETS))
    assert torch.allclose(blended, blend(parts), atol=1e-6)
    single = blend_windows([clip()], ContextWindows(NUM_FRAMES, NUM_FRAMES, (0,)))
    assert torch.equal(single, clip())


def test_long_guided_run_blends_windows_that_have_a_motion_each(small, config, motion):
    """Noise, gradient and loss of each step, window by window, against the paper written out."""
    steps = list(sample(small, "a red star", motion, config, latents=clip(3)))
    text, null = small.encode_text(["a red star", ""]).split(1)
    request = AttentionRequest(temporal=config.guidance_blocks)
    z = clip(3)
    for i, (state, following) in enumerate(zip(steps[:2], steps[1:])):
        noises, grads, losses, t = [], [], [], state.timestep
        for offset in OFFSETS:
            frames = slice(offset, offset + 4)
            window_motion = extract_motion(small, clip()[:, :, frames],
                                           dataclasses.replace(config, num_frames=4),
                                           noise=clip(1)[:, :, frames])
            window = z[:, :, frames].clone().requires_grad_()
            eps, attention = small.unet(window, t, text, request=request)
            loss = motion_loss(attention.temporal, window_motion)
            grads.append(torch.autograd.grad(loss, window)[0])
            eps_null = small.unet(window, t, null)[0]
            noises.append((eps_null + config.cfg_scale * (eps - eps_null)).detach())
            losses.append(loss.item())
        weight = 3e5 * (0.5, 1)[i] * (4 * 8 * 8) / (16 * 64 * 64)
        eps, grad = blend(noises), weight * blend(grads)
        a, b = map(small.schedule.alpha_bar, (t, following.timestep))
        x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
        z = b.sqrt() * x0 + (1 - b).sqrt() * (eps - (1 - a).sqrt() * grad)
        assert (state.latents - z).norm() < 1e-4 * z.norm()
        assert state.loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert state.grad_norm == pytest.approx(float(grad.norm()), rel=1e-3)
        z = state.latents


def test_closed_loop_has_no_beginning(small, config):
    """Noise and reference that are rolled by a window give the same clip, rolled by a window."""
    config = dataclasses.replace(config, num_frames=6, context_overlap=0.5, closed_loop=True,
                                 steps=3)

    def last_latents(shift):
        reference, noise, start = (clip(seed, 6).roll(shift, dims=2) for seed in range(3))
        motion = extract_motion(small, reference, config, noise=noise)
        assert motion.windows.offsets == (0, 2, 4)
        *_, state = sample(small, "a star", motion, config, latents=start)
        return state.latents
    latents, rolled = last_latents(0), last_latents(2)
    assert (rolled - latents.roll(2, dims=2)).norm() < 1e-4 * latents.norm()
    assert (rolled - latents).norm() > 0.1 * latents.norm()


def test_loss_is_called_for_each_window_with_its_frame_offset(small, config):
    calls = []

    def loss(maps, t):
        probs, = maps.temporal.values()
        calls.append((t, maps.frame_offset, probs.shape[-1]))
        return probs.square().mean()
    layer = small.unet.resolve_layers(AttentionRequest(("up_blocks.1",))).temporal[0]
    first = next(sample(small, "", None, config, guidance=[Guidance(loss, layer)],
                        latents=clip(3)))
    assert calls == [(first.timestep, offset, 4) for offset in OFFSETS] and first.grad_norm > 0


def test_motion_of_a_long_clip_is_unchanged_by_saving_and_loading(motion, tmp_path):
    motion.save(tmp_path / "m.safetensors")
    loaded = Motion.load(tmp_path / "m.safetensors")
    assert loaded.metadata == motion.metadata
    assert loaded.windows == motion.windows == ContextWindows(NUM_FRAMES, 4, OFFSETS)
    for offset in OFFSETS:
        for name, values in loaded.window(offset).values.items():
            assert torch.equal(values, motion.window(offset).values[name])


@pytest.mark.parametrize("changes, message", [
    ({"context_overlap": 0.5}, r"context_offsets = \[0, 2, 5\], not \[0, 1, 3, 5\]"),
    ({"context_length": 0}, "context_length = 4, not 9"),
    ({"closed_loop": True}, r"context_offsets = \[0, 2, 5\], not \[0, 3, 6\]")])
def test_motion_of_other_windows_is_rejected(small, config, motion, changes, message):
    with pytest.raises(InputError, match=message):
        sample(small, "", motion, dataclasses.replace(config, **changes))


def test_impossible_windows_are_rejected(small, config):
    with pytest.raises(InputError, match="context_length = 25 .* at most 24 frames"):
        sample(small, "", None, dataclasses.replace(config, context_length=25))
    with pytest.raises(InputError, match="top_k = 5 .* 1 to 4, the window's frames"):
        extract_motion(small, clip(), dataclasses.replace(config, top_k=5))


def test_inversion_is_blended_and_read_in_the_same_windows(small, config):
    config = dataclasses.replace(config, steps=2, guidance_steps=1, inversion_steps=2)
    inverted = invert_reference(small, clip(), "a ball", config)
    text, t = small.encode_text(["a ball"]), 700
    z, alpha_bar = clip(), small.schedule.alpha_bar
    for t_prev, t_next in ((-1, 0), (0, t)):
        eps = blend([small.unet(z[:, :, offset:offset + 4], t_next, text)[0]
                     for offset in OFFSETS])
        x0 = (z - (1 - alpha_bar(t_prev)).sqrt() * eps) / alpha_bar(t_prev).sqrt()
        z = alpha_bar(t_next).sqrt() * x0 + (1 - alpha_bar(t_next)).sqrt() * eps
    assert (inverted.latents[t] - z).norm() < 1e-4 * z.norm()
    motion = inverted.motion_at(t, config)
    assert motion.windows.offsets == OFFSETS
    first, expected = (next(sample(small, "", None, config, guidance=[guidance], latents=clip(3)))
                       for guidance in (inversion_guidance(inverted, config),
                                        motion_guidance(motion)))
    assert torch.equal(first.latents, expected.latents) and first.grad_norm > 0


def test_control_is_cut_into_the_windows_of_its_frames(small_rgb, config):
    model = small_rgb
    condition = sparsectrl_condition(randn(1, 4, 8, 8, seed=5), [6], NUM_FRAMES)
    text = model.encode_text(["a star"])
    noise = Sampler(model, "a star", config, condition).predict_noise(clip(3), 500, text)
    expected = blend([model.unet(clip(3)[:, :, f:f + 4], 500, text, residuals=model.sparsectrl(
        condition[:, :, f:f + 4], 500, text))[0] for f in OFFSETS])
    assert torch.allclose(noise, expected, atol=1e-5)
    motion = extract_motion(model, clip(), config, noise=clip(1), control=condition)
    expected = extract_motion(model, clip()[:, :, 5:], dataclasses.replace(config, num_frames=4),
                              noise=clip(1)[:, :, 5:], control=condition[:, :, 5:])
    for name, values in expected.values.items():
        assert torch.allclose(motion.window(5).values[name], values, atol=1e-6)


def test_semantic_guidance_rejects_several_windows(small, config):
    config = dataclasses.replace(config, semantic_scale=1.0)
    with pytest.raises(InputError, match="needs one context window of 4 frames"):
        semantic_guidance(small, "a star", clip(), config)
