"""Guidance: losses on the attention of the generated clip, and their gradient.

A guidance names the attention that it reads and computes a loss of it. Sampling descends the loss.
"""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import SampleConfig, ValidatedConfig, has_type, short_repr
from .errors import InputError
from .model import Model
from .motion import Motion, motion_loss
from .networks.attention import AttentionMaps, AttentionRequest

# Size at which the published weights were tuned: 16 frames of 512x512 pixels, in latent positions.
REFERENCE_NUM_ELEMENTS = 16 * 64 * 64
LOSS_SCALE = 2.0 ** 12          # for the backward pass in half precision; a power of two is exact


@dataclass(frozen=True)
class Guidance(ValidatedConfig):
    """A loss that sampling descends.

    Attributes:
        loss: Function of the attention maps and the timestep that returns a float32 scalar. For a
            long clip it is called for each context window, `AttentionMaps.frame_offset`.
        layers: Blocks, modules or layers whose attention the loss reads.
        kind: What it reads of them: "temporal" (maps), "temporal_keys", or "cross" (maps).
        weight: Weight relative to the motion loss, which has SampleConfig.motion_weight.
    """

    loss: Callable[[AttentionMaps, int], Tensor]
    layers: str | Sequence[str] = "up_blocks.1"
    kind: str = "temporal"
    weight: float = 1.0

    def __post_init__(self) -> None:
        kinds = AttentionRequest._fields
        self.check("loss", callable(self.loss), "a function loss(maps, timestep)")
        self.check("kind", self.kind in kinds, f"one of {', '.join(kinds)}")
        self.check("weight", has_type(self.weight, float), "a finite number")

    @property
    def request(self) -> AttentionRequest:
        """The attention that the loss reads."""
        layers = (self.layers,) if isinstance(self.layers, str) else tuple(self.layers)
        return AttentionRequest(**{self.kind: layers})


def motion_guidance(motion: Motion, block_weights: Mapping[str, float] | None = None) -> Guidance:
    """Return guidance towards a motion, by `motion_loss` (MotionClone, eq. 3).

    Args:
        motion: Motion of the reference, on the model's device.
        block_weights: Weight of each block by name; 1 for blocks that are not named.
    """
    return Guidance(lambda maps, t: motion_loss(maps.temporal, motion.window(maps.frame_offset),
                                                block_weights), tuple(motion.values))


def resolve_guidance(guidance: Sequence[Guidance], motion: Motion | None, model: Model,
                     config: SampleConfig) -> list[Guidance]:
    """Return all guidance of a run, the motion's first, with full layer names.

    Raises:
        InputError: If `guidance` is not a list of Guidance or names layers that the UNet does not
            have, or the motion does not fit the model and the settings.
    """
    config.check("motion_weight", not guidance or config.motion_weight > 0, "above 0 with guidance")
    if not isinstance(guidance, Sequence) or not all(isinstance(g, Guidance) for g in guidance):
        raise InputError(f"guidance = {short_repr(guidance)} must be a list, [Guidance(loss), ...]")
    if motion is not None and config.motion_weight:
        if motion.metadata and motion.metadata.get("model") != model.sha256:
            raise InputError("the motion was extracted with another model: extract it again")
        motion.check_config(config, model.config)
        motion = motion.map(lambda tensor: tensor.to(model.device))
        guidance = [motion_guidance(motion, config.block_weight_map), *guidance]
    return [replace(one, layers=getattr(model.unet.resolve_layers(one.request), one.kind))
            for one in guidance]


def guidance_weight(step: int, config: SampleConfig, num_elements: int) -> float:
    """Return lambda, the weight of the guidance at one step; 0 after the guided steps.

    The weight rises over the first guided steps and falls over the last. The loss is a mean, so its
    gradient per element falls with the size of the clip. The factor num_elements / (16*64*64) makes
    the guidance equally strong at every size, and is 1 at the published one.

    Args:
        step: Index of the step, from 0.
        config: Settings.
        num_elements: f*h*w of the latents that the UNet sees at once.
    """
    rise = min(1.0, (step + 1) / max(1, config.guidance_warmup_steps))
    fall = min(1.0, max(0, config.guidance_steps - step) / max(1, config.guidance_cooldown_steps))
    return config.motion_weight * rise * fall * num_elements / REFERENCE_NUM_ELEMENTS


def guidance_gradient(guidance: Sequence[Guidance], maps: AttentionMaps, z: Tensor, t: int
                      ) -> tuple[Tensor, Tensor]:
    """Return g, the weighted sum of the losses, and its gradient with respect to z.

    The loss is scaled during the backward pass, because half precision would round its gradient
    to zero.

    Args:
        guidance: Guidance with full layer names (`resolve_guidance`).
        maps: Attention of the pass that z went through.
        z: Latents that require a gradient.
        t: Timestep.
    """
    g = torch.stack([one.weight * one.loss(maps.select(one.request), t) for one in guidance]).sum()
    # With the scale as an argument of its own, PyTorch would import sympy, which takes 0.4 s.
    grad, = torch.autograd.grad(LOSS_SCALE * g, z)
    return g.detach(), grad / LOSS_SCALE
