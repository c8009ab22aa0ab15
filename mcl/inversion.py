"""The variant with DDIM inversion (arXiv 2406.05338, versions 1 to 3).

The reference is led back, step by step, to the noise that it would have been sampled from. At each
guided step the motion is then read from its own latents at that timestep, in place of one reading
from once-noised latents.
"""
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import SampleConfig
from .errors import InputError, NumericalError
from .files import save_safetensors
from .model import Model
from .motion import Guide, Motion, finite, motion_loss, strongest
from .sampler import clip_shape, predict
from .schedule import Schedule, ddim_step
from .networks.temporal import Attended, Wanted
from .context_windows import Windows, blend, windows_of


@torch.no_grad()
def invert(model: Model, latents: Tensor, prompt: str, timesteps: Sequence[int],
           t_before: int = -1, windows: Windows | None = None) -> Iterator[tuple[int, Tensor]]:
    """DDIM run backwards (arXiv 2010.02502): yields (t, z_t) of a clip for ascending timesteps.

    `latents` (1, c, f, h, w) are those of `t_before`: -1 for a clean clip. One step leads from
    the timestep before to t, with the noise that the model sees at t: the steps that sampling
    takes, without classifier-free guidance. A clip of more frames than the model knows takes
    `windows`. Raises NumericalError in a step that is not finite.
    """
    windows = windows or Windows(latents.shape[2], latents.shape[2], (0,))
    text = model.encode_text([prompt])
    z = latents.to(model.device, torch.float32)
    for t_before, t in zip([t_before, *timesteps], timesteps):
        eps = blend([predict(model, z[:, :, windows.at(start)], t, text)[0]
                     for start in windows.starts], windows)
        z = ddim_step(z, eps, eps, model.schedule.abar(t_before), model.schedule.abar(t))
        if not torch.isfinite(z).all():
            raise NumericalError(f"the inversion is not finite at timestep {t}: dtype float32 may "
                                 "mend it")
        yield t, z


@dataclass(frozen=True)
class Inversion:
    """A reference along its inversion."""
    model: Model
    text: Tensor                        # (1, n, d), of the reference's prompt
    latents: Mapping[int, Tensor]       # timestep -> (1, c, f, h, w), read as they are needed

    @torch.no_grad()
    def attend(self, t: int, wanted: Wanted, frames: Tensor | slice = slice(None)) -> Attended:
        """The reference's attention at timestep t, in all frames or those of one window. Raises
        InputError for a timestep that was not kept."""
        if t not in self.latents:
            raise InputError(f"the reference was not inverted to timestep {t}: invert it with the "
                             "settings that are sampled with")
        z = self.latents[t][:, :, frames].to(self.model.device, self.model.dtype)
        return self.model.unet.attend(z, t, self.text, wanted)

    def motion(self, t: int, config: SampleConfig, start: int | None = None) -> Motion:
        """The motion at timestep t, of the blocks and values that the settings name, in all windows
        or the one from a frame on."""
        windows = windows_of(config.frames, config, self.model.config.unet.max_frames)
        starts = windows.starts if start is None else (start,)
        h, w = self.latents[t].shape[-2:]
        return finite(strongest(
            [self.attend(t, Wanted(config.blocks), windows.at(each)).temporal_maps
             for each in starts],
            config.top_k, windows, {"frames": config.frames, "height": h, "width": w}))


def inversion_guide(inversion: Inversion, config: SampleConfig) -> Guide:
    """Towards the motion that the reference has at each step.

    Raises InputError where it was not inverted for these settings.
    """
    shape = clip_shape(inversion.model, config)
    for t in guided_timesteps(inversion.model.schedule, config):
        if t not in inversion.latents or inversion.latents[t].shape != shape:
            raise InputError(f"the reference was not inverted to latents of {shape} at timestep "
                             f"{t}: invert it with the settings that are sampled with")
    return Guide(Wanted(temporal_maps=config.blocks), lambda seen, t: motion_loss(
        seen.temporal_maps, inversion.motion(t, config, seen.start), config.weights_of_blocks))


class KeptLatents(Mapping[int, Tensor]):
    """Latents {t: (1, c, f, h, w)} in the files of a folder, mapped into memory as they are read.

    `key` says of what they are. Raises InputError where the folder cannot be written, where a
    file cannot be read, and where one is of something else.
    """

    def __init__(self, folder: Path, key: str):
        self.folder, self.key = folder, key
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made a folder ({error.strerror})") from error
        for t in self:
            self.open(t)

    def open(self, t: int) -> safe_open:
        file = self.file(t)
        try:
            opened = safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: not inverted latents that can be read ({error}); delete "
                             "it, and it is made again") from error
        if (opened.metadata() or {}).get("key") != self.key:
            raise InputError(f"{file}: is of another reference, prompt, model or other settings; "
                             "choose an empty folder")
        return opened

    def file(self, t: int) -> Path:
        return self.folder / f"{t:04d}.safetensors"

    def __getitem__(self, t: int) -> Tensor:
        if not self.file(t).exists():
            raise KeyError(t)
        latents: Tensor = self.open(t).get_tensor("latents")
        return latents

    def __iter__(self) -> Iterator[int]:
        files = self.folder.glob("[0-9]" * 4 + ".safetensors")     # others may lie there too
        return iter(sorted(int(file.stem) for file in files))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def keep(self, t: int, latents: Tensor) -> None:
        save_safetensors(self.file(t), {"latents": latents.cpu()}, {"key": self.key})

    def drop(self, t: int) -> None:
        self.file(t).unlink()


def invert_motion(model: Model, latents: Tensor, prompt: str, config: SampleConfig,
                  progress: Callable[[Iterator], Iterable] = iter, folder: Path | None = None
                  ) -> Inversion:
    """Inverts a reference (1, c, f, h, w) of this prompt, for sampling with these settings.

    progress   wraps the steps, of which there are len(inversion_path(...)), for a bar
    folder     where the latents are kept, in place of memory; what an interrupted inversion left
               there is gone on from, and a finished one is used again
    """
    path = inversion_path(model.schedule, config)
    guided = set(guided_timesteps(model.schedule, config))
    windows = windows_of(latents.shape[2], config, model.config.unet.max_frames)
    if folder is None:
        steps = progress(invert(model, latents, prompt, path, windows=windows))
        kept: Mapping[int, Tensor] = {t: z for t, z in steps if t in guided}
    else:
        kept = invert_into(folder, model, latents, prompt, path, guided, windows, progress)
    return Inversion(model, model.encode_text([prompt]), kept)


def invert_into(folder: Path, model: Model, latents: Tensor, prompt: str, path: list[int],
                guided: set[int], windows: Windows, progress: Callable[[Iterator], Iterable]
                ) -> KeptLatents:
    """Inverts along a path, and keeps the latents of guided timesteps, and the last, on disk."""
    pixels = latents.detach().float().cpu().contiguous().numpy().tobytes()
    said = f"{model.sha256} {model.dtype} {prompt!r} {path} {tuple(latents.shape)}"
    said += f" {windows}" if len(windows.starts) > 1 else ""
    kept = KeptLatents(folder, hashlib.sha256(said.encode() + pixels).hexdigest())
    before = max(kept, default=-1)
    start = latents if before < 0 else kept[before]
    ahead = [t for t in path if t > before]
    for t, z in progress(invert(model, start, prompt, ahead, before, windows)):
        kept.keep(t, z)
        if before >= 0 and before not in guided:
            kept.drop(before)
        before = t
    return kept


def guided_timesteps(schedule: Schedule, config: SampleConfig) -> list[int]:
    return schedule.timesteps(config.steps, config.spacing, config.guidance_steps,
                              config.guidance_span)[:config.guidance_steps]


def inversion_path(schedule: Schedule, config: SampleConfig) -> list[int]:
    """The timesteps of the inversion, ascending: evenly spaced ones up to the noisiest that
    guidance visits, and every one that it visits."""
    guided = guided_timesteps(schedule, config)
    even = np.linspace(0, schedule.config.train_steps - 1, config.inversion_steps).round()
    return sorted({*(int(t) for t in even if t < max(guided, default=0)), *guided})
