"""The motion representation: extraction from a reference, file, and loss (arXiv 2406.05338).

The motion of a clip is the largest temporal attention weights and the frames that they point at,
H = {L, M} in eq. 6 of the paper.
"""
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import MAX_LEVELS, SampleConfig
from .context_windows import ContextWindows, make_context_windows
from .errors import InputError, NumericalError
from .files import save_safetensors
from .model import Model
from .networks.attention import AttentionMaps, AttentionRequest

FORMAT = "mcl-motion-2"
# The noise of the reference does not depend on the user's seed: a reference has one motion. PyTorch
# uses 32 bits of a seed, so this noise is also the initial noise of seed 0, and of no other seed.
REFERENCE_SEED = 1 << 32
SETTINGS = ("extraction_timestep", "top_k", "guidance_blocks")      # that a motion depends on


@dataclass(frozen=True)
class Motion:
    """Motion representation of a reference clip: H = {L, M} (MotionClone, eq. 6).

    Attributes:
        values: By layer name, the k largest attention weights of each row, (b*h*w, heads, f, k)
            float32. In a long clip, b counts the context windows.
        indices: By layer name, the frames that the values point at, like values, int64.
        metadata: Origin of the motion: model (sha256), extraction_timestep, top_k,
            guidance_blocks, num_frames, height and width (of the latents), grids (rows and columns
            by layer); for a long clip also context_length and context_offsets; and anything that
            the caller adds.
    """

    values: dict[str, Tensor]
    indices: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Motion":
        """Return the motion with its tensors on a device."""
        return Motion({name: v.to(device) for name, v in self.values.items()},
                      {name: i.to(device) for name, i in self.indices.items()}, self.metadata)

    @property
    def windows(self) -> ContextWindows:
        """The context windows that the motion was extracted from."""
        length = next(iter(self.values.values())).shape[2]
        return ContextWindows(self.metadata.get("num_frames", length), length,
                              tuple(self.metadata.get("context_offsets", (0,))))

    def window(self, offset: int) -> "Motion":
        """Return the motion of the context window that starts at a frame."""
        offsets = self.windows.offsets
        if len(offsets) == 1:
            return self
        values, indices = ({name: x.chunk(len(offsets))[offsets.index(offset)]
                            for name, x in tensors.items()}
                           for tensors in (self.values, self.indices))
        return Motion(values, indices, self.metadata)

    def check_model(self, model: Model, config: SampleConfig) -> None:
        """Raise InputError if the motion does not fit the model or the settings."""
        if self.metadata.get("model", model.sha256) != model.sha256:
            raise InputError("the motion was extracted with another model: extract it again with "
                             "this model")
        self.check_config(config, model.latent_shape(config)[2:],
                          model.config.unet.motion_max_seq_length)

    def check_config(self, config: SampleConfig, shape: tuple[int, int, int], max_length: int
                     ) -> None:
        """Raise InputError if the motion was extracted at another size or with other settings.

        Args:
            config: Settings of the new clip.
            shape: (f, h, w) of the new clip's latents.
            max_length: Frames that the UNet can see at once.
        """
        size = tuple(self.metadata.get(name, n)
                     for name, n in zip(("num_frames", "height", "width"), shape))
        if size != shape:
            raise InputError("the motion was extracted from {} frames of {}x{} latents, not {} of "
                             "{}x{}: use the same size and length".format(*size, *shape))
        if self.windows != make_context_windows(config.num_frames, config, max_length):
            raise InputError(f"the motion was extracted in windows of {self.windows.length} frames "
                             f"that start at {self.windows.offsets}: use the same context_length, "
                             "context_overlap and closed_loop")
        for name in SETTINGS:
            value = getattr(config, name)
            value = list(value) if isinstance(value, tuple) else value
            if name == "top_k":
                value = value or self.windows.length
            if self.metadata.get(name, value) != value:
                raise InputError(f"the motion was extracted with {name} = {self.metadata[name]}, "
                                 f"the settings have {value}: extract it again or use its settings")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically; indices are stored as bytes."""
        tensors = {f"values.{name}": v.float().cpu() for name, v in self.values.items()}
        tensors |= {f"indices.{name}": i.to(torch.uint8).cpu() for name, i in self.indices.items()}
        save_safetensors(path, tensors, {"format": FORMAT, "metadata": json.dumps(self.metadata)})

    @classmethod
    def load(cls, path: str | Path) -> "Motion":
        """Read a file that `save` wrote. Raises InputError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a motion file ({error}). Give a file that "
                             "--save-motion or Motion.save wrote") from error
        if header.get("format") != FORMAT:
            raise InputError(f"{path}: not a motion file of this version. Give a file that "
                             "--save-motion or Motion.save wrote")
        split: dict[str, dict[str, Tensor]] = {"values": {}, "indices": {}}
        for key, tensor in tensors.items():
            kind, _, layer = key.partition(".")
            split.setdefault(kind, {})[layer] = tensor
        try:
            metadata = json.loads(header["metadata"])
            validate_motion_file(split, metadata)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: a damaged motion file ({error}). Extract the motion "
                             "again") from error
        indices = {name: i.long() for name, i in split["indices"].items()}
        return cls(split["values"], indices, metadata)


def validate_motion_file(tensors: Mapping[str, Mapping[str, Tensor]], metadata: Any) -> None:
    """Raise ValueError, KeyError or TypeError for content that `Motion.save` cannot have written."""
    num_frames, k = metadata["num_frames"], metadata["top_k"]
    height, width = metadata["height"], metadata["width"]
    length = metadata.get("context_length", num_frames)
    offsets = metadata.get("context_offsets", [0])
    numbers = [metadata["extraction_timestep"], k, num_frames, height, width, length, *offsets]
    if not all(type(n) is int and 0 <= n <= 1 << 16 for n in numbers) or not (
            1 <= k <= length <= num_frames and height and width):
        raise ValueError(f"its sizes are {numbers}")
    if not isinstance(metadata["model"], str) or not isinstance(metadata["guidance_blocks"], list):
        raise TypeError("its model or guidance_blocks are missing")
    if set(tensors) != {"values", "indices"} or not tensors["values"] or (
            set(tensors["values"]) != set(tensors["indices"])):
        raise ValueError("its values and indices are not of the same layers")
    # Each level of the UNet halves height and width, rounded up.
    grids = [[-(-height // 2 ** n), -(-width // 2 ** n)] for n in range(MAX_LEVELS)]
    for layer, values in tensors["values"].items():
        indices, grid = tensors["indices"][layer], metadata["grids"][layer]
        if values.ndim != 4 or values.shape != indices.shape or values.shape[2:] != (length, k) or (
                grid not in grids or values.shape[0] != len(offsets) * grid[0] * grid[1]):
            raise ValueError(f"{layer} is {tuple(values.shape)} and {tuple(indices.shape)}")
        if values.dtype != torch.float32 or indices.dtype != torch.uint8 or not (
                (0 <= values) & (values <= 1 + 1e-3)).all() or (indices >= length).any():
            raise ValueError(f"{layer} holds values that no attention map has")


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
    config = config or model.config.sample
    if latents.ndim != 5 or latents.shape[:2] != (1, model.config.unet.in_channels):
        raise InputError(f"latents have shape {tuple(latents.shape)}: expected those of one clip, "
                         f"(1, {model.config.unet.in_channels}, f, h, w)")
    t = config.extraction_timestep
    windows = make_context_windows(latents.shape[2], config,
                                   model.config.unet.motion_max_seq_length)
    k = config.top_k or windows.length
    if k > windows.length:
        raise InputError(f"top_k = {k} is out of range: it must be between 1 and "
                         f"{windows.length}, the number of frames in a window")
    noise = reference_noise(latents) if noise is None else noise
    z = model.schedule.add_noise(latents.to(model.device).float(), noise.to(model.device).float(),
                                 t)
    null_text = model.encode_text([""])
    request = AttentionRequest(temporal=config.guidance_blocks)

    def attention(offset: int) -> AttentionMaps:
        indices = windows.frame_indices(offset)
        condition = None if control is None else control[:, :, indices]
        return model.unet.forward_to_attention(
            z[:, :, indices].to(model.dtype), t, null_text, request,
            model.controlnet_residuals(condition, t, null_text))

    return check_finite(top_k_motion(map(attention, windows.offsets), k, windows, {
        "model": model.sha256, "extraction_timestep": t, "top_k": k,
        "guidance_blocks": list(config.guidance_blocks), "num_frames": windows.num_frames,
        "height": latents.shape[3], "width": latents.shape[4]}))


def top_k_motion(attention: Iterable[AttentionMaps], k: int, windows: ContextWindows,
                 metadata: dict[str, Any]) -> Motion:
    """Return the k largest values of each row of the temporal maps (MotionClone, eqs. 4 and 5).

    Args:
        attention: Temporal maps of each context window.
        k: Values kept of each row.
        windows: The context windows.
        metadata: Origin of the motion.
    """
    top, grids = [], {}
    for maps in attention:
        top.append({name: probs.topk(k, dim=-1) for name, probs in maps.temporal.items()})
        grids = {name: list(maps.grids[name]) for name in maps.temporal}
    metadata = metadata | {"grids": grids}
    if len(top) > 1:
        metadata |= {"context_length": windows.length, "context_offsets": list(windows.offsets)}
    return Motion({name: torch.cat([layers[name].values for layers in top]) for name in top[0]},
                  {name: torch.cat([layers[name].indices for layers in top]) for name in top[0]},
                  metadata)


def check_finite(motion: Motion) -> Motion:
    """Return `motion` unchanged. Raises NumericalError if it contains NaN or infinity."""
    if not all(torch.isfinite(values).all() for values in motion.values.values()):
        raise NumericalError("the reference's attention is not finite: dtype float32 may help")
    return motion


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
        generated = maps[name].gather(-1, motion.indices[name])
        weight = next((w for block, w in (block_weights or {}).items()
                       if f"{name}.".startswith(block + ".")), 1.0)
        losses.append(weight * (generated - values).square().mean())
    return torch.stack(losses).sum()
