"""The page of --maps: clips, their temporal attention and what the guidance did, in one file."""
import base64
import io
import itertools
import json
import math
import zlib
from pathlib import Path
from typing import Any, Mapping, NamedTuple, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from ..files import atomic_write, nonfinite_to_none
from ..motion import Motion
from ..semantic import Masks, infer_grid
from .tracking import tracklets

TEMPLATE = Path(__file__).with_name("html_report.html")
SIDE = 256                              # pixels, which no side of a frame is longer than
LARGEST = 1_350_000                     # bytes of all maps, compressed, but not yet as text


class Shown(NamedTuple):
    """A clip on the page, and its attention: all values of a row, or those that are known."""
    title: str
    note: str                           # how the attention was read
    frames: Tensor | None               # (f, 3, H, W) in [-1, 1]; None where they are not at hand
    motion: Motion


def write_page(folder: Path, clips: Sequence[Shown], kept: Motion, masks: Masks | None,
               steps: Sequence[tuple[int, float | None, float]], record: Mapping[str, Any]) -> None:
    """Writes index.html into a folder: one file, which opens in any browser and fetches nothing.

    clips   the reference first, the clone last
    kept    the motion representation
    masks   where semantic guidance found the reference's subject
    steps   of sampling: the timestep, g where its gradient was taken, and lambda
    record  what the clip was made of, by its names; prompt and fps are among them

    Raises InputError where the folder cannot be written.
    """
    shape = kept.info["frames"], kept.info["height"], kept.info["width"]
    _, heads, _, k = next(iter(kept.values.values())).shape
    grid, maps = packed([*(spread(clip.motion) for clip in clips), spread(kept, ranked=True)],
                        shape[1] / shape[2])
    data = {
        "shape": shape, "layers": list(kept.values), "heads": heads, "k": k, "grid": grid,
        "maps": maps, "steps": steps, "record": record,
        "clips": [{"title": clip.title, "note": clip.note, **pictured(clip.frames)}
                  for clip in clips],
        "masks": [] if masks is None else [
            (F.interpolate(mask[None].cpu(), grid)[0] * 100).round().int().flatten(1).tolist()
            for mask in masks]}
    text = json.dumps(nonfinite_to_none(data), allow_nan=False).replace("<", r"\u003c")
    with atomic_write(folder, folder=True) as temporary:
        page = TEMPLATE.read_text("utf-8").replace("{{data}}", text)
        (temporary / "index.html").write_text(page, "utf-8")


def spread(motion: Motion, ranked: bool = False) -> dict[str, Tensor]:
    """Maps (h*w, heads, f, f) of all frames, uint8: a motion's values in 255ths or, ranked, 2 for
    the strongest of a row and 1 for others that it has; 0 elsewhere. Where windows overlap, a row
    is of the last of them."""
    maps, windows = {}, motion.windows
    for name, values in motion.values.items():
        places, heads = len(values) // len(windows.starts), values.shape[1]
        maps[name] = torch.zeros(places, heads, *[windows.frames] * 2, dtype=torch.uint8)
        for start in windows.starts:
            part, here = motion.at(start), windows.at(start)
            rank = 1 + (torch.arange(values.shape[-1]) == 0).expand(part.values[name].shape).byte()
            found = rank if ranked else (part.values[name].cpu() * 255).round().byte()
            rows = found.new_zeros(*found.shape[:3], windows.frames)
            maps[name][:, :, here] = rows.scatter(-1, here[part.indices[name].cpu()], found)
    return maps


def packed(tables: Sequence[Mapping[str, Tensor]], aspect: float) -> tuple[tuple[int, int], str]:
    """The grid of places, and tables (table, layer, place, head, f, f) of LARGEST bytes at most:
    at all places of the coarsest layer or, if those are too many, one in 2x2 of them, 3x3, ..."""
    h, w = infer_grid(min(map(len, tables[0].values())), aspect)
    for stride in itertools.count(1):
        grid = -(-h // stride), -(-w // stride)
        chosen = [torch.stack([thinned(maps, grid, aspect) for maps in table.values()])
                  for table in tables]
        data = zlib.compress(torch.stack(chosen).numpy().tobytes())
        if len(data) <= LARGEST or grid == (1, 1):
            break
    return grid, base64.b64encode(data).decode()


def thinned(maps: Tensor, grid: tuple[int, int], aspect: float) -> Tensor:
    """Of maps (h*w, ...) those in the middles of the cells of a grid: (rows*columns, ...)."""
    h, w = infer_grid(len(maps), aspect)
    y, x = (((torch.arange(n) + 0.5) / n * size).long() for n, size in zip(grid, (h, w)))
    return maps[(y[:, None] * w + x).flatten()]


def pictured(frames: Tensor | None) -> dict[str, Any]:
    """The address of one picture of all frames (f, 3, H, W), in rows of ceil(sqrt(f)), and the
    tracks of points in thousandths of half widths."""
    if frames is None:
        return {"sprite": "", "tracks": []}
    f, _, h, w = frames.shape
    scale, columns = min(1.0, SIDE / max(h, w)), math.ceil(math.sqrt(f))
    size = max(1, round(h * scale)), max(1, round(w * scale))
    small = F.interpolate(frames.cpu().float(), size, mode="area").clamp(-1, 1)
    full = F.pad(small, (0, 0, 0, 0, 0, 0, 0, -f % columns))
    pixels = rearrange((full + 1) * 127.5, "(y x) c h w -> (y h) (x w) c", x=columns)
    file = io.BytesIO()
    Image.fromarray(pixels.round().byte().numpy()).save(file, "WEBP", quality=80)
    return {"sprite": f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}",
            "tracks": (tracklets(frames) * 1000).round().int().tolist()}
