"""The guided sampling loop: DDIM, steered by the gradient of the motion loss."""
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Protocol

import torch
from torch import Tensor

from .config import SampleConfig
from .errors import InputError, NumericalError
from .model import Model
from .motion import Motion, motion_loss
from .schedule import ddim_step

if TYPE_CHECKING:
    from .semantic import Features, Semantics

Steps = list[tuple[int, int]]           # each timestep, and the one that it leads to
# The size at which the published weights were tuned: 16 frames of 512x512, in latent elements.
PUBLISHED_SIZE = 16 * 64 * 64


class Guide(Protocol):
    """What tells the sampler how to move: a `Motion`, or an `Inversion`."""

    @property
    def info(self) -> dict[str, Any]:
        """Of which model and size it is: "model", "frames", "height", "width"."""

    def at(self, t: int) -> Motion:
        """The motion to follow at timestep t."""

    def to(self, device: torch.device | str) -> "Guide":
        """The same on another device."""


@dataclass(frozen=True)
class State:
    """One step of sampling, just taken."""
    step: int               # 0 to steps - 1
    t: int                  # the timestep that it started from
    latents: Tensor         # (1, c, f, h, w) float32, scaled, after the step
    loss: float | None      # the motion loss before weighting, in steps that take its gradient
    grad_norm: float | None


def guidance_weight(step: int, config: SampleConfig, elements: int) -> float:
    """lambda at one step: it rises over the first guided steps and falls over the last.

    `elements` is f*h*w of the latents. The gradient per element of a mean falls with their number,
    so that one weight would drive small clips harder; at the published size the factor is 1.
    """
    up = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    down = min(1.0, (config.guidance_steps - step) / config.cooldown) if config.cooldown else 1.0
    return config.motion_scale * up * down * elements / PUBLISHED_SIZE


def cfg_scale(step: int, config: SampleConfig) -> float:
    """The scale of classifier-free guidance; the last steps may do without (arXiv 2404.07724)."""
    return config.cfg_scale if step < config.cfg_share * config.steps else 1.0


def sample(model: Model, prompt: str, motion: Guide | None = None, *,
           config: SampleConfig = SampleConfig(), latents: Tensor | None = None,
           generator: torch.Generator | None = None, condition: Tensor | None = None,
           semantics: "Semantics | None" = None, recompute: bool = False) -> Iterator[State]:
    """Samples a clip of the prompt that moves like the reference, one state per step.

    motion     of the reference, from `extract_motion` or `invert_motion`; None samples without
               guidance
    latents    the starting noise (1, c, f, h, w), standard normal; drawn from the CPU
               `generator` where not given, so that a seed means the same on every device
    condition  of a model with SparseCtrl, from `sparse_condition`: frames that are given
    semantics  for semantic guidance beside that of the motion, weighted by config.semantic_scale
    recompute  in guided steps, as `UNet3D` does it: less memory, more time, the same numbers

    Raises InputError where the motion does not fit the model or the size, NumericalError where
    the loss or the latents cease to be finite.
    """
    s, c = model.config.vae.downsampling, model.config.unet.in_channels
    if config.height % s or config.width % s:
        raise InputError(f"{config.height}x{config.width} is not possible: height and width must "
                         f"be multiples of {s}")
    shape = (1, c, config.frames, config.height // s, config.width // s)
    if latents is None:
        latents = torch.randn(shape, generator=generator)
    if latents.shape != shape:
        raise InputError(f"latents of shape {tuple(latents.shape)} for a clip of {shape}")
    if motion is not None and config.motion_scale > 0:
        check_fit(motion, model, shape)
        motion = motion.to(model.device)
    else:
        motion = None

    blocks = dict(zip(config.blocks, config.block_weights))
    text, null = model.encode_text([prompt, config.negative_prompt]).split(1)
    timesteps = model.schedule.timesteps(config.steps, config.spacing, config.guidance_steps,
                                         config.guidance_span)
    z = latents.to(model.device, torch.float32)
    steps = list(zip(timesteps, timesteps[1:] + [-1]))
    own = None if semantics is None else semantics.unguided(z, text, null, steps, config)
    for i, (t, t_prev) in enumerate(steps):
        abar, abar_prev = model.schedule.abar(t), model.schedule.abar(t_prev)
        loss = grad = None

        # 1. The noise under the prompt, and, in the first steps, how its maps differ in motion.
        if motion is not None and i < config.guidance_steps:
            weight = guidance_weight(i, config, shape[2] * shape[3] * shape[4])
            features = None if own is None else next(own)
            if i % config.guidance_every == 0:
                guidance = Guidance(motion.at(t), blocks, semantics, features,
                                    config.semantic_scale / config.motion_scale, recompute)
                eps, loss, grad = guided_noise(model, z, t, text, guidance, weight, condition)
                slope = grad / weight
            else:
                eps, grad = noise(model, z, t, text, condition), weight * slope
        else:
            eps = noise(model, z, t, text, condition)

        # 2. Classifier-free guidance.
        scale = cfg_scale(i, config)
        if scale != 1:
            eps_null = noise(model, z, t, null, condition)
            eps = eps_null + scale * (eps - eps_null)

        # 3. DDIM; motion guidance moves the direction, not the predicted clean clip.
        direction = eps if grad is None else eps - (1 - abar).sqrt() * grad
        z = ddim_step(z, eps, direction, abar, abar_prev)

        if not torch.isfinite(z).all() or (loss is not None and not torch.isfinite(loss)):
            raise NumericalError(f"not finite at step {i + 1} of {config.steps} (timestep {t}): "
                                 "a smaller --motion-scale or --dtype float32 may mend it")
        yield State(i, t, z, None if loss is None else float(loss),
                    None if grad is None else float(grad.norm()))


@torch.no_grad()
def noise(model: Model, z: Tensor, t: int, text: Tensor, condition: Tensor | None = None
          ) -> Tensor:
    """The UNet's estimate of the noise in z, like z."""
    eps, _ = model.unet(z.to(model.dtype), t, text,
                        residuals=model.residuals(condition, t, text))
    return eps.float()


@dataclass(frozen=True)
class Guidance:
    """What one step is guided by."""
    motion: Motion
    block_weights: Mapping[str, float] = field(default_factory=dict)
    semantics: "Semantics | None" = None
    own: "Features | None" = None       # of the unguided clip, for the semantic loss
    semantic_weight: float = 0.0        # of that loss, relative to the motion's
    recompute: bool = False             # rather than keep activations for the gradient

    @property
    def maps_of(self) -> tuple[str, ...]:
        return self.motion.layers + (() if self.semantics is None else self.semantics.keys)

    def losses(self, maps: dict[str, Tensor], t: int) -> tuple[Tensor, Tensor]:
        """The motion loss g, and the sum with the semantic one that is descended."""
        loss = motion_loss(maps, self.motion, self.block_weights)
        if self.semantics is None or self.own is None:
            return loss, loss
        return loss, loss + self.semantic_weight * self.semantics.loss(maps, self.own, t)


def guided_noise(model: Model, z: Tensor, t: int, text: Tensor, guidance: Guidance, weight: float,
                 condition: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The noise, the motion loss g, and the gradient of weight * g with respect to z."""
    residuals = model.residuals(condition, t, text)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        eps, maps = model.unet(z.to(model.dtype), t, text, maps_of=guidance.maps_of,
                               residuals=residuals, recompute=guidance.recompute)
        loss, total = guidance.losses(maps, t)
        grad, = torch.autograd.grad(weight * total, z)
    return eps.detach().float(), loss.detach(), grad


def check_fit(motion: Guide, model: Model, shape: tuple[int, ...]) -> None:
    """Raises InputError where a motion was read from another model or at another size."""
    if motion.info.get("model", model.sha256) != model.sha256:
        raise InputError("this motion was read from another model: extract it again with this one")
    known = (motion.info["frames"], motion.info["height"], motion.info["width"])
    if known != shape[2:]:
        raise InputError("this motion was read from {} frames of {}x{} latents, not {} of {}x{}"
                         .format(*known, *shape[2:]))
