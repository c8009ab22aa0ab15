"""The variant with DDIM inversion (arXiv 2406.05338, versions 1 to 3).

The reference is led back, step by step, to the noise that it would have been sampled from. At each
guided step the motion is then read from its own latents at that timestep, in place of one reading
from once-noised latents.
"""
import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from .config import SampleConfig
from .errors import InputError
from .model import Model
from .motion import Motion, strongest
from .sampler import noise
from .schedule import Schedule, ddim_step


@torch.no_grad()
def invert(model: Model, latents: Tensor, prompt: str, timesteps: Sequence[int]
           ) -> Iterator[tuple[int, Tensor]]:
    """DDIM run backwards (arXiv 2010.02502): yields (t, z_t) of a clip for ascending timesteps.

    One step leads from the timestep before, the first from the clean clip, to t, with the noise
    that the model sees at t: the steps that sampling takes, without classifier-free guidance.
    """
    text = model.encode_text([prompt])
    z = latents.to(model.device, torch.float32)
    for t_before, t in zip([-1, *timesteps], timesteps):
        eps = noise(model, z, t, text)
        z = ddim_step(z, eps, eps, model.schedule.abar(t_before), model.schedule.abar(t))
        yield t, z


@dataclass(frozen=True)
class Inversion:
    """A reference along its inversion: latents {t: (1, c, f, h, w)}, read as they are needed."""
    model: Model
    prompt: str                         # of the reference
    latents: dict[int, Tensor]
    k: int
    blocks: tuple[str, ...]
    info: dict[str, Any]

    @torch.no_grad()
    def at(self, t: int) -> Motion:
        """The motion at timestep t. Raises InputError for one that was not kept."""
        if t not in self.latents:
            raise InputError(f"the reference was not inverted to timestep {t}: invert it with the "
                             "settings that are sampled with")
        z, text = self.latents[t].to(self.model.dtype), self.model.encode_text([self.prompt])
        _, maps = self.model.unet(z, t, text, maps_of=self.blocks, need_eps=False)
        return strongest(maps, self.k, self.info | {"t": t})

    def to(self, device: torch.device | str) -> "Inversion":
        return dataclasses.replace(self, latents={t: z.to(device)
                                                  for t, z in self.latents.items()})


def invert_motion(model: Model, latents: Tensor, prompt: str, config: SampleConfig,
                  progress: Callable[[Iterator], Iterable] = iter) -> Inversion:
    """Inverts a reference (1, c, f, h, w) of this prompt, for sampling with these settings.

    `progress` wraps the steps, of which there are len(inversion_path(...)), for a bar.
    """
    guided = set(guided_timesteps(model.schedule, config))
    steps = invert(model, latents, prompt, inversion_path(model.schedule, config))
    info = {"model": model.sha256, "frames": latents.shape[2], "height": latents.shape[3],
            "width": latents.shape[4]}
    return Inversion(model, prompt, {t: z for t, z in progress(steps) if t in guided},
                     config.top_k, config.blocks, info)


def guided_timesteps(schedule: Schedule, config: SampleConfig) -> list[int]:
    return schedule.timesteps(config.steps, config.spacing, config.guidance_steps,
                              config.guidance_span)[:config.guidance_steps]


def inversion_path(schedule: Schedule, config: SampleConfig) -> list[int]:
    """The timesteps of the inversion, ascending: evenly spaced ones up to the noisiest that
    guidance visits, and every one that it visits."""
    guided = guided_timesteps(schedule, config)
    even = np.linspace(0, schedule.config.train_steps - 1, config.inversion_steps).round()
    return sorted({*(int(t) for t in even if t < max(guided, default=0)), *guided})
