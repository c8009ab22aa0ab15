"""The guided sampling loop: DDIM, steered by the gradients of the guides' losses."""
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .config import SampleConfig
from .errors import InputError, NumericalError
from .model import Model
from .motion import Guide, Motion, motion_guide
from .schedule import ddim_step
from .networks.temporal import Attended, Wanted
from .context_windows import Windows, blend, windows_of

# The size at which the published weights were tuned: 16 frames of 512x512, in latent elements.
PUBLISHED_SIZE = 16 * 64 * 64
LOSS_SCALE = 2.0 ** 12                  # a power of two, which rounds nothing


@dataclass(frozen=True)
class State:
    """One step of sampling, just taken."""
    step: int               # 0 to steps - 1
    t: int                  # the timestep that it started from
    latents: Tensor         # (1, c, f, h, w) float32, scaled, after the step
    loss: float | None      # g, the sum of the guides' losses, in steps that take its gradient
    grad_norm: float | None     # of lambda * g
    weight: float           # lambda, 0 in steps that nothing guides


def sample(model: Model, prompt: str | Tensor, motion: Motion | None = None,
           config: SampleConfig | None = None, *, guides: Sequence[Guide] = (),
           latents: Tensor | None = None, generator: torch.Generator | None = None,
           condition: Tensor | None = None, recompute: bool = False) -> Iterator[State]:
    """Samples a clip of the prompt that moves like the reference, one state per step.

    prompt     text, or its embeddings (1, n, d); (2, n, d) with the negative prompt's
    motion     of the reference, from `extract_motion`; None samples without it
    config     the settings; the model's own where not given
    guides     others beside the motion, or in its place (`Guide`)
    latents    the starting noise (1, c, f, h, w), standard normal; drawn from the CPU
               `generator` where not given, so that a seed means the same on every device; what
               the solver "lcm" and guidance_repeats draw on the way is drawn from it too
    condition  of a model with SparseCtrl, from `sparse_condition`: frames that are given
    recompute  in guided steps, as `UNet3D` does it: less memory, more time, the same numbers

    A clip of more frames than the model knows is sampled in windows, of which guides see one at a
    time (`windows_of`). Raises, when called, InputError for a size that the model cannot have, for
    a motion of another model, size or settings, and for attention that it has not; and, in the step
    in which they cease to be finite, NumericalError.
    """
    config = config or model.config.sample
    z = starting_noise(model, config, generator) if latents is None else latents
    if z.shape != clip_shape(model, config):
        raise InputError(f"latents of shape {tuple(z.shape)}, where the settings make one clip of "
                         f"{clip_shape(model, config)}")
    if condition is not None:
        check_condition(condition, model, config)
    if guides and not config.motion_weight:
        raise InputError("motion_weight = 0 is not possible with guides, whose losses it weights")
    if motion is not None and config.motion_weight:
        check_fit(motion, model, config)
        guides = (motion_guide(motion.to(model.device), config.weights_of_blocks), *guides)
    guides = [replace(guide, wanted=model.unet.resolve(guide.wanted)) for guide in guides]
    trajectory = Trajectory(model, *embeddings(model, prompt, config), config, condition,
                            generator)
    return guided(trajectory, z.to(model.device, torch.float32), guides, recompute)


def guided(trajectory: "Trajectory", z: Tensor, guides: Sequence[Guide], recompute: bool
           ) -> Iterator[State]:
    """The loop. z is z_t, eps the noise that the model sees in it, g the loss of its attention."""
    config, grad = trajectory.config, torch.zeros_like(z)
    seen_at_once = z[:, :, :trajectory.windows.length]
    for i, (t, _) in enumerate(trajectory.steps):
        g, lambda_t = None, guidance_weight(i, config, seen_at_once) if guides else 0.0
        descends = lambda_t > 0 and i % config.guidance_every == 0

        for again in reversed(range(config.guidance_repeats if descends else 1)):
            # 1. The noise under the prompt and, in the first steps, the gradient of g (eq. 3).
            if descends:
                eps, g, grad = noise_and_gradient(trajectory, z, t, guides, recompute)
            else:
                eps = trajectory.noise(z, t, trajectory.text)

            # 2. Classifier-free guidance. 3. DDIM, whose direction alone is guided (eq. 1).
            slope = lambda_t * grad if lambda_t else None
            z = trajectory.step(i, z, eps, slope)

            # 4. Where the step is repeated, the noise that it took away is put back, drawn anew.
            if again:
                z = trajectory.back(i, z)

        if not torch.isfinite(z).all() or (g is not None and not torch.isfinite(g)):
            raise NumericalError(f"not finite at step {i + 1} of {config.steps} (timestep {t}): "
                                 "a smaller motion_weight or cfg_scale, or dtype float32, may mend "
                                 "it")
        yield State(i, t, z, None if g is None else float(g),
                    None if slope is None else float(slope.norm()), lambda_t)


def noise_and_gradient(trajectory: "Trajectory", z: Tensor, t: int, guides: Sequence[Guide],
                       recompute: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """eps, g, and the gradient of g with respect to z; of several windows, their blend, g's mean.

    On its way down it is LOSS_SCALE times as large: half precision would round it to nothing.
    """
    wanted = Wanted(*(tuple(dict.fromkeys(name for guide in guides for name in guide.wanted[kind]))
                      for kind in range(len(Wanted._fields))))
    noises, losses, grads = [], [], []
    for start in trajectory.windows.starts:
        with torch.enable_grad():
            part = z[:, :, trajectory.windows.at(start)].detach().requires_grad_()
            eps, seen = trajectory.predict(part, t, trajectory.text, start, wanted, recompute)
            g = torch.stack([guide.loss(seen.only(guide.wanted), t) for guide in guides]).sum()
            grad, = torch.autograd.grad(g, part, torch.full_like(g, LOSS_SCALE))
        noises.append(eps.detach())
        losses.append(g.detach())
        grads.append(grad / LOSS_SCALE)
    return (blend(noises, trajectory.windows), torch.stack(losses).mean(),
            blend(grads, trajectory.windows))


@dataclass(frozen=True)
class Trajectory:
    """What stays the same on a clip's way from noise."""
    model: Model
    text: Tensor                        # (1, n, d), of the prompt
    null: Tensor                        # of the negative prompt
    config: SampleConfig
    condition: Tensor | None = None
    generator: torch.Generator | None = None

    @cached_property
    def steps(self) -> list[tuple[int, int]]:
        """Each timestep, and the one that it leads to."""
        timesteps = self.model.schedule.timesteps(
            self.config.steps, self.config.spacing, self.config.guidance_steps,
            self.config.guidance_span)
        return list(zip(timesteps, [*timesteps[1:], -1]))

    @cached_property
    def windows(self) -> Windows:
        return windows_of(self.config.frames, self.config, self.model.config.unet.max_frames)

    def noise(self, z: Tensor, t: int, text: Tensor) -> Tensor:
        """The noise that the model sees in z under a text, blended of all windows."""
        return blend([self.predict(z[:, :, self.windows.at(start)], t, text, start)[0]
                      for start in self.windows.starts], self.windows)

    def predict(self, part: Tensor, t: int, text: Tensor, start: int, wanted: Wanted = Wanted(),
                recompute: bool = False) -> tuple[Tensor, Attended]:
        """The noise in the part of z that one window sees, and the attention wanted."""
        given = None if self.condition is None else self.condition[:, :, self.windows.at(start)]
        eps, seen = predict(self.model, part, t, text, wanted, given, recompute)
        return eps, replace(seen, start=start)

    @torch.no_grad()
    def step(self, i: int, z: Tensor, eps: Tensor, slope: Tensor | None = None) -> Tensor:
        """z_t -> z_{t-1} of step i: classifier-free guidance, then DDIM, or a consistency model's.

        slope  of lambda * g, like z. It moves the direction of DDIM and not the clean clip that it
               predicts, which would cancel most of the guidance and turn the rest around.
        """
        t, t_prev = self.steps[i]
        abar, abar_prev = self.model.schedule.abar(t), self.model.schedule.abar(t_prev)
        scale = cfg_scale(i, self.config)
        if scale != 1:
            eps_null = self.noise(z, t, self.null)
            eps = eps_null + scale * (eps - eps_null)
        direction = self.drawn(z) if self.config.solver == "lcm" else eps
        if slope is not None:
            direction = direction - (1 - abar).sqrt() * slope
        return ddim_step(z, eps, direction, abar, abar_prev)

    def back(self, i: int, z: Tensor) -> Tensor:
        """z_{t-1} -> z_t of step i, by fresh noise: universal guidance's recurrence (arXiv
        2302.07121, section 3.3)."""
        t, t_prev = self.steps[i]
        kept = self.model.schedule.abar(t) / self.model.schedule.abar(t_prev)
        return kept.sqrt() * z + (1 - kept).sqrt() * self.drawn(z)

    def drawn(self, z: Tensor) -> Tensor:
        """Fresh noise like z, from the CPU generator."""
        return torch.randn(z.shape, generator=self.generator).to(z.device)


def predict(model: Model, z: Tensor, t: int, text: Tensor, wanted: Wanted = Wanted(),
            condition: Tensor | None = None, recompute: bool = False) -> tuple[Tensor, Attended]:
    """The UNet's estimate of the noise in z, float32 like z, and the attention wanted."""
    with torch.set_grad_enabled(z.requires_grad):
        eps, seen = model.unet(z.to(model.dtype), t, text, **wanted._asdict(), recompute=recompute,
                               residuals=model.residuals(condition, t, text))
    return eps.float(), seen


def guidance_weight(step: int, config: SampleConfig, z: Tensor) -> float:
    """lambda at one step: it rises over the first guided steps, falls over the last, and is 0 then.

    The gradient per element of a mean falls with the number of elements, f*h*w of z (b, c, f, h,
    w), so that one weight would drive small clips harder; at the published size the factor is 1.
    """
    if step >= config.guidance_steps:
        return 0.0
    up = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    down = min(1.0, (config.guidance_steps - step) / config.cooldown) if config.cooldown else 1.0
    return config.motion_weight * up * down * z[0, 0].numel() / PUBLISHED_SIZE


def cfg_scale(step: int, config: SampleConfig) -> float:
    """The scale of classifier-free guidance; the last steps may do without (arXiv 2404.07724)."""
    return config.cfg_scale if step < config.cfg_share * config.steps else 1.0


def clip_shape(model: Model, config: SampleConfig) -> tuple[int, int, int, int, int]:
    """Of the latents of a clip. Raises InputError for a size or length that cannot be."""
    s = model.config.vae.downsampling
    if config.height % s or config.width % s:
        raise InputError(f"{config.width}x{config.height} is not possible: width and height must "
                         f"be multiples of {s}")
    frames = windows_of(config.frames, config, model.config.unet.max_frames).frames
    return (1, model.config.unet.in_channels, frames, config.height // s, config.width // s)


def starting_noise(model: Model, config: SampleConfig, generator: torch.Generator | None = None
                   ) -> Tensor:
    """Standard normal latents (1, c, f, h, w), drawn on the CPU."""
    return torch.randn(clip_shape(model, config), generator=generator)


def embeddings(model: Model, prompt: str | Tensor, config: SampleConfig) -> tuple[Tensor, Tensor]:
    """Of the prompt and of the negative one, (1, n, d) each. Raises InputError for others."""
    if isinstance(prompt, str):
        text, null = model.encode_text([prompt, config.negative_prompt]).split(1)
        return text, null
    d = model.config.unet.text_channels
    if not isinstance(prompt, Tensor) or prompt.ndim != 3 or len(prompt) > 2 or (
            prompt.shape[2] != d):
        what = tuple(prompt.shape) if isinstance(prompt, Tensor) else type(prompt).__name__
        raise InputError(f"the prompt is {what}, where one text is wanted, or its embeddings "
                         f"(1, n, {d}), or (2, n, {d}) with the negative prompt's; one clip at a "
                         "time is sampled")
    given = prompt.to(model.device, model.dtype)
    return given[:1], given[1:] if len(given) > 1 else model.encode_text([config.negative_prompt])


def check_condition(condition: Tensor, model: Model, config: SampleConfig) -> None:
    """Raises InputError for a condition that this model's SparseCtrl cannot be given."""
    if model.sparsectrl is None:
        raise InputError("this model has no SparseCtrl, which a condition is given to")
    b, c, f, h, w = clip_shape(model, config)
    shape = (b, c + 1, f, h, w) if model.sparsectrl.kind == "rgb" else (
        b, 4, f, config.height, config.width)
    if condition.shape != shape:
        raise InputError(f"a condition of shape {tuple(condition.shape)}, where the settings make "
                         f"one of {shape} (`sparse_condition`)")


def check_fit(motion: Motion, model: Model, config: SampleConfig) -> None:
    """Raises InputError where a motion was read from another model, at another size or with other
    settings than are sampled with."""
    if motion.info.get("model", model.sha256) != model.sha256:
        raise InputError("this motion was read from another model: extract it again with this one")
    check_settings(motion, config, clip_shape(model, config)[2:], model.config.unet.max_frames)


def check_settings(motion: Motion, config: SampleConfig, shape: tuple[int, int, int], longest: int
                   ) -> None:
    """Raises InputError where a motion was read at another size than (f, h, w) or otherwise.

    longest  frames that the UNet can see at once
    """
    known: Mapping[str, Any] = motion.info
    size = tuple(known.get(name, n) for name, n in zip(("frames", "height", "width"), shape))
    if size != shape:
        raise InputError("this motion was read from {} frames of {}x{} latents, not {} of {}x{}"
                         .format(*size, *shape))
    if motion.windows != windows_of(config.frames, config, longest):
        raise InputError(f"this motion was read in windows of {motion.windows.length} frames from "
                         f"{motion.windows.starts} on, the settings have others (window, overlap, "
                         "loop): extract it again with these settings")
    for name, wanted in (("t", config.extract_t), ("k", config.top_k),
                         ("blocks", list(config.blocks))):
        if known.get(name, wanted) != wanted:
            raise InputError(f"this motion was read with {name} = {known[name]}, the settings have "
                             f"{wanted}: extract it again with these settings")
