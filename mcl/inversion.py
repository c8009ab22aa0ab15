"""The paper's first form: motion from DDIM inversion (arXiv 2406.05338, versions 1 to 3).

The reference is led back step by step to the noise that it would have been sampled from. At every
guided step, the motion is read from the inverted latents of that timestep.
"""
import hashlib
from collections import UserDict
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import SampleConfig
from .context_windows import ContextWindows, blend_windows, make_context_windows
from .errors import InputError, NumericalError
from .files import open_safetensors, save_safetensors
from .guidance import Guidance
from .model import Model
from .motion import Motion, motion_loss, motion_metadata, top_k_motion
from .networks.attention import AttentionMaps, AttentionRequest
from .sampler import Progress, no_progress
from .schedule import NUM_TRAIN_TIMESTEPS, NoiseSchedule, ddim_step


@torch.no_grad()
def ddim_invert(model: Model, latents: Tensor, prompt: str, timesteps: Sequence[int],
                t_before: int = -1, windows: ContextWindows | None = None
                ) -> Iterator[tuple[int, Tensor]]:
    """Run DDIM backwards (arXiv 2010.02502) and yield (t, z_t) for rising timesteps.

    Args:
        model: The model.
        latents: Latents (1, c, f, h, w) at `t_before`.
        prompt: What the clip shows. There is no classifier-free guidance.
        timesteps: Rising timesteps to visit.
        t_before: Timestep of `latents`; -1 for a clean clip.
        windows: Context windows of a long clip.

    Raises:
        NumericalError: In a step whose result is not finite.
    """
    windows = windows or ContextWindows(latents.shape[2], latents.shape[2], (0,))
    text = model.encode_text([prompt])
    z = latents.detach().to(model.device, torch.float32)
    for t_prev, t in pairwise([t_before, *timesteps]):
        parts = (z[:, :, windows.frame_indices(o)].to(model.dtype) for o in windows.offsets)
        eps = blend_windows([model.unet(part, t, text)[0].float() for part in parts], windows)
        z = ddim_step(z, eps, eps, model.schedule.alpha_bar(t_prev), model.schedule.alpha_bar(t))
        if not torch.isfinite(z).all():
            raise NumericalError(f"not finite at timestep {t} of the inversion: try dtype float32")
        yield t, z


class InvertedReference(NamedTuple):
    """A reference with its inverted latents.

    Attributes:
        model: The model that inverted it.
        text: Embeddings of the reference's prompt (1, n, d).
        latents: By timestep, latents (1, c, f, h, w); they may be loaded from disk on access.
    """

    model: Model
    text: Tensor
    latents: Mapping[int, Tensor]

    @torch.no_grad()
    def attention(self, t: int, request: AttentionRequest, frames: Tensor | slice = slice(None)
                  ) -> AttentionMaps:
        """Return the reference's attention at timestep t, in all frames or in those of a window.

        Raises:
            KeyError: If the reference was not inverted to t.
        """
        z = self.latents[t][:, :, frames].to(self.model.device, self.model.dtype)
        return self.model.unet.forward_to_attention(z, t, self.text, request)

    def motion_at(self, t: int, config: SampleConfig, offset: int | None = None) -> Motion:
        """Return the motion at timestep t, in all context windows or in the one at `offset`."""
        windows = make_context_windows(config, self.model.config)
        offsets = windows.offsets if offset is None else (offset,)
        request = AttentionRequest(temporal=config.guidance_blocks)
        maps = [self.attention(t, request, windows.frame_indices(o)) for o in offsets]
        metadata = motion_metadata(config, windows, *self.model.config.latent_shape(config)[3:])
        return top_k_motion(maps, metadata["top_k"], metadata)


def inversion_guidance(inverted: InvertedReference, config: SampleConfig) -> Guidance:
    """Return guidance towards the motion that the reference has at each step.

    Raises:
        InputError: If the reference was not inverted with these settings.
    """
    shape = inverted.model.config.latent_shape(config)
    for t in guided_timesteps(inverted.model.schedule, config):
        if t not in inverted.latents or inverted.latents[t].shape != shape:
            raise InputError(f"the reference was not inverted to {shape} at t={t}: invert it again")

    return Guidance(lambda maps, t: motion_loss(
        maps.temporal, inverted.motion_at(t, config, maps.frame_offset), config.block_weight_map),
        config.guidance_blocks)


class LatentCache(UserDict[int, Any]):
    """Latents by timestep in the files of a folder, loaded on access; `data` holds the paths."""

    def __init__(self, folder: Path, key: str):
        """Open or create a cache folder.

        Args:
            folder: The folder.
            key: Hash of everything that the latents depend on.

        Raises:
            InputError: If the folder holds latents of another key, or files that are not readable.
        """
        self.folder, self.key = folder, key
        folder.mkdir(parents=True, exist_ok=True)
        # Other files in the folder are ignored.
        self.data = {int(f.stem): f for f in sorted(folder.glob("[0-9]" * 4 + ".safetensors"))}
        list(self.values())             # checks every file

    def __getitem__(self, t: int) -> Tensor:
        metadata, tensors = open_safetensors(self.data[t])
        if metadata.get("key") != self.key:
            raise InputError(f"{self.folder}: was made with other inputs. Choose an empty folder")
        return tensors["latents"].read()

    def __setitem__(self, t: int, latents: Tensor) -> None:
        self.data[t] = self.folder / f"{t:04d}.safetensors"
        save_safetensors(self.data[t], {"latents": latents.cpu()}, {"key": self.key})


def invert_reference(model: Model, latents: Tensor, prompt: str, config: SampleConfig,
                     progress: Progress = no_progress,
                     cache_dir: Path | None = None) -> InvertedReference:
    """Invert a reference for sampling with the same settings.

    Args:
        model: The model.
        latents: Scaled latents (1, c, f, h, w) of the reference.
        prompt: What the reference shows.
        config: Settings of the sampling.
        progress: Function that wraps an iterable in a progress bar, such as `tqdm`.
        cache_dir: Folder for the latents, in place of memory. An interrupted inversion continues
            from it, and a finished one is used again.
    """
    timesteps = inversion_timesteps(model.schedule, config)
    guided = guided_timesteps(model.schedule, config)
    windows = make_context_windows(config, model.config, latents.shape[2])
    stored: MutableMapping[int, Tensor] = {}
    if cache_dir is not None:
        key = hashlib.sha256(repr((model.sha256, model.dtype, timesteps, windows)).encode())
        for tensor in (latents, model.encode_text([prompt])):       # a prompt may have new words
            key.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
        stored = LatentCache(cache_dir, key.hexdigest())
    t_before = max(stored, default=-1)
    remaining = [t for t in timesteps if t > t_before]
    steps = ddim_invert(model, stored.get(t_before, latents), prompt, remaining, t_before, windows)
    bar = progress(remaining, desc="inversion", total=len(remaining))
    for t, (_, z) in zip(bar, steps, strict=False):
        # An interrupted inversion continues from any timestep. Nothing is deleted from the folder,
        # because another run may use it.
        if t in guided or cache_dir is not None:
            stored[t] = z
    for t in stored.keys() - guided:
        del stored[t]           # the file stays
    return InvertedReference(model, model.encode_text([prompt]), stored)


def guided_timesteps(schedule: NoiseSchedule, config: SampleConfig) -> list[int]:
    """Return the timesteps of the guided steps, in falling order."""
    return schedule.timesteps(config.steps, config.timestep_spacing, config.guidance_steps,
                              config.guidance_noise_range)[:config.guidance_steps]


def inversion_timesteps(schedule: NoiseSchedule, config: SampleConfig) -> list[int]:
    """Return the rising timesteps of the inversion.

    They are evenly spaced up to the noisiest guided timestep, and include every guided timestep.
    """
    guided = guided_timesteps(schedule, config)
    even = np.linspace(0, NUM_TRAIN_TIMESTEPS - 1, config.inversion_steps).round()
    return sorted({*(int(t) for t in even if t < max(guided, default=0)), *guided})
