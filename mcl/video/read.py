"""Videos, animations and images to frames in [-1, 1].

Shapes: (h, w) as stored, (H, W) as requested.
"""
import os
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange

from ..errors import InputError
from .decode import image_rgba, iter_frames

FITS = ("crop", "pad", "stretch")
MAX_STEP_RATIO = 2.1        # longer frame steps, relative to the training clips', are warned of


def read_video(path: str | os.PathLike, num_frames: int, size: tuple[int, int], start: float = 0.0,
               duration: float | None = None, fit: str = "crop", *, stride: int | None = None,
               model_fps: float | None = None) -> torch.Tensor:
    """Read frames that are spread evenly in time, as (f, 3, H, W) float32 in [-1, 1].

    Frame i is the one on screen at `start + i * T / num_frames` seconds, where T is `duration` or
    the rest of the video. Frames that are due within a quarter of a frame count, because files
    round their times. A part with exactly `num_frames` frames is taken one to one. A part with
    fewer repeats frames, with a warning. The file is decoded twice, so that only the selected
    frames of a long video are in memory. Transparent parts become black. HDR (HLG, PQ) is converted
    to the standard range (`hdr.tonemap_hdr_to_sdr`). Interlaced frames are deinterlaced.

    Args:
        path: A video (mp4, mov, webm, mkv, avi, mpg, ts, flv, wmv, y4m, ...), gif, webp or apng,
            recognized by its content; or a folder of images (png, jpg, webp, bmp) of one size, in
            natural order (2 before 10), at 8 frames per second.
        num_frames: Number of frames to read.
        size: (H, W).
        start: Start of the part to read, in seconds.
        duration: Length of the part in seconds; None for the rest. A part that is shorter, because
            the video ends, gives a warning.
        fit: "crop" takes the largest central part of the target's aspect ratio, "pad" adds black
            bars, "stretch" changes the aspect ratio. Pixels that are not square are made square.
        stride: Take every n-th frame from `start` on, in place of a duration.
        model_fps: Frame rate of the model's training clips, to warn of much longer frame steps.

    Raises:
        InputError: If the file cannot be read or a number is out of range.
    """
    for name, value, is_valid, legal in (("num_frames", num_frames, num_frames >= 1, "1 or more"),
            ("size", size, min(size) >= 1, "1 or more"), ("start", start, start >= 0, "0 or more"),
            ("duration", duration, duration is None or duration > 0, "above 0"),
            ("stride", stride, stride is None or (stride >= 1 and duration is None),
             "1 or more, without a duration"), ("fit", fit, fit in FITS, " or ".join(FITS))):
        if not is_valid:
            raise InputError(f"{name} = {value!r} is out of range: it must be {legal}")
    path = Path(path)
    start_times, end = _frame_times(path, float("inf") if duration is None else start + duration)
    if start >= end:
        raise InputError(f"{path}: start = {start:g} s is past the end, {end:.2f} s")

    tolerance = np.median(np.diff([*start_times, end])) / 4
    if duration is not None and start + duration - end > 4 * tolerance:
        warnings.warn(f"{path}: ends at {end:.2f} s. The part from {start:g} s on has only "
                      f"{end - start:.2f} of the {duration:g} s", stacklevel=2)
    sample_times = start + (end - start) * np.arange(num_frames) / num_frames + tolerance
    indices = (np.searchsorted(start_times, sample_times) - 1).clip(min=0).tolist()
    if stride is not None:
        indices = [indices[0] + stride * i for i in range(num_frames)]
        if indices[-1] >= len(start_times):
            needed, available = indices[-1] - indices[0] + 1, len(start_times) - indices[0]
            raise InputError(f"{path}: stride = {stride} is out of range: {num_frames} frames need "
                             f"{needed}, and there are {available}. Use a smaller stride")
    step = (start_times[indices[-1]] - start_times[indices[0]]) / max(num_frames - 1, 1)
    if model_fps is not None and step * model_fps > MAX_STEP_RATIO:
        warnings.warn(f"{path}: {num_frames} frames are {step:.2f} s apart; the model was trained "
                      f"with {1 / model_fps:.3g} s. Use duration = {num_frames / model_fps:.3g}",
                      stacklevel=2)
    if (num_available := len(start_times) - indices[0]) < num_frames:
        warnings.warn(f"{path}: there are only {num_available} different frames for {num_frames}; "
                      "some are repeated", stacklevel=2)
    timed_frames = zip(range(indices[-1] + 1), iter_frames(path), strict=False)
    frames = {index: _resize(_composite_on_black(frame.decode()), size, fit, frame.pixel_aspect)
              for index, frame in timed_frames if index in indices}
    return torch.cat([frames[index] for index in indices])


def read_image(path: str | os.PathLike, size: tuple[int, int], fit: str = "crop") -> torch.Tensor:
    """Read one image as (1, 3, H, W) float32 in [-1, 1], resized as by `read_video`.

    Raises:
        InputError: If the file is not an image that can be read.
    """
    return _resize(_composite_on_black(image_rgba(Path(path))), size, fit)


def resize_frames(frames: torch.Tensor, num_frames: int, size: tuple[int, int], fit: str = "crop"
                  ) -> torch.Tensor:
    """Return frames in memory with the given number and size, selected as by `read_video`.

    Args:
        frames: Frames (f, 3, h, w) in [-1, 1].
        num_frames: Number of frames to select, evenly spread.
        size: (H, W).
        fit: As for `read_video`.

    Raises:
        InputError: If the tensor has another shape, type or range.
    """
    shape = tuple(frames.shape)
    if len(shape) != 4 or shape[1] != 3 or 0 in shape or not frames.is_floating_point():
        raise InputError(f"frames are {frames.dtype} {shape}: expected floats (f, 3, H, W)")
    if not (frames.abs() <= 1 + 1e-3).all():
        raise InputError(f"frames are in [{frames.min():.3g}, {frames.max():.3g}], not in [-1, 1]")
    indices = torch.arange(num_frames) * len(frames) // num_frames
    selected = frames[indices.to(frames.device)].float()
    return selected if selected.shape[-2:] == size else _resize(selected, size, fit)


def _frame_times(path: Path, stop: float) -> tuple[list[float], float]:
    """Return the start times of the frames before `stop`, and `stop` or the end of the video."""
    start_times: list[float] = []
    for frame in iter_frames(path):
        if frame.start >= stop:
            return start_times, stop
        start_times.append(frame.start)
    if not start_times:
        raise InputError(f"{path}: no frame can be decoded. Give a video that plays")
    return start_times, min(stop, frame.end)


def _composite_on_black(rgba: np.ndarray) -> torch.Tensor:
    """Return (h, w, 4) uint8 as (1, 3, h, w) in [-1, 1], with transparency over black."""
    pixels = rearrange(torch.from_numpy(rgba.copy()).float(), "h w c -> 1 c h w")
    return pixels[:, :3] * (pixels[:, 3:] / 255) / 127.5 - 1


def _resize(frames: torch.Tensor, size: tuple[int, int], fit: str, aspect: float = 1.0
            ) -> torch.Tensor:
    """Return frames (f, 3, h, w) as (f, 3, H, W). `aspect` is a pixel's width by its height."""
    (h, w), (H, W), inner = frames.shape[-2:], size, size
    scale = (max if fit == "crop" else min)(H / h, W / (w * aspect))
    if fit == "crop":
        frames = _crop_or_pad(frames, max(1, round(H / scale)), max(1, round(W / scale / aspect)))
    if fit == "pad":
        inner = max(1, round(h * scale)), max(1, round(w * scale * aspect))
    resized = F.interpolate(frames, inner, mode="bilinear", antialias=True)
    return _crop_or_pad(resized.clamp(-1, 1), H, W)         # the filter overshoots by rounding


def _crop_or_pad(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return frames with their sides cropped, or padded with black, evenly to a size."""
    bars_y, bars_x = height - frames.shape[-2], width - frames.shape[-1]        # negative: a crop
    top, left = int(bars_y / 2), int(bars_x / 2)
    return F.pad(frames, (left, bars_x - left, top, bars_y - top), value=-1.0)
