"""The HTML report: clips, their temporal attention and the guidance of each step, in one file."""
import base64
import dataclasses
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..clone import Reference, control_condition, subject_masks
from ..config import SampleConfig
from ..files import atomic_write, nonfinite_to_none
from ..inversion import InvertedReference
from ..model import Model
from ..motion import Motion, extract_motion
from ..sampler import SamplerStep
from .report import result_line
from .tracking import tracklets

TEMPLATE = Path(__file__).with_name("html_report.html")
MAX_SIDE = 256                          # pixels: longest side of a frame on the page
MAX_BYTES = 1_350_000                   # compressed size of all maps, before base64
PATH_KEYS = {"reference", "weights", "images", "loras", "inputs"}       # of a record


class ClipView(NamedTuple):
    """A clip on the page.

    Attributes:
        title: Name of the clip.
        note: How its attention was read.
        frames: Frames (f, 3, H, W) in [-1, 1]; None if they are not known.
        motion: All values of its attention maps, or those that are known.
    """

    title: str
    note: str
    frames: Tensor | None
    motion: Motion


def write_html_report(folder: Path, model: Model, prompt: str, config: SampleConfig,
                      reference: Reference, latents_by_name: Mapping[str, Tensor],
                      steps: Sequence[SamplerStep], record: Mapping[str, Any],
                      control: Tensor | None = None) -> None:
    """Write index.html into a folder: one page that any browser opens without a network.

    Args:
        folder: New or empty folder, or one that this function wrote.
        model: The model that sampled the clips.
        prompt: What the clips show.
        config: Settings of the clone.
        reference: The reference of the clone.
        latents_by_name: Scaled latents (1, c, f, h, w) of the clips "unguided" and "clone".
        steps: Steps of the clone's sampling.
        record: What the page lists as settings; must have "prompt" and "fps".
        control: Condition of SparseCtrl of the clips.

    Raises:
        InputError: If the folder cannot be written.
    """
    motion, frames, t = reference.motion, reference.frames, config.extraction_timestep
    full = dataclasses.replace(config, top_k=0)         # all values of the attention maps
    note = f"noised once to timestep {t}, without a prompt"
    if isinstance(motion, InvertedReference):
        t = min(motion.latents)
        note = f"inverted to timestep {t}, with its own prompt"
        motion, full_motion = (motion.motion_at(t, settings) for settings in (config, full))
    elif frames is None or reference.latents is None:
        note, full_motion = "not available; only its motion is known", motion
    else:               # the reference is read with its own frames as control images
        mask = torch.zeros(1, 1) if control is None else control[0, -1].flatten(1)
        images = {i: frames[i, None] for i in mask.any(dim=1).nonzero()[:, 0].tolist()}
        full_motion = extract_motion(model, reference.latents, full,
                                     control=control_condition(model, images, config))
    clips = [ClipView("reference", note, frames, full_motion)]
    for name, origin in ("unguided", "from the same noise; "), ("clone", ""):
        z, settings = latents_by_name[name], dataclasses.replace(full, extraction_timestep=t)
        clips.append(ClipView(
            name, f"{origin}finished, then noised once to timestep {t}, without a prompt",
            model.vae.decode(z).float().cpu(), extract_motion(model, z, settings, control=control)))
    subject = subject_masks(model, prompt, reference, config)
    write_page(folder, clips, motion, subject.masks(t) if subject else (), steps, record)


def write_page(folder: Path, clips: Sequence[ClipView], motion: Motion, masks: Sequence[Tensor],
               steps: Sequence[SamplerStep], record: Mapping[str, Any]) -> None:
    """Write the page of clips, the reference first.

    Args:
        folder: As for `write_html_report`.
        clips: The clips.
        motion: Motion representation that guided the clone.
        masks: Masks (f, h, w) of the reference's subject and of its background, or nothing.
        steps: Steps of the clone's sampling.
        record: As for `write_html_report`.
    """
    shape = [motion.metadata[name] for name in ("num_frames", "height", "width")]
    _, heads, _, k = next(iter(motion.values.values())).shape
    grid, maps = compress_maps([*(dense_maps(clip.motion) for clip in clips),
                                dense_maps(motion, ranks=True)], motion.metadata["grids"])
    data = {
        "shape": shape, "layers": list(motion.values), "heads": heads, "k": k, "grid": grid,
        "maps": maps, "result": result_line(record.get("report", {})),
        "record": {key: file_names(v) if key in PATH_KEYS else v for key, v in record.items()},
        "steps": [(step.timestep, step.loss, step.guidance_weight) for step in steps],
        "clips": [{"title": c.title, "note": c.note, **sprite_and_tracks(c.frames)} for c in clips],
        "masks": [(F.interpolate(mask[None].cpu(), grid)[0] * 100).round().int().flatten(1).tolist()
                  for mask in masks]}
    text = json.dumps(nonfinite_to_none(data), allow_nan=False).replace("<", r"\u003c")
    with atomic_write(folder, is_folder=True) as temporary:
        (temporary / "index.html").write_text(
            TEMPLATE.read_text("utf-8").replace("{{data}}", text), "utf-8")


def file_names(value: Any) -> Any:
    """Return a part of a record with the names of files in place of their paths.

    A page may be published, but the folders of its author are private. Dictionaries become lists of
    pairs, because two files may have the same name.
    """
    if isinstance(value, (Mapping, list, tuple)):
        return [file_names(v) for v in (value.items() if isinstance(value, Mapping) else value)]
    return Path(value).name if isinstance(value, str) else value


def dense_maps(motion: Motion, ranks: bool = False) -> dict[str, Tensor]:
    """Return the maps (h*w, heads, f, f) of a motion by layer, uint8, 0 where a value is not known.

    Args:
        motion: The motion. Where context windows overlap, the last one counts.
        ranks: Whether to return 2 for the largest value of a row and 1 for its other values,
            instead of the values times 255.
    """
    maps, windows = {}, motion.windows
    for name, values in motion.values.items():
        positions, heads = len(values) // len(windows.offsets), values.shape[1]
        maps[name] = torch.zeros(positions, heads, *[windows.num_frames] * 2, dtype=torch.uint8)
        for offset in windows.offsets:
            window, frames = motion.window(offset), windows.frame_indices(offset)
            levels = (window.values[name].cpu() * 255).round().byte()
            if ranks:
                levels = (1 + (torch.arange(values.shape[-1]) == 0)).byte().expand_as(levels)
            rows = torch.zeros_like(maps[name][:, :, frames])
            maps[name][:, :, frames] = rows.scatter(-1, frames[window.indices[name].cpu()], levels)
    return maps


def compress_maps(tables: Sequence[Mapping[str, Tensor]], grids: Mapping[str, Sequence[int]]
                  ) -> tuple[tuple[int, int], str]:
    """Return a grid of positions (rows, columns), and the maps there, compressed.

    The grid is that of the coarsest layer, or its every second, third, ... row and column until
    the maps fit into MAX_BYTES.

    Args:
        tables: Maps (h*w, heads, f, f) by layer, of each clip.
        grids: Rows and columns of each layer's positions.

    Returns:
        The grid, and base64 of the zlib-compressed bytes (table, layer, position, head, f, f).
    """
    h, w = min(grids.values(), key=math.prod)
    for stride in range(1, max(h, w) + 1):
        grid = -(-h // stride), -(-w // stride)
        maps = [subsample_positions(m, grids[n], grid) for t in tables for n, m in t.items()]
        data = zlib.compress(torch.stack(maps).numpy().tobytes())
        if len(data) <= MAX_BYTES:
            break
    return grid, base64.b64encode(data).decode()


def subsample_positions(maps: Tensor, source: Sequence[int], target: tuple[int, int]) -> Tensor:
    """Return the maps (h*w, ...) of a source grid at the cell centers of a target grid."""
    y, x = (((torch.arange(target[i]) + 0.5) / target[i] * source[i]).long() for i in (0, 1))
    return maps[(y[:, None] * source[1] + x).flatten()]


def sprite_and_tracks(frames: Tensor | None) -> dict[str, Any]:
    """Return the data URL of one image of all frames, and the tracks of points.

    Args:
        frames: Frames (f, 3, H, W) in [-1, 1], or None. The image has ceil(sqrt(f)) columns.

    Returns:
        "sprite" and "tracks"; the tracks are in thousandths of half widths.
    """
    if frames is None:
        return {"sprite": "", "tracks": []}
    f, _, h, w = frames.shape
    scale, columns = min(1.0, MAX_SIDE / max(h, w)), math.ceil(math.sqrt(f))
    size = max(1, round(h * scale)), max(1, round(w * scale))
    small = F.interpolate(frames.cpu().float(), size, mode="area").clamp(-1, 1)
    pixels = rearrange((F.pad(small, (0, 0, 0, 0, 0, 0, 0, -f % columns)) + 1) * 127.5,
                       "(y x) c h w -> (y h) (x w) c", x=columns)
    image = iio.imwrite("<bytes>", pixels.round().byte().numpy(), extension=".webp", quality=80)
    return {"sprite": f"data:image/webp;base64,{base64.b64encode(image).decode()}",
            "tracks": (tracklets(frames) * 1000).round().int().tolist()}
