"""Whether a model will follow a reference, as far as the reference alone can tell."""
import dataclasses
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..model import Model
from ..motion import Motion, extract_motion
from .metrics import top1_agreement


def certainty(model: Model, latents: Tensor) -> float:
    """How surely a model reads the motion of a clip, latents (1, c, f, h, w), scaled: of the rows
    of its attention, the share whose strongest is at the same frame when it is read twice, under
    different noise.

    It is read as the model's own settings say, as `ModelConfig.certain_from` belongs to them. What
    the noise decides is no motion that could guide.
    """
    config = dataclasses.replace(model.config.sample, top_k=1, frames=latents.shape[2])

    def read(seed: int) -> Motion:
        return extract_motion(model, latents, config,
                              generator=torch.Generator().manual_seed(seed))

    return top1_agreement(read(0), read(1))


def told_certainty(model: Model, reference: Path, latents: Tensor) -> float | None:
    """`certainty`, where it is known what this model wants; warns of a reference that has less."""
    least = model.config.certain_from
    if not least:
        return None
    found = certainty(model, latents)
    if found < least:
        warnings.warn(f"{reference}: this model will hardly follow it: it hardly moves, or looks "
                      f"unlike what the model knows (read twice, {found:.0%} of its attention is "
                      f"the same, where {least:.0%} is wanted)")
    return found
