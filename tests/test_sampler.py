"""The sampling loop: the guided step, repeats, classifier-free guidance, errors, control."""
import copy
import dataclasses

import pytest
import torch

from mcl import (
    AttentionRequest,
    Guidance,
    InputError,
    NumericalError,
    extract_motion,
    motion_guidance,
    sample,
    sparsectrl_condition,
)
from mcl.guidance import guidance_weight
from mcl.sampler import Sampler
from mcl.schedule import ddim_step
from tests.conftest import randn

REQUEST = AttentionRequest(temporal=("up_blocks.1",))
STEPS = {"steps": 6, "guidance_steps": 3, "guidance_warmup_steps": 2, "guidance_cooldown_steps": 2}


def with_six_steps(model):
    """Return a model whose own settings have six steps."""
    model = copy.copy(model)
    model.config = dataclasses.replace(
        model.config, sample=dataclasses.replace(model.config.sample, **STEPS))
    return model


@pytest.fixture(scope="module", name="small")
def small_with_six_steps(small):
    return with_six_steps(small)


@pytest.fixture(scope="module", name="small_rgb")
def small_rgb_with_six_steps(small_rgb):
    return with_six_steps(small_rgb)


def clip(seed=0):
    return randn(1, 4, 4, 8, 8, seed=seed)


def states(model, motion, **changes):
    config = dataclasses.replace(model.config.sample, **changes)
    return list(sample(model, "a red star", motion, config, latents=clip(3)))


@pytest.fixture(scope="module")
def motion(small):
    return extract_motion(small, clip(), noise=clip(1))


def test_every_step_yields_its_state(small, motion):
    steps = states(small, motion)
    assert [s.step for s in steps] == list(range(6))
    assert [s.timestep for s in steps] == small.schedule.timesteps(6, "motionclone", 3, 0.3)
    assert all(s.latents.shape == (1, 4, 4, 8, 8) for s in steps)


@pytest.mark.parametrize("ramps", [{}, {"guidance_warmup_steps": 0, "guidance_cooldown_steps": 0}],
                         ids=["ramps", "no ramps"])
@pytest.mark.parametrize("guidance_steps", [0, 1, 3, 6])
def test_only_the_first_guidance_steps_are_guided(small, motion, guidance_steps, ramps):
    steps = states(small, motion, guidance_steps=guidance_steps, **ramps)
    for guided in ([s.loss is not None for s in steps], [s.grad_norm is not None for s in steps],
                   [s.guidance_weight > 0 for s in steps]):
        assert guided == [True] * guidance_steps + [False] * (6 - guidance_steps)


def test_weight_of_zero_disables_guidance_to_the_bit(small, motion):
    disabled = states(small, motion, motion_weight=0.0)
    unguided = states(small, None)
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(disabled, unguided))
    assert not torch.equal(states(small, motion)[-1].latents, unguided[-1].latents)


def test_guidance_is_one_gradient_step_on_the_direction(small, motion):
    """The first guided state minus the unguided one is the closed form of METHOD's trap 1."""
    weight = 3e5
    guided, plain = (states(small, m, motion_weight=weight)[0] for m in (motion, None))
    z = clip(3).requires_grad_()
    text = small.encode_text(["a red star"])
    maps = small.unet(z, 999, text, request=REQUEST)[1].temporal
    loss = sum((maps[n].gather(-1, motion.indices[n]) - motion.values[n]).square().mean()
               for n in motion.values)
    size_ratio, warmup = 4 * 8 * 8 / (16 * 64 * 64), 1 / 2
    grad, = torch.autograd.grad(weight * warmup * size_ratio * loss, z)
    t_prev = small.schedule.timesteps(6, "motionclone", 3, 0.3)[1]
    noise, noise_prev = (1 - small.schedule.alpha_bar(t) for t in (999, t_prev))
    expected = -noise_prev.sqrt() * noise.sqrt() * grad
    assert guided.loss == pytest.approx(loss.item(), rel=1e-4)
    assert guided.grad_norm == pytest.approx(float(grad.norm()), rel=1e-4)
    assert guided.guidance_weight == pytest.approx(weight * warmup * size_ratio)
    assert (guided.latents - plain.latents - expected).norm() < 1e-3 * expected.norm()
    assert expected.norm() > 1e-3 * plain.latents.norm()    # well above what float32 rounds


def test_small_gradients_in_half_precision_agree_with_float32(small, motion, monkeypatch):
    """The loss is so small that its gradient would underflow in float16 without LOSS_SCALE."""
    def gradient(model):
        loss = motion_guidance(motion).loss
        guidance = Guidance(lambda maps, t: 1e-3 * loss(maps, t), tuple(motion.values))
        sampler = Sampler(model, "a red star", model.config.sample, guidance=[guidance])
        return sampler.predict_noise_and_gradient(clip(3), 999)[2]

    def error():
        return float((gradient(half) - expected).norm() / expected.norm())

    half, expected = copy.deepcopy(small).half(), gradient(small)
    assert error() < 0.012
    monkeypatch.setattr("mcl.guidance.LOSS_SCALE", 1.0)
    assert error() > 0.5


def test_repeated_steps_start_again_from_renewed_noise(small, motion, monkeypatch):
    """The first step taken twice, written out: step, new noise, step."""
    config = dataclasses.replace(small.config.sample, motion_weight=3e5)
    repeated = next(sample(small, "a star", motion,
                           dataclasses.replace(config, guidance_repeats=2), latents=clip(3),
                           generator=torch.Generator().manual_seed(1)))
    z = next(sample(small, "a star", motion, config, latents=clip(3))).latents
    ratio = small.schedule.alpha_bar(999) / small.schedule.alpha_bar(850)
    z = ratio.sqrt() * z + (1 - ratio).sqrt() * randn(*z.shape, seed=1)
    expected = next(sample(small, "a star", motion, config, latents=z))
    assert (repeated.latents - expected.latents).norm() < 1e-4 * expected.latents.norm()
    assert repeated.loss == pytest.approx(expected.loss, rel=1e-4)
    renoise, steps = Sampler.renoise, []
    monkeypatch.setattr(Sampler, "renoise",
                        lambda self, i, z: steps.append(i) or renoise(self, i, z))
    states(small, motion, guidance_repeats=3, guidance_interval=2)
    assert steps == [0, 0, 2, 2]        # only guided steps that take a gradient


def test_consistency_sampler_draws_noise_from_the_generator_and_has_the_same_guidance(small,
                                                                                      motion):
    def latents(motion, seed, sampler="lcm"):
        config = dataclasses.replace(small.config.sample, sampler=sampler, motion_weight=3e5)
        return [state.latents for state in sample(
            small, "a star", motion, config, generator=torch.Generator().manual_seed(seed))]
    guided, again, plain, other = (latents(m, seed) for m, seed in (
        (motion, 1), (motion, 1), (None, 1), (None, 2)))
    assert torch.equal(guided[-1], again[-1]) and not torch.equal(plain[-1], other[-1])
    by_ddim = latents(motion, 1, "ddim")[0] - latents(None, 1, "ddim")[0]
    assert by_ddim.norm() > 1e-3
    assert (guided[0] - plain[0] - by_ddim).norm() < 1e-3 * by_ddim.norm()


def test_guidance_lowers_the_loss(small, motion):
    weak = states(small, motion, motion_weight=1e-6, guidance_steps=5)
    strong = states(small, motion, motion_weight=3e5, guidance_steps=5)
    assert strong[4].loss < weak[4].loss


def test_gradient_is_reused_within_the_guidance_interval(small, motion):
    every, third = (states(small, motion, guidance_steps=4, guidance_interval=n,
                           motion_weight=3e5) for n in (1, 3))
    assert [s.loss is not None for s in third] == [True, False, False, True, False, False]
    assert torch.equal(third[0].latents, every[0].latents)
    config = dataclasses.replace(small.config.sample, guidance_steps=4)
    weights = [guidance_weight(i, config, 4 * 8 * 8) for i in range(3)]
    assert [third[i].grad_norm / third[0].grad_norm for i in (1, 2)] == pytest.approx(
        [weights[i] / weights[0] for i in (1, 2)])
    assert third[4].grad_norm is None


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_classifier_free_guidance_is_the_common_form(small, scale):
    text, null = small.encode_text(["a red star", ""]).split(1)
    z = clip(3)
    cond, uncond = (small.unet(z, 999, e)[0] for e in (text, null))
    eps = uncond + scale * (cond - uncond)
    expected = ddim_step(z, eps, eps, *map(small.schedule.alpha_bar, (999, 0)))
    first = states(small, None, steps=2, guidance_steps=0, cfg_scale=scale)[0].latents
    assert torch.allclose(first, expected, atol=1e-4 * float(expected.std()))


def test_classifier_free_guidance_is_limited_to_an_interval_of_the_steps(small):
    def differ(other, **config):
        pairs = zip(states(small, None, **config), other, strict=True)
        return [not torch.equal(a.latents, b.latents) for a, b in pairs]

    on, off = states(small, None), states(small, None, cfg_scale=1.0)
    assert differ(on, cfg_end_fraction=0.5) == [False] * 3 + [True] * 3
    assert differ(off, cfg_start_fraction=0.5) == [False] * 3 + [True] * 3
    for start, end in ((0.0, 0.0), (0.5, 0.5), (0.6, 0.4), (1.0, 1.0)):
        assert not any(differ(off, cfg_start_fraction=start, cfg_end_fraction=end))


@pytest.mark.parametrize("case", ["one window", "long", "control", "short text"])
def test_unguided_steps_predict_both_texts_in_one_batch_if_memory_allows(
        small, small_rgb, case, monkeypatch):
    model = small_rgb if case == "control" else small
    frames = 8 if case == "long" else 4
    config = dataclasses.replace(model.config.sample, steps=2, guidance_steps=0, num_frames=frames,
                                 context_length=4, context_overlap=0.0)
    control = sparsectrl_condition(randn(1, 4, 8, 8), [1], 4) if case == "control" else None
    prompt = randn(1, 5, 12) if case == "short text" else "a red star"
    batches, forward = [], type(model.unet).forward

    def count(self, z, *args, **kwargs):
        batches.append(len(z))
        return forward(self, z, *args, **kwargs)

    monkeypatch.setattr(type(model.unet), "forward", count)
    high, low = ([s.latents for s in sample(
        model, prompt, None, config, latents=randn(1, 4, frames, 8, 8, seed=3), control=control,
        gradient_checkpointing=is_low)] for is_low in (False, True))
    num_windows = frames // 4
    per_step = [1, 1] if case == "short text" else [2]
    assert batches == 2 * num_windows * per_step + 4 * num_windows * [1]
    for a, b in zip(high, low, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_negative_prompt_replaces_the_null_prompt(small):
    plain, negative = (states(small, None, negative_prompt=p)[-1].latents for p in ("", "a ring"))
    assert not torch.equal(plain, negative)


def test_same_seed_gives_the_same_clip(small):
    first, again, other = (
        list(sample(small, "", generator=torch.Generator().manual_seed(seed)))[-1].latents
        for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_run_that_is_not_finite_stops_with_its_step(small, motion):
    with pytest.raises(NumericalError, match=r"step 2 of 6 \(timestep 850\)"):
        states(small, motion, motion_weight=1e36)


def test_embeddings_of_a_prompt_give_the_clip_of_the_prompt(small):
    config = dataclasses.replace(small.config.sample, steps=3, guidance_steps=0)
    embeds = small.encode_text(["a red star", ""])
    clips = [list(sample(small, prompt, None, config, latents=clip(3)))[-1].latents
             for prompt in ("a red star", embeds[:1], embeds)]
    assert torch.equal(clips[0], clips[1]) and torch.allclose(clips[0], clips[2], atol=1e-5)


@pytest.mark.parametrize("arguments, message", [
    ({"prompt": 3}, "prompt is 3: give text"),
    ({"prompt": torch.zeros(3, 7, 12)}, r"prompt is torch.Size\(\[3, 7, 12\]\): give text"),
    ({"latents": torch.zeros(1, 4, 4, 8, 4)}, r"expected \(1, 4, 4, 8, 8\)"),
    ({"control": torch.zeros(1, 5, 4, 8, 8)}, "this model has no SparseCtrl"),
    ({"guidance": [len]}, r"guidance = \[<built-in function len>\] must be a list"),
    ({"guidance": (len, "up_blocks.1")}, "guidance = .*<built-in function len>.* must be a list"),
    ({"guidance": len}, "guidance = <built-in function len> must be a list"),
    ({"guidance": [Guidance(len, "up_block.1")]}, "'up_block.1' has no temporal attention")])
def test_wrong_argument_is_rejected_when_sample_is_called(small, arguments, message):
    with pytest.raises(InputError, match=message):
        sample(small, **{"prompt": ""} | arguments)


def test_guidance_with_a_weight_of_zero_is_rejected(small):
    config = dataclasses.replace(small.config.sample, motion_weight=0.0)
    with pytest.raises(InputError, match="motion_weight = 0.0 .* above 0 with guidance"):
        sample(small, "", None, config, guidance=[Guidance(len)])


@pytest.mark.parametrize("width", [30, 33])
def test_size_that_the_vae_cannot_encode_is_rejected(small, width):
    with pytest.raises(InputError, match=f"size {width}x32: use multiples of 4"):
        sample(small, "", None, dataclasses.replace(small.config.sample, width=width))


def test_condition_of_another_shape_is_rejected(small_rgb):
    with pytest.raises(InputError, match=r"control has shape .* expected \(1, 5, 4, 8, 8\)"):
        sample(small_rgb, "", control=torch.zeros(1, 5, 3, 8, 8))


def test_control_reaches_the_extraction_and_both_branches(small_rgb):
    """A whole run with SparseCtrl, against the paper written out here."""
    model = small_rgb
    config = dataclasses.replace(model.config.sample, motion_weight=3e5)
    condition = sparsectrl_condition(randn(1, 4, 8, 8, seed=5), [2], 4)
    ref_condition = sparsectrl_condition(randn(1, 4, 8, 8, seed=6), [2], 4)
    motion = extract_motion(model, clip(), noise=clip(1), control=ref_condition)
    steps = list(sample(model, "a star", motion, config, latents=clip(3), control=condition))

    text, null = model.encode_text(["a star", ""]).split(1)
    alpha_bar = torch.cat([model.schedule.alphas_cumprod, torch.ones(1)])   # 1 at t = -1
    noised = alpha_bar[400].sqrt() * clip() + (1 - alpha_bar[400]).sqrt() * clip(1)
    attention = model.unet.forward_to_attention(noised, 400, null, REQUEST,
                                                model.sparsectrl(ref_condition, 400, null))
    top = {name: probs.max(dim=-1, keepdim=True) for name, probs in attention.temporal.items()}
    z, timesteps = clip(3), [state.timestep for state in steps] + [-1]
    for i, (t, t_prev) in enumerate(zip(timesteps, timesteps[1:])):
        z = z.detach().requires_grad_()
        eps, attention = model.unet(z, t, text, request=REQUEST,
                                    residuals=model.sparsectrl(condition, t, text))
        g = sum((attention.temporal[name].gather(-1, indices) - values).square().mean()
                for name, (values, indices) in top.items())
        weight = 3e5 * 4 * 8 * 8 / 65536 * (1, 1, .5, 0, 0, 0)[i] * (.5, 1, 1, 1, 1, 1)[i]
        grad, = torch.autograd.grad(weight * g, z)
        uncond, _ = model.unet(z, t, null, residuals=model.sparsectrl(condition, t, null))
        eps = uncond + config.cfg_scale * (eps - uncond)
        x0 = (z - (1 - alpha_bar[t]).sqrt() * eps) / alpha_bar[t].sqrt()
        z = alpha_bar[t_prev].sqrt() * x0 + (1 - alpha_bar[t_prev]).sqrt() * (
            eps - (1 - alpha_bar[t]).sqrt() * grad)
        assert (steps[i].latents - z).norm() < 1e-4 * z.norm()
