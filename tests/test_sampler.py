"""The loop: what guides it, what must not, and when it stops."""
import copy
import dataclasses

import pytest
import torch

from mcl import (Guidance, InputError, Model, NumericalError, SampleConfig, AttentionRequest, extract_motion,
                 motion_guidance, sample, sparsectrl_condition)
from mcl.config import SparseCtrlConfig, from_dict
from mcl.sampler import Sampler, guidance_weight, predict_noise_and_gradient
from mcl.schedule import ddim_step

from tests.conftest import randn, randomize


def clip(seed=0):
    return randn(1, 4, 4, 8, 8, seed=seed)


def states(model, motion, **changes):
    config = dataclasses.replace(model.config.sample, **changes)
    return list(sample(model, "a red star", motion, config, latents=clip(3)))


@pytest.fixture(scope="module")
def motion(small):
    return extract_motion(small, clip(), generator=torch.Generator().manual_seed(1))


def test_one_state_per_step_and_losses_only_while_guided(small, motion):
    taken = states(small, motion)
    assert [s.step for s in taken] == list(range(6))
    assert [s.loss is not None for s in taken] == [True] * 3 + [False] * 3
    assert all(s.latents.shape == (1, 4, 4, 8, 8) for s in taken)


@pytest.mark.parametrize("ramps", [{}, {"warmup": 0, "cooldown": 0}], ids=["ramps", "no ramps"])
@pytest.mark.parametrize("guidance_steps", [0, 1, 3, 6])
def test_only_the_first_guidance_steps_are_guided(small, motion, guidance_steps, ramps):
    taken = states(small, motion, guidance_steps=guidance_steps, **ramps)
    guided = [True] * guidance_steps + [False] * (6 - guidance_steps)
    assert [s.loss is not None for s in taken] == guided
    assert [s.weight > 0 for s in taken] == guided


def test_a_scale_of_zero_is_no_guidance_to_the_bit(small, motion):
    off = states(small, motion, motion_weight=0.0)
    none = states(small, None)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(off, none))
    on = states(small, motion)
    assert not torch.equal(on[-1].latents, none[-1].latents)


def test_guidance_is_one_gradient_step_on_the_direction(small, motion):
    """The first guided state minus the unguided one is the closed form of METHOD's trap 1."""
    scale = 3e5
    guided, plain = (states(small, m, motion_weight=scale)[0] for m in (motion, None))
    z = clip(3).requires_grad_()
    text = small.encode_text(["a red star"])
    maps = small.unet(z, 999, text, request=AttentionRequest(temporal=tuple(motion.values)))[1].temporal
    loss = sum((maps[n].gather(-1, motion.indices[n]) - motion.values[n]).square().mean()
               for n in motion.values)
    elements, ramp = 4 * 8 * 8 / (16 * 64 * 64), 1 / 2
    grad, = torch.autograd.grad(scale * ramp * elements * loss, z)
    t_prev = small.schedule.timesteps(6, "uneven", 3, 0.3)[1]
    noise, noise_prev = (1 - small.schedule.alpha_bar(t) for t in (999, t_prev))
    moved = -noise_prev.sqrt() * noise.sqrt() * grad
    assert guided.loss == pytest.approx(loss.item(), rel=1e-4)
    assert (guided.latents - plain.latents - moved).norm() < 1e-3 * moved.norm()
    assert moved.norm() > 1e-3 * plain.latents.norm()       # well above what float32 rounds


def test_small_gradients_in_half_precision_agree_with_float32(small, motion, monkeypatch):
    """The loss is so small that its gradient would underflow in float16 without LOSS_SCALE."""
    def gradient(model):
        text = model.encode_text(["a red star"])
        loss = motion_guidance(motion).loss
        guide = Guidance(AttentionRequest(temporal=tuple(motion.values)),
                      lambda seen, t: 1e-3 * loss(seen, t))
        return predict_noise_and_gradient(Sampler(model, text, text, model.config.sample), clip(3), 999,
                                  [guide])[2]

    def error():
        return float((gradient(half) - expected).norm() / expected.norm())

    half, expected = copy.deepcopy(small).half(), gradient(small)
    assert error() < 0.012
    monkeypatch.setattr("mcl.sampler.LOSS_SCALE", 1.0)
    assert error() > 0.5


def test_repeated_steps_start_from_their_noise_again(small, motion, monkeypatch):
    """Twice the first step, written out: there, back by fresh noise, there again."""
    config = dataclasses.replace(small.config.sample, motion_weight=3e5)
    twice = next(sample(small, "a star", motion, dataclasses.replace(config, guidance_repeats=2),
                        latents=clip(3), generator=torch.Generator().manual_seed(1)))
    z = next(sample(small, "a star", motion, config, latents=clip(3))).latents
    kept = small.schedule.alpha_bar(999) / small.schedule.alpha_bar(850)
    z = kept.sqrt() * z + (1 - kept).sqrt() * randn(*z.shape, seed=1)
    again = next(sample(small, "a star", motion, config, latents=z))
    assert (twice.latents - again.latents).norm() < 1e-4 * again.latents.norm()
    assert twice.loss == pytest.approx(again.loss, rel=1e-4)
    back, steps = Sampler.back, []
    monkeypatch.setattr(Sampler, "back", lambda self, i, z: steps.append(i) or back(self, i, z))
    states(small, motion, guidance_repeats=3, guidance_interval=2)
    assert steps == [0, 0, 2, 2]        # of three guided steps those that take a gradient


def test_consistency_steps_draw_their_noise_from_the_generator_and_are_guided_alike(small, motion):
    def run(motion, seed, **changes):
        config = dataclasses.replace(small.config.sample, sampler="lcm", motion_weight=3e5,
                                     **changes)
        return [state.latents for state in sample(
            small, "a star", motion, config, generator=torch.Generator().manual_seed(seed))]
    guided, again, plain, other = run(motion, 1), run(motion, 1), run(None, 1), run(None, 2)
    assert torch.equal(guided[-1], again[-1]) and not torch.equal(plain[-1], other[-1])
    by_ddim, unguided = (list(sample(
        small, "a star", m, dataclasses.replace(small.config.sample, motion_weight=3e5),
        generator=torch.Generator().manual_seed(1)))[0].latents for m in (motion, None))
    moved = by_ddim - unguided
    assert moved.norm() > 1e-3 and (guided[0] - plain[0] - moved).norm() < 1e-3 * moved.norm()


def test_guidance_lowers_the_loss(small, motion):
    weak = states(small, motion, motion_weight=1e-6, guidance_steps=5)
    strong = states(small, motion, motion_weight=3e5, guidance_steps=5)
    assert strong[4].loss < weak[4].loss


def test_a_gradient_serves_for_several_steps(small, motion):
    every, third = (states(small, motion, guidance_steps=4, guidance_interval=n, motion_weight=3e5)
                    for n in (1, 3))
    assert [s.loss is not None for s in third] == [True, False, False, True, False, False]
    assert torch.equal(third[0].latents, every[0].latents)
    config = dataclasses.replace(small.config.sample, guidance_steps=4)
    weights = [guidance_weight(i, config, clip()) for i in range(3)]
    assert [third[i].grad_norm / third[0].grad_norm for i in (1, 2)] == pytest.approx(
        [weights[i] / weights[0] for i in (1, 2)])
    assert third[4].grad_norm is None


def test_weight_rises_falls_and_is_the_published_one_at_the_published_size():
    config = SampleConfig()
    full, half = torch.empty(1, 4, 16, 64, 64), torch.empty(1, 4, 16, 32, 32)
    at = [guidance_weight(i, config, full) for i in range(51)]
    assert at[0] == 200 and at[9] == 2000 and at[40] == 2000 and at[41] == 1800 and at[49] == 200
    assert at[50] == 0 and guidance_weight(20, config, half) == 500


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_is_the_common_form(small, scale):
    text, null = small.encode_text(["a red star", ""]).split(1)
    z, alpha_bar, alpha_bar_prev = clip(3), small.schedule.alpha_bar(999), small.schedule.alpha_bar(0)
    cond, uncond = (small.unet(z, 999, e)[0] for e in (text, null))
    eps = uncond + scale * (cond - uncond)
    expected = ddim_step(z, eps, eps, alpha_bar, alpha_bar_prev)
    first = states(small, None, steps=2, guidance_steps=0, cfg_scale=scale)[0].latents
    assert torch.allclose(first, expected, atol=1e-4 * float(expected.std()))


def test_steps_beyond_their_share_have_no_classifier_free_guidance(small):
    none, half, full = (states(small, None, cfg_end_fraction=share) for share in (0, .5, 1))
    assert torch.equal(half[2].latents, full[2].latents)
    assert not torch.equal(half[3].latents, full[3].latents)
    weak = states(small, None, cfg_scale=1.0)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(none, weak))


def test_the_negative_prompt_takes_the_place_of_the_null_prompt(small):
    plain, negative = (states(small, None, negative_prompt=p)[-1].latents for p in ("", "a ring"))
    assert not torch.equal(plain, negative)


def test_a_seed_is_a_clip(small):
    first, again, other = (
        list(sample(small, "", generator=torch.Generator().manual_seed(seed)))[-1].latents
        for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_run_that_is_not_finite_stops_and_says_where(small, motion):
    with pytest.raises(NumericalError, match=r"step 2 of 6 \(timestep 850\)"):
        states(small, motion, motion_weight=1e36)


def test_a_motion_of_another_size_model_or_setting_is_refused_when_called(small, motion):
    config = small.config.sample
    for change, message in (({"width": 16}, "from 4 frames of 8x8 latents, not 4 of 8x4"),
                            ({"extract_t": 200}, "t = 400, the settings have 200"),
                            ({"top_k": 2}, "k = 1, the settings have 2"),
                            ({"blocks": ("up_blocks.2",)}, "'up_blocks.1'.*have .'up_blocks.2'")):
        with pytest.raises(InputError, match=message):
            sample(small, "", motion, dataclasses.replace(config, **change))
    foreign = dataclasses.replace(motion, info=motion.info | {"model": "another"})
    with pytest.raises(InputError, match="another model"):
        sample(small, "", foreign)


@pytest.mark.parametrize("change, message", [
    ({"guidance_steps": 101}, "guidance_steps = 101 .* 0 to the number of steps, 100"),
    ({"top_k": 17}, "top_k = 17 .* 1 to the number of frames, 16"),
    ({"steps": 0}, "steps = 0 .* 1 to 1000"), ({"spacing": "odd"}, "uneven, linspace, leading"),
    ({"motion_weight": float("nan")}, "motion_weight = nan"), ({"blocks": ()}, "at least one"),
    ({"solver": "euler"}, "solver = 'euler' .* one of ddim, lcm"),
    ({"spacing": "lcm"}, "steps = 100 .* 1 to 50 with spacing lcm"),
    ({"solver": "lcm", "semantic_scale": 1.0}, "semantic_scale = 1.0 .* 0 with solver lcm"),
    ({"overlap": 1.0}, "overlap = 1.0 .* 0 to 0.9"),
    ({"guidence_steps": 3}, "unknown setting 'guidence_steps'")])
def test_settings_that_cannot_be_are_refused_with_the_legal_range(change, message):
    with pytest.raises(InputError, match=message):
        from_dict(SampleConfig, change)


def test_a_condition_is_seen_by_the_reading_and_by_both_branches(small):
    """A whole run under SparseCtrl, against the paper written out here."""
    config = dataclasses.replace(small.config, sparsectrl=SparseCtrlConfig("rgb", motion_num_attention_heads=2))
    model = Model(config)
    for part in model.children():
        randomize(part)
    config = dataclasses.replace(config.sample, motion_weight=3e5)
    condition = sparsectrl_condition(randn(1, 4, 8, 8, seed=5), [2], 4)
    own = sparsectrl_condition(randn(1, 4, 8, 8, seed=6), [2], 4)
    motion = extract_motion(model, clip(), noise=clip(1), condition=own)
    found = list(sample(model, "a star", motion, latents=clip(3), config=config,
                        condition=condition))

    text, null = model.encode_text(["a star", ""]).split(1)
    alpha_bar = torch.cat([model.schedule.alphas_cumprod, torch.ones(1)])    # at -1 as well
    read = alpha_bar[400].sqrt() * clip() + (1 - alpha_bar[400]).sqrt() * clip(1)
    seen = model.unet.attend(read, 400, null, AttentionRequest(("up_blocks.1",)),
                             model.sparsectrl(own, 400, null))
    top = {name: probs.max(dim=-1, keepdim=True) for name, probs in seen.temporal.items()}
    z, timesteps = clip(3), [state.t for state in found] + [-1]
    for i, (t, t_prev) in enumerate(zip(timesteps, timesteps[1:])):
        z = z.detach().requires_grad_()
        eps, seen = model.unet(z, t, text, request=AttentionRequest(temporal=("up_blocks.1",)),
                               residuals=model.sparsectrl(condition, t, text))
        g = sum((seen.temporal[name].gather(-1, at) - value).square().mean()
                for name, (value, at) in top.items())
        weight = 3e5 * 4 * 8 * 8 / 65536 * (1, 1, .5, 0, 0, 0)[i] * (.5, 1, 1, 1, 1, 1)[i]
        grad, = torch.autograd.grad(weight * g, z)
        uncond, _ = model.unet(z, t, null, residuals=model.sparsectrl(condition, t, null))
        eps = uncond + config.cfg_scale * (eps - uncond)
        x0 = (z - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        z = alpha_bar[t_prev].sqrt() * x0 + (1 - alpha_bar[t_prev]).sqrt() * (
            eps - (1 - alpha_bar[t]).sqrt() * grad)
        assert (found[i].latents - z).norm() < 1e-4 * z.norm()
