"""Write frames in [-1, 1] to videos, animations and image folders."""
import os
from fractions import Fraction
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
import torch
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from einops import rearrange

from ..errors import InputError, NumericalError
from ..files import atomic_write
from ..ownership import check_writable


def write_video(path: str | os.PathLike, frames: torch.Tensor, fps: float) -> None:
    """Write frames to a file, or to a folder of images.

    The same frames give the same bytes. The file or folder is written under a temporary name and
    renamed, so that a failure leaves the earlier one.

    Args:
        path: The extension selects the format: .mp4 (H.264), .gif, .webp (lossless), or none for a
            folder of 00000.png, 00001.png, ... (which stores no frame rate).
        frames: Frames (f, 3, H, W) in [-1, 1], of any float type and device. Other values are
            clamped.
        fps: Frames per second, 0.1 to 100; up to 50 for .gif.

    Raises:
        InputError: If `path` cannot be written, or the size or frame rate is out of range.
        NumericalError: If a frame contains NaN or infinity.
    """
    target = Path(path)
    check_output_path(target)
    check_frame_rate(target, fps)
    height, width = frames.shape[-2:]
    if target.suffix.lower() == ".mp4" and (height % 2 or width % 2):
        raise InputError(f"{target}: mp4 needs even sides, not {height}x{width}. Use .gif or .webp")
    if not torch.isfinite(frames).all():
        raise NumericalError(f"{target}: not written, because the frames contain NaN or infinity")
    with atomic_write(target, is_folder=not target.suffix) as temporary:
        try:
            WRITERS[target.suffix.lower()](temporary, to_uint8(frames), fps)
        except av.FFmpegError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror})") from error


def to_uint8(frames: torch.Tensor) -> np.ndarray:
    """Return frames (f, 3, H, W) in [-1, 1] as images (f, H, W, 3), uint8."""
    levels = (frames.cpu().float().clamp(-1, 1) + 1) * 127.5
    return rearrange(levels.round().to(torch.uint8), "f c H W -> f H W c").numpy()


def check_output_path(path: Path) -> None:
    """Raise InputError if `write_video` could not write to `path`. Changes nothing."""
    suffix = path.suffix.lower()
    if suffix not in WRITERS or path.name.lower() in WRITERS:       # ".mp4" has no extension
        raise InputError(f"{path}: the extension is not known. Use .mp4, .gif or .webp, or no "
                         "extension for a folder of PNG images")
    check_writable(path, "file" if suffix else "folder")


def check_frame_rate(path: Path, fps: float) -> None:
    """Raise InputError if `write_video` could not write `fps` frames per second to `path`."""
    if not 0.1 <= fps <= 100:
        raise InputError(f"fps = {fps} is out of range: it must be between 0.1 and 100")
    if path.suffix.lower() == ".gif" and fps > 50:      # browsers play shorter frames at 10 fps
        raise InputError(f"{path}: a gif plays at most 50 frames per second, not {fps:g}. Use .mp4")


def _write_mp4(path: Path, images: np.ndarray, fps: float) -> None:
    """Write H.264 with BT.709 colors, which imageio's interface cannot name."""
    with av.open(f"file:{path}", "w", options={"movflags": "faststart"}) as container:
        # One thread, because x264 divides an image by its threads and the bytes would depend on
        # their number. No macroblock tree, because it reads uninitialized memory for small images.
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001),
                                      options={"crf": "14", "threads": "1", "mbtree": "0"})
        _, stream.height, stream.width, _ = images.shape
        stream.pix_fmt = "yuv420p"
        codec = stream.codec_context        # players guess the colors of a file without these
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for image in images:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _write_animation(path: Path, images: np.ndarray, fps: float) -> None:
    """Write .gif or .webp. Frame boundaries are rounded, so that the rate is right on average.

    The path is absolute, because imageio expands a leading "~".
    """
    tick = 10 if path.suffix.lower() == ".gif" else 1   # the format's unit of time in milliseconds
    frame_boundaries = np.rint(np.arange(len(images) + 1) * 1000 / fps / tick).astype(int)
    iio.imwrite(path.absolute(), images, plugin="pillow", save_all=True, loop=0, lossless=True,
                duration=(np.diff(frame_boundaries) * tick).tolist())


def _write_pngs(path: Path, images: np.ndarray, fps: float) -> None:
    """Write one PNG image per frame. A folder has no frame rate."""
    for index, image in enumerate(images):
        iio.imwrite(path.absolute() / f"{index:05d}.png", image, plugin="pillow")


WRITERS = {".mp4": _write_mp4, ".gif": _write_animation, ".webp": _write_animation, "": _write_pngs}
