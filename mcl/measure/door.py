"""Whether a model will follow a reference, as far as the reference alone can tell."""
import dataclasses
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..model import Model
from ..motion import extract_motion


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


def told_sharpness(model: Model, reference: Path, latents: Tensor) -> float | None:
    """`sharpness`, where it is known what this model wants; warns of a reference that has less."""
    least = model.config.sharp_from
    if not least:
        return None
    found = sharpness(model, latents)
    if found < least:
        warnings.warn(f"{reference}: this model will hardly follow it: it hardly moves, or looks "
                      f"unlike what the model knows (its strongest attention along time is "
                      f"{found:.3f} in the mean, where {least:.3f} is wanted)")
    return found
