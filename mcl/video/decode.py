"""Decode videos, animations and image folders to frames with the times at which they are shown.

imageio writes this project's images, but its two back ends are used directly to read. PyAV decodes
videos, because imageio does not return edit lists, rotation and color properties. Pillow decodes
images, because imageio refuses damaged EXIF data, turns gray images along the wrong axis and clips
16-bit gray to white.
"""
import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, Colorspace, ColorTrc
from PIL import ExifTags, Image, ImageOps, ImageSequence

from ..errors import InputError
from ..ownership import check_readable
from .hdr import TRANSFERS, tonemap_hdr_to_sdr

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# First bytes of the files that Pillow decodes. FFmpeg decodes all others, whatever their name.
IMAGE_MAGIC = re.compile(rb"GIF8|RIFF.{4}WEBP|\x89PNG|\xff\xd8\xff|BM.{4}\0\0\0\0", re.DOTALL)
UNTIMED_FPS = 8                     # for frames without a time: a folder, a gif without delays

# Only formats that contain the video itself: FFmpeg would follow playlists to other files.
FFMPEG_OPTIONS = {"protocol_whitelist": "file", "format_whitelist":
                  "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,h264,hevc,flv,asf,ogg,mxf"}
# Metadata that is not UTF-8 must not stop a file from opening. PyAV 19 has no such option: it
# always replaces the wrong bytes.
METADATA_OPTIONS: dict[str, Any] = {"metadata_errors": "replace"} if hasattr(
    av.container.InputContainer, "metadata_errors") else {}
# FFmpeg's own decoders of these codecs ignore the alpha channel.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}

# Pillow's parsers of damaged files raise all of these.
PILLOW_ERRORS = (OSError, IndexError, SyntaxError, ValueError, struct.error,
                 Image.DecompressionBombError)


class TimedFrame(NamedTuple):
    """A frame, shown from `start` to `end` (seconds from the start of the clip).

    `decode()` returns its pixels as (h, w, 4) uint8 RGBA.
    """

    start: float
    end: float
    decode: Callable[[], np.ndarray]


def iter_frames(path: Path) -> Iterator[TimedFrame]:
    """Return an iterator over the frames of a video, animation or image folder, in time order.

    Raises:
        InputError: If the clip cannot be read; also later, while iterating.
    """
    check_readable(path)
    if path.is_dir():
        return _folder_frames(path)
    return _animation_frames(path) if _is_image_file(path) else _video_frames(path)


def has_audio(path: Path) -> bool:
    """Return whether a clip has an audio track, which `read_video` ignores."""
    check_readable(path)
    if path.is_dir() or _is_image_file(path):
        return False
    with _open_container(path) as container:
        return bool(container.streams.audio)


def image_rgba(path: Path) -> np.ndarray:
    """Return one image as (h, w, 4) uint8, turned by its EXIF orientation.

    Raises:
        InputError: If the image cannot be decoded.
    """
    with _open_image(path) as image:
        if image.mode == "I;16":        # converting to RGBA alone would clip 16-bit gray to white
            return _upright_rgba(image.convert("I").point(lambda level: level / 257).convert("L"))
        return _upright_rgba(image)


def _is_image_file(path: Path) -> bool:
    """Return whether a file begins like an image that Pillow decodes."""
    if not (path.is_file() and os.access(path, os.R_OK)):       # opening a pipe would block
        return False
    with open(path, "rb") as file:
        return IMAGE_MAGIC.match(file.read(16)) is not None


def _video_frames(path: Path) -> Iterator[TimedFrame]:
    """Yield the frames of a video's first video stream."""
    count, origin, start, end = 0, 0.0, -1.0, 0.0
    try:
        with _open_container(path) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None or stream.codec_context is None:
                raise InputError(f"{path}: holds no video in a known codec. Encode it again")
            # FFmpeg's Theora decoder sometimes returns damaged frames with several threads.
            stream.thread_type = "NONE" if stream.codec_context.name == "theora" else "AUTO"
            declared_transfer = stream.codec_context.color_trc      # decoding may reset it
            step = float(1 / (stream.average_rate or stream.guessed_rate or UNTIMED_FPS))
            # AVI stores no presentation times, and FFmpeg's substitutes are out of order.
            has_times = container.format.name != "avi"
            for count, frame in enumerate(_decode_stream(path, stream), start=1):
                time = frame.time if has_times and frame.pts is not None else origin + end
                origin = time if count == 1 else origin
                # Joined recordings restart their clock: continue at the end of the last frame.
                start = time - origin if time - origin > start else end
                end = start + step
                yield TimedFrame(start, end, partial(_video_rgba, frame, declared_transfer))
    except av.FFmpegError as error:
        place = f"at about frame {count}, {end:.2f} s" if count else "from its start"
        raise InputError(f"{path}: cannot be decoded {place} ({error.strerror}). Use a shorter "
                         "duration, or another video") from error


@contextmanager
def _open_container(path: Path) -> Iterator[av.container.InputContainer]:
    """Open a video by its descriptor, because FFmpeg would guess the format from its name."""
    with (open(os.open(path, os.O_RDONLY), "rb") as file,
          av.open(file, options=FFMPEG_OPTIONS, **METADATA_OPTIONS) as container):
        yield container


def _decode_stream(path: Path, stream: Any) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream, then check that it ends where its file declares.

    Raises InputError if the file ends inside a frame, and warns if frames are missing.
    """
    is_cut, count, num_hidden, end = False, 0, 0, 0.0
    container, decoder = stream.container, stream.codec_context
    alpha_decoder = ALPHA_DECODERS.get(decoder.name)
    if stream.metadata.get("alpha_mode") == "1" and alpha_decoder in av.codecs_available:
        decoder = av.CodecContext.create(alpha_decoder, "r")
    for packet in container.demux(stream):
        is_cut |= packet.is_corrupt
        num_hidden += packet.is_discard             # by an edit list
        for frame in decoder.decode(packet):
            if frame.time is not None and frame.time_base is not None:
                end = max(end, frame.time + float(frame.duration * frame.time_base))
            count += 1
            yield frame
    if is_cut:
        raise InputError(f"{path}: is cut short. Give the whole file, or a shorter duration")
    duration = _declared_duration(container, stream)
    if 0 < count < stream.frames - num_hidden:
        warnings.warn(f"{path}: may be cut short: {count} of {stream.frames} frames", stacklevel=2)
    elif not stream.frames and end and duration - end > 1.5 / (stream.average_rate or UNTIMED_FPS):
        warnings.warn(f"{path}: may be cut short: {end:.2f} of {duration:.2f} s", stacklevel=2)


def _declared_duration(container: av.container.InputContainer, stream: av.VideoStream) -> float:
    """Return the end of a stream in seconds as its file declares it, or 0 if it does not."""
    if match := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):
        hours, minutes, seconds = map(float, match.groups())        # Matroska
        return 3600 * hours + 60 * minutes + seconds
    # The longest stream sets the duration of its file.
    return (container.duration or 0) / av.time_base if len(container.streams) == 1 else 0.0


def _video_rgba(frame: av.VideoFrame, declared_transfer: int) -> np.ndarray:
    """Return a video frame as (h, w, 4) uint8 sRGB, rotated upright.

    The frame's own transfer function is used, or that of its container if the frame has none.
    """
    transfer = frame.color_trc if frame.color_trc != ColorTrc.UNSPECIFIED else declared_transfer
    if transfer in TRANSFERS:
        has_matrix = frame.colorspace in (Colorspace.BT2020, Colorspace.ITU709)
        deep = frame.to_ndarray(format="rgba64le",
                                src_colorspace=None if has_matrix else Colorspace.BT2020)
        rgba: np.ndarray = (deep // 256).astype(np.uint8)
        is_bt2020 = frame.color_primaries != ColorPrimaries.BT709
        rgba[..., :3] = tonemap_hdr_to_sdr(deep[..., :3], transfer, is_bt2020)
    else:
        rgba = frame.to_ndarray(format="rgba")
    return np.rot90(rgba, round(frame.rotation / 90))


def _animation_frames(path: Path) -> Iterator[TimedFrame]:
    """Yield the frames of a gif, webp or animated png file."""
    end = 0.0
    with _open_image(path) as image:
        if image.format not in ("GIF", "WEBP") and not (
                image.format == "PNG" and getattr(image, "is_animated", False)):
            raise InputError(f"{path}: is a single image. Give a folder of images, or a video")
        for frame in ImageSequence.Iterator(image):
            rgba, start = _upright_rgba(frame), end     # a webp has no duration before decoding
            end += (frame.info.get("duration") or 1000 / UNTIMED_FPS) / 1000
            yield TimedFrame(start, end, partial(np.asarray, rgba))


def _folder_frames(folder: Path) -> Iterator[TimedFrame]:
    """Yield the images of a folder in natural order (2 before 10)."""
    entries = [name for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    names = ([name for name in entries if name.lower().endswith(IMAGE_SUFFIXES)] or
             [name for name in entries if _is_image_file(folder / name)])
    if not names:
        raise InputError(f"{folder}: holds no image. Give a folder of {', '.join(IMAGE_SUFFIXES)}")
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part
                                 for part in re.split(r"(\d+)", name)])
    sizes, step = set(), 1 / UNTIMED_FPS
    for index, name in enumerate(names):
        with _open_image(folder / name) as image:
            sizes.add(_upright_size(image))
        if len(sizes) > 1:
            raise InputError(f"{folder}: {name} and {names[0]} differ in size. Give one size")
        yield TimedFrame(index * step, (index + 1) * step, partial(image_rgba, folder / name))


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the two sides of an image after its EXIF rotation, without decoding its pixels."""
    with suppress(*PILLOW_ERRORS):                  # damaged EXIF data
        # PngImageFile's own getexif decodes the pixels to search for EXIF data behind them.
        # Orientations 5 to 8 swap width and height.
        if Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            return image.height, image.width
    return image.size


def _upright_rgba(image: Image.Image) -> np.ndarray:
    """Return an image as (h, w, 4) uint8, turned by its EXIF orientation."""
    rgba = image.convert("RGBA")
    with suppress(*PILLOW_ERRORS):                  # damaged EXIF data
        ImageOps.exif_transpose(rgba, in_place=True)
    return np.asarray(rgba)


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image. The errors of Pillow's decoders become InputError."""
    try:
        with Image.open(path) as image:
            yield image
    except PILLOW_ERRORS as error:
        if isinstance(error, InputError):           # which is a ValueError
            raise
        raise InputError(f"{path}: cannot be decoded ({error}). Give an intact image") from error
