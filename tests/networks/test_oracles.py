"""Numerical equality with diffusers and transformers, element by element, at small random size."""
import dataclasses
import functools
from fractions import Fraction

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from torch import nn

from mcl import AttentionRequest, InputError, Model, extract_motion, sample, sparsectrl_condition
from mcl.config import CLIPTextConfig, SampleConfig, SparseCtrlConfig, UNetConfig
from mcl.inversion import ddim_invert
from mcl.motion import Motion, motion_loss
from mcl.networks.attention import AttentionMaps
from mcl.networks.sparsectrl import SparseCtrl
from mcl.networks.text_encoder import TextEncoder
from mcl.networks.tokenizer import Tokenizer
from mcl.networks.unet import UNet3D
from mcl.networks.vae import AutoencoderKL
from mcl.sampler import Sampler
from mcl.schedule import NoiseSchedule, ddim_step
from tests.conftest import SMALL, randn, randomize
from tests.networks.diffusers_oracle import (
    diffusers_name,
    diffusers_noise,
    diffusers_unet,
    load_into_diffusers,
    max_error,
    relative_error,
    use_animatediff_norms,
)

diffusers = pytest.importorskip("diffusers")
sparse_unet = pytest.importorskip("diffusers.models.controlnets.controlnet_sparsectrl")
transformers = pytest.importorskip("transformers")

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


# The schedule and the loop

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
    config = dataclasses.replace(SMALL.sample, steps=12, guidance_steps=8, num_frames=8,
                                 guidance_warmup_steps=3, guidance_cooldown_steps=4, cfg_scale=8.5,
                                 motion_weight=3e5)
    model = Model(SMALL)
    model.unet = unets(V3)[0]
    randomize(model.text_encoder)
    clip, noise, start = (randn(1, 4, 8, 8, 8, seed=s) for s in range(3))
    motion = extract_motion(model, clip, noise=noise)
    guided, unguided = ([state.latents for state in sample(
        model, "a red star", m, config, latents=start)] for m in (motion, None))

    reference = scheduler().add_noise(clip, noise, torch.tensor(400))
    text, null = model.encode_text(["a red star", ""]).split(1)
    expected = list(oracle_run(unets(V3)[1], reference, start, text, null, config))
    assert len(guided) == len(expected) == 12
    assert max(map(relative_error, guided, expected)) < 1e-4
    assert relative_error(unguided[-1], expected[-1]) > 0.01
