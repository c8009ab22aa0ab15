"""Clips on disk to frames in [-1, 1]; (h, w) as stored, (H, W) as asked for."""
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from .decode import image_rgba, pictures
from ..errors import InputError

FITS = ("crop", "pad", "stretch")
LONG_STEP = 2.1  # times the step that motion modules know: what is longer is new to them


def read_video(path: str | os.PathLike, frames: int, size: tuple[int, int], start: float = 0.0,
               duration: float | None = None, fit: str = "crop", *, stride: int | None = None,
               known_fps: float | None = None) -> torch.Tensor:
    """Read `frames` frames, spread evenly in time, as (f, 3, H, W) float32 in [-1, 1].

    Frame i is the one on screen (or due within a quarter of a frame, as files round their
    times) at `start + i * T / frames` seconds; T is `duration`, or the rest of the clip. So a
    window of `frames` frames is taken one to one; one of fewer repeats them, with a warning.
    With a `stride`, which goes without `duration`, they are every so manieth from `start` on.

    path: a video (mp4, mov, webm, mkv, avi, ts, flv, wmv, ogv, ...), gif, webp or apng, by its
        content, whatever its name; or a folder of images (png, jpg, webp, bmp), all of one size,
        taken in natural order (2 before 10) at 8 frames per second.
    size: (H, W). fit: "crop" takes the largest central part of that aspect ratio, "pad" adds
        black bars, "stretch" changes the aspect ratio. Pixels are taken to be square.
    known_fps: the frames per second that the motion modules were trained with (`config.fps`, of
        AnimateDiff 8), if much longer steps are to be warned of.

    The file is decoded twice, so that of a long clip only the chosen frames are held.
    Transparent parts become black, and HDR (HLG, PQ) what a screen of the usual range shows
    (`colour.to_sdr`). Raises InputError where the file or a number is unusable.
    """
    if min(frames, *size) < 1:
        raise InputError(f"frames is {frames} and size {size[0]}x{size[1]}; "
                         "each number must be 1 or more")
    if not start >= 0 or not (duration is None or duration > 0):
        raise InputError(f"start is {start} s and duration {duration} s; "
                         "start must be 0 or more, and duration above 0")
    if stride is not None and (stride < 1 or duration is not None):
        raise InputError(f"stride = {stride} is not possible: 1 or more, and without a duration")
    if fit not in FITS:
        raise InputError(f"fit is {fit!r}; it must be one of {', '.join(FITS)}")
    path = Path(path)
    begins, end = _timeline(path, float("inf") if duration is None else start + duration)
    if start >= end:
        raise InputError(f"{path}: start {start:g} s is past the end; the clip is {end:.2f} s long")

    slack = np.median(np.diff([*begins, end])) / 4
    moments = start + (end - start) * np.arange(frames) / frames + slack
    chosen = (np.searchsorted(begins, moments) - 1).clip(min=0).tolist()
    if stride is not None:
        chosen = [chosen[0] + stride * i for i in range(frames)]
        if chosen[-1] >= len(begins):
            raise InputError(f"{path}: stride = {stride} is not possible: {frames} frames would "
                             f"span {chosen[-1] - chosen[0] + 1}, from the start on there are "
                             f"{len(begins) - chosen[0]}; give a smaller one, or fewer frames")
    step = (begins[chosen[-1]] - begins[chosen[0]]) / max(frames - 1, 1)
    if known_fps is not None and step * known_fps > LONG_STEP:
        warnings.warn(f"{path}: {frames} frames are taken of it, {step:.2f} s apart, where motion "
                      f"modules know {1 / known_fps:.3g} s; duration = {frames / known_fps:.3g} "
                      "reads a window that they know", stacklevel=2)
    if len(set(chosen)) < frames:
        warnings.warn(f"{path}: only {len(set(chosen))} different frames for the {frames} asked "
                      "for; some are repeated", stacklevel=2)
    fitted = {index: _fit(_on_black(rgba()), size, fit)
              for index, (_, _, rgba) in zip(range(chosen[-1] + 1), pictures(path))
              if index in chosen}
    return torch.cat([fitted[index] for index in chosen])


def read_picture(path: str | os.PathLike, size: tuple[int, int], fit: str = "crop"
                 ) -> torch.Tensor:
    """Read one image as (1, 3, H, W) float32 in [-1, 1], brought to `size` as `read_video` does.

    Raises InputError where it is not an image that can be read.
    """
    return _fit(_on_black(image_rgba(Path(path))), size, fit)


def _timeline(path: Path, stop: float) -> tuple[list[float], float]:
    """When each frame before `stop` begins, and `stop` or the end of the clip, in seconds."""
    begins: list[float] = []
    for begin, end, _ in pictures(path):
        if begin >= stop:
            return begins, stop
        begins.append(begin)
    if not begins:
        raise InputError(f"{path}: holds no frame that can be decoded; give a clip that plays")
    return begins, min(stop, end)


def _on_black(rgba: np.ndarray) -> torch.Tensor:
    """(h, w, 4) uint8 to (1, 3, h, w) in [-1, 1], transparency laid over black."""
    pixels = rearrange(torch.from_numpy(rgba.copy()).float(), "h w c -> 1 c h w")
    return pixels[:, :3] * (pixels[:, 3:] / 255) / 127.5 - 1


def _fit(picture: torch.Tensor, size: tuple[int, int], fit: str) -> torch.Tensor:
    """(1, 3, h, w) to (1, 3, H, W)."""
    (h, w), (H, W) = picture.shape[-2:], size
    inner_h, inner_w = size
    if fit == "crop":
        scale = max(H / h, W / w)
        crop_h, crop_w = max(1, round(H / scale)), max(1, round(W / scale))
        top, left = (h - crop_h) // 2, (w - crop_w) // 2
        picture = picture[..., top:top + crop_h, left:left + crop_w]
    if fit == "pad":
        scale = min(H / h, W / w)
        inner_h, inner_w = max(1, round(h * scale)), max(1, round(w * scale))
    inner = F.interpolate(picture, (inner_h, inner_w), mode="bilinear", antialias=True)
    top, left = (H - inner_h) // 2, (W - inner_w) // 2
    bars = (left, W - inner_w - left, top, H - inner_h - top)
    return F.pad(inner.clamp(-1, 1), bars, value=-1.0)  # the filter overshoots by rounding
