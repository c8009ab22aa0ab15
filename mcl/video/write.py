"""Frames in [-1, 1] to clips on disk."""
import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange
from PIL import Image

from ..errors import InputError, NumericalError
from ..files import atomic_write, check_writable


def write_video(path: str | os.PathLike, frames: torch.Tensor, fps: float) -> None:
    """Write frames (f, 3, H, W) in [-1, 1], clamped, of any float type and device.

    By the extension of `path`: .mp4 (H.264), .gif, .webp (lossless), or none for a folder of
    00000.png, 00001.png, ... (which carries no time). The same frames give the same bytes. The
    whole is written beside the target and renamed, so that a failure leaves what was there.
    fps: frames per second, 0.1 to 100. Raises InputError where `path` cannot be written, and
    NumericalError for frames that are not finite, which would be black.
    """
    target = Path(path)
    check_output_path(target)
    if not 0.1 <= fps <= 100:
        raise InputError(f"fps is {fps}; it must be from 0.1 to 100")
    if target.suffix.lower() == ".mp4" and any(side % 2 for side in frames.shape[-2:]):
        raise InputError(f"{target}: mp4 needs an even height and width; change the size from "
                         f"{frames.shape[-2]}x{frames.shape[-1]}, or write .gif or .webp")
    if not torch.isfinite(frames).all():
        raise NumericalError(f"{target}: not written: its frames are not finite")
    pixels = to_uint8(frames)
    with atomic_write(target, folder=not target.suffix) as temporary:
        try:
            WRITERS[target.suffix.lower()](temporary, pixels, fps)
        except av.FFmpegError as error:
            raise InputError(f"{target}: cannot be written: {error.strerror}") from error


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Frames (f, 3, H, W) in [-1, 1] as pictures (f, H, W, 3) of 8 bits."""
    levels = (frames.cpu().float().clamp(-1, 1) + 1) * 127.5
    return rearrange(levels.round().to(torch.uint8), "f c H W -> f H W c").numpy()


def check_output_path(path: str | os.PathLike) -> None:
    """Raise InputError if `write_video` could not write to `path`; touches nothing."""
    target = Path(path)
    suffix = target.suffix.lower()
    if suffix not in WRITERS or target.name.lower() in WRITERS:     # ".mp4" has no extension
        raise InputError(f"{target}: its name must end in .mp4, .gif or .webp, or "
                         "have no extension for a folder of PNG frames")
    check_writable(target, folder=not suffix)


def _write_mp4(path: Path, pixels: np.ndarray, fps: float) -> None:
    with av.open(f"file:{path}", "w", options={"movflags": "faststart"}) as container:
        # One thread, as x264 divides the picture by threads and the bytes depend on it. Without
        # its macroblock tree, which in small pictures (64x64) reads what nobody has written.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                      options={"crf": "14", "threads": "1", "mbtree": "0"})
        _, stream.height, stream.width, _ = pixels.shape
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context  # players guess the colours of a file that does not say
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for picture in pixels:
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_animation(path: Path, pixels: np.ndarray, fps: float) -> None:
    tick = 10 if path.suffix.lower() == ".gif" else 1  # milliseconds, the format's unit of time
    turns = np.rint(np.arange(len(pixels) + 1) * 1000 / fps / tick).astype(int)
    delays = (np.diff(turns) * tick).tolist()
    first, *rest = [Image.fromarray(picture) for picture in pixels]
    first.save(path, save_all=True, append_images=rest, duration=delays, loop=0, lossless=True)


def _write_folder(path: Path, pixels: np.ndarray, fps: float) -> None:
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(path / f"{index:05d}.png")


WRITERS = {".mp4": _write_mp4, ".gif": _write_animation, ".webp": _write_animation,
           "": _write_folder}
