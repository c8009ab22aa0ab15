"""Clips longer than a UNet sees at once: each window by itself, and how they are blended."""
import dataclasses

import numpy as np
import pytest
import torch

from mcl import (Guidance, InputError, Model, Motion, SampleConfig, AttentionRequest, extract_motion,
                 invert_reference, motion_guidance, sample, semantic_guidance, sparsectrl_condition)
from mcl.config import SparseCtrlConfig
from mcl.inversion import inversion_guidance
from mcl.motion import motion_loss
from mcl.sampler import Sampler
from mcl.context_windows import ContextWindows, blend_windows, make_context_windows

from tests.conftest import randn, randomize

FRAMES, STARTS = 9, (0, 2, 5)           # windows of 4, of which neighbours share 1 or 2
PLAIN = np.array([1, 2, 2, 1.0])        # weights of a window's frames


def clip(seed=0, frames=FRAMES):
    return randn(1, 4, frames, 8, 8, seed=seed)


@pytest.fixture(scope="module")
def config(small):
    return dataclasses.replace(small.config.sample, num_frames=FRAMES, context_length=4, context_overlap=0.3,
                               motion_weight=3e5)


@pytest.fixture(scope="module")
def motion(small, config):
    return extract_motion(small, clip(), config, noise=clip(1))


def blended(parts, starts=STARTS):
    """The weighted mean, written out frame by frame."""
    frames = []
    for f in range(FRAMES):
        there = [(PLAIN[(f - s) % FRAMES], part[:, :, (f - s) % FRAMES])
                 for s, part in zip(starts, parts) if (f - s) % FRAMES < 4]
        frames.append(sum(w * part for w, part in there) / sum(w for w, _ in there))
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("frames, given, starts, length", [
    (64, {}, (0, 12, 24, 36, 48), 16), (16, {}, (0,), 16), (5, {}, (0,), 5), (17, {}, (0, 1), 16),
    (40, {"overlap": 0.5}, (0, 8, 16, 24), 16), (9, {"window": 4}, STARTS, 4),
    (10, {"window": 4}, (0, 3, 6), 4), (10, {"window": 4, "overlap": 0.4}, (0, 2, 4, 6), 4),
    (32, {"loop": True}, (0, 10, 21), 16), (16, {"loop": True}, (0, 8), 16),
    (9, {"window": 4, "overlap": 0.5, "loop": True}, (0, 1, 3, 5, 7), 4),
    (48, {"overlap": 0.0}, (0, 16, 32), 16), (1, {"loop": True}, (0,), 1)])
def test_windows_are_evenly_apart_and_leave_no_frame_out(frames, given, starts, length):
    if "window" in given:
        given = {"overlap": 0.3} | given
    found = make_context_windows(frames, SampleConfig(**given), 16)
    assert found == ContextWindows(frames, length, starts)
    assert sorted({int(f) for s in starts for f in found.at(s)}) == list(range(frames))


def test_a_blend_is_the_mean_by_weights_that_fall_to_the_edges():
    parts = [clip(seed, 4) for seed in range(3)]
    assert torch.allclose(blend_windows(parts, ContextWindows(FRAMES, 4, STARTS)), blended(parts), atol=1e-6)
    assert torch.equal(blend_windows([clip()], ContextWindows(FRAMES, FRAMES, (0,))), clip())


def test_a_long_guided_run_is_its_windows_each_with_its_own_motion(small, config, motion):
    """Noise, gradient and loss of each step, window by window, against the paper written out."""
    states = list(sample(small, "a red star", motion, config, latents=clip(3)))
    text, null = small.encode_text(["a red star", ""]).split(1)
    alpha_bar = small.schedule.alpha_bar
    z = clip(3)
    for i, (state, after) in enumerate(zip(states[:2], states[1:])):
        noises, grads, losses = [], [], []
        for start in STARTS:
            own = extract_motion(small, clip()[:, :, start:start + 4],
                                 dataclasses.replace(config, num_frames=4),
                                 noise=clip(1)[:, :, start:start + 4])
            part = z[:, :, start:start + 4].clone().requires_grad_()
            eps, seen = small.unet(part, state.t, text, temporal=config.guidance_blocks)
            loss = motion_loss(seen.temporal, own)
            grads.append(torch.autograd.grad(loss, part)[0])
            eps_null = small.unet(part, state.t, null)[0]
            noises.append((eps_null + config.cfg_scale * (eps - eps_null)).detach())
            losses.append(loss.item())
        weight = 3e5 * (0.5, 1)[i] * (4 * 8 * 8) / (16 * 64 * 64)
        e, grad = blended(noises), weight * blended(grads)
        a, b = alpha_bar(state.t), alpha_bar(after.t)
        x0 = (z - (1 - a).sqrt() * e) / a.sqrt()
        z = b.sqrt() * x0 + (1 - b).sqrt() * (e - (1 - a).sqrt() * grad)
        assert (state.latents - z).norm() < 1e-4 * z.norm()
        assert state.loss == pytest.approx(np.mean(losses), rel=1e-4)
        assert state.grad_norm == pytest.approx(float(grad.norm()), rel=1e-3)
        z = state.latents


def test_a_loop_has_no_beginning(small, config):
    """Turned by a window, noise and reference give the same clip, turned likewise."""
    config = dataclasses.replace(config, num_frames=6, context_overlap=0.5, closed_loop=True, steps=3)

    def last(turn):
        reference, noise, start = (clip(seed, 6).roll(turn, dims=2) for seed in range(3))
        motion = extract_motion(small, reference, config, noise=noise)
        assert motion.windows.starts == (0, 2, 4)
        *_, state = sample(small, "a star", motion, config, latents=start)
        return state.latents
    here, turned = last(0), last(2)
    assert (turned - here.roll(2, dims=2)).norm() < 1e-4 * here.norm()
    assert (turned - here).norm() > 0.1 * here.norm()


def test_a_guide_sees_one_window_at_a_time_and_from_which_frame_on(small, config):
    seen = []

    def loss(attended, t):
        probs, = attended.temporal.values()
        seen.append((t, attended.start, probs.shape[-1]))
        return probs.square().mean()
    layer = small.unet.resolve(AttentionRequest(("up_blocks.1",))).temporal[0]
    states = sample(small, "", None, config, guides=[Guidance(AttentionRequest((layer,)), loss)],
                    latents=clip(3))
    first = next(states)
    assert seen == [(first.t, start, 4) for start in STARTS] and first.grad_norm > 0


def test_a_windowed_motion_survives_its_file_and_fits_no_other_windows(small, config, motion,
                                                                       tmp_path):
    motion.save(tmp_path / "m.safetensors")
    again = Motion.load(tmp_path / "m.safetensors")
    assert again.info == motion.info and again.windows == motion.windows == ContextWindows(9, 4, STARTS)
    for start in STARTS:
        for name, values in again.at(start).values.items():
            assert torch.equal(values, motion.at(start).values[name])
    for change in ({"overlap": 0.5}, {"window": 0}, {"loop": True}):
        with pytest.raises(InputError, match=r"windows of 4 frames from \(0, 2, 5\) on, the set"):
            sample(small, "", again, dataclasses.replace(config, **change))
    with pytest.raises(InputError, match="window = 25 is not possible: .* know up to 24"):
        sample(small, "", None, dataclasses.replace(config, context_length=25))
    with pytest.raises(InputError, match="top_k = 5 .* the number of frames, 4"):
        extract_motion(small, clip(), dataclasses.replace(config, top_k=5))


def test_an_inversion_is_blended_and_read_in_the_same_windows(small, config):
    config = dataclasses.replace(config, steps=2, guidance_steps=1, inversion_steps=2)
    inversion = invert_reference(small, clip(), "a ball", config)
    text, t = small.encode_text(["a ball"]), 700
    z, alpha_bar = clip(), small.schedule.alpha_bar
    for before, now in ((-1, 0), (0, t)):
        e = blended([small.unet(z[:, :, s:s + 4], now, text)[0] for s in STARTS])
        x0 = (z - (1 - alpha_bar(before)).sqrt() * e) / alpha_bar(before).sqrt()
        z = alpha_bar(now).sqrt() * x0 + (1 - alpha_bar(now)).sqrt() * e
    assert (inversion.latents[t] - z).norm() < 1e-4 * z.norm()
    whole = inversion.motion(t, config)
    assert whole.windows.starts == STARTS
    first = next(sample(small, "", None, config, guides=[inversion_guidance(inversion, config)],
                        latents=clip(3)))
    again = next(sample(small, "", None, config, guides=[motion_guidance(whole)], latents=clip(3)))
    assert torch.equal(first.latents, again.latents) and first.grad_norm > 0


def test_a_condition_is_cut_into_the_windows_of_its_frames(small, config):
    model = Model(dataclasses.replace(small.config, sparsectrl=SparseCtrlConfig(
        "rgb", motion_num_attention_heads=2)))
    for part in model.children():
        randomize(part)
    condition = sparsectrl_condition(randn(1, 4, 8, 8, seed=5), [6], FRAMES)
    text = model.encode_text(["a star"])
    found = Sampler(model, text, text, config, condition).noise(clip(3), 500, text)
    expected = blended([model.unet(clip(3)[:, :, s:s + 4], 500, text, residuals=model.sparsectrl(
        condition[:, :, s:s + 4], 500, text))[0] for s in STARTS])
    assert torch.allclose(found, expected, atol=1e-5)
    read = extract_motion(model, clip(), config, noise=clip(1), condition=condition)
    own = extract_motion(model, clip()[:, :, 5:], dataclasses.replace(config, num_frames=4),
                         noise=clip(1)[:, :, 5:], condition=condition[:, :, 5:])
    for name, values in own.values.items():
        assert torch.allclose(read.at(5).values[name], values, atol=1e-6)


def test_semantic_guidance_refuses_windows(small, config):
    config = dataclasses.replace(config, semantic_scale=1.0)
    with pytest.raises(InputError, match="compares whole clips of up to 4 frames"):
        semantic_guidance(small, "a star", clip(), config)
