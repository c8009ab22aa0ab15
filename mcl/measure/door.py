"""Whether a model will follow a reference, as far as the reference alone can tell."""
import dataclasses
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..model import Model
from ..motion import extract_motion
from ..windows import blend, windows_of


def sharpness(model: Model, latents: Tensor) -> float:
    """How sharply a model sees the motion of a clip, latents (1, c, f, h, w), scaled: the mean, in
    [1/f, 1], of the strongest attention of every row.

    It is read as the model's own settings say, as `ModelConfig.sharp_from` belongs to them. Where
    little moves, or the model knows little of what it sees, every frame looks at all alike, and
    there is nothing to guide by.
    """
    config = dataclasses.replace(model.config.sample, top_k=1, frames=latents.shape[2])
    motion = extract_motion(model, latents, config, generator=torch.Generator().manual_seed(0))
    return float(torch.cat([v.flatten().float() for v in motion.values.values()]).mean())


@torch.no_grad()
def denoising_error(model: Model, latents: Tensor) -> float:
    """How unlike what a model knows a clip looks, latents (1, c, f, h, w), scaled: the mean square
    error of the noise that it finds in it, without a prompt, at its own extract_t, 0 for perfect
    and 1 for a model that finds none.

    Where much changes that the model does not know, each frame looks at itself: that is sharp, but
    no motion. A long clip is denoised in the windows that `sample` sees it in.
    """
    config, z = model.config.sample, latents.to(model.device).float()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    noisy = model.schedule.add_noise(z, noise, config.extract_t).to(model.dtype)
    windows = windows_of(z.shape[2], config, model.config.unet.max_frames)
    null = model.encode_text([""])
    parts = [model.unet(noisy[:, :, windows.at(start)], config.extract_t, null)[0].float()
             for start in windows.starts]
    return float((blend(parts, windows) - noise).square().mean())


def check_reference(model: Model, reference: Path, latents: Tensor) -> dict[str, float]:
    """The `sharpness` and `denoising_error` of a clip, latents (1, c, f, h, w), scaled; warns, by
    the reference's name, where the model wants others. Empty where it is unknown what it wants."""
    least, most = model.config.sharp_from, model.config.error_to
    if not least:
        return {}
    found = {"sharpness": sharpness(model, latents),
             "denoising_error": denoising_error(model, latents)}
    if found["sharpness"] < least:
        why = (f"it hardly moves, or looks unlike what the model knows (its strongest attention "
               f"along time is {found['sharpness']:.3f} in the mean, where {least:.3f} is wanted)")
    elif found["denoising_error"] > most:
        why = (f"it looks unlike what the model knows (the noise in it is found with an error of "
               f"{found['denoising_error']:.3f}, where {most:.3f} at the most is wanted)")
    else:
        return found
    warnings.warn(f"{reference}: this model will hardly follow it: {why}")
    return found
