"""The motion of a clip: the strongest temporal attention in it (arXiv 2406.05338, section 4)."""
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .config import LEVELS, SampleConfig
from .errors import InputError, NumericalError
from .files import save_safetensors
from .model import Model
from .networks.temporal import Attended, Wanted
from .context_windows import Windows, windows_of

FORMAT = "mcl-motion-1"


@dataclass(frozen=True)
class Motion:
    """What is kept of a reference clip: H = {L, M} of eq. 6.

    values   layer -> (b*h*w, heads, f, k) float32, the k largest attention weights of each row
    indices  layer -> (b*h*w, heads, f, k) int64, the frames that they point at
    info     where it comes from: model (sha256), t, k, blocks, frames, height, width (of the
             latents), and whatever the caller wants to remember; of a long clip, whose windows
             are the b, also window and starts, their length and first frames
    """
    values: dict[str, Tensor]
    indices: dict[str, Tensor]
    info: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> "Motion":
        return Motion({name: v.to(device) for name, v in self.values.items()},
                      {name: i.to(device) for name, i in self.indices.items()}, self.info)

    @property
    def windows(self) -> Windows:
        """In which it was read."""
        length = next(iter(self.values.values())).shape[2]
        return Windows(self.info.get("frames", length), length,
                       tuple(self.info.get("starts", (0,))))

    def at(self, start: int) -> "Motion":
        """What was read in the window that begins at a frame; of a single window, that one."""
        starts = self.windows.starts
        if len(starts) == 1:
            return self
        values, indices = ({name: x.chunk(len(starts))[starts.index(start)]
                            for name, x in kept.items()} for kept in (self.values, self.indices))
        return Motion(values, indices, self.info)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all; frame numbers are stored as bytes."""
        tensors = {f"values.{name}": v.float().cpu() for name, v in self.values.items()}
        tensors |= {f"indices.{name}": i.to(torch.uint8).cpu() for name, i in self.indices.items()}
        save_safetensors(path, tensors, {"format": FORMAT, "info": json.dumps(self.info)})

    @classmethod
    def load(cls, path: str | Path) -> "Motion":
        """Reads what `save` wrote. Raises InputError for any other file."""
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: not a motion file that can be read ({error})") from error
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path}: not a motion file, which `Motion.save` writes")
        split: dict[str, dict[str, Tensor]] = {"values": {}, "indices": {}}
        for key, tensor in tensors.items():
            kind, _, layer = key.partition(".")
            split.setdefault(kind, {})[layer] = tensor
        try:
            info = json.loads(metadata["info"])
            check_motion(split, info)
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: a damaged motion file ({error}); read the motion "
                             "again") from error
        indices = {name: i.long() for name, i in split["indices"].items()}
        return cls(split["values"], indices, info)


def check_motion(tensors: Mapping[str, Mapping[str, Tensor]], info: Any) -> None:
    """Raises ValueError, KeyError or TypeError for what `Motion.save` cannot have written."""
    frames, k = info["frames"], info["k"]
    length, starts = info.get("window", frames), info.get("starts", [0])
    numbers = [*(info[name] for name in ("t", "k", "frames", "height", "width")), length, *starts]
    if not all(type(n) is int and 0 <= n <= 1 << 16 for n in numbers) or not (
            1 <= k <= length <= frames and info["height"] and info["width"]):
        raise ValueError(f"its sizes are {numbers}")
    if not isinstance(info["model"], str) or not isinstance(info["blocks"], list):
        raise TypeError("its model or blocks are none")
    if set(tensors) != {"values", "indices"} or not tensors["values"] or (
            set(tensors["values"]) != set(tensors["indices"])):
        raise ValueError("its values and indices are not of the same layers")
    # Each level of the UNet halves the sides, upwards rounded.
    places = {len(starts) * -(-info["height"] // 2 ** n) * -(-info["width"] // 2 ** n)
              for n in range(LEVELS)}
    for layer, values in tensors["values"].items():
        indices = tensors["indices"][layer]
        if values.ndim != 4 or values.shape != indices.shape or values.shape[2:] != (length, k) or (
                values.shape[0] not in places):
            raise ValueError(f"{layer} is {tuple(values.shape)} and {tuple(indices.shape)}")
        if values.dtype != torch.float32 or indices.dtype != torch.uint8 or not (
                (0 <= values) & (values <= 1 + 1e-3)).all() or (indices >= length).any():
            raise ValueError(f"{layer} holds what no attention is")


@torch.no_grad()
def extract_motion(model: Model, latents: Tensor, config: SampleConfig | None = None, *,
                   noise: Tensor | None = None, generator: torch.Generator | None = None,
                   condition: Tensor | None = None) -> Motion:
    """Reads the motion of a clip off one noised pass of the UNet, without inversion.

    latents    (1, c, f, h, w), scaled, of the reference
    config     whose extract_t, top_k and blocks say what is read; the model's own where not given
    noise      like latents, standard normal; drawn from the CPU `generator` where not given
    condition  of a model with SparseCtrl: the reference's own frames, at the places where the
               new clip will be given others (`sparse_condition`)

    The null prompt, conditional branch only; the pass ends after the last block that is read. A
    clip of more frames than the model knows is read in the windows that `sample` sees it in. Raises
    InputError for latents of another shape, a block without temporal attention, and a top_k of more
    than the number of frames, of a window if there are several; NumericalError where the attention
    is not finite.
    """
    config = config or model.config.sample
    if latents.ndim != 5 or latents.shape[:2] != (1, model.config.unet.in_channels):
        raise InputError(f"latents of shape {tuple(latents.shape)}, where those of one clip are "
                         f"wanted: (1, {model.config.unet.in_channels}, f, h, w)")
    frames, t, k = latents.shape[2], config.extract_t, config.top_k
    windows = windows_of(frames, config, model.config.unet.max_frames)
    if k > windows.length:
        raise InputError(f"top_k = {k} is not possible: 1 to the number of frames, "
                         f"{windows.length}")
    if noise is None:
        noise = torch.randn(latents.shape, generator=generator)
    z = model.schedule.add_noise(latents.to(model.device).float(), noise.to(model.device).float(),
                                 t)
    null = model.encode_text([""])

    def maps(start: int) -> dict[str, Tensor]:
        here = windows.at(start)
        given = None if condition is None else condition[:, :, here]
        return model.unet.attend(z[:, :, here].to(model.dtype), t, null, Wanted(config.blocks),
                                 model.residuals(given, t, null)).temporal_maps

    return finite(strongest(map(maps, windows.starts), k, windows, {
        "model": model.sha256, "t": t, "k": k, "blocks": list(config.blocks), "frames": frames,
        "height": latents.shape[3], "width": latents.shape[4]}))


def strongest(maps: Iterable[Mapping[str, Tensor]], k: int, windows: Windows, info: dict[str, Any]
              ) -> Motion:
    """The k largest values of each row of the maps, one set of them for each window, and where they
    are (eqs. 4, 5)."""
    top = [{name: probs.topk(k, dim=-1) for name, probs in seen.items()} for seen in maps]
    several = {"window": windows.length, "starts": list(windows.starts)} if len(top) > 1 else {}
    return Motion({name: torch.cat([found[name].values for found in top]) for name in top[0]},
                  {name: torch.cat([found[name].indices for found in top]) for name in top[0]},
                  info | several)


def finite(motion: Motion) -> Motion:
    """The same. Raises NumericalError where it is not finite."""
    if not all(torch.isfinite(values).all() for values in motion.values.values()):
        raise NumericalError("the reference's attention is not finite: dtype float32 may mend it")
    return motion


def motion_loss(maps: Mapping[str, Tensor], motion: Motion,
                block_weights: Mapping[str, float] | None = None) -> Tensor:
    """How far the maps are from the motion, at its indices alone: a float32 scalar (eqs. 3, 6).

    The sum over layers of the mean square difference, in the published code's scaling; each
    weighted by the block whose layer it is, where `block_weights` names that.
    """
    losses = []
    for name, values in motion.values.items():
        generated = maps[name].gather(-1, motion.indices[name])
        weight = next((w for block, w in (block_weights or {}).items()
                       if f"{name}.".startswith(block + ".")), 1.0)
        losses.append(weight * (generated - values).square().mean())
    return torch.stack(losses).sum()


@dataclass(frozen=True)
class Guide:
    """What steers a clip while it is sampled: the gradient of a loss of its own attention.

    wanted  the attention that the loss reads, by the names of blocks or layers
    loss    of what was wanted, and the timestep: a float32 scalar that is descended, weighted by
            lambda, SampleConfig.motion_weight; of a long clip it is asked for each window, whose
            first frame is `Attended.start`
    """
    wanted: Wanted
    loss: Callable[[Attended, int], Tensor]


def motion_guide(motion: Motion, block_weights: Mapping[str, float] | None = None) -> Guide:
    """Towards the motion, by `motion_loss`; whose tensors are on the model's device."""
    return Guide(Wanted(temporal_maps=tuple(motion.values)),
                 lambda seen, t: motion_loss(seen.temporal_maps, motion.at(seen.start),
                                             block_weights))
