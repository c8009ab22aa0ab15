"""DDIM run backwards: the noise that a clip would have been sampled from (arXiv 2010.02502)."""
from typing import Iterator, Sequence

import torch
from torch import Tensor

from .model import Model
from .sampler import noise
from .schedule import ddim_step


@torch.no_grad()
def invert(model: Model, latents: Tensor, prompt: str, timesteps: Sequence[int]
           ) -> Iterator[tuple[int, Tensor]]:
    """Latents (1, c, f, h, w) of a clip, at each of the timesteps, which ascend: (t, z_t).

    One step leads from the timestep before, the first from the clean clip, to t, with the noise
    that the model sees at t: the same steps as sampling takes, without classifier-free guidance.
    """
    text = model.encode_text([prompt])
    z = latents.to(model.device, torch.float32)
    for t_before, t in zip([-1, *timesteps], timesteps):
        eps = noise(model, z, t, text)
        z = ddim_step(z, eps, eps, model.schedule.abar(t_before), model.schedule.abar(t))
        yield t, z
