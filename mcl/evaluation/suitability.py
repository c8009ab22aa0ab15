"""Whether a model will follow a reference, as far as the reference alone can tell."""
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..model import Model
from ..context_windows import blend_windows, make_context_windows


def motion_magnitude(latents: Tensor) -> float:
    """How much of a clip changes, latents (1, c, f, h, w): the standard deviation in time at a
    place, of which a tenth of the places have more, as a share of that of the whole; 0 at rest.

    Where hardly anything moves, or a camera passes over what looks the same everywhere, there is
    nothing to guide by.
    """
    z = latents.float()
    change = (z - z.mean(dim=2, keepdim=True)).square().mean(dim=(0, 1, 2)).sqrt()
    return float(change.quantile(0.9) / z.std().clamp(min=1e-6))


@torch.no_grad()
def denoising_error(model: Model, latents: Tensor) -> float:
    """How unlike what a model knows a clip looks, latents (1, c, f, h, w), scaled: the mean square
    error of the noise that it finds in it, without a prompt, at its own extract_t, 0 for perfect
    and 1 for a model that finds none.

    Of what a model does not know, no motion is read. A long clip is denoised in the windows that
    `sample` sees it in.
    """
    config, z = model.config.sample, latents.to(model.device).float()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
    noisy = model.schedule.add_noise(z, noise, config.extraction_timestep).to(model.dtype)
    windows = make_context_windows(z.shape[2], config, model.config.unet.motion_max_seq_length)
    null = model.encode_text([""])
    parts = [model.unet(noisy[:, :, windows.at(start)], config.extraction_timestep, null)[0].float()
             for start in windows.starts]
    return float((blend_windows(parts, windows) - noise).square().mean())


def warn_if_unsuitable(model: Model, reference: Path, latents: Tensor) -> dict[str, float]:
    """The `movement` and `denoising_error` of a clip, latents (1, c, f, h, w), scaled; warns, by
    the reference's name, where the model wants others. Empty where it is unknown what it wants."""
    least, most = model.config.min_reference_motion, model.config.max_denoising_error
    if not least:
        return {}
    found = {"movement": motion_magnitude(latents), "denoising_error": denoising_error(model, latents)}
    if found["movement"] < least:
        why = (f"little of it moves (its latents change by {found['movement']:.3f} of their "
               f"spread, where {least:.3f} is wanted)")
    elif found["denoising_error"] > most:
        why = (f"it looks unlike what the model knows (the noise in it is found with an error of "
               f"{found['denoising_error']:.3f}, where {most:.3f} at the most is wanted)")
    else:
        return found
    warnings.warn(f"{reference}: this model will hardly follow it: {why}")
    return found
