"""The guided sampling loop: DDIM, guided by the gradient of losses on attention."""
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from .config import SampleConfig, short_repr
from .context_windows import blend_windows, make_context_windows
from .errors import InputError, NumericalError
from .guidance import Guidance, guidance_gradient, guidance_weight, resolve_guidance
from .model import Model
from .motion import Motion
from .networks.attention import NO_REQUEST, AttentionMaps, AttentionRequest, merge_requests
from .schedule import ddim_step

Progress = Callable[..., Iterable]          # like tqdm: progress(iterable, desc=..., total=...)


class SamplerStep(NamedTuple):
    """One finished step of sampling.

    Attributes:
        step: Index of the step, from 0.
        timestep: Timestep that the step started from.
        latents: Scaled latents (1, c, f, h, w) after the step, float32.
        loss: g, the sum of the guidance losses; None in steps that compute no gradient.
        grad_norm: Norm of the gradient of lambda * g; None in steps without guidance.
        guidance_weight: lambda; 0 in steps without guidance.
    """

    step: int
    timestep: int
    latents: Tensor
    loss: float | None
    grad_norm: float | None
    guidance_weight: float


def sample(model: Model, prompt: str | Tensor, motion: Motion | None = None,
           config: SampleConfig | None = None, *, guidance: Sequence[Guidance] = (),
           generator: Generator | None = None, gradient_checkpointing: bool = False,
           control: Tensor | None = None, latents: Tensor | None = None) -> Iterator[SamplerStep]:
    """Sample a clip of the prompt that moves like the reference; yields one state per step.

    Clips longer than the motion modules are sampled in context windows. All arguments are checked
    when the function is called, before the first step.

    Args:
        model: The model.
        prompt: Text, or its embeddings (1, n, d), or (2, n, d) with the negative prompt's.
        motion: Motion of the reference, from `extract_motion`; None to sample without it.
        config: Settings; the model's own if None.
        guidance: More guidance, beside the motion or in its place.
        latents: Initial noise (1, c, f, h, w), standard normal; drawn from `generator` if None.
        generator: CPU generator for all random numbers, so that a seed means the same on every
            device.
        control: Condition of SparseCtrl, from `sparsectrl_condition`.
        gradient_checkpointing: Whether to save memory: guided steps recompute activations, and
            the two passes of classifier-free guidance are never one batch.

    Raises:
        InputError: If the size is not possible, the motion belongs to another model, size or
            settings, or the guidance names attention that the model does not have.
        NumericalError: In a step whose result is not finite.
    """
    config = config or model.config.sample
    z = initial_noise(model, config, generator) if latents is None else latents
    if z.shape != (shape := model.config.latent_shape(config)):
        raise InputError(f"latents have shape {tuple(z.shape)}: expected {shape}")
    guidance = resolve_guidance(guidance, motion, model, config)
    sampler = Sampler(model, prompt, config, control, generator, guidance, gradient_checkpointing)
    return sampling_loop(sampler, z.detach().to(model.device, torch.float32))


def sampling_loop(sampler: "Sampler", z: Tensor) -> Iterator[SamplerStep]:
    """Run all steps. z is z_t, eps the noise estimate, g the loss and lambda its weight."""
    config, grad_g = sampler.config, torch.zeros_like(z)
    for i, (t, _) in enumerate(sampler.timestep_pairs):
        lambda_t = guidance_weight(i, config, sampler.window_elements) if sampler.guidance else 0.0
        g, takes_gradient = None, lambda_t > 0 and i % config.guidance_interval == 0

        for repeats_left in reversed(range(config.guidance_repeats if takes_gradient else 1)):
            # 1. In guided steps, predict the noise for the prompt, g and its gradient (eq. 3).
            if takes_gradient:
                eps, g, grad_g = sampler.predict_noise_and_gradient(z, t)

            # 2. Classifier-free guidance, which predicts the noise that is not known yet.
            eps = sampler.classifier_free_guidance(i, z, eps if takes_gradient else None)

            # 3. DDIM step. The gradient of lambda * g changes only its direction (eq. 1).
            z = sampler.step(i, z, eps, lambda_t * grad_g)

            # 4. To repeat the step, add back the noise that it removed, newly drawn.
            if repeats_left:
                z = sampler.renoise(i, z)

        if not torch.isfinite(z).all() or (g is not None and not torch.isfinite(g)):
            raise NumericalError(f"not finite at step {i + 1} of {config.steps} (timestep {t}): a "
                                 "smaller motion_weight or cfg_scale, or dtype float32, may help")
        yield SamplerStep(i, t, z, None if g is None else float(g),
                          float((lambda_t * grad_g).norm()) if lambda_t else None, lambda_t)


class Sampler:
    """The parts of a sampling run that do not change between steps.

    Attributes:
        model: The model.
        config: Settings.
        text: Embeddings of the prompt (1, n, d).
        negative_embeds: Embeddings of the negative prompt (1, n, d).
        control: Condition of SparseCtrl, or None.
        generator: CPU generator for the noise that is drawn during sampling.
        guidance: Guidance with full layer names (`resolve_guidance`).
        gradient_checkpointing: Whether to save memory, as for `sample`.
        windows: The context windows of the clip.
        window_elements: f*h*w of the latents of one context window.
        timestep_pairs: Each timestep and the one that its step leads to; the last leads to -1.
    """

    def __init__(self, model: Model, prompt: str | Tensor, config: SampleConfig,
                 control: Tensor | None = None, generator: Generator | None = None,
                 guidance: Sequence[Guidance] = (), gradient_checkpointing: bool = False):
        """Check and prepare a run; the arguments and errors are those of `sample`."""
        self.model, self.config, self.control, self.generator = model, config, control, generator
        self.guidance, self.gradient_checkpointing = guidance, gradient_checkpointing
        b, c, f, h, w = model.config.latent_shape(config)
        self.windows = make_context_windows(config, model.config)
        self.window_elements = self.windows.length * h * w
        timesteps = model.schedule.timesteps(config.steps, config.timestep_spacing,
                                             config.guidance_steps, config.guidance_noise_range)
        self.timestep_pairs = list(zip(timesteps, [*timesteps[1:], -1], strict=True))

        d = model.config.unet.cross_attention_dim
        if isinstance(prompt, str):
            prompt = model.encode_text([prompt, config.negative_prompt])
        elif not isinstance(prompt, Tensor) or prompt.shape[2:] != (d,) or len(prompt) > 2:
            raise InputError(f"prompt is {short_repr(getattr(prompt, 'shape', prompt))}: give "
                             f"text, or embeddings (1, n, {d}) or (2, n, {d})")
        self.text, *rest = prompt.to(model.device, model.dtype).split(1)
        self.negative_embeds, = rest or [model.encode_text([config.negative_prompt])]

        shapes = {"rgb": (b, c + 1, f, h, w), "scribble": (b, 4, f, config.height, config.width)}
        shape = shapes.get(model.config.sparsectrl.kind, "None, as this model has no SparseCtrl")
        if control is not None and control.shape != shape:
            raise InputError(f"control has shape {tuple(control.shape)}: expected {shape}")

    def predict_noise(self, z: Tensor, t: int, text: Tensor) -> Tensor:
        """Return the noise of clips (b, c, f, h, w) for texts (b, n, d), blended over windows."""
        return blend_windows([
            self.predict_window(z[:, :, self.windows.frame_indices(offset)], t, text, offset)[0]
            for offset in self.windows.offsets], self.windows)

    def predict_noise_and_gradient(self, z: Tensor, t: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the noise estimate for the prompt, g, and the gradient of g.

        In a long clip, noise and gradient are blended over the context windows, and g is the mean.
        """
        request, results = merge_requests([one.request for one in self.guidance]), []
        for offset in self.windows.offsets:
            with torch.enable_grad():
                window = z[:, :, self.windows.frame_indices(offset)].detach().requires_grad_()
                eps, maps = self.predict_window(window, t, self.text, offset, request)
                results.append((eps.detach(), *guidance_gradient(self.guidance, maps, window, t)))
        noises, losses, grads = zip(*results, strict=True)
        return (blend_windows(noises, self.windows), torch.stack(losses).mean(),
                blend_windows(grads, self.windows))

    def predict_window(self, window: Tensor, t: int, text: Tensor, offset: int,
                       request: AttentionRequest = NO_REQUEST) -> tuple[Tensor, AttentionMaps]:
        """Return the noise estimate of the window at a frame offset, and requested attention."""
        frames = self.windows.frame_indices(offset)
        with torch.set_grad_enabled(window.requires_grad):
            eps, maps = self.model.unet(
                window.to(self.model.dtype), t, text, request=request,
                residuals=self.model.controlnet_residuals(self.control, t, text, frames),
                gradient_checkpointing=self.gradient_checkpointing)
        return eps.float(), replace(maps, frame_offset=offset)

    def classifier_free_guidance(self, i: int, z: Tensor, eps: Tensor | None = None) -> Tensor:
        """Return the noise estimate of step i, uncond + s * (cond - uncond).

        Outside of the interval from cfg_start_fraction to cfg_end_fraction of the steps, the
        estimate is cond, at half of the cost (arXiv 2404.07724).

        Args:
            i: Index of the step.
            z: Latents z_t.
            eps: cond, the noise estimate for the prompt, if it is known.
        """
        config, (t, _) = self.config, self.timestep_pairs[i]
        is_inside = config.cfg_start_fraction <= i / config.steps < config.cfg_end_fraction
        if config.cfg_scale == 1 or not is_inside:
            return self.predict_noise(z, t, self.text) if eps is None else eps
        is_batch = not self.gradient_checkpointing and self.text.shape == self.negative_embeds.shape
        if eps is None and is_batch:        # faster, in twice the memory
            texts = torch.cat([self.text, self.negative_embeds])
            eps, uncond = self.predict_noise(torch.cat([z, z]), t, texts).split(1)
        else:
            eps = self.predict_noise(z, t, self.text) if eps is None else eps
            uncond = self.predict_noise(z, t, self.negative_embeds)
        return uncond + config.cfg_scale * (eps - uncond)

    def step(self, i: int, z: Tensor, eps: Tensor, guidance_grad: Tensor | float = 0.0) -> Tensor:
        """Return z_{t-1} after step i of DDIM, or of a consistency model (sampler "lcm").

        Args:
            i: Index of the step.
            z: Latents z_t.
            eps: Noise estimate after classifier-free guidance.
            guidance_grad: Gradient of lambda * g, like z; 0 without guidance. It is added to the
                direction of the step only, not to the estimate that x0 is predicted with.
        """
        alpha_bar, alpha_bar_prev = map(self.model.schedule.alpha_bar, self.timestep_pairs[i])
        noise = self.randn_like(z) if self.config.sampler == "lcm" else eps
        direction = noise - (1 - alpha_bar).sqrt() * guidance_grad
        return ddim_step(z, eps, direction, alpha_bar, alpha_bar_prev)

    def renoise(self, i: int, z: Tensor) -> Tensor:
        """Return z_t of step i from z_{t-1} and new noise (recurrence, arXiv 2302.07121)."""
        alpha_bar, alpha_bar_prev = map(self.model.schedule.alpha_bar, self.timestep_pairs[i])
        ratio = alpha_bar / alpha_bar_prev
        return ratio.sqrt() * z + (1 - ratio).sqrt() * self.randn_like(z)

    def randn_like(self, z: Tensor) -> Tensor:
        """Return standard normal noise like z, drawn from the CPU generator."""
        return torch.randn(z.shape, generator=self.generator).to(z.device)


def initial_noise(model: Model, config: SampleConfig, generator: Generator | None = None) -> Tensor:
    """Return standard normal latents (1, c, f, h, w), drawn on the CPU."""
    return torch.randn(model.config.latent_shape(config), generator=generator)


def no_progress(iterable: Iterable, desc: str = "", total: int | None = None) -> Iterable:
    """Return the iterable unchanged: no progress bar."""
    return iterable
