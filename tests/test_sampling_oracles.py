"""Numerical equality of the schedule, the inversion and the guided loop with diffusers."""
import dataclasses
from fractions import Fraction

import numpy as np
import pytest
import torch

from mcl import Model, extract_motion, sample
from mcl.config import SampleConfig
from mcl.inversion import ddim_invert
from mcl.networks.attention import AttentionMaps
from mcl.sampler import Sampler
from mcl.schedule import NoiseSchedule, ddim_step
from tests.conftest import SMALL, randn, randomize
from tests.lazy import LazyModule
from tests.networks.diffusers_oracle import (
    diffusers_noise,
    max_error,
    relative_error,
)
from tests.networks.test_oracles import V3, oracle_noise_and_maps, unets

diffusers = LazyModule("diffusers")


def scheduler(spacing="leading"):
    return diffusers.DDIMScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=True, steps_offset=1, timestep_spacing=spacing)


def test_alpha_bar_and_added_noise_equal_diffusers():
    schedule, oracle = NoiseSchedule(), scheduler()
    assert (schedule.alphas_cumprod - oracle.alphas_cumprod).abs().max() < 1e-6
    assert schedule.alpha_bar(-1) == oracle.final_alpha_cumprod
    x, noise = randn(2, 50)
    for t in (0, 400, 999):
        assert max_error(schedule.add_noise(x, noise, t),
                         oracle.add_noise(x, noise, torch.tensor(t))) < 1e-6


@pytest.mark.parametrize("spacing, steps", [
    ("leading", 25), ("leading", 30), ("linspace", 30), ("linspace", 1000), ("motionclone", 100)])
def test_ddim_steps_equal_diffusers(spacing, steps):
    schedule, oracle = NoiseSchedule(), scheduler()
    timesteps = schedule.timesteps(steps, spacing, 50, 0.3)
    if spacing != "motionclone":
        oracle = scheduler(spacing)
        oracle.set_timesteps(steps)
        assert timesteps == oracle.timesteps.tolist()
    z, weight = randn(3, 40), randn(40, 40, seed=1) / 40 ** 0.5
    for t, t_prev in zip(timesteps, timesteps[1:] + [-1]):
        eps = torch.tanh(z @ weight + t / 1000)
        if spacing != "leading":
            # diffusers goes back by 1000 // steps. This goes to the next timestep of any list.
            oracle.num_inference_steps = Fraction(1000, t - t_prev)
        expected = oracle.step(eps, t, z).prev_sample
        z = ddim_step(z, eps, eps, schedule.alpha_bar(t), schedule.alpha_bar(t_prev))
        assert max_error(z, expected) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 25, 999])
def test_trailing_steps_equal_diffusers_euler_and_ddim(steps):
    schedule = NoiseSchedule()
    timesteps = schedule.timesteps(steps, "trailing", 0, 0.3)
    euler = diffusers.EulerDiscreteScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing")
    ddim = scheduler("trailing")
    for oracle in (euler, ddim):
        oracle.set_timesteps(steps)
        assert oracle.timesteps.tolist() == timesteps
    z, weight = randn(3, 40), randn(40, 40, seed=1) / 40 ** 0.5
    x = z * (1 + euler.sigmas[0] ** 2).sqrt()           # Euler's latents are larger by this factor
    for i, (t, t_prev) in enumerate(zip(timesteps[:8], timesteps[1:] + [-1])):
        assert max_error(euler.scale_model_input(x, euler.timesteps[i]), z) < 1e-5
        eps = torch.tanh(z @ weight + t / 1000)
        x = euler.step(eps, euler.timesteps[i], x).prev_sample
        before, z = z, ddim_step(z, eps, eps, schedule.alpha_bar(t), schedule.alpha_bar(t_prev))
        assert max_error(x / (1 + euler.sigmas[i + 1] ** 2).sqrt(), z) < 1e-5
        if t - t_prev == 1000 // steps:                 # the step that diffusers' DDIM takes
            assert max_error(z, ddim.step(eps, t, before).prev_sample) < 1e-5


@pytest.mark.parametrize("steps", [1, 2, 4, 6, 7, 8, 33, 50])
def test_lcm_steps_equal_diffusers_with_the_same_noise(steps):
    oracle = diffusers.LCMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
    oracle.set_timesteps(steps)
    config = SampleConfig(steps=steps, guidance_steps=0, timestep_spacing="lcm", sampler="lcm",
                          cfg_scale=1.0)
    generator, oracle_generator = (torch.Generator().manual_seed(5) for _ in range(2))
    sampler = Sampler(FunctionModel(None), "", config, None, generator)
    assert [t for t, _ in sampler.timestep_pairs] == oracle.timesteps.tolist()
    z, weight = randn(3, 40), randn(40, 40, seed=1) / 40 ** 0.5
    for i, (t, _) in enumerate(sampler.timestep_pairs):
        eps = torch.tanh(z @ weight + t / 1000)
        expected = oracle.step(eps, t, z, generator=oracle_generator).prev_sample
        z = sampler.step(i, z, eps)
        assert max_error(z, expected) < 1e-5


class FunctionModel:
    """A model whose noise is a fixed function of the latents and the timestep."""

    config, sparsectrl = SMALL, None
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, noise):
        self.schedule, self.noise = NoiseSchedule(), noise

    def encode_text(self, prompts):
        return torch.zeros(len(prompts), 77, 1)

    def controlnet_residuals(self, condition, t, text):
        return None

    def unet(self, z, t, text, **options):
        return self.noise(z, t), AttentionMaps()


@pytest.mark.parametrize("spacing, steps", [("leading", 25), ("leading", 1000), ("trailing", 25)])
def test_ddim_inversion_equals_diffusers(spacing, steps):
    oracle = diffusers.DDIMInverseScheduler(
        beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=True, steps_offset=0, timestep_spacing=spacing)
    oracle.set_timesteps(steps)
    weight = randn(9, 9, seed=1) / 3
    model = FunctionModel(lambda z, t: torch.tanh(z @ weight + t / 1000))
    z = start = randn(1, 4, 3, 9, 9)
    timesteps = oracle.timesteps.tolist()
    for (t, inverted), expected_t in zip(ddim_invert(model, start, "", timesteps), timesteps,
                                         strict=True):
        assert t == expected_t
        z = oracle.step(model.noise(z, t), t, z).prev_sample
        assert max_error(inverted, z) < 1e-5


def test_sampling_undoes_inversion():
    """The model is linear, and so weak that one step hardly changes its noise."""
    weight = torch.linalg.qr(randn(9, 9, seed=1)).Q * 0.005
    model = FunctionModel(lambda z, t: z @ weight)
    clip = randn(1, 4, 3, 9, 9)
    timesteps = list(range(1000))
    for _, z in ddim_invert(model, clip, "", timesteps):
        pass
    assert relative_error(z, clip) > 0.5
    alpha_bar = model.schedule.alpha_bar
    for t in reversed(timesteps):
        eps = model.noise(z, t)
        z = ddim_step(z, eps, eps, alpha_bar(t), alpha_bar(t - 1))
    assert (z - clip).abs().max() < 1e-4 * clip.abs().max()


def oracle_run(oracle, reference, z, text, null, config):
    """Yield the latents after each step of the paper's single-step method with diffusers' UNet.

    `reference` holds the latents of the reference clip, noised to t = 400.
    """
    with torch.no_grad():
        _, maps = oracle_noise_and_maps(oracle, reference, 400, null)
    top = {name: probs.max(dim=-1, keepdim=True) for name, probs in maps.items()}

    n, g = config.steps, config.guidance_steps
    border = int((1 - config.guidance_noise_range) * 1000)
    timesteps = np.concatenate([np.linspace(999, border, g), np.linspace(border - 1, 0, n - g)])
    timesteps = np.rint(timesteps).astype(int).tolist()
    alpha_bar = scheduler().alphas_cumprod
    scale = config.motion_weight * z[0, 0].numel() / (16 * 64 * 64)
    for i, t in enumerate(timesteps):
        a, a_prev = alpha_bar[t], alpha_bar[timesteps[i + 1]] if i + 1 < n else torch.tensor(1.0)
        grad = torch.zeros_like(z)
        if i < g:
            weight = scale
            if i < config.guidance_warmup_steps:
                weight *= (i + 1) / config.guidance_warmup_steps
            if i > g - config.guidance_cooldown_steps:
                weight *= (g - i) / config.guidance_cooldown_steps
            z = z.detach().requires_grad_()
            _, maps = oracle_noise_and_maps(oracle, z, t, text)
            loss = sum(((maps[name].gather(-1, m) - value) ** 2).mean()
                       for name, (value, m) in top.items())
            grad, = torch.autograd.grad(weight * loss, z)
        with torch.no_grad():
            cond, uncond = diffusers_noise(oracle, torch.cat([z, z]), t, torch.cat([text, null])
                                        ).split(1)
            eps = uncond + config.cfg_scale * (cond - uncond)
            x0 = (z - (1 - a).sqrt() * eps) / a.sqrt()
            z = (a_prev.sqrt() * x0 + (1 - a_prev).sqrt() * eps
                 - (1 - a_prev).sqrt() * (1 - a).sqrt() * grad)
        yield z


def test_guided_run_equals_the_paper_with_diffusers_unet():
    config = dataclasses.replace(SMALL.sample, steps=8, guidance_steps=6, num_frames=5,
                                 guidance_warmup_steps=3, guidance_cooldown_steps=3, cfg_scale=8.5,
                                 motion_weight=3e5)
    model = Model(SMALL)
    model.unet = unets(V3)[0]
    randomize(model.text_encoder)
    clip, noise, start = (randn(1, 4, 5, 8, 8, seed=s) for s in range(3))
    motion = extract_motion(model, clip, noise=noise)
    guided, unguided = ([state.latents for state in sample(
        model, "a red star", m, config, latents=start)] for m in (motion, None))

    reference = scheduler().add_noise(clip, noise, torch.tensor(400))
    text, null = model.encode_text(["a red star", ""]).split(1)
    expected = list(oracle_run(unets(V3)[1], reference, start, text, null, config))
    assert len(guided) == len(expected) == 8
    assert max(map(relative_error, guided, expected)) < 1e-4
    assert relative_error(unguided[-1], expected[-1]) > 0.01
