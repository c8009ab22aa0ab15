"""The motion representation: extraction from a reference, file, and loss (arXiv 2406.05338).

The motion of a clip is the largest temporal attention weights and the frames that they point at,
H = {L, M} in eq. 6 of the paper.
"""
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import ModelConfig, SampleConfig
from .context_windows import ContextWindows, make_context_windows
from .errors import InputError, NumericalError
from .files import open_safetensors, save_safetensors
from .model import Model
from .networks.attention import AttentionMaps, AttentionRequest

FORMAT = "mcl-motion-2"
# The noise of the reference does not depend on the user's seed: a reference has one motion. PyTorch
# uses 32 bits of a seed, so this noise is also the initial noise of seed 0, and of no other seed.
REFERENCE_SEED = 1 << 32


@dataclass(frozen=True)
class Motion:
    """Motion representation of a reference clip: H = {L, M} (MotionClone, eq. 6).

    Attributes:
        values: By layer name, the k largest attention weights of each row, (b*h*w, heads, f, k)
            float32. In a long clip, b counts the context windows.
        indices: By layer name, the frames that the values point at, like values, int64.
        metadata: Origin of the motion: model (sha256), extraction_timestep, top_k,
            guidance_blocks, num_frames, height and width (of the latents), grids (rows and columns
            by layer), context_length, context_offsets, and anything that the caller adds. Empty if
            the origin is not known; it is not checked then.
    """

    values: dict[str, Tensor]
    indices: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def map(self, function: Callable[[Tensor], Tensor]) -> "Motion":
        """Return the motion with a function applied to each of its tensors."""
        return replace(self, values={name: function(v) for name, v in self.values.items()},
                       indices={name: function(i) for name, i in self.indices.items()})

    @property
    def windows(self) -> ContextWindows:
        """The context windows that the motion was extracted from."""
        length = next(iter(self.values.values())).shape[2]
        return ContextWindows(self.metadata.get("num_frames", length), length,
                              tuple(self.metadata.get("context_offsets", (0,))))

    def window(self, offset: int) -> "Motion":
        """Return the motion of the context window that starts at a frame."""
        offsets = self.windows.offsets
        if len(offsets) == 1:           # also guides every window of a longer clip
            return self
        return self.map(lambda tensor: tensor.chunk(len(offsets))[offsets.index(offset)])

    def check_config(self, config: SampleConfig, model: ModelConfig) -> None:
        """Raise InputError if the motion was extracted at another size or with other settings."""
        windows, (h, w) = make_context_windows(config, model), model.latent_shape(config)[3:]
        for name, value in motion_metadata(config, windows, h, w).items():
            if self.metadata and self.metadata.get(name) != value:
                raise InputError(f"the motion was extracted with {name} = {self.metadata.get(name)}"
                                 f", not {value}: extract it again, or use the same settings")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically; indices are stored as bytes."""
        tensors = {f"values.{name}": v.float().cpu() for name, v in self.values.items()}
        tensors |= {f"indices.{name}": i.to(torch.uint8).cpu() for name, i in self.indices.items()}
        save_safetensors(path, tensors, {"format": FORMAT, "metadata": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | Path) -> "Motion":
        """Read a file that `save` wrote. Raises InputError for any other file."""
        header, lazy_tensors = open_safetensors(Path(path))
        tensors = {name: tensor.read() for name, tensor in lazy_tensors.items()}
        if header.get("format") != FORMAT:
            raise InputError(f"{path}: not a motion file. Give one that --save-motion wrote")
        try:
            origin = json.loads(header["metadata"])
            values, indices = ({layer: tensors[f"{kind}.{layer}"] for layer in origin["grids"]}
                               for kind in ("values", "indices"))
            if not 2 * len(values) == len(tensors) > 0:
                raise ValueError("its metadata are of other layers")
            f, k, n = origin["context_length"], origin["top_k"], len(origin["context_offsets"])
            for layer, v in values.items():
                i, (h, w) = indices[layer], origin["grids"][layer]
                has_shape = v.shape == i.shape == (n * h * w, *v.shape[1:2], f, k)
                has_dtype = (v.dtype, i.dtype) == (torch.float32, torch.uint8)
                in_range = ((0 <= v) & (v <= 1 + 1e-3)).all() and (i < f).all()     # rounded
                if not (has_shape and has_dtype and in_range):
                    raise ValueError(f"{layer}: no attention map of {f} frames, {h}x{w}, top_k {k}")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: a damaged motion file ({error}). Save it again") from error
        return cls(values, {layer: i.long() for layer, i in indices.items()}, origin)


def reference_noise(latents: Tensor) -> Tensor:
    """Return the noise of every reference, standard normal like latents, on the CPU."""
    return torch.randn(latents.shape, generator=torch.Generator().manual_seed(REFERENCE_SEED))


@torch.no_grad()
def extract_motion(model: Model, latents: Tensor, config: SampleConfig | None = None, *,
                   noise: Tensor | None = None, control: Tensor | None = None) -> Motion:
    """Return the motion of a clip from one pass of the UNet on its noised latents.

    The pass uses the empty prompt without classifier-free guidance, and stops after the last guided
    block (MotionClone, section 4). Clips longer than the motion modules are read in the context
    windows that `sample` uses.

    Args:
        model: The model that the new clip will be sampled with.
        latents: Scaled latents (1, c, f, h, w) of the reference.
        config: Settings: extraction_timestep, top_k, guidance_blocks; the model's own if None.
        noise: Standard normal noise, like latents; the same for every call if None.
        control: SparseCtrl condition made of the reference's own frames, at the frame indices of
            the new clip's control images (`sparsectrl_condition`).

    Raises:
        InputError: If the latents have another shape, a block has no temporal attention, or top_k
            is more than the number of frames.
        NumericalError: If the attention is not finite.
    """
    config, c = config or model.config.sample, model.config.unet.in_channels
    if latents.ndim != 5 or latents.shape[:2] != (1, c):
        raise InputError(f"latents have shape {tuple(latents.shape)}: expected (1, {c}, f, h, w)")
    windows = make_context_windows(config, model.config, latents.shape[2])
    k, t = config.top_k or windows.length, config.extraction_timestep
    config.check("top_k", k <= windows.length, f"1 to {windows.length}, the window's frames")
    x0, noise = (x.to(model.device, torch.float32)
                 for x in (latents, reference_noise(latents) if noise is None else noise))
    z, null_text = model.schedule.add_noise(x0, noise, t).to(model.dtype), model.encode_text([""])
    request = AttentionRequest(temporal=config.guidance_blocks)

    def attention(offset: int) -> AttentionMaps:
        frames = windows.frame_indices(offset)
        residuals = model.controlnet_residuals(control, t, null_text, frames)
        return model.unet.forward_to_attention(z[:, :, frames], t, null_text, request, residuals)

    metadata = motion_metadata(config, windows, *latents.shape[3:]) | {"model": model.sha256}
    return top_k_motion([attention(offset) for offset in windows.offsets], k, metadata)


def motion_metadata(config: SampleConfig, windows: ContextWindows, *grid: int) -> dict[str, Any]:
    """Return the settings and sizes that a motion depends on; `grid` is h, w of the latents."""
    return dict(
        extraction_timestep=config.extraction_timestep, top_k=config.top_k or windows.length,
        guidance_blocks=list(config.guidance_blocks), num_frames=windows.num_frames, height=grid[0],
        width=grid[1], context_length=windows.length, context_offsets=list(windows.offsets))


def top_k_motion(maps: Sequence[AttentionMaps], k: int, metadata: dict[str, Any]) -> Motion:
    """Return the k largest values of each row of the temporal maps (MotionClone, eqs. 4 and 5).

    Args:
        maps: Temporal maps of each context window.
        k: Values kept of each row.
        metadata: Origin of the motion.

    Raises:
        NumericalError: If the attention is not finite.
    """
    top = {name: torch.cat([m.temporal[name] for m in maps]).topk(k) for name in maps[0].temporal}
    if not all(torch.isfinite(values).all() for values, _ in top.values()):
        raise NumericalError("the reference's attention is not finite: dtype float32 may help")
    metadata = metadata | {"grids": {name: list(maps[0].grids[name]) for name in top}}
    return Motion({name: values for name, (values, _) in top.items()},
                  {name: indices for name, (_, indices) in top.items()}, metadata)


def motion_loss(maps: Mapping[str, Tensor], motion: Motion,
                block_weights: Mapping[str, float] | None = None) -> Tensor:
    """Return the masked temporal-attention loss (MotionClone, eqs. 3 and 6).

    Args:
        maps: Temporal attention of the generated clip, by layer name, each (b*h*w, heads, f, f).
        motion: Motion of the reference, extracted with the same settings.
        block_weights: Weight of each block by name; 1 for blocks that are not named.

    Returns:
        Scalar float32: the sum over layers of the mean squared difference at the motion's indices.
    """
    losses = []
    for name, values in motion.values.items():
        if maps[name].shape[:3] != values.shape[:3]:
            raise InputError(f"the motion of {name} is not of the map's size: extract it again")
        generated = maps[name].gather(-1, motion.indices[name])
        weight = next((w for block, w in (block_weights or {}).items()
                       if f"{name}.".startswith(block + ".")), 1.0)
        losses.append(weight * (generated - values).square().mean())
    return torch.stack(losses).sum()
